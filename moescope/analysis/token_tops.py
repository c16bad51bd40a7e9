"""Which expert came first for each token id, and in each document: counted one MoE layer at a time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from scipy.sparse import csr_array

from moescope.analysis.counts import Labelling, Phase, shard_table
from moescope.analysis.pairs import CELLS
from moescope.analysis.spreading import over_shards
from moescope.analysis.token_properties import groups_of_rows

if TYPE_CHECKING:
    from jaxtyping import Float, Int

    from moescope.store import Store


@dataclass(frozen=True)
class TokenTops:
    """Top-1 experts of one layer, in the documents of one label.

    Attributes:
        table: [token, expert] occurrences of the token at which the expert came first.
        held: [document, token] occurrences of the token with a top-1 expert, sparse.
        first: [document, expert] tokens of the document, listed or not, at which the expert came first.
    """

    table: Float[np.ndarray, "token expert"]
    held: csr_array
    first: Float[np.ndarray, "document expert"]


def token_tops(
    store: Store,
    sites: Sequence[Any],
    ids: Int[np.ndarray, " token"],
    documents: Labelling,
    code: Int[np.ndarray, " document"],
    n_labels: int,
    phase: Phase | None,
) -> Iterator[list[TokenTops]]:
    """Of each layer in turn, of each label; memory is that of one layer.

    Args:
        store: an open store with the routing tier.
        sites: site records.
        ids: token ids, ascending; others count in `first` alone.
        documents: which documents.
        code: the label of each of them, -1 for none.
        n_labels: how many labels there are.
        phase: only tokens of this phase.
    """
    index = documents.spread(np.arange(code.size))
    held = None
    for site in sites:
        if held is None or site.slots_can_miss:
            held = _held(store, site, ids, index, phase)
        step = max(CELLS // max(ids.size * site.n_experts, 1), 1)  # labels at once
        found: list[TokenTops] = []
        for start in range(0, n_labels, step):
            some = min(step, n_labels - start)
            inside = (code >= start) & (code < start + some)
            label = np.where(inside, code - start, -1)
            table = np.zeros((some * ids.size, site.n_experts))
            first = np.zeros((code.size, site.n_experts))
            for names, count, rows, by_document in over_shards(store, _counts, site, ids, index, label, phase):
                table[names] += count
                first[rows] += by_document
            for own in range(some):
                mine = np.flatnonzero(label == own)
                part = table[own * ids.size : (own + 1) * ids.size]
                found.append(TokenTops(part, held[mine], first[mine]))
        yield found


def _held(store: Store, site: Any, ids: np.ndarray, index: np.ndarray, phase: Phase | None) -> csr_array:
    """[document, token] rows with a top-1 expert."""
    shape = (int(index.max(initial=-1)) + 1, ids.size)
    parts = list(over_shards(store, _occurring, site, ids, index, phase))
    cell = np.concatenate([names for names, _ in parts])
    count = np.concatenate([seen for _, seen in parts]).astype(np.float64)
    return csr_array((count, np.divmod(cell, max(ids.size, 1))), shape=shape)  # adds up what stands in two shards


def _occurring(
    shard: Any, site: Any, ids: np.ndarray, index: np.ndarray, phase: Phase | None
) -> tuple[np.ndarray, np.ndarray]:
    """(document x tokens + token, rows of it with a top-1 expert) of one shard."""
    document, token = groups_of_rows(shard, index, phase), _places(shard, ids)
    kept = (document >= 0) & (token >= 0)
    if site.slots_can_miss:
        kept &= np.asarray(shard.routing(site.key, fields=["valid"]).valid)[:, 0]
    return np.unique(document[kept] * ids.size + token[kept], return_counts=True)


def _counts(
    shard: Any, site: Any, ids: np.ndarray, index: np.ndarray, label: np.ndarray, phase: Phase | None
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """(label x tokens + token, [the same, expert], documents, [the same, expert]) of one shard: those there are."""
    document, token = groups_of_rows(shard, index, phase), _places(shard, ids)
    of_row = np.where(document >= 0, label[document], -1)
    group = np.where((of_row >= 0) & (token >= 0), of_row * ids.size + token, -1)
    return *_table(shard, site, group), *_table(shard, site, np.where(of_row >= 0, document, -1))


def _table(shard: Any, site: Any, group: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    names, place = np.unique(group, return_inverse=True)
    left_out = int(names.size > 0 and names[0] < 0)
    names = names[left_out:]
    return names, shard_table(shard, site, names.size, place - left_out, ranks=1)[0]


def _places(shard: Any, ids: np.ndarray) -> np.ndarray:
    """Where each row's token id stands in `ids`, -1 where it does not."""
    token = shard.tokens(["token_id"])["token_id"].to_numpy().astype(np.int64)
    at = np.minimum(np.searchsorted(ids, token), ids.size - 1)
    return np.where(ids[at] == token, at, -1)
