"""Caches of experts: how often a needed expert is at hand when only some of a layer fit into fast memory (METHODS 5).

Source: segment cache best hit rate (SCH) of Liang et al. (arXiv 2505.16056), whose cache drops the experts that the
next m tokens need least, beside what can be had without foresight (LRU, LFU) and with all of it (Belady).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import xarray as xr

from moescope.analysis.counts import Labelling, Phase, labelling, sites_of
from moescope.analysis.labelled import LayerAxis, provenance
from moescope.analysis.locality_kernels import BELADY, LFU, LRU, SCH, replay
from moescope.analysis.question import LAYERS, PHASE, SEED, Analysis, Parameter
from moescope.analysis.resampling import INTERVAL, ratio_interval
from moescope.analysis.runs import GROUPED, SHUFFLED, Cells, Runs, over_runs, runs_of_ids, split_runs
from moescope.analysis.sparse import packed, unpack
from moescope.errors import MoescopeError

if TYPE_CHECKING:
    from jaxtyping import Int

    from moescope.store import Store

WINDOWS = (4, 16, 64)
"""Foresight of SCH, in tokens, the current one included."""
RATIOS = (1.0, 1.5, 2.0, 3.0, 4.0, 6.0, 8.0)
"""Default cache sizes, in multiples of k; the paper finds most models served best at about 2."""
SCOPE = (
    "one token at a time; a cache of `size` experts in every layer, empty at the start of each sequence, into which "
    "all experts of a token are loaded together, so that hits are judged before the token; no prefetching"
)
UNDEFINED = (
    "NaN where a token's k experts do not fit into the cache, or no token is; for the model where they do not fit in "
    "any one layer"
)
CHANCE = "the share of a layer's experts that fit: what a cache of experts drawn at random hits"


def caches(
    store: Store,
    sizes: Sequence[int] | None = None,
    windows: Sequence[int] = WINDOWS,
    by: str | None = None,
    layers: Sequence[int] | None = None,
    where: dict[str, str | Sequence[str]] | None = None,
    phase: Phase | None = None,
    draws: int = 2,
    resamples: int = 1000,
    seed: int = 0,
) -> xr.Dataset:
    """Hit rates of expert caches: LRU, LFU, SCH at several windows, and Belady, the best there can be.

    How to read it: `hit_rate` is the share of selected experts that the cache already held. LRU and LFU know the past
    alone and can be built; SCH also knows the next m tokens, Belady all of them, and no cache beats it. What a policy
    has beyond `shuffled` comes from the order of tokens, what `shuffled` has beyond `chance` from each sequence using
    some experts more than others and, for SCH and Belady, from foresight. `hit_rate` counts loads into a cache that is
    not full yet as hits, as the paper does; in short sequences that is much of it: `hit_rate_empty` counts them as the
    misses they are.

    Args:
        store: an open store with the routing tier.
        sizes: experts that each layer's cache holds, at least its k; 1 to 8 times the largest k if None.
        windows: m of SCH, each 1 or more; none for the other policies alone.
        by: a document label; adds the dimension `label`.
        layers, where, phase: filters, as in `analysis.load`. Tokens that a phase leaves out close up.
        draws: shuffles behind `shuffled`; 0 for none.
        resamples: bootstrap draws behind the limits; 0 for none.
        seed: of all draws. They do not depend on how the store is cut into shards.

    Returns:
        Dataset with dims (layer, policy, size) or (layer, policy, size, label): hit_rate, hit_rate_low, hit_rate_high,
        hit_rate_empty, shuffled (mean hit_rate with tokens shuffled); the same but the layer with `model_` before the
        name, all layers having caches of that size; (layer, size): chance; (size): model_chance; (layer) or (layer,
        label): selections.
        Policies are "lru", "lfu", "sch-4" (m = 4), …, "belady".

    Raises:
        MoescopeError: a size no layer can use, a window below 1, an unknown label or layer, or nothing to count.
    """
    sites = sites_of(store, layers)
    held = cache_sizes(sites, sizes)
    chosen = labelling(store, by, where, phase)
    task = replay_task(chosen, windows, draws, seed, {"by": by, "where": where and dict(where), "phase": phase})
    if resamples < 0:
        raise MoescopeError("`resamples` must be 0 or more.")
    found = replayed(store, sites, task)
    axis = LayerAxis.of_sites(sites)
    attrs = provenance(
        store,
        analysis="caches",
        sizes=held,
        windows=list(windows),
        by=by,
        where=where,
        phase=phase,
        draws=draws,
        resamples=resamples,
        seed=seed,
        null=SHUFFLED if draws else "none: no draws were asked for",
        chance=CHANCE,
        scope=SCOPE,
        interval=INTERVAL,
        undefined=UNDEFINED,
        documents_unlabelled=chosen.unlabelled,
        documents_filtered=chosen.filtered,
        table="layer, policy, size" if by is None else "layer, policy, size, label",
    )
    if task.grouped:
        attrs["documents_grouped"] = GROUPED.format(groups=task.cells.groups)
    variables = _variables(sites, found, task, held, resamples, seed)
    coordinates = {name: value for name, value in axis.coordinates().items() if name != "expert"}
    coordinates |= {"policy": list(task.policies), "size": held, "label": list(chosen.labels)}
    result = xr.Dataset(variables, coords=coordinates, attrs=attrs)
    return result.isel(label=0, drop=True) if by is None else result


def replay_ids(
    ids: Int[np.ndarray, "token rank"],
    n_experts: int,
    policy: str = "lru",
    sequence: Int[np.ndarray, " token"] | None = None,
) -> Replayed:
    """Replays plain ids on caches of every size at once.

    Args:
        ids: [token, rank] ids of the selected experts, negative where a slot is missing.
        n_experts: of the layer.
        policy: "lru", "lfu", "belady", or "sch-m" with m the tokens it foresees.
        sequence: [token] which sequence a token is of, its tokens together and in order; one sequence if None.

    Raises:
        MoescopeError: as `runs_of_ids`, or an unknown policy.
    """
    runs = runs_of_ids(ids, sequence, n_experts)
    found = Replayed.empty(1, n_experts)
    number, window = _parsed(policy)
    replay(runs.ids, runs.edge, np.zeros(runs.document.size, np.int64), number, window, found.depth, found.first)
    return found


@dataclass(frozen=True)
class Replayed:
    """What a policy's caches of every size had, by cell (documents, or what else the rows are).

    Attributes:
        depth: [cell, expert + 1] selections that every cache of at least that many experts had.
        first: [cell, expert] selections that were a sequence's first of their expert, by how many experts it had used.
    """

    depth: Int[np.ndarray, "cell place"]
    first: Int[np.ndarray, "cell expert"]

    @classmethod
    def empty(cls, cells: int, n_experts: int) -> Replayed:
        """Nothing replayed yet."""
        return cls(np.zeros((cells, n_experts + 1), np.int64), np.zeros((cells, n_experts), np.int64))

    @property
    def selections(self) -> Int[np.ndarray, " cell"]:
        """All of them."""
        return self.depth.sum(axis=1) + self.first.sum(axis=1)

    def hits(self, sizes: Sequence[int], full: bool = True) -> Int[np.ndarray, "cell size"]:
        """Selections that a cache of each size had.

        Args:
            sizes: in experts; a size beyond the layer's experts holds all of them.
            full: count loads into a cache that is not full yet as hits.
        """
        reach = np.minimum(np.asarray(sizes, dtype=np.int64), self.first.shape[1])
        found = np.cumsum(self.depth, axis=1)[:, reach]
        return found + np.cumsum(self.first, axis=1)[:, reach - 1] if full else found


@dataclass(frozen=True)
class ReplayTask:
    """What is replayed in every layer; `asked` names it for the store's aggregates."""

    policies: tuple[str, ...]
    cells: Cells
    n_labels: int
    draws: int
    seed: int
    phase: Phase | None
    grouped: bool
    asked: dict[str, Any]

    def of_label(self, label: int) -> np.ndarray:
        """[cell] bool: the cells of a label."""
        return self.cells.label == label


