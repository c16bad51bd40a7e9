"""Judging placements: crossings, device load and time on given tokens, beside random placements (METHODS 3)."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import xarray as xr

from moescope.analysis.labelled import PADDING, LayerAxis
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
class Network:
    """The cost of a crossing: a simple model in which transfers neither overlap nor queue.

    A token that changes device inside a node takes `latency_us + bytes_per_token / bandwidth`, to another node
    `node_latency_us + bytes_per_token / node_bandwidth`; a layer takes `compute_us` times the load of its busiest
    device over the mean. Their sum over layers is `microseconds`.

    Attributes:
        devices_per_node: neighbouring devices that share a node; all of them if None.
        bandwidth: GB/s between devices of a node; 450 is NVLink 4 in one direction.
        node_bandwidth: GB/s between nodes; 50 is one 400 Gb/s network card per device.
        latency_us, node_latency_us: microseconds each crossing waits besides; 0 where large batches hide it.
        compute_us: microseconds per token and layer on an evenly loaded device; 0 counts communication alone.
        bytes_per_token: size of what is sent; the model's hidden state if None, and unknown for plain counts.
    """

    devices_per_node: int | None = None
    bandwidth: float = 450.0
    node_bandwidth: float = 50.0
    latency_us: float = 0.0
    node_latency_us: float = 0.0
    compute_us: float = 0.0
    bytes_per_token: float | None = None


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


@dataclass(frozen=True)
class Measured:
    """One placement on given tokens.

    Attributes:
        crossed: [step] share of tokens that change device; NaN without tokens.
        across: [step] share that change node as well.
        load: [layer, device] share of the layer's selections; NaN without one.
    """

    crossed: Float[np.ndarray, " step"]
    across: Float[np.ndarray, " step"]
    load: Float[np.ndarray, "layer device"]

    @property
    def imbalance(self) -> Float[np.ndarray, " layer"]:
        """The busiest device's load over the mean."""
        return self.load.max(axis=1) * self.load.shape[1]

    def microseconds(self, task: Task) -> float:
        """Time of a token by the cost model; see `Network`."""
        network = task.network
        if network.bytes_per_token is None:
            return float("nan")
        # GB/s are thousands of bytes per microsecond.
        near = network.latency_us + network.bytes_per_token / (network.bandwidth * 1e3)
        far = network.node_latency_us + network.bytes_per_token / (network.node_bandwidth * 1e3)
        moved = np.asarray(task.slots) * ((self.crossed - self.across) * near + self.across * far)
        return float(np.nansum(moved) + network.compute_us * np.nansum(self.imbalance))


