"""Co-activation: which experts of one layer are chosen together, beyond what their loads give (METHODS 3).

Source: OLMoE (arXiv 2409.02060, section 5.2) and its released analysis script.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pyarrow as pa
import xarray as xr
from scipy.stats import t

from moescope.analysis.counts import Phase, document_tokens, labelling, sites_of
from moescope.analysis.discovery import adjusted
from moescope.analysis.labelled import PADDING, LayerAxis, provenance
from moescope.analysis.question import LAYERS, PHASE, Analysis, Parameter
from moescope.analysis.routed_rows import kept_rows, slot_ids
from moescope.analysis.spreading import over_shards
from moescope.analysis.transition_kernels import count_coactive, joint_inclusion, single_inclusion
from moescope.errors import MoescopeError

if TYPE_CHECKING:
    from jaxtyping import Float, Int

    from moescope.store import Store


Definition = Literal["paper", "code"]

EXPECTED = (
    "sets of as many experts drawn at random with the same loads (conditional Poisson sampling: the most random way); "
    "topics of documents are not part of it, so that experts of one topic are co-active beyond it"
)

INTERVAL = "95 % intervals and p by a jackknife over groups of whole documents (t distribution)"

ENOUGH = 1e-9
"""Loads are fitted until no inclusion probability is off by more."""


def coactivation(
    store: Store,
    definition: Definition = "paper",
    layers: Sequence[int] | None = None,
    groups: int = 20,
    where: dict[str, str | Sequence[str]] | None = None,
    phase: Phase | None = None,
) -> xr.Dataset:
    """Which experts of one layer are chosen together at the same token.

    How to read it: `conditional` is the share of an expert's tokens at which the other one is active too. Busy experts
    meet often by themselves and every token has k experts, so read `lift`: how many times the expected share that is.
    Believe it when `lift_low` .. `lift_high` does not hold 1, and among many pairs when `q` is small.

    Args:
        store: an open store with the routing tier.
        definition: "paper" counts all pairs of the top-k, "code" (the released script) only pairs whose ranks follow
            one another, and divides by all the expert's tokens (expected: the same sets with ranks in random order).
        layers: model layer indices; all MoE layers if None.
        groups: groups of whole documents behind the intervals.
        where, phase: filters, as in `analysis.load`.

    Returns:
        Dataset with dims (layer, expert, other): count (tokens with both), conditional = P(other | expert), expected
        (of conditional: see `attrs["null"]`), lift, lift_low, lift_high, p (two-sided), q (Benjamini-Hochberg over
        unordered pairs of all layers); (layer, expert): active (tokens), exists; (layer): tokens. NaN on the diagonal
        and for experts never selected; lift is NaN where nothing is expected, as in layers with one expert a token; p
        and q are NaN for pairs that never meet, whose lift is 0 whichever documents are left out: the jackknife has no
        spread to judge it by. Read their `expected` instead, which says how often they should have met.

    Raises:
        MoescopeError: an unknown definition or layer, or nothing left to count.
    """
    if definition not in ("paper", "code"):
        raise MoescopeError('`definition` is "paper" or "code".')
    if groups < 2:
        raise MoescopeError("`groups` must be 2 or more.")
    sites = sites_of(store, layers)
    documents = labelling(store, None, where, phase).documents if where else document_tokens(store, phase)[0]
    if not documents.size:
        raise MoescopeError("The store holds no token: nothing to count.")
    found = [
        coactivation_from_counts(*_coactive(store, site, definition, groups, documents, phase, bool(where)), definition)
        for site in sites
    ]
    axis = LayerAxis.of_sites(sites)
    widest = int(axis.n_experts.max(initial=0))
    pair = ("layer", "expert", "other")
    variables: dict[str, Any] = {}
    for name in ("count", "conditional", "expected", "lift", "lift_low", "lift_high", "p"):
        out = np.full((len(sites), widest, widest), np.nan)
        for row, (site, values) in enumerate(zip(sites, found, strict=True)):
            out[row, : site.n_experts, : site.n_experts] = values[name]
        variables[name] = (pair, out)
    p = variables["p"][1]
    tested = np.triu(np.ones((widest, widest), dtype=bool), 1) & ~np.isnan(p)
    q = adjusted(np.where(tested, p, np.nan))
    variables["q"] = (pair, np.where(np.isnan(q), np.swapaxes(q, 1, 2), q))
    variables["active"] = (("layer", "expert"), axis.pad([values["active"].astype(np.float64) for values in found]))
    variables["tokens"] = ("layer", [int(values["tokens"]) for values in found])
    variables["exists"] = (("layer", "expert"), axis.exists)
    attrs = provenance(
        store,
        analysis="coactivation",
        definition=definition,
        groups=min(groups, documents.size),
        where=where,
        phase=phase,
        null=EXPECTED,
        interval=INTERVAL if documents.size > 1 else "none: one document alone shows no spread between documents",
    )
    attrs |= {"padding": PADDING, "table": ", ".join(pair), "table_order": "lift"}
    attrs["undefined"] = (
        "NaN on the diagonal and for experts never selected; lift also where a token has one expert; p and q for pairs "
        "that never meet (count 0): lift is 0 without any of the groups too, so that a jackknife has no spread"
    )
    attrs["family"] = f"q: all {int(tested.sum())} defined unordered pairs of this result"
    return xr.Dataset(variables, coords=axis.coordinates() | {"other": np.arange(widest)}, attrs=attrs)


def coactivation_from_counts(
    both: Int[np.ndarray, "group expert expert"],
    active: Int[np.ndarray, "group expert"],
    size: Int[np.ndarray, "group slots"],
    definition: Definition = "paper",
) -> dict[str, np.ndarray]:
    """The values of one layer from plain counts of groups of documents.

    Args:
        both: [group, expert, expert] tokens at which both are active (in following ranks for "code"); symmetric, the
            diagonal is not looked at.
        active: [group, expert] tokens at which the expert is active.
        size: [group, k + 1] tokens with 0 .. k active experts.
        definition: as in `coactivation`.

    Returns:
        count, conditional, expected, lift, lift_low, lift_high, p: [expert, expert]; active [expert]; tokens ().
    """
    inside = size.sum(axis=1) > 0
    both, active, size = both[inside], active[inside], size[inside]
    k = size.shape[1] - 1
    # Of two ranks drawn from k, two in k follow one another.
    apart = 1.0 if definition == "paper" else 2 / max(k, 2)
    sums = both.sum(axis=0), active.sum(axis=0), size.sum(axis=0)
    odds, expected = expected_together(sums[1], sums[2])
    conditional, expected = _given(sums[0], sums[1]), _given(expected * apart, _diagonal(expected))
    lift = _ratio(conditional, expected)
    n = len(both)
    blank = np.full(lift.shape, np.nan)
    low, high, p = blank, blank, blank
    if n > 1:
        parts = []
        for group in range(n):
            rest = sums[0] - both[group], sums[1] - active[group], sums[2] - size[group]
            _, fitted = expected_together(rest[1], rest[2], odds)
            parts.append(_ratio(_given(rest[0], rest[1]), _given(fitted * apart, _diagonal(fitted))))
        stack = np.stack(parts)
        error = np.sqrt((n - 1) / n * ((stack - stack.mean(axis=0)) ** 2).sum(axis=0))
        reach = float(t.ppf(0.975, n - 1)) * error
        low, high = np.maximum(lift - reach, 0.0), lift + reach
        with np.errstate(divide="ignore", invalid="ignore"):
            statistic = np.where(error > 1e-12, np.abs(lift - 1) / error, np.nan)
        p = 2 * t.sf(statistic, n - 1)
    values = {"count": sums[0].astype(np.float64), "conditional": conditional, "expected": expected, "lift": lift}
    values |= {"lift_low": low, "lift_high": high, "p": p}
    for table in values.values():
        np.fill_diagonal(table, np.nan)
    return values | {"active": sums[1], "tokens": sums[2].sum()}


def expected_together(
    active: Float[np.ndarray, " expert"],
    size: Float[np.ndarray, " slots"],
    odds: Float[np.ndarray, " expert"] | None = None,
) -> tuple[Float[np.ndarray, " expert"], Float[np.ndarray, "expert expert"]]:
    """Probability that two experts are active together if loads and numbers of experts are all there is.

    Among all ways to draw sets of the given sizes so that every expert is active as often as it is, conditional Poisson
    sampling has the largest entropy (Chen, Dempster & Liu 1994): a set's probability is proportional to the product of
    its members' odds. The odds are fitted by iteration.

    Args:
        active: [expert] tokens at which each is active; together as many as `size` has slots.
        size: [k + 1] tokens with 0 .. k active experts.
        odds: where to start.

    Returns:
        (odds [expert], [expert, expert] probability of both, each expert's own on the diagonal).
    """
    tokens = max(float(size.sum()), 1.0)
    # An expert that is always active would need infinite odds.
    wanted = np.minimum(np.asarray(active, dtype=np.float64) / tokens, 1 - 1e-7)
    share = np.asarray(size, dtype=np.float64) / tokens
    start = wanted / (1 - wanted)
    found: np.ndarray = start if odds is None else np.where(wanted > 0, np.where(odds > 0, odds, start), 0.0)
    single = np.zeros(found.size)
    for _ in range(500):
        single_inclusion(found, share, single)
        if np.abs(single - wanted).max(initial=0.0) < ENOUGH:
            break
        with np.errstate(divide="ignore", invalid="ignore"):
            step = (wanted / (1 - wanted)) / (single / np.maximum(1 - single, 1e-12))
        found = np.where(wanted > 0, found * step, 0.0)
        used = found > 0
        found = found / np.exp(np.log(found[used]).mean()) if used.any() else found
    joint = np.zeros((found.size, found.size))
    joint_inclusion(found, share, joint)
    return found, joint


def _diagonal(joint: np.ndarray) -> np.ndarray:
    return np.diagonal(joint).copy()


def _given(both: np.ndarray, active: np.ndarray) -> np.ndarray:
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(active[:, None] > 0, both / active[:, None], np.nan)


def _ratio(found: np.ndarray, expected: np.ndarray) -> np.ndarray:
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(expected > 0, found / expected, np.nan)


def _coactive(
    store: Store,
    site: Any,
    definition: Definition,
    groups: int,
    documents: Int[np.ndarray, " document"],
    phase: Phase | None,
    filtered: bool,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(both, active, size) of `coactivation_from_counts`, kept in the store unless documents were filtered."""
    n = min(groups, documents.size)
    shape = (n, site.n_experts, site.n_experts)

    def scan() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        both, active = np.zeros(shape, np.int64), np.zeros(shape[:2], np.int64)
        size = np.zeros((n, site.top_k + 1), np.int64)
        for parts in over_shards(store, _shard_coactive, site, definition == "code", n, documents, phase, filtered):
            for total, part in zip((both, active, size), parts, strict=True):
                total += part
        return both, active, size

    def compute() -> pa.Table:
        both, active, size = scan()
        own = np.arange(site.n_experts)
        both[:, own, own] = active  # an expert is always active with itself
        cells = np.nonzero(both)
        slots = np.nonzero(size)
        parts = [*cells, both[cells]], [slots[0], np.full(slots[0].size, -1), slots[1], size[slots]]
        names = ("group", "expert", "other", "count")
        return pa.table(
            {name: np.concatenate(pair) for name, pair in zip(names, zip(*parts, strict=True), strict=True)}
        )

    if filtered:
        both, active, size = scan()
    else:
        params = {"site": site.key, "definition": definition, "groups": n, "phase": phase or "all"}
        kept = store.cached(f"coactivation-{site.key}", compute, params)
        group, expert, other, count = (kept[name].to_numpy() for name in ("group", "expert", "other", "count"))
        both, size = np.zeros(shape, np.int64), np.zeros((n, site.top_k + 1), np.int64)
        slot = expert < 0  # rows without an expert hold the tokens by number of slots
        size[group[slot], other[slot]] = count[slot]
        both[group[~slot], expert[~slot], other[~slot]] = count[~slot]
        active = np.einsum("gee->ge", both).copy()
        np.einsum("gee->ge", both)[:] = 0
    return both + np.swapaxes(both, 1, 2), active, size


def _shard_coactive(
    shard: Any,
    site: Any,
    adjacent: bool,
    n: int,
    documents: Int[np.ndarray, " document"],
    phase: Phase | None,
    filtered: bool,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(both, active, size) of one shard; `both` in its upper triangle."""
    both = np.zeros((n, site.n_experts, site.n_experts), np.int64)
    active, size = np.zeros((n, site.n_experts), np.int64), np.zeros((n, site.top_k + 1), np.int64)
    rows = kept_rows(shard, documents if filtered else None, phase)
    ids = slot_ids(shard, site, "all", rows)
    document = shard.tokens(["document"])["document"].to_numpy()
    place = np.searchsorted(documents, document if rows is None else document[rows])
    count_coactive(ids, place % n, adjacent, both, active, size)
    return both, active, size


COACTIVATION_QUESTION = Analysis(
    name="coactivation",
    run=coactivation,
    figure="coactivation",
    help="Which experts of one layer are chosen together at the same token, beyond their loads?",
    parameters=(
        Parameter("definition", str, "paper", "all pairs of the top-k, or adjacent ranks", ("paper", "code")),
        Parameter("groups", int, 20, "groups of documents behind the intervals"),
        LAYERS,
        PHASE,
    ),
    tier="routing",
)
