"""Counting paths: the first-ranked experts of a window of layers, streamed, in bounded memory."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from moescope.analysis.counts import Phase
from moescope.analysis.information import entropy
from moescope.analysis.routed_rows import kept_rows, runs_of, slot_ids
from moescope.analysis.spreading import over_shards
from moescope.analysis.transition_kernels import count_transitions, hash_rows, reorder_runs
from moescope.errors import MoescopeError

if TYPE_CHECKING:
    from jaxtyping import Int

    from moescope.store import Store


def window(store: Store, layers: Sequence[Any] | None, length: int) -> list[Any]:
    """The sites of a window of layers: the ones named, or the first `length`."""
    sites = list(store.sites)[: max(length, 0)] if layers is None else [store.site(layer) for layer in layers]
    if len(sites) < 2:
        raise MoescopeError(f"A path needs two MoE layers; this window has {len(sites)}.")
    return sites


class Held:
    """Counts of paths, at most `capacity` of them; what was dropped had at most `missed` tokens each."""

    def __init__(self, capacity: int, depth: int) -> None:
        self.capacity = capacity
        self.missed = 0
        self.tokens = 0
        self.hash = np.empty(0, dtype=np.uint64)
        self.count = np.empty(0, dtype=np.int64)
        self.route = np.empty((0, depth), dtype=np.int32)
        self._waiting: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []

    def add(self, found: np.ndarray, count: np.ndarray, routes: np.ndarray) -> None:
        """Adds different paths: their hashes, counts and experts."""
        self.tokens += int(count.sum())
        self._waiting.append((found, count, routes))
        if sum(part[0].size for part in self._waiting) > max(self.hash.size, self.capacity // 4):
            self.merge()

    def merge(self) -> None:
        """Adds what waits, as in lossy counting: a path that comes back lacks what it was dropped with."""
        parts = [(self.hash, self.count, self.route), *self._waiting]
        hashes, counts, routes = (np.concatenate(column) for column in zip(*parts, strict=True))
        del parts  # hundreds of megabytes, which are in the three now
        self._waiting, self.hash, self.count, self.route = [], hashes[:0], counts[:0], routes[:0]
        order = np.argsort(hashes, kind="stable")
        hashes = hashes[order]
        first = np.flatnonzero(np.diff(hashes, prepend=~hashes[:1]))
        self.hash = hashes[first]
        del hashes
        self.count = np.add.reduceat(counts[order], first) if first.size else counts
        self.route = routes[order[first]]
        if self.hash.size > self.capacity:
            order = np.lexsort((self.hash, -self.count))
            self.missed += int(self.count[order[self.capacity]])
            kept = np.sort(order[: self.capacity])
            self.hash, self.count, self.route = self.hash[kept], self.count[kept], self.route[kept]

    def best(self, top: int) -> Held:
        """Those that can be among the `top` most frequent."""
        top = min(top, self.count.size)
        least = int(np.partition(self.count, -top)[-top])
        kept = np.flatnonzero(self.count >= least - self.missed)
        chosen = Held(self.capacity, self.route.shape[1])
        chosen.hash, chosen.count, chosen.route = self.hash[kept], self.count[kept], self.route[kept]
        return chosen

    def entropy(self) -> float:
        return float("nan") if self.missed else entropy(self.count)


class Walk:
    """Counts the first-ranked experts of a window of layers, shard by shard, as they are or as a control."""

    def __init__(
        self, store: Store, sites: list[Any], documents: np.ndarray | None, phase: Phase | None, seed: int
    ) -> None:
        self.store = store
        self.missing = 0
        self._sites = sites
        self._how = (tuple(sites), documents, phase, seed)

    def count(self, draw: int | None, capacity: int) -> tuple[Held, list[np.ndarray], int]:
        """(paths, [E, E] counts of each step, tokens)."""
        self.missing = 0
        held = Held(capacity, len(self._sites))
        steps = [np.zeros((a.n_experts, b.n_experts), np.int64) for a, b in itertools.pairwise(self._sites)]
        for paths, tables, missing in over_shards(self.store, _shard_paths, *self._how, draw):
            held.add(*paths)
            self.missing += missing
            for step, table in zip(steps, tables, strict=True):
                step += table
        held.merge()
        return held, steps, held.tokens

    def count_of(self, wanted: np.ndarray, draw: int | None) -> Int[np.ndarray, " path"]:
        """Exact counts of the paths with these hashes."""
        order = np.argsort(wanted)
        count = np.zeros(wanted.size, dtype=np.int64)
        for found in over_shards(self.store, _shard_matches, *self._how, draw, wanted[order]):
            count[order] += found
        return count


def _routes(
    shard: Any, sites: tuple[Any, ...], documents: np.ndarray | None, phase: Phase | None, seed: int, draw: int | None
) -> tuple[np.ndarray, np.ndarray, int]:
    """(hash [row], expert [row, step], rows left out because an expert is missing)."""
    rows = kept_rows(shard, documents, phase)
    ids = [slot_ids(shard, site, "top1", rows)[:, 0] for site in sites]
    route = np.stack([column.astype(np.int32) for column in ids], axis=1)
    if draw is not None:
        runs, order = runs_of(shard, rows), np.empty(len(route), dtype=np.int64)
        for step in range(1, len(sites)):
            reorder_runs(*runs, seed, draw * len(sites) + step, False, order)
            route[:, step] = route[order, step]
    whole = (route >= 0).all(axis=1)
    kept = route if whole.all() else route[whole]
    hashes = np.empty(len(kept), dtype=np.uint64)
    hash_rows(kept, hashes)
    return hashes, kept, int((~whole).sum())


def _shard_paths(shard: Any, sites: tuple[Any, ...], *how: Any) -> tuple[tuple[np.ndarray, ...], list[np.ndarray], int]:
    """((hash, count, experts) of the shard's different paths, counts of each step, rows left out)."""
    hashes, route, missing = _routes(shard, sites, *how)
    one = np.ones(1, dtype=np.int64)
    tables = [np.zeros((a.n_experts, b.n_experts), np.int64) for a, b in itertools.pairwise(sites)]
    for step, table in enumerate(tables):
        a, b = (np.ascontiguousarray(route[:, place, None]) for place in (step, step + 1))
        count_transitions(a, b, one, one, table)
    found, first, count = np.unique(hashes, return_index=True, return_counts=True)
    return (found, count, route[first]), tables, missing


def _shard_matches(
    shard: Any,
    sites: tuple[Any, ...],
    documents: np.ndarray | None,
    phase: Phase | None,
    seed: int,
    draw: int | None,
    known: np.ndarray,
) -> Int[np.ndarray, " path"]:
    """Rows of the shard that take each path of ascending hashes `known`."""
    hashes, _, _ = _routes(shard, sites, documents, phase, seed, draw)
    place = np.minimum(np.searchsorted(known, hashes), known.size - 1)
    return np.bincount(place[known[place] == hashes], minlength=known.size)
