"""Paths of tokens through consecutive layers, and experts that are active together inside one (METHODS 3).

Source: co-activation as OLMoE (arXiv 2409.02060, section 5.2) and its released analysis script.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pyarrow as pa
import xarray as xr
from scipy.stats import false_discovery_control, t

from moescope.analysis.counts import Phase, document_tokens, labelling, sites_of
from moescope.analysis.labelled import PADDING, LayerAxis, provenance
from moescope.analysis.question import LAYERS, PHASE, SEED, Analysis, Parameter
from moescope.analysis.transition_kernels import (
    count_coactive,
    count_transitions,
    hash_rows,
    joint_inclusion,
    reorder_runs,
    single_inclusion,
)
from moescope.analysis.transitions import kept_rows, runs_of, slot_ids
from moescope.errors import MoescopeError

if TYPE_CHECKING:
    from jaxtyping import Float, Int

    from moescope.store import Store

Definition = Literal["paper", "code"]

CONTROL = (
    "each layer's tokens rotated by their own random offset within each sequence: every layer keeps its loads, topics "
    "and runs, and what links the layers of one token is lost"
)
EXPECTED = (
    "sets of as many experts drawn at random with the same loads (conditional Poisson sampling: the most random way); "
    "topics of documents are not part of it, so that experts of one topic are co-active beyond it"
)
INTERVAL = "95 % intervals and p by a jackknife over groups of whole documents (t distribution)"
ENOUGH = 1e-9
"""Loads are fitted until no inclusion probability is off by more."""


def paths(
    store: Store,
    layers: Sequence[Any] | None = None,
    length: int = 4,
    top: int = 50,
    links: int = 30,
    draws: int = 19,
    seed: int = 0,
    where: dict[str, str | Sequence[str]] | None = None,
    phase: Phase | None = None,
    capacity: int = 2_000_000,
) -> xr.Dataset:
    """The strongest top-1 paths through a window of consecutive layers, and how free a token's path is.

    How to read it: a path is the first-ranked expert of each layer of the window. `count` against `control` says how
    many tokens take it beyond what the layers' loads, topics and runs give. `conditional_entropy` (nats) is how open
    the next expert still is when the current one is known; `path_entropy` how open the whole path is: exp of it is the
    number of equally used paths. Few tokens cannot show many paths (it is at most log `tokens`), so read it against
    `control_entropy`, which has the same limit: lower means that the layers are linked.

    Args:
        store: an open store with the routing tier.
        layers: the layers of the window, in order (model layer indices or site keys); at least two.
        length: without `layers`, the first so many MoE layers.
        top: paths to report.
        links: transitions to report for each step of the window, the most used ones.
        draws: random controls; 0 for none.
        seed: of the controls, which do not depend on how the store is cut into shards.
        where, phase: filters, as in `analysis.load`.
        capacity: different paths held in memory at once. Beyond it the rarest are dropped and the rest counted again:
            counts stay exact, and no dropped path can have more than `attrs["missed_at_most"]` tokens.

    Returns:
        Dataset with dims (path, step): expert; (path): count, share, markov = expected count if each layer depended on
        the one before alone, control = mean count in the controls, p (a control has at least this count), q
        (Benjamini-Hochberg over the paths shown, which were chosen for their counts: read it as a ranking); (link,
        transition): source, target, link_count, link_conditional, link_lift; link_count 0 and -1 ids where a link has
        fewer; (link): entropy of the target, conditional_entropy, control_conditional_entropy; and (): path_entropy
        (NaN if paths were dropped), control_entropy, p_entropy (a control has at most this entropy), markov_entropy =
        H(first) + sum of conditional entropies, independent_entropy = sum of the layers' entropies, distinct_paths,
        tokens, tokens_missing (left out: no first rank in some layer). Along step: layer, site; along link:
        source_layer, target_layer.

    Raises:
        MoescopeError: fewer than two layers, or nothing left to count.
    """
    sites = _window(store, layers, length)
    if min(top, links, capacity) < 1 or draws < 0:
        raise MoescopeError("`top`, `links` and `capacity` must be 1 or more, `draws` 0 or more.")
    documents = labelling(store, None, where, phase).documents if where else None
    walk = _Walk(store, sites, documents, phase, seed)
    held, step_counts, tokens = walk.count(None, capacity)
    if not tokens:
        raise MoescopeError("No token with a first-ranked expert in every layer of the window is left.")
    missing = walk.missing
    best = held.best(top)
    counts = walk.count_of(best.hash, None) if held.missed else best.count
    order = np.lexsort((best.hash, -counts))[:top]
    route, counts, hashes = best.route[order], counts[order], best.hash[order]
    control, entropies, step_entropies = [], [], []
    for draw in range(draws):
        mixed_held, mixed_steps, _ = walk.count(draw, capacity)
        control.append(walk.count_of(hashes, draw))
        entropies.append(mixed_held.entropy())
        step_entropies.append([_conditional_entropy(table) for table in mixed_steps])
    values = _path_values(route, counts, step_counts, tokens, control)
    steps = [_conditional_entropy(table) for table in step_counts]
    loads = [step_counts[0].sum(axis=1), *(table.sum(axis=0) for table in step_counts)]
    entropy = held.entropy()
    reached = sum(found <= entropy + 1e-12 for found in entropies)
    whole = draws > 0 and not np.isnan([entropy, *entropies]).any()
    attrs = provenance(
        store,
        analysis="paths",
        layers=[site.key for site in sites],
        where=where,
        phase=phase,
        draws=draws,
        seed=seed,
        missed_at_most=held.missed,
        null=CONTROL if draws else "none: no controls were asked for",
    )
    return xr.Dataset(
        {name: ("path", found) for name, found in values.items()}
        | {"expert": (("path", "step"), route)}
        | _links(step_counts, links)
        | {
            "entropy": ("link", [_entropy(load) for load in loads[1:]]),
            "conditional_entropy": ("link", steps),
            "control_conditional_entropy": (
                "link",
                np.mean(step_entropies, axis=0) if draws else [np.nan] * len(steps),
            ),
            "path_entropy": ((), entropy),
            "control_entropy": ((), float(np.mean(entropies)) if draws else np.nan),
            "p_entropy": ((), (reached + 1) / (draws + 1) if whole else np.nan),
            "markov_entropy": ((), _entropy(loads[0]) + sum(steps)),
            "independent_entropy": ((), sum(_entropy(load) for load in loads)),
            "distinct_paths": ((), held.count.size if not held.missed else np.nan),
            "tokens": ((), tokens),
            "tokens_missing": ((), missing),
        },
        coords={
            "path": np.arange(len(counts)),
            "step": np.arange(len(sites)),
            "layer": ("step", [site.layer for site in sites]),
            "site": ("step", np.array([site.key for site in sites], dtype=object)),
            "source_layer": ("link", [site.layer for site in sites[:-1]]),
            "target_layer": ("link", [site.layer for site in sites[1:]]),
        },
        attrs=attrs
        | {
            "undefined": "path_entropy is NaN where paths were dropped: raise `capacity`",
            "table": "path",
            "table_order": "count",
        },
    ).assign_coords(path=["-".join(map(str, experts)) for experts in route.tolist()])


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
        and for experts never selected; lift is NaN where nothing is expected, as in layers with one expert a token.

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
    q = np.full(p.shape, np.nan)
    q[tested] = false_discovery_control(p[tested]) if tested.any() else []
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
    attrs["undefined"] = "NaN on the diagonal and for experts never selected; lift also where a token has one expert"
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
        for shard in store.shards:
            rows = kept_rows(shard, documents if filtered else None, phase)
            ids = slot_ids(shard, site, "all", rows)
            document = shard.tokens(["document"])["document"].to_numpy()
            place = np.searchsorted(documents, document if rows is None else document[rows])
            count_coactive(ids, place % n, definition == "code", both, active, size)
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


def _window(store: Store, layers: Sequence[Any] | None, length: int) -> list[Any]:
    sites = list(store.sites)[: max(length, 0)] if layers is None else [store.site(layer) for layer in layers]
    if len(sites) < 2:
        raise MoescopeError(f"A path needs two MoE layers; this window has {len(sites)}.")
    return sites


class _Held:
    """Counts of paths, at most `capacity` of them; what was dropped had at most `missed` tokens each."""

    def __init__(self, capacity: int, depth: int) -> None:
        self.capacity = capacity
        self.missed = 0
        self.tokens = 0
        self.hash = np.empty(0, dtype=np.uint64)
        self.count = np.empty(0, dtype=np.int64)
        self.route = np.empty((0, depth), dtype=np.int32)
        self._waiting: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []

    def add(self, hashes: np.ndarray, routes: np.ndarray) -> None:
        found, first, count = np.unique(hashes, return_index=True, return_counts=True)
        self.tokens += hashes.size
        self._waiting.append((found, count, routes[first]))
        if sum(part[0].size for part in self._waiting) > max(self.hash.size, self.capacity // 4):
            self.merge()

    def merge(self) -> None:
        """Adds what waits, as in lossy counting: a path that comes back lacks what it was dropped with."""
        parts = [(self.hash, self.count, self.route), *self._waiting]
        self._waiting = []
        hashes, counts, routes = (np.concatenate(column) for column in zip(*parts, strict=True))
        self.hash, first, index = np.unique(hashes, return_index=True, return_inverse=True)
        self.count = np.zeros(self.hash.size, dtype=np.int64)
        np.add.at(self.count, index, counts)
        self.route = routes[first].astype(np.int32)
        if self.hash.size > self.capacity:
            order = np.lexsort((self.hash, -self.count))
            self.missed += int(self.count[order[self.capacity]])
            kept = np.sort(order[: self.capacity])
            self.hash, self.count, self.route = self.hash[kept], self.count[kept], self.route[kept]

    def best(self, top: int) -> _Held:
        """Those that can be among the `top` most frequent."""
        order = np.lexsort((self.hash, -self.count))
        least = int(self.count[order[min(top, order.size) - 1]])
        kept = np.sort(order[self.count[order] + self.missed >= least])
        chosen = _Held(self.capacity, self.route.shape[1])
        chosen.hash, chosen.count, chosen.route = self.hash[kept], self.count[kept], self.route[kept]
        return chosen

    def entropy(self) -> float:
        return float("nan") if self.missed else _entropy(self.count)


class _Walk:
    """Streams the first-ranked experts of a window of layers, as they are or as a control."""

    def __init__(
        self, store: Store, sites: list[Any], documents: np.ndarray | None, phase: Phase | None, seed: int
    ) -> None:
        self.store, self.sites, self.documents, self.seed = store, sites, documents, seed
        self.phase: Phase | None = phase
        self.missing = 0

    def routes(self, draw: int | None) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Shard by shard (hash [row], expert [row, step]); rows with a missing expert are left out."""
        self.missing = 0
        for shard in self.store.shards:
            rows = kept_rows(shard, self.documents, self.phase)
            ids = [slot_ids(shard, site, "top1", rows)[:, 0] for site in self.sites]
            route = np.stack([column.astype(np.int32) for column in ids], axis=1)
            if draw is not None:
                runs, order = runs_of(shard, rows), np.empty(len(route), dtype=np.int64)
                for step in range(1, len(self.sites)):
                    reorder_runs(*runs, self.seed, draw * len(self.sites) + step, False, order)
                    route[:, step] = route[order, step]
            whole = (route >= 0).all(axis=1)
            self.missing += int((~whole).sum())
            route = route if whole.all() else route[whole]
            hashes = np.empty(len(route), dtype=np.uint64)
            hash_rows(route, hashes)
            yield hashes, route

    def count(self, draw: int | None, capacity: int) -> tuple[_Held, list[np.ndarray], int]:
        """(paths, [E, E] counts of each step, tokens)."""
        held = _Held(capacity, len(self.sites))
        steps = [np.zeros((a.n_experts, b.n_experts), np.int64) for a, b in itertools.pairwise(self.sites)]
        one = np.ones(1, dtype=np.int64)
        for hashes, route in self.routes(draw):
            held.add(hashes, route)
            for step, table in enumerate(steps):
                a, b = (np.ascontiguousarray(route[:, place, None]) for place in (step, step + 1))
                count_transitions(a, b, one, one, table)
        held.merge()
        return held, steps, held.tokens

    def count_of(self, wanted: np.ndarray, draw: int | None) -> Int[np.ndarray, " path"]:
        """Exact counts of the paths with these hashes."""
        order = np.argsort(wanted)
        known = wanted[order]
        count = np.zeros(wanted.size, dtype=np.int64)
        for hashes, _ in self.routes(draw):
            place = np.minimum(np.searchsorted(known, hashes), known.size - 1)
            count[order] += np.bincount(place[known[place] == hashes], minlength=known.size)
        return count


