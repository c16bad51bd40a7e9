"""Transitions and affinity: which experts of one layer are followed by which of another, beyond chance (METHODS 3).

Source: ExFlow (arXiv 2401.08383) for the conditional `P(e_m = j | e_l = i)` of top-1 experts. The correction of mutual
information for a finite sample, and the null, are argued for in `NULL` and `affinity`.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pyarrow as pa
import xarray as xr
from scipy.stats import chi2, false_discovery_control

from moescope.analysis.counts import Phase, labelling
from moescope.analysis.labelled import provenance
from moescope.analysis.permutation import TIE
from moescope.analysis.question import PHASE, SEED, Analysis, Parameter
from moescope.analysis.transition_kernels import count_reordered, count_transitions
from moescope.errors import MoescopeError, StoreError

if TYPE_CHECKING:
    from jaxtyping import Float, Int

    from moescope.store import Store

Ranks = Literal["top1", "all", "weighted"]
Null = Literal["rotate", "shuffle"]
Pairs = str | Sequence[str | tuple[Any, Any]] | None

BLOCK_CELLS = 16_000_000
"""Cells (draws x source x target experts) of the null that are held at once: 128 MB in int64."""
RESULT_CELLS = 60_000_000
"""Cells (pairs x source x target experts) beyond which a result is only the scores of each pair."""
WORK = 2e9
"""Slot pairs that the null may count by default: some seconds on one core."""

NULL = {
    "rotate": (
        "the target layer's tokens rotated by a random offset within each sequence: keeps what each sequence uses in "
        "each layer, and how routing runs on from token to token, and breaks only which token goes with which"
    ),
    "shuffle": (
        "the target layer's tokens shuffled within each sequence: keeps what each sequence uses in each layer; right "
        "only where neighbouring tokens are not routed alike, and too narrow otherwise"
    ),
    "analytic": (
        "tokens drawn independently with both layers' loads kept: the bias of mutual information to first order and, "
        "for top-1 counts, the G-test; tokens of one document are not independent, so that p is too small for text"
    ),
}
UNDEFINED = (
    "conditional, lift, p and q are NaN from a source expert (lift, p and q also to a target expert) that was never "
    "selected; p and normalised are NaN for a pair one of whose layers used a single expert: nothing could be told"
)


def transition_counts(
    store: Store,
    source: Any,
    target: Any,
    ranks: Ranks = "top1",
    documents: Int[np.ndarray, " document"] | None = None,
    phase: Phase | None = None,
) -> Int[np.ndarray, "source_expert target_expert"]:
    """Tokens by (expert in layer `source`, expert in layer `target`).

    Args:
        store: an open store with the routing tier.
        source, target: two MoE layers, each a site record, a site key or a model layer index; in any order, and not
            necessarily neighbours.
        ranks: "top1" counts each token once, by the first-ranked expert of both layers; "all" counts all k x k pairs of
            selected experts; "weighted" counts all of them by the product of their rank weights, k - rank (Borda: the
            first of 8 counts 8, the last 1).
        documents: document numbers to keep; all if None.
        phase: only tokens of this phase; None for all.

    Returns:
        [E of source, E of target] int64. Missing slots are not counted. Kept in the store's aggregates when
        `documents` is None.

    Raises:
        MoescopeError: no such layer, or an unknown `ranks`.
    """
    return transition_tables(store, [(source, target)], ranks, documents, phase)[0]


def transition_tables(
    store: Store,
    pairs: Sequence[tuple[Any, Any]] | None = None,
    ranks: Ranks = "top1",
    documents: Int[np.ndarray, " document"] | None = None,
    phase: Phase | None = None,
) -> list[Int[np.ndarray, "source_expert target_expert"]]:
    """`transition_counts` of many pairs of layers in one pass over the store, each layer decoded once a shard.

    Args:
        pairs: (source, target) pairs; every MoE layer with the next one if None.
        store, ranks, documents, phase: as in `transition_counts`.
    """
    sites = site_pairs(store, pairs)
    if ranks not in ("top1", "all", "weighted"):
        raise MoescopeError('`ranks` is "top1", "all" or "weighted".')
    shapes = [(source.n_experts, target.n_experts) for source, target in sites]
    if documents is not None:
        return _scan(store, sites, shapes, ranks, documents, phase)

    def compute() -> pa.Table:
        found = _scan(store, sites, shapes, ranks, None, phase)
        cells = [np.nonzero(table) for table in found]
        names = [(source.key, target.key) for source, target in sites]
        sizes = [len(cell[0]) for cell in cells]
        return pa.table(
            {
                "source": pa.array(np.repeat([name[0] for name in names], sizes), pa.string()),
                "target": pa.array(np.repeat([name[1] for name in names], sizes), pa.string()),
                "pair": _joined([np.full(size, index) for index, size in enumerate(sizes)], np.int32),
                "source_expert": _joined([cell[0] for cell in cells], np.int32),
                "target_expert": _joined([cell[1] for cell in cells], np.int32),
                "count": _joined([table[cell] for table, cell in zip(found, cells, strict=True)], np.int64),
            }
        )

    asked = [f"{source.key}>{target.key}" for source, target in sites]
    kept = store.cached("transitions", compute, {"pairs": asked, "ranks": ranks, "phase": phase or "all"})
    edges = np.searchsorted(kept["pair"].to_numpy(), np.arange(len(sites) + 1))
    row, column = kept["source_expert"].to_numpy(), kept["target_expert"].to_numpy()
    count = kept["count"].to_numpy()
    tables = []
    for index, shape in enumerate(shapes):
        part = slice(int(edges[index]), int(edges[index + 1]))
        table = np.zeros(shape, dtype=np.int64)
        table[row[part], column[part]] = count[part]
        tables.append(table)
    return tables


def affinity(
    store: Store,
    ranks: Ranks = "top1",
    pairs: Pairs = None,
    null: Null = "rotate",
    permutations: int | None = None,
    seed: int = 0,
    where: dict[str, str | Sequence[str]] | None = None,
    phase: Phase | None = None,
    cells: bool = True,
) -> xr.Dataset:
    """Which experts of one layer are followed by which experts of another, and how much one layer tells of the other.

    How to read it: `conditional` is the share of the source expert's tokens that go on to the target expert, `lift` how
    many times its usual share that is (1: nothing special). `mi_corrected` (nats) is what knowing the source expert
    tells of the target expert beyond the null: 0 is nothing, and the target layer's entropy is all there is to tell.
    Believe a pair of layers when `q_mi` is small, and a single transition when `q` is.

    The null. Mutual information of counts is above 0 even for independent layers, by about (E-1)(E'-1)/2N for N
    independent tokens (`mi_bias`), and by more for text: a document about one topic uses few experts in *every* layer,
    and neighbouring tokens are routed alike. Permuting whole documents cannot test this, because both layers of a token
    move together. So the target layer is moved against the source layer inside each sequence ("rotate"): loads,
    topics and runs stay as they are in both layers, and only the link between the two layers of one token is lost. Its
    mean is subtracted. "shuffle" loses the runs too, and finds affinity in layers that merely have runs. A sequence,
    not a token, is what is drawn independently. Not removed is what both layers owe to the token's own identity.

    Args:
        store: an open store with the routing tier.
        ranks: as in `transition_counts`: "top1", "all" k x k pairs, or "weighted" by rank. With k above 1 the mutual
            information is that of one slot of each layer drawn at random: it stays far below the entropy even where
            one layer decides the other.
        pairs: "neighbours" (default), "all" pairs of a layer and a later one, or a list of (source, target) layers or
            of "source-target" strings, in any direction.
        null: "rotate" or "shuffle".
        permutations: draws of the null; 0 for values alone. By default at least 200, as many as it takes for a single
            transition to reach q <= 0.05, at most 5000, fewer (at least 19) where that takes long.
        seed: of the draws. They are the same whichever way the store is cut into shards.
        where: label -> value(s), documents to keep.
        phase: "prefill" or "decode"; both if None.
        cells: False for the scores of each pair alone, for very many pairs.

    Returns:
        Dataset with dims (pair, source_expert, target_expert): count (int-valued; NaN where there is no such expert),
        conditional = P(target | source), lift, expected (mean count of the null), p (the null has at least this
        count), q (Benjamini-Hochberg over the cells of all pairs), exists; and with dims (pair): mi (nats), mi_null and
        mi_null_p99 (its mean and 99th percentile), mi_corrected = mi - mi_null, mi_bias (the analytic value for
        independent tokens, to first order; NaN for "weighted" and where slots of k > 1 can miss), normalised =
        mi_corrected / (min(entropy_source, entropy_target) - mi_null), 1 where one top-1 expert decides the other;
        p_mi, q_mi, entropy_source, entropy_target, conditional_entropy = entropy_target - mi, total (summed counts).
        `pair` is named "source-target"; source_layer, target_layer, source_site, target_site stand along it.

    Raises:
        MoescopeError: fewer than two MoE layers, no such pair, nothing left to count, or a result too large for memory.
    """
    if null not in ("rotate", "shuffle"):
        raise MoescopeError('`null` is "rotate" or "shuffle".')
    if permutations is not None and permutations < 0:
        raise MoescopeError("`permutations` must be 0 (values without a null) or more.")
    sites = chosen_pairs(store, pairs)
    if cells and sum(a.n_experts * b.n_experts for a, b in sites) > RESULT_CELLS:
        raise MoescopeError(
            f"{len(sites)} pairs of layers are too many to hold every transition: name fewer `pairs`, or ask for the "
            "scores alone with cells=False."
        )
    documents = labelling(store, None, where, phase).documents if where else None
    tables, observed = _observe(store, sites, ranks, documents, phase, cells)
    if not any(measured["total"] for measured in observed):
        raise MoescopeError("No token with both layers of any pair is left: nothing to count.")
    if permutations is None:
        permutations = _enough_draws(store, sites, ranks, cells)
    how = _Draws(ranks, null, permutations, seed, documents, phase)
    drawn = _draw_null(store, sites, tables, how) if permutations else []
    attrs = provenance(
        store,
        analysis="affinity",
        ranks=ranks,
        pairs=pairs if isinstance(pairs, str) else "neighbours" if pairs is None else pair_names(sites),
        where=where,
        phase=phase,
        permutations=permutations,
        seed=seed,
        null=NULL[null] if permutations else "none: no permutations were asked for",
    )
    return _dataset(tables, observed, drawn, _pair_coordinates(sites), attrs)


def affinity_from_counts(
    counts: Sequence[Float[np.ndarray, "source_expert target_expert"]] | Float[np.ndarray, "pair source target"],
    pairs: Sequence[tuple[int, int]] | None = None,
    top_k: int = 1,
) -> xr.Dataset:
    """The same from plain tables of counts, for instance published ones.

    Args:
        counts: one [source expert, target expert] table, or one for each pair of layers; NaN for experts that a layer
            lacks.
        pairs: (source, target) layer of each table; (0, 1), (1, 2), ... if None.
        top_k: slots of each layer that were paired at a token; 1 for top-1 counts.

    Returns:
        As `affinity`, with the analytic correction in place of draws: mi_corrected = mi - mi_bias; p_mi is the G-test's
        and only for top_k 1; mi_null_p99, expected, p and q are NaN. See `attrs["null"]`.

    Raises:
        MoescopeError: negative counts, or names that do not fit.
    """
    given = [counts] if isinstance(counts, np.ndarray) and counts.ndim == 2 else list(counts)
    tables = [_trimmed(np.asarray(table, dtype=np.float64)) for table in given]
    names = list(itertools.pairwise(range(len(tables) + 1))) if pairs is None else [tuple(pair) for pair in pairs]
    if len(names) != len(tables):
        raise MoescopeError(f"{len(names)} pairs of layers were named for {len(tables)} tables of counts.")
    observed = [_measures(table, float(top_k), float(top_k)) for table in tables]
    keys = [tuple(f"L{layer:03d}" for layer in name) for name in names]
    coordinates = {
        "pair": [f"{source}-{target}" for source, target in names],
        "source_layer": ("pair", [source for source, _ in names]),
        "target_layer": ("pair", [target for _, target in names]),
        "source_site": ("pair", np.array([key[0] for key in keys], dtype=object)),
        "target_site": ("pair", np.array([key[1] for key in keys], dtype=object)),
    }
    attrs = provenance(None, analysis="affinity", ranks=f"top {top_k}", permutations=0, null=NULL["analytic"])
    result = _dataset(tables, observed, [], coordinates, attrs)
    bias, mi = result["mi_bias"].values, result["mi"].values
    freedom = np.array([(measured["used_source"] - 1) * (measured["used_target"] - 1) for measured in observed])
    p = np.where(freedom > 0, chi2.sf(2 * result["total"].values * mi, np.maximum(freedom, 1)), np.nan)
    p = p if top_k == 1 else np.full(p.shape, np.nan)
    return result.assign(
        mi_null=("pair", bias),
        mi_corrected=("pair", mi - bias),
        normalised=("pair", _normalised(mi, bias, observed)),
        p_mi=("pair", p),
        q_mi=("pair", _adjusted(p)),
    )


def _enough_draws(store: Store, sites: list[tuple[Any, Any]], ranks: Ranks, cells: bool) -> int:
    """Draws that let one transition reach q <= 0.05 (alone among m tests it has q = m p), within what takes seconds."""
    tests = sum(a.n_experts * b.n_experts for a, b in sites) if cells else len(sites)
    slots = sum(1 if ranks == "top1" else a.top_k * b.top_k for a, b in sites)
    wanted = np.clip(tests / 0.05, 200, 5000)
    # A cell of a draw takes some four times a slot pair: its logarithm.
    return int(max(19, min(wanted, WORK / max(store.n_tokens * slots, 1), WORK / (4 * tests))))


def mutual_information(table: Float[np.ndarray, "source target"]) -> float:
    """Mutual information, in nats, of a table of counts; NaN for an empty one."""
    total = table.sum()
    if total <= 0:
        return float("nan")
    cells = _n_log_n(table[table > 0])
    found = cells - _n_log_n(table.sum(axis=0)) - _n_log_n(table.sum(axis=1)) + _n_log_n(np.array([total]))
    return max(0.0, float(found / total))


def chosen_pairs(store: Store, pairs: Pairs) -> list[tuple[Any, Any]]:
    """Site records of what `affinity` takes as `pairs`.

    Raises:
        MoescopeError: there is none.
    """
    words = [pairs] if isinstance(pairs, str) else pairs
    if words is None or list(words) == ["neighbours"]:
        found = site_pairs(store, None)
    elif list(words) == ["all"]:
        found = list(itertools.combinations(store.sites, 2))
    else:
        found = site_pairs(store, [_parsed(word) for word in words])
    if not found:
        raise MoescopeError(f"Affinity needs two MoE layers; the store has {len(store.sites)}, and no pair was named.")
    return found


def _parsed(pair: str | tuple[Any, Any]) -> tuple[Any, Any]:
    parts = pair.split("-") if isinstance(pair, str) else list(pair)
    if len(parts) != 2:
        raise MoescopeError(f"{pair!r} is no pair of layers: write it as source-target, for instance 3-4.")
    source, target = (int(part) if isinstance(part, str) and part.strip().isdecimal() else part for part in parts)
    return source, target


def site_pairs(store: Store, pairs: Sequence[tuple[Any, Any]] | None) -> list[tuple[Any, Any]]:
    """The site records of pairs of layers; neighbouring MoE layers, in the store's order, if None."""
    if pairs is None:
        return list(itertools.pairwise(store.sites))
    return [
        (store.site(getattr(source, "key", source)), store.site(getattr(target, "key", target)))
        for source, target in pairs
    ]


def kept_rows(shard: Any, documents: Int[np.ndarray, " document"] | None, phase: Phase | None) -> np.ndarray | None:
    """[row] bool: the rows of a shard that the filters keep; None where they keep all."""
    if documents is None and phase is None:
        return None
    columns = [name for name, wanted in (("document", documents), ("phase", phase)) if wanted is not None]
    tokens = shard.tokens(columns)
    kept = np.ones(shard.n_tokens, dtype=bool)
    if documents is not None:
        kept &= np.isin(tokens["document"].to_numpy(), np.asarray(documents))
    if phase is not None:
        kept &= np.asarray(tokens["phase"].cast(pa.string()).to_numpy(zero_copy_only=False)) == phase
    return kept


def slot_ids(shard: Any, site: Any, ranks: Ranks, rows: np.ndarray | None) -> Int[np.ndarray, "row rank"]:
    """Ids of one layer's slots in a shard, rank order, -1 where a slot is missing; the first rank alone for "top1".

    Raises:
        StoreError: an id beyond the layer's experts.
    """
    routing = shard.routing(site.key, fields=["expert", "valid"])
    depth = 1 if ranks == "top1" else site.top_k
    stored = routing.expert[:, :depth]
    beyond = stored >= site.n_experts
    ids = stored.astype(np.int16 if site.n_experts <= 2**15 else np.int32)
    if routing.valid is not None:
        valid = routing.valid[:, :depth]
        beyond &= valid
        ids[~valid] = -1
    if beyond.any():
        raise StoreError(
            f"Slots of layer {site.layer} name an expert beyond the {site.n_experts} it has: "
            "the store is damaged; run `moescope check` on it."
        )
    return ids if rows is None else ids[rows]


def runs_of(shard: Any, rows: np.ndarray | None) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Rows that belong to one sequence of one document: (first row of each run and the end, document, sequence)."""
    tokens = shard.tokens(["document", "sequence"])
    document, sequence = (tokens[name].to_numpy().astype(np.int64) for name in ("document", "sequence"))
    if rows is not None:
        document, sequence = document[rows], sequence[rows]
    fresh = np.ones(document.size, dtype=bool)
    fresh[1:] = (document[1:] != document[:-1]) | (sequence[1:] != sequence[:-1])
    first = np.flatnonzero(fresh)
    return np.append(first, document.size), document[first], sequence[first]


def rank_worth(ranks: Ranks, width: int) -> Int[np.ndarray, " rank"]:
    """What each rank counts: 1, or k - rank for "weighted"."""
    return np.arange(width, 0, -1, dtype=np.int64) if ranks == "weighted" else np.ones(width, dtype=np.int64)


def _scan(
    store: Store,
    sites: list[tuple[Any, Any]],
    shapes: list[tuple[int, int]],
    ranks: Ranks,
    documents: Int[np.ndarray, " document"] | None,
    phase: Phase | None,
) -> list[Int[np.ndarray, "source_expert target_expert"]]:
    tables = [np.zeros(shape, dtype=np.int64) for shape in shapes]
    for ids in _decoded(store, sites, ranks, documents, phase):
        for (source, target), table in zip(sites, tables, strict=True):
            a, b = ids[source.key], ids[target.key]
            count_transitions(a, b, rank_worth(ranks, a.shape[1]), rank_worth(ranks, b.shape[1]), table)
    return tables


def _decoded(
    store: Store,
    sites: list[tuple[Any, Any]],
    ranks: Ranks,
    documents: Int[np.ndarray, " document"] | None,
    phase: Phase | None,
) -> Iterator[dict[str, np.ndarray]]:
    """Shard by shard, the ids of every layer that takes part."""
    wanted = {site.key: site for pair in sites for site in pair}
    for shard in store.shards:
        rows = kept_rows(shard, documents, phase)
        yield {key: slot_ids(shard, site, ranks, rows) for key, site in wanted.items()}


@dataclass(frozen=True)
class _Draws:
    """What the null of `affinity` is drawn by."""

    ranks: Ranks
    null: Null
    permutations: int
    seed: int
    documents: np.ndarray | None
    phase: Phase | None


@dataclass
class _Drawn:
    """The null of one pair: mutual information by draw; per cell the draws at least as large, and the summed counts."""

    mi: Float[np.ndarray, " draw"]
    above: Int[np.ndarray, "source target"]
    summed: Int[np.ndarray, "source target"]


def _draw_null(store: Store, sites: list[tuple[Any, Any]], tables: list[np.ndarray], how: _Draws) -> list[_Drawn]:
    empty = np.zeros((0, 0), np.int64)
    shapes = [table.shape for table in tables]
    drawn = [_Drawn(np.full(how.permutations, np.nan), empty, empty) for _ in sites]
    for held, shape in zip(drawn, shapes, strict=False):
        held.above, held.summed = np.zeros(shape, np.int64), np.zeros(shape, np.int64)
    for block in _blocks(sites, how.permutations):
        for (index, start, _), stack in zip(block, _count_block(store, sites, block, how), strict=True):
            drawn[index].mi[start : start + len(stack)] = [mutual_information(table) for table in stack]
            if tables:
                drawn[index].above += (stack >= tables[index]).sum(axis=0)
                drawn[index].summed += stack.sum(axis=0)
    return drawn


def _count_block(
    store: Store, sites: list[tuple[Any, Any]], block: list[tuple[int, int, int]], how: _Draws
) -> list[Int[np.ndarray, "draw source target"]]:
    """Counts under the null, one stack of draws for each entry of the block; pairs are shared out over threads."""
    pairs = [sites[index] for index, _, _ in block]
    counts = [
        np.zeros((stop - start, source.n_experts, target.n_experts), np.int64)
        for (_, start, stop), (source, target) in zip(block, pairs, strict=True)
    ]
    wanted = {site.key: site for pair in pairs for site in pair}
    with ThreadPoolExecutor(min(os.cpu_count() or 1, 8)) as pool:
        for shard in store.shards:
            rows = kept_rows(shard, how.documents, how.phase)
            runs = runs_of(shard, rows)
            ids = {key: slot_ids(shard, site, how.ranks, rows) for key, site in wanted.items()}
            jobs = []
            for (_, start, _), (source, target), count in zip(block, pairs, counts, strict=True):
                a, b = ids[source.key], ids[target.key]
                worth = rank_worth(how.ranks, a.shape[1]), rank_worth(how.ranks, b.shape[1])
                shuffle = how.null == "shuffle"
                jobs.append(pool.submit(count_reordered, a, b, *worth, *runs, how.seed, start, shuffle, count))
            for job in jobs:
                job.result()
    return counts


def _blocks(sites: list[tuple[Any, Any]], permutations: int) -> Iterator[list[tuple[int, int, int]]]:
    """Cuts (pair, draws) into blocks of bounded size: lists of (pair, first draw, end)."""
    block: list[tuple[int, int, int]] = []
    room = BLOCK_CELLS
    for index, (source, target) in enumerate(sites):
        size = source.n_experts * target.n_experts
        start = 0
        while start < permutations:
            fits = room // size
            if not fits and block:
                yield block
                block, room = [], BLOCK_CELLS
                continue
            stop = min(permutations, start + max(1, fits))
            block.append((index, start, stop))
            room -= (stop - start) * size
            start = stop
    if block:
        yield block


def _observe(
    store: Store,
    sites: list[tuple[Any, Any]],
    ranks: Ranks,
    documents: np.ndarray | None,
    phase: Phase | None,
    cells: bool,
) -> tuple[list[np.ndarray], list[dict[str, float]]]:
    """Counts of all pairs (none where only scores are wanted, which are then counted a few pairs at a time)."""
    step = len(sites) if cells else max(1, BLOCK_CELLS // max(a.n_experts * b.n_experts for a, b in sites))
    tables, observed = [], []
    for part in (sites[start : start + step] for start in range(0, len(sites), step)):
        found = transition_tables(store, part, ranks, documents, phase)
        for (source, target), table in zip(part, found, strict=True):
            observed.append(_measures(table, _mean_slots(source, ranks), _mean_slots(target, ranks)))
        tables += found if cells else []
    return tables, observed


def _mean_slots(site: Any, ranks: Ranks) -> float:
    """Slots of a layer that a token is counted at, for the analytic bias; NaN where that is not a plain number."""
    if ranks == "top1":
        return 1.0
    return float("nan") if ranks == "weighted" or (site.slots_can_miss and site.top_k > 1) else float(site.top_k)


def _measures(table: np.ndarray, source_slots: float, target_slots: float) -> dict[str, float]:
    """Scores of one table of counts.

    The bias of mutual information under independence is half the expected chi-square of the cells over the tokens N.
    With k of E experts at each token, an expert of load p has the variance k p (1 - k p), so that a layer gives
    the factor sum_i (1 - k p_i) / k = (E - k) / k, and the table (E - k) (E' - k') / (2 k k' N), as
    usual for k = 1.
    """
    total = float(table.sum())
    source, target = table.sum(axis=1), table.sum(axis=0)
    used_source, used_target = int((source > 0).sum()), int((target > 0).sum())
    free = max(used_source - source_slots, 0.0) * max(used_target - target_slots, 0.0)
    return {
        "total": total,
        "mi": mutual_information(table),
        "mi_bias": free / (2 * total) if total else float("nan"),
        "entropy_source": _entropy(source),
        "entropy_target": _entropy(target),
        "used_source": used_source,
        "used_target": used_target,
    }


def _dataset(
    tables: list[np.ndarray],
    observed: list[dict[str, float]],
    drawn: list[_Drawn],
    coordinates: dict[str, Any],
    attrs: dict,
) -> xr.Dataset:
    column = {name: np.array([measured[name] for measured in observed], dtype=np.float64) for name in observed[0]}
    n = len(observed)
    blank = np.full(n, np.nan)
    null = np.array([held.mi.mean() for held in drawn]) if drawn else blank
    p99 = np.array([np.quantile(held.mi, 0.99, method="higher") for held in drawn]) if drawn else blank
    p = blank
    if drawn:
        draws = drawn[0].mi.size
        above = np.array([(held.mi >= mi - TIE).sum() for held, mi in zip(drawn, column["mi"], strict=True)])
        told = (column["used_source"] > 1) & (column["used_target"] > 1)
        p = np.where(told, (above + 1) / (draws + 1), np.nan)
    per_pair = {name: column[name] for name in ("mi", "mi_bias", "entropy_source", "entropy_target", "total")}
    per_pair |= {
        "mi_null": null,
        "mi_null_p99": p99,
        "mi_corrected": column["mi"] - null,
        "p_mi": p,
        "q_mi": _adjusted(p),
    }
    per_pair["normalised"] = _normalised(column["mi"], null, observed)
    per_pair["conditional_entropy"] = column["entropy_target"] - column["mi"]
    variables: dict[str, Any] = {name: ("pair", values) for name, values in per_pair.items()}
    attrs = attrs | {"undefined": UNDEFINED, "table": "pair", "table_order": "mi_corrected"}
    if tables:
        cell = ("pair", "source_expert", "target_expert")
        found = _cells(tables, drawn)
        variables |= {name: (cell, values) for name, values in found.items()}
        coordinates = coordinates | {
            name: np.arange(size) for name, size in zip(cell[1:], found["count"].shape[1:], strict=True)
        }
        attrs |= {"table": ", ".join(cell), "table_order": "count"}
        if drawn:
            attrs |= _note(found["p"], found["q"], drawn[0].mi.size)
    return xr.Dataset(variables, coords=coordinates, attrs=attrs)


def _cells(tables: list[np.ndarray], drawn: list[_Drawn]) -> dict[str, np.ndarray]:
    """The variables with dims (pair, source_expert, target_expert), padded to the widest layers."""
    shape = (len(tables), max(t.shape[0] for t in tables), max(t.shape[1] for t in tables))
    names = ("count", "conditional", "lift", "expected", "p")
    out = {name: np.full(shape, np.nan) for name in names}
    out["exists"] = np.zeros(shape, dtype=bool)
    for index, table in enumerate(tables):
        place = (index, slice(table.shape[0]), slice(table.shape[1]))
        source, target, total = table.sum(axis=1, keepdims=True), table.sum(axis=0), table.sum()
        with np.errstate(divide="ignore", invalid="ignore"):
            conditional = table / source
            lift = conditional / (target / total)
        out["count"][place], out["conditional"][place], out["lift"][place] = table, conditional, lift
        out["exists"][place] = True
        if drawn:
            draws = drawn[index].mi.size
            out["expected"][place] = drawn[index].summed / draws
            out["p"][place] = np.where(np.isnan(lift), np.nan, (drawn[index].above + 1) / (draws + 1))
    return out | {"q": _adjusted(out["p"])}


def _note(p: np.ndarray, q: np.ndarray, draws: int) -> dict[str, str]:
    tests = int((~np.isnan(p)).sum())
    family = {"family": f"q: all {tests} defined transitions of this result; q_mi: its pairs of layers"}
    needed = int(np.ceil(tests / (draws + 1) / 0.05))
    if needed <= 1 or np.nanmin(q, initial=1.0) <= 0.05:
        return family
    return family | {
        "notes": f"with {draws} permutations no p is below {1 / (draws + 1):.2g}, so that q <= 0.05 takes at least "
        f"{needed} discoveries among {tests} transitions; raise permutations, or read p_mi"
    }


def _normalised(mi: np.ndarray, null: np.ndarray, observed: list[dict[str, float]]) -> np.ndarray:
    most = np.array([min(measured["entropy_source"], measured["entropy_target"]) for measured in observed])
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(most - null > TIE, (mi - null) / (most - null), np.nan)


def _adjusted(p: np.ndarray) -> np.ndarray:
    tested = ~np.isnan(p)
    q = np.full(p.shape, np.nan)
    q[tested] = false_discovery_control(p[tested]) if tested.any() else []
    return q


def _pair_coordinates(sites: list[tuple[Any, Any]]) -> dict[str, Any]:
    return {
        "pair": pair_names(sites),
        "source_layer": ("pair", [source.layer for source, _ in sites]),
        "target_layer": ("pair", [target.layer for _, target in sites]),
        "source_site": ("pair", np.array([source.key for source, _ in sites], dtype=object)),
        "target_site": ("pair", np.array([target.key for _, target in sites], dtype=object)),
    }


def pair_names(sites: list[tuple[Any, Any]]) -> list[str]:
    """ "3-4" for each pair of layers; with site keys where a layer number names two routers."""
    keys: dict[int, set[str]] = {}
    for site in itertools.chain.from_iterable(sites):
        keys.setdefault(site.layer, set()).add(site.key)
    plain = all(len(found) == 1 for found in keys.values())
    return [f"{a.layer}-{b.layer}" if plain else f"{a.key}-{b.key}" for a, b in sites]


def _trimmed(table: np.ndarray) -> np.ndarray:
    """A table without the NaN rows and columns at its end, which are experts that a layer lacks."""
    if table.ndim != 2:
        raise MoescopeError(
            f"Counts of a pair of layers need the axes source and target expert; got {table.ndim} axes."
        )
    there = ~np.isnan(table)
    table = table[
        : 1 + np.flatnonzero(there.any(axis=1)).max(initial=-1), : 1 + np.flatnonzero(there.any(axis=0)).max(initial=-1)
    ]
    if np.isnan(table).any() or (table < 0).any():
        raise MoescopeError("Counts must be 0 or more, and NaN only for experts at the end that a layer lacks.")
    return table


def _entropy(counts: np.ndarray) -> float:
    total = counts.sum()
    return float(np.log(total) - _n_log_n(counts) / total) if total > 0 else float("nan")


def _n_log_n(counts: np.ndarray) -> float:
    kept = counts[counts > 0].astype(np.float64)
    return float((kept * np.log(kept)).sum())


def _joined(parts: list[np.ndarray], dtype: Any) -> np.ndarray:
    return np.concatenate([np.empty(0, dtype), *(part.astype(dtype) for part in parts)])


AFFINITY_QUESTION = Analysis(
    name="affinity",
    run=affinity,
    figure="affinity",
    help="Which experts of one layer are followed by which of another, beyond topics and runs?",
    parameters=(
        Parameter("ranks", str, "top1", "first-ranked experts, all k x k, or weighted", ("top1", "all", "weighted")),
        Parameter("pairs", str, None, "neighbours (default), all, or pairs such as 3-7", many=True),
        Parameter("null", str, "rotate", "what moves one layer against the other", ("rotate", "shuffle")),
        Parameter("permutations", int, None, "draws of the null (default: enough for the tests)"),
        Parameter("cells", bool, True, "keep every transition, not only the scores of each pair"),
        PHASE,
        SEED,
    ),
    tier="routing",
)
