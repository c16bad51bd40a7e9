"""Judging placements: crossings, device load and time on given tokens, beside random placements (METHODS 3)."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import xarray as xr

from moescope.analysis.labelled import PADDING, LayerAxis
from moescope.analysis.placement_costs import COSTS, Network, time_of, traffic
from moescope.analysis.placement_kernels import add_crossings
from moescope.analysis.placement_programs import Solution, exflow, moetuner
from moescope.analysis.placing import (
    Counts,
    Plan,
    contiguous,
    gathered,
    onehot,
    random_plan,
    round_robin,
    step_bound,
    widths_of,
)
from moescope.analysis.replication import eplb
from moescope.analysis.resampling import mean_present
from moescope.analysis.routed_rows import Ranks, kept_rows, slot_ids
from moescope.errors import MoescopeError

if TYPE_CHECKING:
    from jaxtyping import Float, Int

    from moescope.store import Store

CONTROLS = ("contiguous", "round_robin", "random")
"""Placements that look at no token."""

UNDEFINED = (
    "a step without a held-out token at both layers has NaN crossings and is left out of sums and means over steps; a "
    "layer without one has NaN imbalance; home is NaN where an expert has replicas on several devices (see hosts), and "
    "objective, gap and bound are for placements without replicas; NaN limits where there is one held-out document; "
    "microseconds are NaN where the bytes of a token are not known"
)
NULL = (
    "balanced placements drawn at random, each layer by itself: (D-1)/D crossings at each step are expected of them; p "
    "is the share of draws that cross no more than the method, itself counted. Intervals are over held-out documents "
    "(linearised, 95 %), those of random over draws"
)


@dataclass(frozen=True)
class Task:
    """What is asked, beside the counts.

    Attributes:
        slots: [step] transfers that each token makes.
        others: as in `analysis.placement`.
    """

    devices: int
    methods: tuple[str, ...]
    uneven: bool
    redundant: int
    groups: int
    time_limit: float
    draws: int
    seed: int
    network: Network
    slots: list[float]

    @property
    def per_node(self) -> int:
        """Devices of each node."""
        return self.network.devices_per_node or self.devices


@dataclass
class Placed:
    """Placements by method: per layer the share of each expert's tokens that each device serves, and its replicas."""

    hosts: dict[str, list[np.ndarray]] = field(default_factory=dict)
    replicas: dict[str, list[np.ndarray]] = field(default_factory=dict)
    solutions: dict[str, Solution] = field(default_factory=dict)
    drawn: list[Plan] = field(default_factory=list)

    def add(self, name: str, plan: Plan, devices: int) -> None:
        self.hosts[name] = [onehot(layer, devices) for layer in plan]
        self.replicas[name] = [np.ones(layer.size) for layer in plan]


def place(counts: Counts, loads: Sequence[np.ndarray], task: Task) -> Placed:
    """Solves every method on these counts and loads."""
    placed, widths = Placed(), widths_of(counts)
    per_node = task.per_node
    for name in task.methods:
        if name == "eplb":
            for load in loads:
                held = eplb(
                    load[None], task.devices, task.redundant, task.groups, task.devices // per_node, task.uneven
                )
                placed.hosts.setdefault(name, []).append(held.hosts(0))
                placed.replicas.setdefault(name, []).append(held.replicas[0].astype(np.float64))
            continue
        if name == "exflow":
            solution = exflow(counts, task.devices, task.uneven, task.seed, task.time_limit)
        else:
            solution = moetuner(counts, loads, task.devices, task.uneven, task.time_limit)
        placed.solutions[name] = solution
        placed.add(name, gathered(counts, solution.plan, task.devices, per_node), task.devices)
    rng = np.random.default_rng(task.seed)
    placed.drawn = [random_plan(widths, task.devices, rng) for _ in range(task.draws)]
    for name, plan in (
        ("contiguous", contiguous(widths, task.devices)),
        ("round_robin", round_robin(widths, task.devices)),
        ("random", placed.drawn[0]),
    ):
        placed.add(name, plan, task.devices)
    return placed


