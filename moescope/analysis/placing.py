"""Placement on plain counts: what a placement crosses, simple placements, a local search, and a bound (METHODS 3).

A plan is one [expert] array of devices per MoE layer; counts are one [source expert, target expert] table per step,
from each MoE layer to the next. A token crosses at a step when its two experts stand on different devices.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from scipy.optimize import linear_sum_assignment

from moescope.analysis.watching import counted, look
from moescope.errors import MoescopeError

if TYPE_CHECKING:
    from jaxtyping import Float, Int

Plan = list[np.ndarray]
"""Per layer, the device of each expert: [expert] int64."""
Counts = Sequence[np.ndarray]
"""Per step, [source expert, target expert] tokens."""

SPECTRAL_STARTS = 5
"""Steps, spread over the model, whose communities the local search starts from."""


def widths_of(counts: Counts) -> list[int]:
    """The number of experts of each layer that a chain of tables is about.

    Raises:
        MoescopeError: no table, tables that do not follow one another, or negative or missing counts.
    """
    if not len(counts):
        raise MoescopeError("Placement needs two MoE layers or more: with one there is no step to cross.")
    for step, table in enumerate(counts):
        if table.ndim != 2 or (step and counts[step - 1].shape[1] != table.shape[0]):
            raise MoescopeError("Counts must be [source expert, target expert] tables, each from the layer before.")
        if not (table >= 0).all():
            raise MoescopeError("Counts must be 0 or more, and none missing.")
    return [counts[0].shape[0], *(table.shape[1] for table in counts)]


def room(n_experts: int, devices: int, uneven: bool) -> tuple[int, int]:
    """(fewest, most) experts that a device may hold of a layer.

    Raises:
        MoescopeError: they do not divide, and that is not allowed.
    """
    if n_experts % devices and not uneven:
        raise MoescopeError(
            f"{n_experts} experts do not divide over {devices} devices: choose a divisor, or allow uneven=True "
            "(devices then differ by at most one expert per layer)."
        )
    return n_experts // devices, -(-n_experts // devices)


def crossings(counts: Counts, plan: Plan) -> Float[np.ndarray, " step"]:
    """Tokens that change device at each step."""
    return np.array(
        [
            table[source[:, None] != target[None, :]].sum()
            for table, source, target in zip(counts, plan[:-1], plan[1:], strict=True)
        ],
        dtype=np.float64,
    )


def round_robin(widths: Sequence[int], devices: int) -> Plan:
    """Expert e on device e mod D, in every layer."""
    return [np.arange(width) % devices for width in widths]


def contiguous(widths: Sequence[int], devices: int) -> Plan:
    """Blocks of consecutive experts, in every layer: what serving engines do when not told otherwise."""
    return [np.sort(np.arange(width) % devices) for width in widths]


def random_plan(widths: Sequence[int], devices: int, rng: np.random.Generator) -> Plan:
    """A balanced placement drawn uniformly, each layer by itself: a token stays with probability 1/D at each step."""
    return [rng.permutation(devices)[rng.permutation(np.arange(width) % devices)] for width in widths]


def best_layer(gain: Float[np.ndarray, "expert device"], fewest: int, most: int) -> Int[np.ndarray, " expert"]:
    """The assignment of one layer's experts to devices with the largest summed gain, each device within its room.

    Solved exactly as an assignment to slots. Where room is uneven, slots beyond the fewest may be left to blanks.
    """
    n_experts, devices = gain.shape
    slots = np.repeat(gain, fewest, axis=1)
    if most > fewest:
        blanks = np.zeros((devices * most - n_experts, devices * most))
        blanks[:, : devices * fewest] = -np.inf
        slots = np.vstack([np.hstack([slots, gain]), blanks])
    _, chosen = linear_sum_assignment(slots, maximize=True)
    chosen = chosen[:n_experts]
    return np.where(chosen < devices * fewest, chosen // max(fewest, 1), chosen - devices * fewest)


def align(counts: Counts, plan: Plan, devices: int) -> Plan:
    """Renames the devices of each layer so that the fewest tokens cross, experts staying with their companions.

    Exact: the renaming that suits a step best does not depend on any other step, since every later layer can follow
    it. This is MoETuner's second stage for devices that are all equally far from one another.
    """
    aligned = [plan[0]]
    for table, target in zip(counts, plan[1:], strict=True):
        source = aligned[-1]
        traffic = onehot(source, devices).T @ table @ onehot(target, devices)
        row, column = linear_sum_assignment(traffic, maximize=True)
        name = np.empty(devices, dtype=np.int64)
        name[column] = row
        aligned.append(name[target])
    return aligned


def gathered(counts: Counts, plan: Plan, devices: int, per_node: int) -> Plan:
    """Renames devices, in all layers alike, so that those that exchange most tokens stand in one node.

    Crossings stay as they are. Nodes are filled one by one round the busiest device left, then improved by exchanges.
    """
    if per_node >= devices or per_node == 1:
        return plan
    traffic = np.zeros((devices, devices))
    for table, source, target in zip(counts, plan[:-1], plan[1:], strict=True):
        traffic += onehot(source, devices).T @ table @ onehot(target, devices)
    traffic += traffic.T
    np.fill_diagonal(traffic, 0)
    node = np.full(devices, -1, dtype=np.int64)
    for place in range(devices // per_node):
        for _ in range(per_node):
            free = np.flatnonzero(node < 0)
            inside = traffic[free][:, node == place].sum(axis=1)
            node[free[np.lexsort((-traffic[free].sum(axis=1), -inside))[0]]] = place
    while True:
        near = traffic @ onehot(node, devices // per_node)
        own = near[np.arange(devices), node]
        # Gain of exchanging devices a and b: what each has in the other's node, without the link between themselves.
        gain = near[:, node] + near[:, node].T - own[:, None] - own[None, :] - 2 * traffic
        gain[node[:, None] == node[None, :]] = 0
        a, b = np.unravel_index(int(gain.argmax()), gain.shape)
        if gain[a, b] <= 1e-9 * max(traffic.sum(), 1):
            break
        node[a], node[b] = node[b], node[a]
    name = np.empty(devices, dtype=np.int64)
    name[np.argsort(node, kind="stable")] = np.arange(devices)
    return [name[layer] for layer in plan]


def refine(counts: Counts, plan: Plan, devices: int, uneven: bool = False, deadline: float = np.inf) -> Plan:
    """Improves a plan until neither re-placing any one layer nor renaming devices from some layer on helps.

    Each layer is placed *optimally* given its neighbours, in sweeps there and back.

    Args:
        deadline: on `time.perf_counter`; the plan found by then is returned.
    """
    current = [layer.copy() for layer in plan]
    best = crossings(counts, current).sum()
    while True:
        look()
        trial = [layer.copy() for layer in current]
        for layer in [*range(len(trial)), *reversed(range(len(trial) - 1))]:
            if time.perf_counter() > deadline:
                break
            _replace(counts, trial, layer, devices, uneven)
        trial = align(counts, trial, devices)
        found = crossings(counts, trial).sum()
        if found >= best - 1e-9 * max(best, 1):
            return current
        current, best = trial, found


def _replace(counts: Counts, plan: Plan, layer: int, devices: int, uneven: bool) -> None:
    """Places one layer of `plan` anew, unless nothing is gained."""
    size = plan[layer].size
    stays = np.zeros((size, devices))
    if layer > 0:
        stays += counts[layer - 1].T @ onehot(plan[layer - 1], devices)
    if layer < len(counts):
        stays += counts[layer] @ onehot(plan[layer + 1], devices)
    chosen = best_layer(stays, *room(size, devices, uneven))
    index = np.arange(size)
    if stays[index, chosen].sum() > stays[index, plan[layer]].sum():
        plan[layer] = chosen


def local_search(
    counts: Counts,
    devices: int,
    uneven: bool = False,
    seed: int = 0,
    starts: int = 6,
    kicks: int = 30,
    seconds: float = np.inf,
) -> Plan:
    """A good placement without proof: several starts refined, then the best one disturbed and refined again.

    Starts are spectral partitions of single steps (find communities), a greedy one (experts of the first layer with the
    same successors together), both regular placements, and random ones. The same seed gives the same plan, unless the
    time runs out.

    Args:
        counts: per step, [source expert, target expert].
        devices: how many.
        uneven: as in `room`.
        seed: of random starts and disturbances.
        starts: random starts.
        kicks: disturbances of the best plan.
        seconds: stop after this long.
    """
    deadline = time.perf_counter() + seconds
    rng = np.random.default_rng(seed)
    widths = widths_of(counts)
    tables = [np.asarray(table, dtype=np.float64) for table in counts]
    plans = [contiguous(widths, devices), round_robin(widths, devices)]
    plans.append(_greedy(tables, widths, devices, uneven))
    for step in np.unique(np.linspace(0, len(tables) - 1, SPECTRAL_STARTS).astype(int)).tolist():
        plans.append(_spectral(tables, widths, devices, uneven, step))
    plans += [random_plan(widths, devices, rng) for _ in range(starts)]
    best, fewest = plans[0], np.inf
    for attempt in counted("plans", range(len(plans) + kicks)):
        if attempt and (fewest == 0 or time.perf_counter() > deadline):
            break
        start = plans[attempt] if attempt < len(plans) else _disturbed(best, rng)
        found = refine(tables, align(tables, start, devices), devices, uneven, deadline)
        crossed = crossings(tables, found).sum()
        if crossed < fewest:
            best, fewest = found, crossed
    return best


def _disturbed(plan: Plan, rng: np.random.Generator) -> Plan:
    """The plan with the experts of a few neighbouring layers exchanged in pairs; devices keep how many they hold."""
    first = int(rng.integers(len(plan)))
    changed = [layer.copy() for layer in plan]
    for layer in changed[first : first + int(rng.integers(1, 4))]:
        for _ in range(max(1, layer.size // 8)):
            a, b = rng.integers(layer.size, size=2)
            layer[[a, b]] = layer[[b, a]]
    return changed


def _greedy(counts: Counts, widths: list[int], devices: int, uneven: bool) -> Plan:
    """Fills the devices of the first layer one by one, round its busiest unplaced expert with those most alike it in
    where their tokens go; then follows the tokens layer by layer."""
    table = counts[0]
    norm = np.linalg.norm(table, axis=1, keepdims=True)
    likeness = (table / np.where(norm > 0, norm, 1)) @ table.T
    load, first = table.sum(axis=1), np.full(widths[0], -1, dtype=np.int64)
    sizes = np.bincount(np.arange(widths[0]) % devices, minlength=devices)
    for device in range(devices):
        free = np.flatnonzero(first < 0)
        if not free.size:
            break
        leader = free[np.argmax(load[free])]
        others = free[free != leader]
        alike = others[np.argsort(-likeness[others, leader], kind="stable")]
        first[[leader, *alike[: sizes[device] - 1]]] = device
    return _followed(counts, widths, devices, uneven, [first], 0)


def _spectral(counts: Counts, widths: list[int], devices: int, uneven: bool, step: int) -> Plan:
    """Balanced k-means of both layers of one step on its leading singular vectors; from there the tokens are followed
    to the layers before and after.

    One step at a time: the leading eigenvectors of the graph of *all* layers are slow waves along the layers, which say
    nothing of communities.
    """
    table = counts[step]
    degrees = [table.sum(axis=1), table.sum(axis=0)]
    scales = [np.where(degree > 0, 1 / np.sqrt(np.where(degree > 0, degree, 1)), 0) for degree in degrees]
    left, _, right = np.linalg.svd(scales[0][:, None] * table * scales[1], full_matrices=False)
    sides = [
        _unit(vectors[:, :devices] * scale[:, None]) for vectors, scale in zip((left, right.T), scales, strict=True)
    ]
    points, weight = np.concatenate(sides), np.concatenate(degrees)
    centre = _far_apart(points, weight, devices)
    pair: Plan = []
    for _ in range(8):
        pair = [
            best_layer(degree[:, None] * (side @ centre.T), *room(side.shape[0], devices, uneven))
            for side, degree in zip(sides, degrees, strict=True)
        ]
        centre = _unit(onehot(np.concatenate(pair), devices).T @ (points * weight[:, None]))
    return _followed(counts, widths, devices, uneven, pair, step)


def _followed(counts: Counts, widths: list[int], devices: int, uneven: bool, plan: Plan, first: int) -> Plan:
    """Extends a plan of some layers, from layer `first` on, to all: each layer in turn best placed given the last."""
    whole = list(plan)
    for layer in range(first + len(plan), len(widths)):
        stays = counts[layer - 1].T @ onehot(whole[-1], devices)
        whole.append(best_layer(stays, *room(widths[layer], devices, uneven)))
    for layer in range(first - 1, -1, -1):
        stays = counts[layer] @ onehot(whole[0], devices)
        whole.insert(0, best_layer(stays, *room(widths[layer], devices, uneven)))
    return whole


def _unit(rows: np.ndarray) -> np.ndarray:
    length = np.linalg.norm(rows, axis=1, keepdims=True)
    return rows / np.where(length > 0, length, 1)


def _far_apart(points: np.ndarray, weight: np.ndarray, count: int) -> np.ndarray:
    """`count` points, each the farthest in direction from those before, the first the heaviest."""
    chosen = [int(np.argmax(weight))]
    nearest = np.full(len(points), -np.inf)
    while len(chosen) < count:
        nearest = np.maximum(nearest, points @ points[chosen[-1]])
        chosen.append(int(np.argmin(np.where(weight > 0, nearest, np.inf))))
    return points[chosen]


def step_bound(table: Float[np.ndarray, "source target"], devices: int, uneven: bool = False) -> float:
    """Tokens that must cross at one step under *any* placement within the room of the devices.

    The larger of two bounds. Room: at most `most` targets can share a device with a source expert, so that it keeps
    its tokens to its busiest targets at best; and so from the target's side. Spectral: with indicators X, Y of devices
    and C, C' experts on each, the tokens kept are trace(X'NY); X/sqrt(C) and Y/sqrt(C') have orthonormal columns whose
    span contains the constant vector, so that with P the projection off the constant vector
    kept <= total/D + sqrt(C C') * (the D-1 largest singular values of PNP), by von Neumann's trace inequality.
    """
    total = float(table.sum())
    rooms = [room(size, devices, uneven) for size in table.shape]
    by_row = np.sort(table, axis=1)[:, ::-1][:, : rooms[1][1]].sum()
    by_column = np.sort(table, axis=0)[::-1][: rooms[0][1]].sum()
    kept = min(float(by_row), float(by_column))
    if all(fewest == most for fewest, most in rooms):
        centred = table - table.mean(axis=0) - table.mean(axis=1, keepdims=True) + table.mean()
        values = np.linalg.svd(centred, compute_uv=False)[: devices - 1]
        kept = min(kept, total / devices + np.sqrt(rooms[0][0] * rooms[1][0]) * float(values.sum()))
    # Rounding of the singular values must not lift the bound above the truth.
    lowest = max(total - kept - 1e-9 * max(total, 1), 0.0)
    return float(np.ceil(lowest)) if np.array_equal(table, np.round(table)) else lowest


def onehot(plan: Int[np.ndarray, " expert"], devices: int) -> Float[np.ndarray, "expert device"]:
    """1 where an expert is on a device."""
    out = np.zeros((plan.size, devices))
    out[np.arange(plan.size), plan] = 1
    return out
