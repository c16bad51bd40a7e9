"""EPLB: replicate the busiest experts and pack the replicas onto devices, heaviest first (METHODS 3).

Source: the expert parallelism load balancer of DeepSeek-V3 (arXiv 2412.19437, section 3.4), re-derived from its
description; its published example is a test. It looks at load alone, not at where tokens come from.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from moescope.errors import MoescopeError

if TYPE_CHECKING:
    from jaxtyping import Float, Int


@dataclass(frozen=True)
class Replication:
    """Which expert each slot of each device holds.

    Attributes:
        expert: [layer, device, slot] int64; the logical expert of each physical one, -1 for a slot left empty (only
            where experts and replicas do not divide evenly over devices).
        replicas: [layer, expert] int64; how many times each expert is held, at least 1.
        hierarchical: were groups of experts kept together on nodes?
    """

    expert: Int[np.ndarray, "layer device slot"]
    replicas: Int[np.ndarray, "layer expert"]
    hierarchical: bool

    def hosts(self, layer: int) -> Float[np.ndarray, "expert device"]:
        """The share of each expert's tokens that each device serves, its replicas being used equally."""
        held = np.zeros((self.replicas.shape[1], self.expert.shape[1]))
        device, slot = np.nonzero(self.expert[layer] >= 0)
        np.add.at(held, (self.expert[layer, device, slot], device), 1.0)
        return held / self.replicas[layer][:, None]


def eplb(
    load: Float[np.ndarray, "layer expert"],
    devices: int,
    redundant: int = 0,
    groups: int = 1,
    nodes: int = 1,
    uneven: bool = False,
) -> Replication:
    """Replicates and packs experts so that devices carry even load.

    How to read it: `hosts(layer)` times the load is what each device carries; a device holds the same number of
    experts as every other. Load is evened out, communication is not considered.

    Args:
        load: [layer, expert] tokens (or any measure of work) of each expert, >= 0.
        devices: how many devices share each layer.
        redundant: replicas beyond one of each expert, per layer.
        groups: groups of consecutive experts among which the router is limited (DeepSeek-V3: 8); 1 if it is not.
        nodes: machines the devices stand in. Where `groups` divides over `nodes`, groups are first packed onto nodes
            and experts replicated inside a node ("hierarchical"); otherwise nodes are ignored ("global").
        uneven: let devices differ by one expert where experts and replicas do not divide over devices.

    Returns:
        The slots of every device.

    Raises:
        MoescopeError: the numbers do not divide, or load is negative or missing.
    """
    table = np.asarray(load, dtype=np.float64)
    if table.ndim != 2 or table.shape[1] == 0 or not (table >= 0).all():
        raise MoescopeError("EPLB needs the load of every expert, [layer, expert], each 0 or more and none missing.")
    if redundant < 0 or min(devices, groups, nodes) < 1:
        raise MoescopeError("Devices, groups and nodes must be 1 or more, redundant experts 0 or more.")
    n_experts = table.shape[1]
    slots = n_experts + redundant
    if slots % devices and not uneven:
        raise MoescopeError(
            f"{slots} experts and replicas do not divide over {devices} devices: choose `redundant` so that they do, "
            "or allow uneven=True."
        )
    hierarchical = nodes > 1 and groups % nodes == 0
    if hierarchical and (n_experts % groups or devices % nodes or redundant % nodes or slots % devices):
        raise MoescopeError(
            f"{groups} groups over {nodes} nodes: {n_experts} experts must divide into the groups, and {devices} "
            f"devices and {redundant} replicas over the nodes; or give groups=1 to ignore nodes."
        )
    parts = (groups, nodes) if hierarchical else (1, 1)
    held, copies = zip(*(_layer(row, devices, slots, *parts) for row in table), strict=True) if len(table) else ((), ())
    width = -(-slots // devices)
    return Replication(
        expert=np.array(held, dtype=np.int64).reshape(len(table), devices, width),
        replicas=np.array(copies, dtype=np.int64).reshape(len(table), n_experts),
        hierarchical=hierarchical,
    )


def _layer(load: Float[np.ndarray, " expert"], devices: int, slots: int, groups: int, nodes: int):
    """Slots [device, slot] and replicas [expert] of one layer: groups to nodes, replicas inside them."""
    per_group, per_node = load.size // groups, devices // nodes
    node_of_group = pack(load.reshape(groups, per_group).sum(axis=1), nodes)
    held = np.full((devices, -(-slots // devices)), -1, dtype=np.int64)
    copies = np.zeros(load.size, dtype=np.int64)
    for node in range(nodes):
        # In the order in which the groups were packed, heaviest first, as the published example has it.
        members = np.concatenate([np.arange(g * per_group, (g + 1) * per_group) for g in node_of_group[node]])
        here = members[replicate(load[members], slots // nodes - members.size)]
        copies += np.bincount(here, minlength=load.size)
        packed = pack(load[here] / copies[here], per_node)
        for place, pieces in enumerate(packed):
            held[node * per_node + place, : len(pieces)] = here[pieces]
    return held, copies


def replicate(load: Float[np.ndarray, " expert"], extra: int) -> Int[np.ndarray, " slot"]:
    """The expert of each slot: every expert once, then `extra` times whichever has the most load per replica."""
    copies = np.ones(load.size, dtype=np.int64)
    chosen = list(range(load.size))
    for _ in range(extra):
        busiest = int(np.argmax(load / copies))
        copies[busiest] += 1
        chosen.append(busiest)
    return np.array(chosen, dtype=np.int64)


def pack(load: Float[np.ndarray, " item"], packs: int) -> Sequence[list[int]]:
    """Items of each pack, in the order they went in: heaviest first, into the lightest pack that has room.

    Packs hold equally many items; where that is impossible, some one more than others.
    """
    room, spare = divmod(load.size, packs)
    held: list[list[int]] = [[] for _ in range(packs)]
    carried = np.zeros(packs)
    for item in np.argsort(-load, kind="stable").tolist():
        # The last `spare` items that overfill a pack by one may do so in any pack.
        free = [p for p in range(packs) if len(held[p]) < room or (len(held[p]) == room and spare > 0)]
        lightest = min(free, key=lambda p: carried[p])
        spare -= len(held[lightest]) == room
        held[lightest].append(item)
        carried[lightest] += load[item]
    return held