def judge(
    placed: Placed,
    halves: Sequence[Counts],
    loads: Sequence[Float[np.ndarray, " expert"]],
    task: Task,
    axis: LayerAxis,
) -> xr.Dataset:
    """The labelled result: `halves` are the counts solved on and the counts (with `loads`) to judge on."""
    names = list(placed.hosts)
    tokens = np.array([table.sum() for table in halves[1]], dtype=np.float64)
    if not tokens.any():
        raise MoescopeError("No held-out token has an expert in two neighbouring MoE layers: nothing to judge on.")
    plans = [[onehot(layer, task.devices) for layer in plan] for plan in placed.drawn]
    judged, before = (
        {name: [traffic(placed.hosts[name], half, loads, task.per_node)] for name in names}
        | {"random": [traffic(hosts, half, loads, task.per_node) for hosts in plans]}
        for half in halves[::-1]
    )
    crossed, solved = (_means([[one.crossed for one in found[name]] for name in names]) for found in (judged, before))
    imbalance = _means([[one.imbalance for one in judged[name]] for name in names])
    times = [[time_of(one, task.network, task.slots) for one in judged[name]] for name in names]
    per_token, used = np.nansum(crossed, axis=0), tokens > 0
    low, high, p = _against_random(names, per_token, [np.nansum(one.crossed) for one in judged["random"]])
    batch = _means([[np.array(time.batch) for time in found] for found in times])
    per_method = {
        "crossings_per_token": per_token,
        "crossings_low": low,
        "crossings_high": high,
        "crossings_per_step": per_token / used.sum(),
        "solved_crossings_per_step": mean_present(solved.T),
        "p": p,
        "imbalance_mean": mean_present(imbalance.T),
        "imbalance_max": np.nanmax(imbalance, axis=0),
        "microseconds": batch / task.network.batch,
        "batch_microseconds": batch,
        "alone_microseconds": _means([[np.array(time.alone) for time in found] for found in times]),
        "seconds": np.array([placed.solutions[n].seconds if n in placed.solutions else 0.0 for n in names]),
    }
    bound = np.full(tokens.size, np.nan)
    bound[used] = [step_bound(t, task.devices, task.uneven) / t.sum() for t in halves[1] if t.sum() > 0]
    step, layer = ("step", "plan"), ("layer", "plan")
    variables: dict[str, Any] = {name: ("plan", values) for name, values in per_method.items()}
    variables |= _proven(placed, halves[0], solved, task) | _where(placed, axis)
    variables |= {
        "device_load": (("layer", "device", "plan"), np.stack([judged[name][0].load for name in names], axis=-1)),
        "imbalance": (layer, imbalance),
        "crossings": (step, crossed),
        "solved_crossings": (step, solved),
        "step_microseconds": (step, _means([[time.step for time in found] for found in times])),
        "tokens": ("step", tokens),
        "bound": ("step", bound),
        "bound_per_step": ((), float(bound[used].mean())),
        "expected_random": ((), (task.devices - 1) / task.devices),
    }
    layers = axis.layers
    ends = layers if np.unique(layers).size == layers.size else axis.sites
    coordinates = axis.coordinates() | {
        "plan": names,
        "device": np.arange(task.devices),
        "step": [f"{a}-{b}" for a, b in itertools.pairwise(ends)],
        "source_layer": ("step", layers[:-1]),
        "target_layer": ("step", layers[1:]),
    }
    return xr.Dataset(variables, coords=coordinates, attrs=_attributes(placed, task))


def _means(values: list[list[np.ndarray]]) -> Float[np.ndarray, "*row plan"]:
    """Means over each method's placements, methods last."""
    return np.stack([np.mean(of_method, axis=0) for of_method in values], axis=-1)


def _against_random(names: list[str], per_token: np.ndarray, drawn: list[float]) -> tuple[np.ndarray, ...]:
    """(low, high, p): 95 % of the draws for "random", and for the others the share of draws that cross no more."""
    sums, random = np.array(drawn), names.index("random")
    p = (1 + (sums[:, None] <= per_token * (1 + 1e-12)).sum(axis=0)) / (sums.size + 1)
    p[random] = np.nan
    low, high = np.full((2, len(names)), np.nan)
    low[random], high[random] = np.percentile(sums, [2.5, 97.5])
    return low, high, p


