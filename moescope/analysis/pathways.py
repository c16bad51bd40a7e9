"""Paths of tokens through consecutive layers, beside what the layers give without being linked (METHODS 3).

Paths are shown because they are the most used, and the most used ones of a control would look linked too. So a path is
held against each control twice: against the count of the same path there, and against that of the path of the same
rank, which was chosen there as it was chosen here. The larger of the two counts decides.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import xarray as xr

from moescope.analysis.counts import Phase, labelling
from moescope.analysis.discovery import adjusted
from moescope.analysis.information import conditional_entropy, entropy
from moescope.analysis.labelled import provenance
from moescope.analysis.path_counting import Held, Walk, window
from moescope.analysis.question import PHASE, SEED, Analysis, Parameter
from moescope.analysis.watching import counted
from moescope.errors import MoescopeError

if TYPE_CHECKING:
    from moescope.store import Store


CONTROL = (
    "each layer's tokens rotated by their own random offset within each sequence: every layer keeps its loads, topics "
    "and runs, and what links the layers of one token is lost"
)


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

    How to read it: a path is the first-ranked expert of each layer of the window. `count` against `control` and
    `control_rank` says how many tokens take it beyond what the layers' loads, topics and runs give.
    `conditional_entropy` (nats) is how open the next expert still is when the current one is known; `path_entropy` how
    open the whole path is: exp of it is the number of equally used paths. Few tokens cannot show many paths (it is at
    most log `tokens`), so read it against `control_entropy`, which has the same limit: lower means that the layers are
    linked.

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
    sites = window(store, layers, length)
    if min(top, links, capacity) < 1 or draws < 0:
        raise MoescopeError("`top`, `links` and `capacity` must be 1 or more, `draws` 0 or more.")
    documents = labelling(store, None, where, phase).documents if where else None
    walk = Walk(store, sites, documents, phase, seed)
    held, step_counts, tokens = walk.count(None, capacity)
    if not tokens:
        raise MoescopeError("No token with a first-ranked expert in every layer of the window is left.")
    missing = walk.missing
    best = held.best(top)
    counts = walk.count_of(best.hash, None) if held.missed else best.count
    order = np.lexsort((best.hash, -counts))[:top]
    route, counts, hashes = best.route[order], counts[order], best.hash[order]
    of_paths, missed, distinct = held.entropy(), held.missed, held.count.size
    del held, best  # the controls need the room
    control, ranked, entropies, step_entropies = [], [], [], []
    for draw in counted("draws of the null", range(draws)):
        mixed_held, mixed_steps, _ = walk.count(draw, capacity)
        same, of_rank = _in_control(walk, draw, mixed_held, hashes)
        control.append(same)
        ranked.append(of_rank)
        entropies.append(mixed_held.entropy())
        step_entropies.append([conditional_entropy(table) for table in mixed_steps])
        del mixed_held
    values = _path_values(route, counts, step_counts, tokens, control, ranked)
    steps = [conditional_entropy(table) for table in step_counts]
    loads = [step_counts[0].sum(axis=1), *(table.sum(axis=0) for table in step_counts)]
    reached = sum(found <= of_paths + 1e-12 for found in entropies)
    whole = draws > 0 and not np.isnan([of_paths, *entropies]).any()
    attrs = provenance(
        store,
        analysis="paths",
        layers=[site.key for site in sites],
        where=where,
        phase=phase,
        draws=draws,
        seed=seed,
        missed_at_most=missed,
        null=CONTROL if draws else "none: no controls were asked for",
    )
    return xr.Dataset(
        {name: ("path", found) for name, found in values.items()}
        | {"expert": (("path", "step"), route)}
        | _links(step_counts, links)
        | {
            "entropy": ("link", [entropy(load) for load in loads[1:]]),
            "conditional_entropy": ("link", steps),
            "control_conditional_entropy": (
                "link",
                np.mean(step_entropies, axis=0) if draws else [np.nan] * len(steps),
            ),
            "path_entropy": ((), of_paths),
            "control_entropy": ((), float(np.mean(entropies)) if draws else np.nan),
            "p_entropy": ((), (reached + 1) / (draws + 1) if whole else np.nan),
            "markov_entropy": ((), entropy(loads[0]) + sum(steps)),
            "independent_entropy": ((), sum(entropy(load) for load in loads)),
            "distinct_paths": ((), distinct if not missed else np.nan),
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


def _in_control(walk: Walk, draw: int, held: Held, hashes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Tokens that a control gives to each of these paths, and to its own most used ones, as many and in order."""
    own = held.best(hashes.size).hash
    wanted = np.union1d(hashes, own)
    found = walk.count_of(wanted, draw)
    most = np.sort(found[np.searchsorted(wanted, own)])[::-1][: hashes.size]
    ranked = np.zeros(hashes.size, dtype=np.int64)
    ranked[: most.size] = most
    # What was dropped has at most `missed` tokens and may stand at any rank.
    return found[np.searchsorted(wanted, hashes)], np.maximum(ranked, held.missed)


def _path_values(
    route: np.ndarray,
    counts: np.ndarray,
    steps: list[np.ndarray],
    tokens: int,
    control: list[np.ndarray],
    ranked: list[np.ndarray],
) -> dict[str, np.ndarray]:
    markov = steps[0].sum(axis=1)[route[:, 0]].astype(np.float64)
    for step, table in enumerate(steps):
        markov *= table[route[:, step], route[:, step + 1]] / table.sum(axis=1)[route[:, step]]
    values = {"count": counts, "share": counts / tokens, "markov": markov}
    values |= dict.fromkeys(("control", "control_rank", "p", "q"), np.full(counts.shape, np.nan))
    if control:
        values["control"], values["control_rank"] = np.mean(control, axis=0), np.mean(ranked, axis=0)
        reached = np.maximum(control, ranked) >= counts
        values["p"] = (reached.sum(axis=0) + 1) / (len(control) + 1)
        values["q"] = adjusted(values["p"])
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
