"""Routing with and without memory, and a store whose shards end in the middle of sequences."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np

from moescope.store import Store


def sticky_ids(
    rng: np.random.Generator, sequence: np.ndarray, n_experts: int, top_k: int, stick: float, topic: float = 0.0
) -> np.ndarray:
    """[token, rank] ids whose scores go on from token to token inside a sequence.

    Args:
        stick: 0 draws every token anew, 1 never changes.
        topic: how much a sequence prefers some experts throughout.
    """
    ids = np.empty((sequence.size, top_k), int)
    for number in np.unique(sequence):
        rows = np.flatnonzero(sequence == number)
        liked, scores = rng.normal(size=n_experts) * topic, rng.normal(size=n_experts)
        for row in rows:
            scores = stick * scores + np.sqrt(1 - stick**2) * rng.normal(size=n_experts)
            ids[row] = np.argsort(-(scores + liked))[:top_k]
    return ids


class _Part:
    """Some rows of a shard, as a shard."""

    def __init__(self, shard: Any, first: int, last: int) -> None:
        self.shard, self.rows, self.n_tokens = shard, slice(first, last), last - first

    def tokens(self, columns: Sequence[str]) -> Any:
        return self.shard.tokens(columns).slice(self.rows.start, self.n_tokens)

    def routing(self, key: str, fields: Sequence[str]) -> SimpleNamespace:
        found = self.shard.routing(key, fields=fields)
        valid = None if found.valid is None else found.valid[self.rows]
        return SimpleNamespace(expert=found.expert[self.rows], valid=valid)


def recut(store: Store, cuts: Sequence[int]) -> Store:
    """The same store (of one shard) as if its shards ended at these rows, and without its aggregates."""
    (shard,) = store.shards
    edges = [0, *sorted(cuts), shard.n_tokens]
    cut = copy.copy(store)
    cut.shards = [_Part(shard, a, b) for a, b in itertools.pairwise(edges)]  # pyright: ignore
    cut.cached = lambda name, compute, params=None: compute()  # pyright: ignore[reportAttributeAccessIssue]
    return cut