def _proven(placed: Placed, counts: Counts, solved: np.ndarray, task: Task) -> dict[str, Any]:
    """Crossings on the half solved on, and how far they can be from the fewest there are; NaN with replicas."""
    totals = np.array([table.sum() for table in counts], dtype=np.float64)
    objective = np.nansum(solved * totals[:, None], axis=0)
    lowest = sum(step_bound(table, task.devices, task.uneven) for table in counts)
    if "exflow" in placed.solutions:
        lowest = max(lowest, placed.solutions["exflow"].bound)
    copied = np.array([any((held > 1).any() for held in placed.replicas[name]) for name in placed.hosts])
    with np.errstate(invalid="ignore", divide="ignore"):
        gap = np.where(objective > 0, np.maximum(objective - lowest, 0) / objective, 0.0)
    return {
        "objective": ("plan", np.where(copied, np.nan, objective)),
        "gap": ("plan", np.where(copied, np.nan, gap)),
        "lower_bound": ((), lowest),
    }


def _where(placed: Placed, axis: LayerAxis) -> dict[str, Any]:
    """Which device holds what."""
    grid = ("layer", "expert", "plan")
    hosts, replicas = (
        axis.pad([np.stack([held[name][row] for name in held], axis=-1) for row in range(len(axis.layers))])
        for held in (placed.hosts, placed.replicas)
    )
    single = (hosts == 1).any(axis=2)
    return {
        "home": (grid, np.where(single, np.nan_to_num(hosts).argmax(axis=2), np.nan)),
        "replicas": (grid, replicas),
        "hosts": (("layer", "expert", "device", "plan"), hosts),
        "exists": (("layer", "expert"), axis.exists),
    }


def _attributes(placed: Placed, task: Task) -> dict[str, Any]:
    proofs = {}
    for name, solution in placed.solutions.items():
        proofs |= {
            f"{name}_status": solution.status,
            f"{name}_program_objective": solution.objective,
            f"{name}_program_bound": solution.bound,
            f"{name}_program_gap": solution.gap,
            f"{name}_better_than_heuristic": str(solution.improved),
        }
    network = {key: "none" if value is None else value for key, value in vars(task.network).items()}
    asked = {"devices": task.devices, "uneven": str(task.uneven), "redundant": task.redundant, "groups": task.groups}
    limits = {"time_limit": task.time_limit, "draws": task.draws, "seed": task.seed}
    notes = {"null": NULL, "costs": COSTS, "undefined": UNDEFINED, "padding": PADDING}
    return asked | limits | network | proofs | notes | {"table": "plan", "table_order": "none"}


def errors_over_documents(
    store: Store,
    pairs: list[tuple[Any, Any]],
    ranks: Ranks,
    documents: Int[np.ndarray, " document"],
    phase: Any,
    placed: Placed,
    result: xr.Dataset,
) -> Float[np.ndarray, " method"]:
    """Standard error of `crossings_per_token`, documents being what is drawn.

    Each step is a ratio of sums over documents; its linearisation gives every document one number, summed over steps,
    so that what a document does at one step may go with what it does at the next. NaN for one document.
    """
    methods = list(placed.hosts)
    excess = np.zeros((documents.size, len(methods)))
    tokens, share = result["tokens"].values, result["crossings"].values
    for shard in store.shards:
        rows = kept_rows(shard, documents, phase)
        number = shard.tokens(["document"])["document"].to_numpy()
        place_of = np.searchsorted(documents, number if rows is None else number[rows])
        ids = {site.key: slot_ids(shard, site, ranks, rows) for pair in pairs for site in pair}
        for step, (source, target) in enumerate(pairs):
            if tokens[step] == 0:
                continue
            cost = np.stack([1 - hosts[step] @ hosts[step + 1].T for hosts in placed.hosts.values()])
            add_crossings(
                ids[source.key], ids[target.key], place_of, cost, share[step], 1.0 / float(tokens[step]), excess
            )
    if documents.size < 2:
        return np.full(len(methods), np.nan)
    return np.sqrt((excess**2).sum(axis=0) * documents.size / (documents.size - 1))
