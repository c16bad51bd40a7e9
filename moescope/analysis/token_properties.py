"""Counts of token properties (a token id, a class of tokens, a marker) and experts by document, in one pass.

A property is a set of rows; a row may have several. Each combination of properties that can occur is a *signature*, a
row has exactly one, and all counts follow from those of (document, signature, expert).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from scipy.sparse import csr_array

from moescope.analysis.counts import Labelling, Phase, labelling, row_groups, shard_table
from moescope.analysis.pairs import PairCounts, PairSum
from moescope.analysis.spreading import over_shards

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int

    from moescope.store import Store


class Signatures(Protocol):
    """Which properties each row of a shard has. A plain object: another process can be handed it."""

    @property
    def member(self) -> Any:
        """[signature, property] bool, dense or sparse: which properties a signature has; signature 0 has none."""
        ...

    def of_rows(self, shard: Any) -> Int[np.ndarray, " row"]:
        """The signature of each row."""
        ...


@dataclass(frozen=True)
class SignaturesOfIds:
    """Properties of a row that its token id alone decides.

    Attributes:
        of_id: [token id] signature; ids beyond its end have none.
        member: [signature, property].
    """

    of_id: Int[np.ndarray, " token_id"]
    member: Bool[np.ndarray, "signature property"]

    @classmethod
    def of_sets(cls, sets: Sequence[Sequence[int]]) -> SignaturesOfIds:
        """From the token ids of each property."""
        n_ids = max((max(ids, default=-1) for ids in sets), default=-1) + 1
        has = np.zeros((n_ids + 1, len(sets)), dtype=bool)  # the last row stands for ids that no property names
        for place, ids in enumerate(sets):
            has[list(ids), place] = True
        member, of_id = np.unique(has, axis=0, return_inverse=True)
        return cls(of_id.ravel()[:-1], member)  # rows sort False first: signature 0 has no property

    def of_rows(self, shard: Any) -> Int[np.ndarray, " row"]:
        """The signature of each row."""
        token = shard.tokens(["token_id"])["token_id"].to_numpy().astype(np.int64)
        if not self.of_id.size:
            return np.zeros(token.size, dtype=np.int64)
        inside = (token >= 0) & (token < self.of_id.size)
        return np.where(inside, self.of_id[np.clip(token, 0, self.of_id.size - 1)], 0)


@dataclass(frozen=True)
class PropertyCounts:
    """Counts by document of some documents of a store.

    Attributes:
        documents: which documents, and how many were left out.
        tokens: [document] tokens of each.
        held: [document, property] tokens that have the property, sparse.
        joint: per layer, tokens with the property at which the expert was active; groups are
            document x properties + property.
        selections: per layer, [document, expert] tokens at which the expert was active.
    """

    documents: Labelling
    tokens: Int[np.ndarray, " document"]
    held: csr_array
    joint: list[PairCounts]
    selections: list[Float[np.ndarray, "document expert"]]


def property_counts(
    store: Store,
    sites: Sequence[Any],
    signatures: Signatures,
    where: dict[str, str | Sequence[str]] | None = None,
    phase: Phase | None = None,
) -> PropertyCounts:
    """Counts them, shard by shard; memory is that of the sparse table.

    Args:
        store: an open store with the routing tier.
        sites: site records.
        signatures: which rows have which properties.
        where: label -> value(s), documents to keep.
        phase: only tokens of this phase.
    """
    documents = labelling(store, None, where, phase)
    member = csr_array(signatures.member, dtype=np.float64)
    n, kinds = documents.documents.size, member.indptr.size - 1
    index = documents.spread(np.arange(n))
    sums = [PairSum(n * kinds, site.n_experts, False) for site in sites]
    size = np.zeros(n * kinds, dtype=np.int64)
    for names, rows, tables in over_shards(store, _scan, tuple(sites), signatures, kinds, index, phase):
        size[names] += rows
        for total, count in zip(sums, tables, strict=True):
            total.add(names, count, None)
    held = csr_array(size.reshape(n, kinds).astype(np.float64)) @ member
    joint, selections = [], []
    for total in sums:
        pairs = total.counts()
        document, kind = np.divmod(pairs.group, kinds)
        everything = np.zeros((n, pairs.n_experts))
        np.add.at(everything, (document, pairs.expert), pairs.count)
        selections.append(everything)
        joint.append(_of_properties(pairs, document, kind, member))
    return PropertyCounts(documents, documents.tokens, csr_array(held), joint, selections)


def _scan(
    shard: Any,
    sites: Sequence[Any],
    signatures: Signatures,
    kinds: int,
    index: np.ndarray,
    phase: Phase | None,
) -> tuple[np.ndarray, np.ndarray, list[np.ndarray]]:
    """(group names, rows of each, per layer counts [group, expert]) of one shard."""
    group = groups_of_rows(shard, index, phase)
    group = np.where(group < 0, -1, group * kinds + signatures.of_rows(shard))
    names, place, rows = np.unique(group, return_inverse=True, return_counts=True)
    if names.size and names[0] < 0:
        names, place, rows = names[1:], place - 1, rows[1:]
    return names, rows, [shard_table(shard, site, names.size, place)[0] for site in sites]


def groups_of_rows(
    shard: Any, index: Int[np.ndarray, " document_number"], phase: Phase | None
) -> Int[np.ndarray, " row"]:
    """`index[document]` of each row of a shard; -1 for a document that is not in it, and for rows of another phase."""
    document = row_groups(shard, "document", phase)
    inside = (document >= 0) & (document < index.size)
    return np.where(inside, index[np.clip(document, 0, max(index.size - 1, 0))], -1)


def _of_properties(pairs: PairCounts, document: np.ndarray, kind: np.ndarray, member: csr_array) -> PairCounts:
    """Sums over signatures: each pair is counted once for each property of its signature."""
    n_properties, experts = (member.T @ np.ones(member.indptr.size - 1)).size, pairs.n_experts
    each = np.diff(member.indptr)[kind]
    pair = np.repeat(np.arange(kind.size), each)
    within = np.arange(pair.size) - np.repeat(np.cumsum(each) - each, each)
    place = member.indices[member.indptr[kind[pair]] + within].astype(np.int64)
    cell = (document[pair] * n_properties + place) * experts + pairs.expert[pair]
    cell, where = np.unique(cell, return_inverse=True)
    count = np.bincount(where, weights=pairs.count[pair], minlength=cell.size).astype(np.int64)
    return PairCounts(cell // experts, (cell % experts).astype(np.int32), count, None, experts)
