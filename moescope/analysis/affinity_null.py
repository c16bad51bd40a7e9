"""The null of affinity: one layer's tokens moved against the other's inside each sequence, counted draw by draw."""

from __future__ import annotations

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from moescope.analysis.counts import Phase
from moescope.analysis.information import mutual_information
from moescope.analysis.routed_rows import Ranks, kept_rows, rank_worth, runs_of, slot_ids
from moescope.analysis.spreading import THREADS, over_shards
from moescope.analysis.transition_kernels import count_reordered
from moescope.analysis.watching import counted

if TYPE_CHECKING:
    from jaxtyping import Float, Int

    from moescope.store import Store


Null = Literal["rotate", "shuffle"]

BLOCK_CELLS = 4_000_000
"""Cells (draws x source x target experts) of the null counted at once: 32 MB for each shard that is at work."""

WORK = 2e9
"""Slot pairs that the null may count by default: some seconds on one core."""

NULL = {
    "rotate": (
        "the target layer's tokens rotated by a random offset within each sequence: keeps what each sequence uses in "
        "each layer, and how routing runs on from token to token, and breaks only which token goes with which"
    ),
    "shuffle": (
        "the target layer's tokens shuffled within each sequence: keeps what each sequence uses in each layer; right "
        "only where neighbouring tokens are not routed alike, and too narrow otherwise"
    ),
    "analytic": (
        "tokens drawn independently with both layers' loads kept: the bias of mutual information to first order and, "
        "for top-1 counts, the G-test; tokens of one document are not independent, so that p is too small for text"
    ),
}


@dataclass(frozen=True)
class Draws:
    """What the null of `affinity` is drawn by."""

    ranks: Ranks
    null: Null
    permutations: int
    seed: int
    documents: np.ndarray | None
    phase: Phase | None


@dataclass
class Drawn:
    """The null of one pair: mutual information by draw; per cell the draws at least as large, and the summed counts."""

    mi: Float[np.ndarray, " draw"]
    above: Int[np.ndarray, "source target"]
    summed: Int[np.ndarray, "source target"]


def enough_draws(store: Store, sites: list[tuple[Any, Any]], ranks: Ranks, cells: bool) -> int:
    """Draws that let one transition reach q <= 0.05 (alone among m tests it has q = m p), within what takes seconds."""
    tests = sum(a.n_experts * b.n_experts for a, b in sites) if cells else len(sites)
    slots = sum(1 if ranks == "top1" else a.top_k * b.top_k for a, b in sites)
    wanted = np.clip(tests / 0.05, 200, 5000)
    # A cell of a draw takes some four times a slot pair: its logarithm.
    return int(max(19, min(wanted, WORK / max(store.n_tokens * slots, 1), WORK / (4 * tests))))


def draw_null(store: Store, sites: list[tuple[Any, Any]], tables: list[np.ndarray], how: Draws) -> list[Drawn]:
    """Draws the null of every pair, in blocks of bounded size."""
    empty = np.zeros((0, 0), np.int64)
    shapes = [table.shape for table in tables]
    drawn = [Drawn(np.full(how.permutations, np.nan), empty, empty) for _ in sites]
    for held, shape in zip(drawn, shapes, strict=False):
        held.above, held.summed = np.zeros(shape, np.int64), np.zeros(shape, np.int64)
    for block in counted("draws of the null", list(_blocks(sites, how.permutations))):
        for (index, start, _), stack in zip(block, _count_block(store, sites, block, how), strict=True):
            drawn[index].mi[start : start + len(stack)] = [mutual_information(table) for table in stack]
            if tables:
                drawn[index].above += (stack >= tables[index]).sum(axis=0)
                drawn[index].summed += stack.sum(axis=0)
    return drawn


def _count_block(
    store: Store, sites: list[tuple[Any, Any]], block: list[tuple[int, int, int]], how: Draws
) -> list[Int[np.ndarray, "draw source target"]]:
    """Counts under the null, one stack of draws for each entry of the block."""
    asked = tuple((*sites[index], start, stop) for index, start, stop in block)
    counts = [np.zeros((stop - start, a.n_experts, b.n_experts), np.int64) for a, b, start, stop in asked]
    # Shards are shared out over threads or an executor; what cores that leaves, over the pairs of a shard.
    threads = max(1, min(os.cpu_count() or 1, 8) // max(1, min(len(store.shards), THREADS)))
    for stacks in over_shards(store, _shard_block, asked, how, threads):
        for total, stack in zip(counts, stacks, strict=True):
            total += stack
    return counts


def _shard_block(
    shard: Any, asked: tuple[tuple[Any, Any, int, int], ...], how: Draws, threads: int
) -> list[Int[np.ndarray, "draw source target"]]:
    """The counts of one shard: for each (source, target, first draw, end) a stack of draws."""
    rows = kept_rows(shard, how.documents, how.phase)
    runs = runs_of(shard, rows)
    wanted = {site.key: site for source, target, *_ in asked for site in (source, target)}
    ids = {key: slot_ids(shard, site, how.ranks, rows) for key, site in wanted.items()}
    counts = []
    with ThreadPoolExecutor(threads) as pool:
        jobs = []
        for source, target, start, stop in asked:
            a, b = ids[source.key], ids[target.key]
            worth = rank_worth(how.ranks, a.shape[1]), rank_worth(how.ranks, b.shape[1])
            counts.append(np.zeros((stop - start, source.n_experts, target.n_experts), np.int64))
            shuffle = how.null == "shuffle"
            jobs.append(pool.submit(count_reordered, a, b, *worth, *runs, how.seed, start, shuffle, counts[-1]))
        for job in jobs:
            job.result()
    return counts


def _blocks(sites: list[tuple[Any, Any]], permutations: int) -> Iterator[list[tuple[int, int, int]]]:
    """Cuts (pair, draws) into blocks of bounded size: lists of (pair, first draw, end)."""
    block: list[tuple[int, int, int]] = []
    room = BLOCK_CELLS
    for index, (source, target) in enumerate(sites):
        size = source.n_experts * target.n_experts
        start = 0
        while start < permutations:
            fits = room // size
            if not fits and block:
                yield block
                block, room = [], BLOCK_CELLS
                continue
            stop = min(permutations, start + max(1, fits))
            block.append((index, start, stop))
            room -= (stop - start) * size
            start = stop
    if block:
        yield block