def _path_values(
    route: np.ndarray, counts: np.ndarray, steps: list[np.ndarray], tokens: int, control: list[np.ndarray]
) -> dict[str, np.ndarray]:
    markov = steps[0].sum(axis=1)[route[:, 0]].astype(np.float64)
    for step, table in enumerate(steps):
        markov *= table[route[:, step], route[:, step + 1]] / table.sum(axis=1)[route[:, step]]
    blank = np.full(counts.shape, np.nan)
    values = {"count": counts, "share": counts / tokens, "markov": markov, "control": blank, "p": blank, "q": blank}
    if control:
        stack = np.stack(control)
        values["control"] = stack.mean(axis=0)
        values["p"] = ((stack >= counts).sum(axis=0) + 1) / (len(control) + 1)
        values["q"] = false_discovery_control(values["p"])
    return values


def _links(steps: list[np.ndarray], links: int) -> dict[str, Any]:
    """The most used transitions of each step, with dims (link, transition)."""
    shape = (len(steps), links)
    ids = {name: np.full(shape, -1, dtype=np.int64) for name in ("source", "target")}
    count = np.zeros(shape, dtype=np.int64)
    conditional, lift = np.full(shape, np.nan), np.full(shape, np.nan)
    for step, table in enumerate(steps):
        order = np.argsort(-table, axis=None, kind="stable")[:links]
        order = order[table.ravel()[order] > 0]
        a, b = np.unravel_index(order, table.shape)
        n = order.size
        ids["source"][step, :n], ids["target"][step, :n], count[step, :n] = a, b, table[a, b]
        conditional[step, :n] = table[a, b] / table.sum(axis=1)[a]
        lift[step, :n] = conditional[step, :n] * table.sum() / table.sum(axis=0)[b]
    found = ids | {"link_count": count, "link_conditional": conditional, "link_lift": lift}
    return {name: (("link", "transition"), values) for name, values in found.items()}


def _entropy(counts: np.ndarray) -> float:
    total = counts.sum()
    if not total:
        return float("nan")
    share = counts[counts > 0] / total
    return float(-(share * np.log(share)).sum())


def _conditional_entropy(table: np.ndarray) -> float:
    """Entropy, in nats, of the target expert when the source expert is known."""
    return max(0.0, _entropy(table) - _entropy(table.sum(axis=1)))


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
PATHS_QUESTION = Analysis(
    name="paths",
    run=paths,
    figure="paths",
    help="Which paths through consecutive layers do tokens take, and how free are they?",
    parameters=(
        Parameter("layers", int, None, "consecutive MoE layers (default: the first few)", many=True),
        Parameter("length", int, 4, "layers in the window"),
        Parameter("top", int, 50, "paths to keep"),
        Parameter("links", int, 30, "transitions to keep between each two layers"),
        Parameter("draws", int, 19, "controls with rotated layers"),
        PHASE,
        SEED,
    ),
    tier="routing",
)