def measure(
    hosts: Sequence[Float[np.ndarray, "expert device"]],
    counts: Counts,
    loads: Sequence[Float[np.ndarray, " expert"]],
    per_node: int,
) -> Measured:
    """What a placement does with tokens of these transitions and loads; replicas are used at random."""
    devices = hosts[0].shape[1]
    node = onehot(np.arange(devices) // per_node, devices)
    crossed, across = np.full(len(counts), np.nan), np.full(len(counts), np.nan)
    for step, table in enumerate(counts):
        total = table.sum()
        if total > 0:
            traffic = hosts[step].T @ table @ hosts[step + 1]
            crossed[step] = max(0.0, 1 - np.trace(traffic) / total)
            across[step] = max(0.0, 1 - np.trace(node.T @ traffic @ node) / total)
    carried = np.stack([load @ held for load, held in zip(loads, hosts, strict=True)])
    total = np.array([load.sum() for load in loads], dtype=np.float64)[:, None]
    return Measured(crossed, across, np.where(total > 0, carried / np.where(total > 0, total, 1), np.nan))


def judge(
    placed: Placed,
    halves: Sequence[Counts],
    loads: Sequence[Float[np.ndarray, " expert"]],
    task: Task,
    axis: LayerAxis,
) -> xr.Dataset:
    """The labelled result: `halves` are the counts solved on and the counts (with `loads`) to judge on."""
    names, per_node = list(placed.hosts), task.per_node
    judged = {name: measure(hosts, halves[1], loads, per_node) for name, hosts in placed.hosts.items()}
    solved = {name: measure(hosts, halves[0], loads, per_node) for name, hosts in placed.hosts.items()}
    tokens = np.array([table.sum() for table in halves[1]], dtype=np.float64)
    if not tokens.any():
        raise MoescopeError("No held-out token has an expert in two neighbouring MoE layers: nothing to judge on.")
    plans = [[onehot(layer, task.devices) for layer in plan] for plan in placed.drawn]
    drawn = [measure(hosts, halves[1], loads, per_node) for hosts in plans]
    crossed = np.stack([judged[name].crossed for name in names], axis=1)
    imbalance = np.stack([judged[name].imbalance for name in names], axis=1)
    before = np.stack([solved[name].crossed for name in names], axis=1)
    microseconds = np.array([judged[name].microseconds(task) for name in names])
    random = names.index("random")
    sums = np.array([np.nansum(one.crossed) for one in drawn])
    crossed[:, random] = np.mean([one.crossed for one in drawn], axis=0)
    before[:, random] = np.mean([measure(hosts, halves[0], loads, per_node).crossed for hosts in plans], axis=0)
    imbalance[:, random] = np.mean([one.imbalance for one in drawn], axis=0)
    microseconds[random] = np.mean([one.microseconds(task) for one in drawn])
    per_token = np.nansum(crossed, axis=0)
    p = (1 + (sums[:, None] <= per_token * (1 + 1e-12)).sum(axis=0)) / (len(drawn) + 1)
    p[random] = np.nan
    low, high = np.full((2, len(names)), np.nan)
    low[random], high[random] = np.percentile(sums, [2.5, 97.5])
    totals = np.array([table.sum() for table in halves[0]], dtype=np.float64)
    objective = np.nansum(before * totals[:, None], axis=0)
    copied = np.array([any((held > 1).any() for held in placed.replicas[name]) for name in names])
    lowest = max(
        sum(step_bound(table, task.devices, task.uneven) for table in halves[0]),
        placed.solutions["exflow"].bound if "exflow" in placed.solutions else 0.0,
    )
    with np.errstate(invalid="ignore", divide="ignore"):
        bound = np.array([step_bound(table, task.devices, task.uneven) for table in halves[1]]) / tokens
        gap = np.where(objective > 0, np.maximum(objective - lowest, 0) / objective, 0.0)
    used = tokens > 0
    grid = ("layer", "expert", "method")
    hosts = axis.pad([np.stack([placed.hosts[name][row] for name in names], axis=-1) for row in range(len(loads))])
    replicas = axis.pad(
        [np.stack([placed.replicas[name][row] for name in names], axis=-1) for row in range(len(loads))]
    )
    exists = axis.exists
    alone = (hosts == 1).any(axis=2)
    layers = axis.layers
    return xr.Dataset(
        {
            "home": (grid, np.where(alone, np.nan_to_num(hosts).argmax(axis=2), np.nan)),
            "replicas": (grid, replicas),
            "hosts": (("layer", "expert", "device", "method"), hosts),
            "device_load": (
                ("layer", "device", "method"),
                np.stack([judged[name].load for name in names], axis=-1),
            ),
            "imbalance": (("layer", "method"), imbalance),
            "crossings": (("step", "method"), crossed),
            "solved_crossings": (("step", "method"), before),
            "tokens": ("step", tokens),
            "bound": ("step", bound),
            "crossings_per_token": ("method", per_token),
            "crossings_low": ("method", low),
            "crossings_high": ("method", high),
            "crossings_per_step": ("method", per_token / used.sum()),
            "solved_crossings_per_step": ("method", _mean(before)),
            "p": ("method", p),
            "imbalance_mean": ("method", _mean(imbalance)),
            "imbalance_max": ("method", np.nanmax(imbalance, axis=0)),
            "microseconds": ("method", microseconds),
            "objective": ("method", np.where(copied, np.nan, objective)),
            "gap": ("method", np.where(copied, np.nan, gap)),
            "seconds": ("method", [placed.solutions[n].seconds if n in placed.solutions else 0.0 for n in names]),
            "lower_bound": ((), lowest),
            "bound_per_step": ((), float(bound[used].mean())),
            "expected_random": ((), (task.devices - 1) / task.devices),
            "exists": (("layer", "expert"), exists),
        },
        coords=axis.coordinates()
        | {
            "method": names,
            "device": np.arange(task.devices),
            "step": [f"{a}-{b}" for a, b in itertools.pairwise(layers)],
            "source_layer": ("step", layers[:-1]),
            "target_layer": ("step", layers[1:]),
        },
        attrs=_attributes(placed, task),
    )


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
    notes = {"null": NULL, "undefined": UNDEFINED, "padding": PADDING}
    return asked | limits | network | proofs | notes | {"table": "layer, expert, method", "table_order": "none"}


def _mean(values: Float[np.ndarray, "row method"]) -> Float[np.ndarray, " method"]:
    """Means over the rows that are not NaN."""
    defined = ~np.isnan(values)
    return np.where(defined.any(axis=0), np.nansum(values, axis=0) / np.maximum(defined.sum(axis=0), 1), np.nan)


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
