"""Sequences as they ran: each one whole, its tokens in order, streamed from the shards of a store.

What depends on the order of tokens (windows, caches) must not see a sequence cut in two, nor two sequences as one. A
run is the rows of one sequence of one document; the pieces of one that goes on in the next shard are put together.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from moescope.analysis.counts import Labelling, Phase
from moescope.analysis.locality_kernels import drop_repeats
from moescope.analysis.routed_rows import kept_rows, runs_of, slot_ids
from moescope.analysis.spreading import over_shards
from moescope.analysis.transition_kernels import reorder_runs, stirred
from moescope.errors import MoescopeError

if TYPE_CHECKING:
    from jaxtyping import Int

    from moescope.store import Store

GROUPS, FEWEST, CELLS = 200, 20, 4000
"""Documents of a label are summed in at most 200 groups; in fewer, though 20, where labels are many."""
GROUPED = "documents beyond {groups} of a label are drawn in {groups} groups of whole documents"

SHUFFLED = (
    "the tokens of each sequence in random order, the same in every layer: keeps what each sequence uses, and loses "
    "only that neighbouring tokens use the same"
)


@dataclass(frozen=True)
class Cells:
    """Which row of a table each document adds to: a document, or a group of whole documents, of one label.

    Attributes:
        of_document: [document number] cell; -1 for documents that are left out.
        label: [cell] index of its label.
        tokens: [cell] stored tokens.
        groups: the most cells a label can have.
    """

    of_document: Int[np.ndarray, " document"]
    label: Int[np.ndarray, " cell"]
    tokens: Int[np.ndarray, " cell"]
    groups: int

    @classmethod
    def of(cls, chosen: Labelling) -> Cells:
        """Cells of labelled documents; groups are drawn by a hash of the document's number, whatever its shard."""
        n_labels = len(chosen.labels)
        groups = min(GROUPS, max(FEWEST, CELLS // n_labels))
        hashed = np.array([int(stirred(0, int(number))) % groups for number in chosen.documents.tolist()], np.int64)
        key = np.empty(chosen.documents.size, np.int64)
        for code in range(n_labels):
            mine = np.flatnonzero(chosen.code == code)
            key[mine] = code * groups + (np.arange(mine.size) if mine.size <= groups else hashed[mine])
        found, cell = np.unique(key, return_inverse=True)
        tokens = np.bincount(cell, weights=chosen.tokens, minlength=found.size).astype(np.int64)
        return cls(chosen.spread(cell), found // groups, tokens, groups)

    def of_runs(self, document: Int[np.ndarray, " run"]) -> tuple[np.ndarray, np.ndarray]:
        """(cell, label) of each run; -1 for runs of documents that are left out."""
        known = document < self.of_document.size
        cell = np.where(known, self.of_document[np.where(known, document, 0)], -1)
        return cell, np.where(cell >= 0, self.label[cell], -1)


@dataclass(frozen=True)
class Runs:
    """Some whole runs of one layer.

    Attributes:
        ids: [row, rank] signed ids, -1 where a slot is missing or names an expert its token has named before.
        edge: [run + 1] first row of each run, and the end.
        document, sequence: [run] what the run is.
    """

    ids: Int[np.ndarray, "row rank"]
    edge: Int[np.ndarray, " edge"]
    document: Int[np.ndarray, " run"]
    sequence: Int[np.ndarray, " run"]

    def shuffled(self, seed: int, draw: int) -> Int[np.ndarray, "row rank"]:
        """The ids with the rows of each run in random order; it depends on seed, draw, document and sequence alone."""
        order = np.empty(len(self.ids), dtype=np.int32)
        reorder_runs(self.edge, self.document, self.sequence, seed, draw, True, order)
        return self.ids[order]


def split_runs(store: Store, phase: Phase | None = None) -> frozenset[tuple[int, int]]:
    """(document, sequence) of every run that goes on from one shard into the next."""
    ends = list(over_shards(store, _ends, phase))
    return frozenset(here[1] for here, there in itertools.pairwise(ends) if here and there and here[1] == there[0])


def over_runs(
    store: Store,
    site: Any,
    phase: Phase | None,
    split: frozenset[tuple[int, int]],
    function: Callable[..., Any],
    *arguments: Any,
) -> Iterator[Any]:
    """`function(runs, *arguments)` of all whole runs of one layer: each shard's, then those that shards cut in two.

    Args:
        store, site: as elsewhere.
        phase: tokens of another phase are left out, and what is left of a run closes up.
        split: from `split_runs` of the same store and phase.
        function: of a module's top level, and its arguments plain, so that another process can be handed them.
    """
    held: dict[tuple[int, int], list[np.ndarray]] = {}
    for found, apart in over_shards(store, _of_shard, site, phase, split, function, arguments):
        yield found
        for key, ids in apart:
            held.setdefault(key, []).append(ids)
    if held:
        whole = [np.concatenate(parts) for parts in held.values()]
        edge = np.cumsum([0, *(len(ids) for ids in whole)])
        document, sequence = np.array(list(held), dtype=np.int64).T
        yield function(Runs(np.concatenate(whole), edge, document, sequence), *arguments)


def _ends(shard: Any, phase: Phase | None) -> tuple[tuple[int, int], tuple[int, int]] | None:
    """The first and the last run of a shard."""
    _, document, sequence = runs_of(shard, kept_rows(shard, None, phase))
    if not document.size:
        return None
    return (int(document[0]), int(sequence[0])), (int(document[-1]), int(sequence[-1]))


def _of_shard(
    shard: Any,
    site: Any,
    phase: Phase | None,
    split: frozenset[tuple[int, int]],
    function: Callable[..., Any],
    arguments: tuple[Any, ...],
) -> tuple[Any, list[tuple[tuple[int, int], np.ndarray]]]:
    """The answer for a shard's own runs, and its pieces of runs that other shards have a part of."""
    rows = kept_rows(shard, None, phase)
    edge, document, sequence = runs_of(shard, rows)
    ids = slot_ids(shard, site, "all", rows)
    drop_repeats(ids, site.n_experts)
    names = list(zip(document.tolist(), sequence.tolist(), strict=True)) if split else []
    apart = [(name, ids[edge[run] : edge[run + 1]]) for run, name in enumerate(names) if name in split]
    if apart:
        own = np.array([name not in split for name in names])
        length = np.diff(edge)
        ids = ids[np.repeat(own, length)]
        edge, document, sequence = np.append(0, np.cumsum(length[own])), document[own], sequence[own]
    return function(Runs(ids, edge, document, sequence), *arguments), apart


def runs_of_ids(ids: Int[np.ndarray, "token rank"], sequence: Int[np.ndarray, " token"] | None, n_experts: int) -> Runs:
    """Plain ids as runs.

    Args:
        ids: [token, rank] expert ids, negative where there is none; tokens of a sequence together and in order.
        sequence: [token] which sequence a token is of; all of one if None.
        n_experts: of the layer.

    Raises:
        MoescopeError: shapes that do not fit, an id beyond the experts, or a sequence in two places.
    """
    table = np.asarray(ids)
    if table.ndim != 2 or table.dtype.kind not in "iu":
        raise MoescopeError("Ids are whole numbers with the axes token and rank.")
    if table.max(initial=-1) >= n_experts:
        raise MoescopeError(f"An id names an expert beyond the {n_experts} of the layer.")
    table = np.maximum(table, -1).astype(np.int16 if n_experts <= 2**15 else np.int32)
    number = np.zeros(len(table), np.int64) if sequence is None else np.asarray(sequence).astype(np.int64)
    if number.shape != (len(table),):
        raise MoescopeError(f"`sequence` names {number.size} tokens, the ids have {len(table)}: give one for each.")
    first = np.flatnonzero(np.diff(number, prepend=number[:1] - 1)) if number.size else np.empty(0, np.int64)
    if np.unique(number[first]).size < first.size:
        raise MoescopeError("The tokens of a sequence must stand together, in order.")
    drop_repeats(table, n_experts)
    return Runs(table, np.append(first, len(table)), number[first], number[first])
