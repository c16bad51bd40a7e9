"""Placement: which device should hold which expert, and what each answer costs on tokens it was not fitted to.

Source: METHODS 3. ExFlow (arXiv 2401.08383) and MoETuner (arXiv 2502.06643) in `placement_programs`, EPLB (arXiv
2412.19437) in `replication`, all solved on one part of the documents and judged on the other.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import xarray as xr

from moescope.analysis.counts import Phase, document_counts, labelling
from moescope.analysis.labelled import LayerAxis, provenance
from moescope.analysis.placement_costs import Network
from moescope.analysis.placement_judging import Task, errors_over_documents, judge, place
from moescope.analysis.placing import Counts, room, widths_of
from moescope.analysis.question import PHASE, SEED, Analysis, Parameter
from moescope.analysis.routed_rows import Ranks
from moescope.analysis.transitions import site_pairs, transition_tables
from moescope.errors import MoescopeError

if TYPE_CHECKING:
    from jaxtyping import Float, Int

    from moescope.store import Store

METHODS = ("exflow", "moetuner", "eplb")
"""What `method` may name; "all" is all of them."""
BYTES = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2, "float8_e4m3fn": 1, "float8_e5m2": 1}


def placement(
    store: Store,
    devices: int = 4,
    method: str | Sequence[str] = "all",
    split: float = 0.5,
    ranks: Ranks = "top1",
    time_limit: float = 30.0,
    uneven: bool = False,
    redundant: int = 0,
    groups: int = 1,
    draws: int = 200,
    seed: int = 0,
    where: dict[str, str | Sequence[str]] | None = None,
    phase: Phase | None = None,
    devices_per_node: int | None = None,
    bandwidth: float = 450.0,
    node_bandwidth: float = 50.0,
    latency_us: float = 0.0,
    node_latency_us: float = 0.0,
    compute_us: float = 0.0,
    bytes_per_token: float | None = None,
    batch: int = 1024,
) -> xr.Dataset:
    """Where to put the experts, by several methods, each solved on some documents and judged on the others.

    How to read it: `crossings_per_step` is the share of steps from one MoE layer to the next at which a held-out token
    changes device: (D-1)/D at random, and not below `bound_per_step` with every expert held once. `imbalance_mean` is
    how much more than its share the busiest device of a layer does: 1 is even. A placement for few crossings may load
    devices unevenly and the reverse: `microseconds` weighs both, by your own bandwidths. Believe a gain that
    `crossings_low` to `crossings_high` keep clear of the other method's; `solved_crossings_per_step` well below it is
    what did not carry over to new documents.

    Args:
        store: an open store with the routing tier and two MoE layers or more.
        devices: how many devices share the experts of each layer.
        method: "exflow" (fewest crossings), "moetuner" (even load, then few crossings), "eplb" (even load, replicas), a
            list of them, or "all". The controls contiguous, round_robin and random are always there.
        split: share of documents to solve on; the others are held out.
        ranks: "top1" follows each token from its first expert to its next first expert; "all" all k x k pairs of slots.
        time_limit: seconds for each of exflow and moetuner.
        uneven: let devices differ by one expert per layer where experts do not divide over devices.
        redundant: replicas per layer that EPLB may add, used equally by tokens wherever they come from; the other
            methods hold every expert once.
        groups: groups of experts of a group-limited router, which EPLB keeps on one node where they divide over nodes.
        draws: random placements.
        seed: of the split, the random placements and the local search.
        where: label -> value(s), documents to use.
        phase: "prefill" or "decode"; both if None.
        devices_per_node: devices that share a node; all of them if None. With nodes, those devices of exflow and
            moetuner that exchange most tokens are then gathered in a node, by a heuristic.
        bandwidth, node_bandwidth: GB/s of each device inside its node (450: NVLink 4) and to other nodes (50: a 400
            Gb/s network card).
        latency_us, node_latency_us: microseconds that a transfer waits besides, inside a node and between nodes.
        compute_us: microseconds one device works for one token's experts at one layer; 0 counts communication alone.
        bytes_per_token: size of what is sent; the model's hidden state if None.
        batch: tokens that go through the layers together.

    Returns:
        Dataset with dims (layer, expert, plan): home = the device (0 .. D-1), replicas; (layer, expert, device,
        plan): hosts = the share of the expert's tokens each device serves; (layer, device, plan): device_load =
        share of the layer's held-out selections (all k slots); (layer, plan): imbalance = its maximum over its mean;
        (step, plan): crossings = share of held-out tokens that change device, solved_crossings on the other half,
        step_microseconds of a batch; (step): tokens, held-out tokens (pairs of slots for "all") with both layers, bound
        = the least possible share; (plan): crossings_per_token = sum over steps, crossings_low, crossings_high
        (95 %), crossings_per_step = mean over steps, solved_crossings_per_step, p, imbalance_mean, imbalance_max (over
        layers), microseconds per token, batch_microseconds of a batch, alone_microseconds of one token by itself,
        objective = crossings on the half solved on, gap = (objective - lower_bound) / objective, seconds; and
        lower_bound, bound_per_step (held out), expected_random. `plan` is the method or control, `step` is named
        "source-target". What exflow and moetuner proved is in the attributes. For "random" all but home, hosts and
        device_load are means over draws.

    Raises:
        MoescopeError: one device, one MoE layer, experts that do not divide over devices, too few documents to split,
            or no token with two layers.
    """
    names = _methods(method)
    _check(devices, split, draws)
    pairs = site_pairs(store, None)
    if not pairs:
        raise MoescopeError(f"Placement needs two MoE layers or more; the store has {len(store.sites)}.")
    if ranks not in ("top1", "all"):
        raise MoescopeError('`ranks` is "top1" or "all".')
    for site in store.sites:
        room(site.n_experts, devices, uneven)
    documents = labelling(store, None, where, phase).documents
    solving, held_out = split_documents(documents, split, seed)
    costs = _network(
        {
            "devices_per_node": devices_per_node,
            "bandwidth": bandwidth,
            "node_bandwidth": node_bandwidth,
            "latency_us": latency_us,
            "node_latency_us": node_latency_us,
            "compute_us": compute_us,
            "bytes_per_token": bytes_per_token,
            "batch": batch,
        },
        devices,
    )
    if costs.bytes_per_token is None:
        width = BYTES.get(str(store.manifest.model.dtype).removeprefix("torch."))
        costs = replace(costs, bytes_per_token=width and float(store.manifest.model.hidden_size * width))
    halves = [transition_tables(store, pairs, ranks, part, phase) for part in (solving, held_out)]
    side = np.full(int(documents.max()) + 1, -1, dtype=np.int64)
    side[solving], side[held_out] = 0, 1
    loads = [document_counts(store, site, phase=phase).by_label(side, 2) for site in store.sites]
    slots = [1.0 if ranks == "top1" else float(target.top_k) for _, target in pairs]
    task = Task(devices, names, uneven, redundant, groups, time_limit, draws, seed, costs, slots)
    placed = place(halves[0], [load[:, 0] for load in loads], task)
    result = judge(placed, halves, [load[:, 1] for load in loads], task, LayerAxis.of_sites(store.sites))
    reach = 1.96 * errors_over_documents(store, pairs, ranks, held_out, phase, placed, result)
    centre, drawn = result["crossings_per_token"], result["plan"] == "random"
    return result.assign(
        crossings_low=result["crossings_low"].where(drawn, np.maximum(centre - reach, 0)),
        crossings_high=result["crossings_high"].where(drawn, centre + reach),
    ).assign_attrs(
        provenance(
            store,
            analysis="placement",
            method=list(names),
            split=split,
            ranks=ranks,
            where=where,
            phase=phase,
            documents_solved=solving.size,
            documents_held_out=held_out.size,
            judged_on="documents held out",
        )
    )


def placement_from_counts(
    counts: Counts,
    devices: int,
    method: str | Sequence[str] = "all",
    loads: Sequence[Float[np.ndarray, " expert"]] | None = None,
    held_out: Counts | None = None,
    held_out_loads: Sequence[Float[np.ndarray, " expert"]] | None = None,
    layers: Sequence[int] | None = None,
    time_limit: float = 30.0,
    uneven: bool = False,
    redundant: int = 0,
    groups: int = 1,
    draws: int = 200,
    seed: int = 0,
    **network: Any,
) -> xr.Dataset:
    """The same from plain tables of transitions.

    Args:
        counts: per step, [source expert, target expert] tokens to solve on.
        loads: per layer, [expert] tokens (all slots); sums of `counts` if None.
        held_out, held_out_loads: the same from other tokens, to judge on; without them methods are judged on the tokens
            they were solved on, which flatters them.
        layers: model layer index of each layer; 0, 1, 2, ... if None.
        network: devices_per_node, bandwidth, node_bandwidth, latency_us, node_latency_us, compute_us, bytes_per_token
            and batch, as in `placement`; times are NaN without bytes_per_token.
        others: as in `placement`.

    Returns:
        As `placement`, with NaN intervals for all but "random": nothing is known of documents.

    Raises:
        MoescopeError: as `placement`, or tables that do not fit one another.
    """
    names = _methods(method)
    _check(devices, 0.5, draws)
    widths = widths_of(counts)
    for width in widths:
        room(width, devices, uneven)
    judged = counts if held_out is None else held_out
    if [table.shape for table in judged] != [table.shape for table in counts]:
        raise MoescopeError("Held-out counts must have the shapes of the counts solved on.")
    if held_out is None:
        held_out_loads = loads if held_out_loads is None else held_out_loads
    work = [_loads(table, given) for table, given in ((counts, loads), (judged, held_out_loads))]
    if any([len(load) for load in side] != widths for side in work):
        raise MoescopeError(f"Loads must be one [expert] array per layer, of {', '.join(map(str, widths))} experts.")
    halves = [[np.asarray(table, dtype=np.float64) for table in side] for side in (counts, judged)]
    costs = _network(network, devices)
    slots = [1.0] * len(counts)
    task = Task(devices, names, uneven, redundant, groups, time_limit, draws, seed, costs, slots)
    index = np.arange(len(widths)) if layers is None else np.asarray(layers, dtype=np.int64)
    if index.size != len(widths):
        raise MoescopeError(f"`layers` names {index.size} layers, but the counts go through {len(widths)}.")
    axis = LayerAxis(index, tuple(f"L{i:03d}" for i in index), np.array(widths), np.full(len(widths), np.nan))
    placed = place(halves[0], work[0], task)
    return judge(placed, halves, work[1], task, axis).assign_attrs(
        provenance(
            None,
            analysis="placement",
            method=list(names),
            judged_on="the counts solved on" if held_out is None else "counts held out",
        )
    )


def split_documents(
    documents: Int[np.ndarray, " document"], split: float, seed: int
) -> tuple[Int[np.ndarray, " document"], Int[np.ndarray, " document"]]:
    """Documents to solve on and documents to judge on, each ascending, at least one each.

    Raises:
        MoescopeError: there are fewer than two.
    """
    if documents.size < 2:
        raise MoescopeError("Placement is solved on some documents and judged on others: one document cannot be split.")
    mixed = np.random.default_rng(seed).permutation(documents)
    first = int(np.clip(round(split * documents.size), 1, documents.size - 1))
    return np.sort(mixed[:first]), np.sort(mixed[first:])


def _methods(method: str | Sequence[str]) -> tuple[str, ...]:
    asked = METHODS if method == "all" else (method,) if isinstance(method, str) else tuple(method)
    for name in asked:
        if name not in METHODS:
            raise MoescopeError(f"There is no placement method {name!r}; there are {', '.join(METHODS)}, and all.")
    return tuple(dict.fromkeys(asked))


def _check(devices: int, split: float, draws: int) -> None:
    if devices < 2:
        raise MoescopeError("On one device nothing crosses: ask for 2 devices or more.")
    if not 0 < split < 1:
        raise MoescopeError("`split` is the share of documents to solve on: between 0 and 1.")
    if draws < 1:
        raise MoescopeError("`draws` must be 1 or more: random placements are the control.")


def _network(asked: dict[str, Any], devices: int) -> Network:
    known = [entry.name for entry in fields(Network)]
    for name, value in asked.items():
        if name not in known:
            raise MoescopeError(f"The cost model has no {name!r}; it has {', '.join(known)}.")
        above = "bandwidth" in name or name == "batch"
        if value is not None and (value < 0 or (value == 0 and above)):
            raise MoescopeError(f"{name} must be above 0." if above else f"{name} must be 0 or more.")
    per_node = asked.get("devices_per_node")
    if per_node is not None and (per_node != int(per_node) or per_node < 1 or devices % int(per_node)):
        raise MoescopeError(f"{devices} devices do not divide into nodes of {per_node:g}.")
    given = asked | ({} if per_node is None else {"devices_per_node": int(per_node)})
    return Network(**given)


def _loads(counts: Counts, given: Sequence[Float[np.ndarray, " expert"]] | None) -> list[Float[np.ndarray, " expert"]]:
    """Loads as given, or what the transitions say of them: tokens that leave each layer, and that reach the last."""
    if given is None:
        return [*(np.asarray(table).sum(axis=1) for table in counts), np.asarray(counts[-1]).sum(axis=0)]
    return [np.asarray(load, dtype=np.float64) for load in given]


PLACEMENT_QUESTION = Analysis(
    name="placement",
    run=placement,
    figure="placement",
    help="Which device should hold which expert, and what does each answer cost on tokens it was not fitted to?",
    parameters=(
        Parameter("devices", int, 4, "devices that share the experts of each layer"),
        Parameter("method", str, "all", "how to place", ("all", *METHODS)),
        Parameter("split", float, 0.5, "share of documents to solve on; the others judge"),
        Parameter("ranks", str, "top1", "follow first experts, or all k x k pairs", ("top1", "all")),
        Parameter("time_limit", float, 30.0, "seconds for each of exflow and moetuner"),
        Parameter("uneven", bool, False, "let devices differ by one expert per layer"),
        Parameter("redundant", int, 0, "replicas per layer that eplb may add"),
        Parameter("groups", int, 1, "groups of experts of a group-limited router"),
        Parameter("draws", int, 200, "random placements"),
        Parameter("devices_per_node", int, None, "devices that share a node (default: all)"),
        Parameter("bandwidth", float, 450.0, "GB/s of each device inside its node"),
        Parameter("node_bandwidth", float, 50.0, "GB/s of each device to other nodes"),
        Parameter("latency_us", float, 0.0, "microseconds a transfer waits inside a node"),
        Parameter("node_latency_us", float, 0.0, "microseconds a transfer waits between nodes"),
        Parameter("compute_us", float, 0.0, "microseconds a device works for one token at one layer"),
        Parameter("bytes_per_token", float, None, "size of what is sent (default: the hidden state)"),
        Parameter("batch", int, 1024, "tokens that go through the layers together"),
        PHASE,
        SEED,
    ),
    tier="routing",
)
