"""Where token ids stand: the first place of each, and the documents that hold any of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from moescope.analysis.contents import contents_of
from moescope.analysis.spreading import over_shards

if TYPE_CHECKING:
    from jaxtyping import Int

    from moescope.store import Store


def first_places(
    store: Store, ids: Sequence[int] | Int[np.ndarray, " token"]
) -> tuple[Int[np.ndarray, " token"], Int[np.ndarray, " token"]]:
    """The first occurrence of each token id, in the order of the store's rows.

    Args:
        store: an open store.
        ids: token ids.

    Returns:
        (document numbers, places among the document's stored tokens from 0); -1 and -1 for an id that never occurs.
    """
    wanted = np.asarray(ids, dtype=np.int64)
    row, document = np.full(wanted.size, -1), np.full(wanted.size, -1)
    for shard in store.shards:
        if (row >= 0).all():
            break
        table = shard.tokens(["token_id", "document"])
        held, first = np.unique(table["token_id"].to_numpy(), return_index=True)
        place = np.searchsorted(held, wanted).clip(max=max(held.size - 1, 0))
        new = np.flatnonzero((row < 0) & (held[place] == wanted)) if held.size else np.empty(0, dtype=np.int64)
        row[new] = shard.offset + first[place[new]]
        document[new] = table["document"].to_numpy()[first[place[new]]]
    contents = contents_of(store)
    where = [contents.place_of(int(d), int(r)) if r >= 0 else -1 for d, r in zip(document, row, strict=True)]
    return document, np.array(where, dtype=np.int64)


def documents_of_tokens(store: Store, ids: Sequence[int]) -> Int[np.ndarray, " document"]:
    """Numbers, ascending, of the documents in which any of these token ids occurs."""
    wanted = np.unique(np.asarray(ids, dtype=np.int64))
    parts = list(over_shards(store, _shard_documents, wanted))
    return np.unique(np.concatenate(parts)) if parts else np.empty(0, dtype=np.int64)


def _shard_documents(shard, wanted: np.ndarray) -> np.ndarray:
    table = shard.tokens(["token_id", "document"])
    ids = table["token_id"].to_numpy()
    place = np.searchsorted(wanted, ids).clip(max=max(wanted.size - 1, 0))
    hit = wanted[place] == ids if wanted.size else np.zeros(ids.size, dtype=bool)
    return np.unique(table["document"].to_numpy()[hit])
