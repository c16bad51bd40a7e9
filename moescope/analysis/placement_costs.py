"""What crossings and imbalance cost in time, by bandwidths and latencies that the user sets (METHODS 3).

A model to weigh placements against one another, not a simulator: two regimes bracket what a serving engine sees.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from jaxtyping import Float

COSTS = (
    "microseconds = batch_microseconds / batch. A batch: at each step every device sends and receives at once, by its "
    "links inside the node and to other nodes side by side; the step takes the slower of the two for the busiest "
    "device, its latency once, and then the busiest device's work; mean traffic stands for the batch's own. A token "
    "alone (alone_microseconds): its transfers one after another, each with its latency, and compute_us a layer"
)


@dataclass(frozen=True)
class Network:
    """The devices and what joins them.

    Attributes:
        devices_per_node: neighbouring devices that share a node; all of them if None.
        bandwidth: GB/s of each device to those of its node, one direction; 450 is NVLink 4.
        node_bandwidth: GB/s of each device to other nodes, one direction; 50 is one 400 Gb/s network card per device.
        latency_us, node_latency_us: microseconds that a transfer waits besides, inside a node and between nodes.
        compute_us: microseconds one device works for one token's experts at one layer; 0 counts communication alone.
        bytes_per_token: size of what is sent; the model's hidden state if None, and unknown for plain counts.
        batch: tokens that go through the layers together.
    """

    devices_per_node: int | None = None
    bandwidth: float = 450.0
    node_bandwidth: float = 50.0
    latency_us: float = 0.0
    node_latency_us: float = 0.0
    compute_us: float = 0.0
    bytes_per_token: float | None = None
    batch: int = 1024


@dataclass(frozen=True)
class Traffic:
    """What one placement does with given tokens, as shares.

    Attributes:
        crossed: [step] tokens that change device; NaN without tokens.
        across: [step] tokens that change node as well.
        near: [step] the most that any one device sends to, or receives from, others of its node.
        far: [step] the same to and from other nodes.
        load: [layer, device] the layer's selections; NaN without one.
    """

    crossed: Float[np.ndarray, " step"]
    across: Float[np.ndarray, " step"]
    near: Float[np.ndarray, " step"]
    far: Float[np.ndarray, " step"]
    load: Float[np.ndarray, "layer device"]

    @property
    def imbalance(self) -> Float[np.ndarray, " layer"]:
        """The busiest device's load over the mean."""
        return self.load.max(axis=1) * self.load.shape[1]


def traffic(
    hosts: Sequence[Float[np.ndarray, "expert device"]],
    counts: Sequence[Float[np.ndarray, "source_expert target_expert"]],
    loads: Sequence[Float[np.ndarray, " expert"]],
    per_node: int,
) -> Traffic:
    """What a placement does with tokens of these transitions and loads; replicas are used at random.

    Args:
        hosts: per layer, [expert, device] share of the expert's tokens that each device serves.
        counts: per step, tokens by source and target expert.
        loads: per layer, [expert] selections.
        per_node: devices of each node.
    """
    devices, steps = hosts[0].shape[1], len(counts)
    node = np.arange(devices) // per_node
    same_node = node[:, None] == node[None, :]
    same_device = np.eye(devices, dtype=bool)
    crossed, across, near, far = np.full((4, steps), np.nan)
    for step, table in enumerate(counts):
        total = table.sum()
        if total > 0:
            share = hosts[step].T @ table @ hosts[step + 1] / total
            crossed[step] = max(0.0, 1 - share[same_device].sum())
            across[step] = max(0.0, 1 - share[same_node].sum())
            for which, joined in ((near, same_node & ~same_device), (far, ~same_node)):
                moved = np.where(joined, share, 0.0)
                which[step] = max(moved.sum(axis=1).max(), moved.sum(axis=0).max())
    carried = np.stack([load @ held for load, held in zip(loads, hosts, strict=True)])
    total = np.array([load.sum() for load in loads], dtype=np.float64)[:, None]
    return Traffic(crossed, across, near, far, np.where(total > 0, carried / np.where(total > 0, total, 1), np.nan))


@dataclass(frozen=True)
class Time:
    """Microseconds by the cost model; NaN where the bytes of a token are not known.

    Attributes:
        step: [step] of a batch, from one MoE layer's experts through the next one's.
        batch: of a batch through all layers.
        alone: of one token alone through all layers.
    """

    step: Float[np.ndarray, " step"]
    batch: float
    alone: float


def time_of(found: Traffic, network: Network, slots: Sequence[float]) -> Time:
    """Turns traffic and load into time; `COSTS` says how.

    Args:
        found: what the placement does with the tokens.
        network: the devices and what joins them.
        slots: [step] transfers that each token makes.
    """
    if network.bytes_per_token is None:
        return Time(np.full(found.crossed.shape, np.nan), float("nan"), float("nan"))
    # GB/s are thousands of bytes per microsecond.
    links = (
        (found.near, found.crossed - found.across, network.latency_us, network.bandwidth * 1e3),
        (found.far, found.across, network.node_latency_us, network.node_bandwidth * 1e3),
    )
    transfers, sent = np.asarray(slots, dtype=np.float64), network.bytes_per_token
    moving, alone = np.zeros(len(transfers)), 0.0
    for busiest, share, latency, bandwidth in links:
        busiest, share = np.nan_to_num(busiest), np.nan_to_num(share)
        one = np.where(busiest > 1e-12, latency + network.batch * transfers * busiest * sent / bandwidth, 0.0)
        moving = np.maximum(moving, one)
        alone += float((transfers * share * (latency + sent / bandwidth)).sum())
    work = network.compute_us * network.batch * np.nan_to_num(found.load.max(axis=1))
    step = moving + work[1:]
    return Time(step, float(step.sum() + work[0]), alone + network.compute_us * len(found.load))