def replay_task(chosen: Labelling, windows: Sequence[int], draws: int, seed: int, asked: dict[str, Any]) -> ReplayTask:
    """The policies and the cells of what is to be replayed; `asked` holds by, where and phase.

    Raises:
        MoescopeError: a window below 1, or draws below 0.
    """
    wanted = [int(window) for window in windows]
    if len(set(wanted)) < len(wanted) or min(wanted, default=1) < 1:
        raise MoescopeError("`windows` are different numbers of tokens, each 1 or more.")
    if draws < 0:
        raise MoescopeError("`draws` must be 0 or more.")
    cells = Cells.of(chosen)
    grouped = bool(np.bincount(cells.label).max() < chosen.documents_per_label.max())
    policies = ("lru", "lfu", *(f"sch-{window}" for window in wanted), "belady")
    return ReplayTask(policies, cells, len(chosen.labels), draws, seed, asked["phase"], grouped, asked)


def replayed(store: Store, sites: Sequence[Any], task: ReplayTask) -> list[dict[str, tuple[Replayed, Replayed]]]:
    """Every policy in every layer: (as it was, by cell; shuffled, by label, all draws summed).

    Raises:
        MoescopeError: no expert was selected at all.
    """
    split = split_runs(store, task.phase)
    found = [{policy: _replayed(store, site, policy, task, split) for policy in task.policies} for site in sites]
    if not any(of_site[task.policies[0]][0].selections.any() for of_site in found):
        raise MoescopeError("No expert was selected by any token that is left: nothing to count.")
    return found


