"""How often groups (documents, token ids) and experts of one layer met: sparse tables, and sums of them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from moescope.analysis.kernels import add_pairs, list_pairs
from moescope.errors import MoescopeError

if TYPE_CHECKING:
    from jaxtyping import Float, Int

CELLS = 16_000_000
"""Cells (group x expert, over layers) that are counted densely at once: 128 MB of sums, a quarter of it for a shard."""


@dataclass(frozen=True)
class PairCounts:
    """How often each (group, expert) pair met in one MoE layer; sparse, sorted by group then expert.

    Attributes:
        group: [pair] int64; a document number or a token id.
        expert: [pair] int32.
        count: [pair] int64; tokens of the group at which the expert was selected.
        weight: [pair] float64 sum of routing weights, or None if they were not asked for.
        n_experts: how many experts the layer has, selected or not.
    """

    group: Int[np.ndarray, " pair"]
    expert: Int[np.ndarray, " pair"]
    count: Int[np.ndarray, " pair"]
    weight: Float[np.ndarray, " pair"] | None
    n_experts: int

    @classmethod
    def of_dense(cls, counts: Int[np.ndarray, "group expert"]) -> PairCounts:
        """The sparse form of a dense table with rows for groups 0, 1, 2, ...; NaN columns at its end are no experts."""
        dense = np.asarray(counts, dtype=np.float64)
        present = np.flatnonzero(~np.isnan(dense).all(axis=0))
        width = int(present[-1]) + 1 if present.size else 0
        dense = np.nan_to_num(dense[:, :width])
        if (dense < 0).any() or (dense != np.round(dense)).any():
            raise MoescopeError("Selection counts must be whole numbers, 0 or more.")
        group, expert = np.nonzero(dense)
        return cls(group, expert.astype(np.int32), dense[group, expert].astype(np.int64), None, width)

    def by_label(
        self, label: Int[np.ndarray, " group"], n_labels: int, what: str = "count"
    ) -> Float[np.ndarray, "expert label"]:
        """Sums over groups: [expert, label] float64 of `count` or `weight`; groups labelled below 0 are left out."""
        values = self.count if what == "count" else self.weight
        if values is None:
            raise MoescopeError("These counts were taken without weights: ask for `weighted=True`.")
        total = np.zeros((self.n_experts, n_labels))
        add_pairs(self.group, self.expert, values, np.asarray(label, dtype=np.int64), total)
        return total

    def regrouped(self, index_of_group: Int[np.ndarray, " group"]) -> PairCounts:
        """The same counts with each group renamed to `index_of_group[group]`; groups renamed below 0 are left out."""
        group = _look_up(index_of_group, self.group)
        kept = group >= 0
        weight = None if self.weight is None else self.weight[kept]
        return PairCounts(group[kept], self.expert[kept], self.count[kept], weight, self.n_experts)

    def dense(self, n_groups: int) -> Float[np.ndarray, "group expert"]:
        """The counts of groups 0 .. n_groups - 1 as a dense float64 table; groups outside are left out."""
        table = np.zeros((n_groups, self.n_experts))
        kept = (self.group >= 0) & (self.group < n_groups)
        table[self.group[kept], self.expert[kept]] = self.count[kept]
        return table


def _look_up(table: np.ndarray, index: np.ndarray) -> np.ndarray:
    """`table[index]`, -1 beyond its end."""
    if not table.size:
        return np.full(index.shape, -1, dtype=np.int64)
    return np.where(index < table.size, table[np.minimum(index, table.size - 1)], -1)


class PairSum:
    """Adds up tables of disjoint rows (shards, processes): the sum does not depend on how the rows were cut.

    Dense while groups x experts fit in `CELLS`, sparse beyond (a large vocabulary and many experts).
    """

    def __init__(self, groups: int, n_experts: int, weighted: bool, tokens: int | None = None) -> None:
        """
        Args:
            groups: the largest group number, and one.
            n_experts: experts of the layer.
            weighted: weights are summed too.
            tokens: how many there are in all, more than any count can be; None if that is not known.
        """
        self._shape = (groups, n_experts)
        self._dense = groups * n_experts <= CELLS
        shape = self._shape if self._dense else (0, n_experts)
        few = tokens is not None and tokens <= np.iinfo(np.int32).max
        self._count = np.zeros(shape, dtype=np.int32 if few else np.int64)  # half the memory to add and to look through
        self._weight = np.zeros(shape, dtype=np.float64) if weighted else None
        self._parts: list[PairCounts] = []
        self._merged = 0

    def add(self, names: Int[np.ndarray, " group"] | None, count: np.ndarray, weight: np.ndarray | None) -> None:
        """Adds counts (and weights) [group, expert] of the groups `names`, each named once; of all groups if None."""
        if names is None:
            names = np.arange(self._shape[0])
            where: Any = slice(None)
        else:
            where = names
        if self._dense:
            self._count[where] += count
            if self._weight is not None and weight is not None:
                self._weight[where] += weight
            return
        row, expert = np.nonzero(count)
        kept = None if weight is None else weight[row, expert]
        self._parts.append(PairCounts(names[row], expert.astype(np.int32), count[row, expert], kept, self._shape[1]))
        if sum(part.count.size for part in self._parts[1:]) > max(self._merged, CELLS // 8):
            self._parts = [merge_pairs(self._parts, self._shape[1])]
            self._merged = self._parts[0].count.size

    def counts(self) -> PairCounts:
        """The sum, sparse."""
        if not self._dense:
            return merge_pairs(self._parts, self._shape[1])
        n = np.count_nonzero(self._count)
        group, expert, count = np.empty(n, np.int64), np.empty(n, np.int32), np.empty(n, np.int64)
        list_pairs(self._count, group, expert, count)
        weight = None if self._weight is None else self._weight[group, expert]
        return PairCounts(group, expert, count, weight, self._shape[1])


def merge_pairs(parts: Iterable[PairCounts], n_experts: int) -> PairCounts:
    """Adds up pair counts of disjoint rows."""
    held = list(parts)
    weighted = bool(held) and held[0].weight is not None
    if not held:
        empty = np.empty(0, dtype=np.int64)
        return PairCounts(empty, empty.astype(np.int32), empty, None, n_experts)
    group = np.concatenate([part.group for part in held])
    expert = np.concatenate([part.expert for part in held]).astype(np.int64)
    order = np.lexsort((expert, group))
    group, expert = group[order], expert[order]
    first = np.ones(group.size, dtype=bool)
    first[1:] = (group[1:] != group[:-1]) | (expert[1:] != expert[:-1])
    start = np.flatnonzero(first)
    count = np.add.reduceat(np.concatenate([part.count for part in held])[order], start) if start.size else group
    weight = None
    if weighted:
        values = np.concatenate([_weights(part) for part in held])[order]
        weight = np.add.reduceat(values, start) if start.size else values
    return PairCounts(group[start], expert[start].astype(np.int32), count.astype(np.int64), weight, n_experts)


def _weights(part: PairCounts) -> np.ndarray:
    if part.weight is None:
        raise MoescopeError("Some parts were counted with weights and others without: count all of them one way.")
    return part.weight
