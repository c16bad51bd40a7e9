"""Sequences as they ran: each one whole, its tokens in order, streamed from the shards of a store.

What depends on the order of tokens (windows, caches) must not see a sequence cut in two, nor two sequences as one. A
run is the rows of one sequence of one document; a run that goes on in the next shard is held back until it ends.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from moescope.analysis.counts import Labelling, Phase
from moescope.analysis.locality_kernels import drop_repeats
from moescope.analysis.routed_rows import kept_rows, runs_of, slot_ids
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


def whole_runs(store: Store, site: Any, phase: Phase | None = None) -> Iterator[Runs]:
    """The runs of one layer, some shard's worth at a time; tokens of another phase are left out of them."""
    held = None
    rows = [kept_rows(shard, None, phase) for shard in store.shards[:1]]
    ahead = [runs_of(shard, kept) for shard, kept in zip(store.shards[:1], rows, strict=True)]
    for place, shard in enumerate(store.shards):
        (edge, document, sequence), kept = ahead.pop(), rows.pop()
        for following in store.shards[place + 1 : place + 2]:
            rows.append(kept_rows(following, None, phase))
            ahead.append(runs_of(following, rows[-1]))
        ids = slot_ids(shard, site, "all", kept)
        if held is not None:
            ids = np.concatenate([held, ids])
            edge = np.concatenate([[0], edge[1:] + len(held)])
        goes_on = _goes_on(document, sequence, *ahead[-1][1:]) if ahead else False
        closed = document.size - goes_on
        end = int(edge[closed])
        held = ids[end:] if goes_on else None
        if closed:
            drop_repeats(ids[:end], site.n_experts)
            yield Runs(ids[:end], edge[: closed + 1], document[:closed], sequence[:closed])


def _goes_on(document: np.ndarray, sequence: np.ndarray, next_document: np.ndarray, next_sequence: np.ndarray) -> bool:
    if not document.size or not next_document.size:
        return False
    return bool(document[-1] == next_document[0] and sequence[-1] == next_sequence[0])


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