def cache_sizes(sites: Sequence[Any], sizes: Sequence[int] | None) -> list[int]:
    """The sizes asked for, or multiples of the largest k that leave out some expert of the widest layer.

    Raises:
        MoescopeError: none, twice the same, or one that no layer's k experts fit into.
    """
    if sizes is None:
        k, widest = max(site.top_k for site in sites), max(site.n_experts for site in sites)
        wanted = {round(ratio * k + 1e-9) for ratio in RATIOS}
        return sorted(size for size in wanted if k <= size < widest) or [k]
    found = [int(size) for size in sizes]
    fewest = min(site.top_k for site in sites)
    if not found or len(set(found)) < len(found) or min(found) < fewest:
        raise MoescopeError(f"`sizes` are different numbers of experts, at least the {fewest} that one token needs.")
    return sorted(found)


def _parsed(policy: str) -> tuple[int, int]:
    name, _, window = policy.partition("-")
    if name == "sch" and window.isdecimal() and int(window) > 0:
        return SCH, int(window)
    if policy not in ("lru", "lfu", "belady"):
        raise MoescopeError(
            f"There is no policy {policy!r}: it is lru, lfu, belady, or sch-m with m a number of tokens."
        )
    return {"lru": LRU, "lfu": LFU, "belady": BELADY}[policy], 0


def _replay(runs: Runs, policy: int, window: int, n_experts: int, task: ReplayTask) -> list[np.ndarray]:
    """Some runs replayed: depth and first by cell, then of the shuffles by label."""
    plain, shuffled = Replayed.empty(task.cells.label.size, n_experts), Replayed.empty(task.n_labels, n_experts)
    cell, label = task.cells.of_runs(runs.document)
    replay(runs.ids, runs.edge, cell, policy, window, plain.depth, plain.first)
    for draw in range(task.draws):
        ids = runs.shuffled(task.seed, draw)
        replay(ids, runs.edge, label, policy, window, shuffled.depth, shuffled.first)
    return [plain.depth, plain.first, shuffled.depth, shuffled.first]


def _replayed(
    store: Store, site: Any, policy: str, task: ReplayTask, split: frozenset[tuple[int, int]]
) -> tuple[Replayed, Replayed]:
    """One policy in one layer, kept in the store's aggregates."""
    number, window = _parsed(policy)

    def empty() -> list[Replayed]:
        return [Replayed.empty(rows, site.n_experts) for rows in (task.cells.label.size, task.n_labels)]

    def tables(found: list[Replayed]) -> list[np.ndarray]:
        return [table for one in found for table in (one.depth, one.first)]

    def compute() -> pa.Table:
        total = tables(empty())
        for found in over_runs(store, site, task.phase, split, _replay, number, window, site.n_experts, task):
            for table, part in zip(total, found, strict=True):
                table += part
        return packed(total)

    params = {"site": site.key, "policy": policy, "draws": task.draws, "seed": task.seed, **task.asked}
    plain, shuffled = found = empty()
    unpack(store.cached(f"replays-{site.key}-{policy}", compute, params), tables(found))
    return plain, shuffled


