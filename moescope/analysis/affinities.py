"""Affinity: which experts of one layer are followed by which of another, beyond chance (METHODS 3).

Source: ExFlow (arXiv 2401.08383) for the conditional `P(e_m = j | e_l = i)` of top-1 experts. The correction of mutual
information for a finite sample, and the null, are argued for in `NULL` and `affinity`.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import xarray as xr
from scipy.stats import chi2

from moescope.analysis.affinity_null import BLOCK_CELLS, NULL, Draws, Null, draw_null, enough_draws
from moescope.analysis.affinity_result import affinity_dataset, normalised, trimmed
from moescope.analysis.counts import Phase, labelling
from moescope.analysis.discovery import adjusted
from moescope.analysis.information import measures
from moescope.analysis.labelled import provenance
from moescope.analysis.question import PHASE, SEED, Analysis, Parameter
from moescope.analysis.routed_rows import Ranks
from moescope.analysis.transitions import Pairs, chosen_pairs, pair_coordinates, pair_names, transition_tables
from moescope.errors import MoescopeError

if TYPE_CHECKING:
    from jaxtyping import Float

    from moescope.store import Store


RESULT_CELLS = 60_000_000
"""Cells (pairs x source x target experts) beyond which a result is only the scores of each pair."""


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
        `attrs["floor"]` stands where the draws were too few for any transition to reach q <= 0.05, and says how many
        would do. `pair` is named "source-target"; source_layer, target_layer, source_site, target_site stand along it.

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
        permutations = enough_draws(store, sites, ranks, cells)
    how = Draws(ranks, null, permutations, seed, documents, phase)
    drawn = draw_null(store, sites, tables, how) if permutations else []
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
    return affinity_dataset(tables, observed, drawn, pair_coordinates(sites), attrs)


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
    tables = [trimmed(np.asarray(table, dtype=np.float64)) for table in given]
    names = list(itertools.pairwise(range(len(tables) + 1))) if pairs is None else [tuple(pair) for pair in pairs]
    if len(names) != len(tables):
        raise MoescopeError(f"{len(names)} pairs of layers were named for {len(tables)} tables of counts.")
    observed = [measures(table, float(top_k), float(top_k)) for table in tables]
    keys = [tuple(f"L{layer:03d}" for layer in name) for name in names]
    coordinates = {
        "pair": [f"{source}-{target}" for source, target in names],
        "source_layer": ("pair", [source for source, _ in names]),
        "target_layer": ("pair", [target for _, target in names]),
        "source_site": ("pair", np.array([key[0] for key in keys], dtype=object)),
        "target_site": ("pair", np.array([key[1] for key in keys], dtype=object)),
    }
    attrs = provenance(None, analysis="affinity", ranks=f"top {top_k}", permutations=0, null=NULL["analytic"])
    result = affinity_dataset(tables, observed, [], coordinates, attrs)
    bias, mi = result["mi_bias"].values, result["mi"].values
    freedom = np.array([(measured["used_source"] - 1) * (measured["used_target"] - 1) for measured in observed])
    p = np.where(freedom > 0, chi2.sf(2 * result["total"].values * mi, np.maximum(freedom, 1)), np.nan)
    p = p if top_k == 1 else np.full(p.shape, np.nan)
    return result.assign(
        mi_null=("pair", bias),
        mi_corrected=("pair", mi - bias),
        normalised=("pair", normalised(mi, bias, observed)),
        p_mi=("pair", p),
        q_mi=("pair", adjusted(p)),
    )


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
            observed.append(measures(table, _mean_slots(source, ranks), _mean_slots(target, ranks)))
        tables += found if cells else []
    return tables, observed


def _mean_slots(site: Any, ranks: Ranks) -> float:
    """Slots of a layer that a token is counted at, for the analytic bias; NaN where that is not a plain number."""
    if ranks == "top1":
        return 1.0
    return float("nan") if ranks == "weighted" or (site.slots_can_miss and site.top_k > 1) else float(site.top_k)


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