def _variables(
    sites: Sequence[Any],
    found: list[dict[str, tuple[Replayed, Replayed]]],
    task: ReplayTask,
    sizes: list[int],
    resamples: int,
    seed: int,
) -> dict[str, Any]:
    shape = (len(sites) + 1, len(task.policies), len(sizes), task.n_labels)  # the last row is the model
    names = ("hit_rate", "hit_rate_low", "hit_rate_high", "hit_rate_empty", "shuffled")
    out = {name: np.full(shape, np.nan) for name in names}
    selections = np.stack([of_site[task.policies[0]][0].selections for of_site in found])
    fits = np.array([[size >= site.top_k for size in sizes] for site in sites])
    fits = np.concatenate([fits, fits.all(axis=0, keepdims=True)])
    for place, policy in enumerate(task.policies):
        plain = [of_site[policy][0] for of_site in found]
        mixed = [of_site[policy][1] for of_site in found]
        hits, empty = (_with_sum([one.hits(sizes, full) for one in plain]) for full in (True, False))
        total = _with_sum([one.selections[:, None] for one in plain])
        drawn, drawn_total = (
            _with_sum([m.hits(sizes) for m in mixed]),
            _with_sum([m.selections[:, None] for m in mixed]),
        )
        for label in range(task.n_labels):
            mine = task.of_label(label)
            for row in range(shape[0]):
                at = (row, place, slice(None), label)
                below = np.repeat(total[row][mine], len(sizes), axis=1).astype(np.float64)
                out["hit_rate"][at] = _share(hits[row][mine].sum(axis=0), below.sum(axis=0))
                out["hit_rate_empty"][at] = _share(empty[row][mine].sum(axis=0), below.sum(axis=0))
                out["shuffled"][at] = _share(drawn[row][label], drawn_total[row][label])
                rng = np.random.default_rng(seed)
                limits = ratio_interval(hits[row][mine].astype(np.float64), below, resamples, rng)
                out["hit_rate_low"][at], out["hit_rate_high"][at] = limits
    dims = ("layer", "policy", "size", "label")
    for values in out.values():
        values[~np.broadcast_to(fits[:, None, :, None], shape)] = np.nan
    variables: dict[str, Any] = {name: (dims, values[:-1]) for name, values in out.items()}
    variables |= {f"model_{name}": (dims[1:], values[-1]) for name, values in out.items()}
    width = np.array([site.n_experts for site in sites])
    chance = np.minimum(np.array(sizes)[None, :] / width[:, None], 1.0)
    variables["chance"] = (("layer", "size"), np.where(fits[:-1], chance, np.nan))
    drawn = _share((chance * selections.sum(axis=1)[:, None]).sum(axis=0), selections.sum())
    variables["model_chance"] = ("size", np.where(fits[-1], drawn, np.nan))
    per_label = [selections[:, task.of_label(label)].sum(axis=1) for label in range(task.n_labels)]
    variables["selections"] = (("layer", "label"), np.stack(per_label, axis=1))
    return variables


def _with_sum(per_layer: list[np.ndarray]) -> list[np.ndarray]:
    """The layers' arrays, and their sum after them."""
    return [*per_layer, np.sum(per_layer, axis=0)]


def _share(part: np.ndarray, whole: Any) -> np.ndarray:
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(whole > 0, part / whole, np.nan)


CACHES_QUESTION = Analysis(
    name="caches",
    run=caches,
    figure="caches",
    help="How often is a needed expert at hand when a layer's fast memory holds only some? (SCH, LRU, LFU, Belady)",
    parameters=(
        Parameter("sizes", int, None, "experts a layer's cache holds (default: 1 to 8 times k)", many=True),
        Parameter("windows", int, WINDOWS, "tokens that SCH foresees", many=True),
        Parameter("by", str, None, "a document label: values for each of its values"),
        LAYERS,
        PHASE,
        Parameter("draws", int, 2, "shuffles behind the control"),
        Parameter("resamples", int, 1000, "bootstrap draws behind the limits"),
        SEED,
    ),
    tier="routing",
)
