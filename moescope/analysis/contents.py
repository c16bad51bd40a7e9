"""Where everything is in a store: the rows of a document, the shards of a token, the texts; made once, read in parts.

A page asks for one document, one token, a few hits; none of these may read whole columns of a store. Three small
tables answer where to read: the runs of rows of each document, where its text is, and how often each shard has each
token id. They are counted once, kept in the store's aggregates, and held in memory with the open store: 24 bytes a
sequence, 150 bytes a document, about 2 bytes a token.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import numpy as np
import pyarrow as pa
from pyarrow import compute

from moescope.analysis.spreading import over_shards
from moescope.errors import StoreError

pc: Any = compute  # its functions are made when it is imported: no type checker sees them

if TYPE_CHECKING:
    from jaxtyping import Int

    from moescope.store import Shard, Store

OPENING = 120
"""Characters of a document's text that a list of documents shows."""
HELD_TEXT = 128 * 2**20
"""Bytes of text that are held in memory to be searched; more are read shard by shard at each search."""


@dataclass(frozen=True)
class Stretch:
    """Rows of one shard that follow each other in one document.

    Attributes:
        shard: the shard.
        rows: its rows, counted from its first.
    """

    shard: Shard
    rows: slice

    @property
    def first(self) -> int:
        """The first row, counted from the store's first."""
        return self.shard.offset + self.rows.start


class Contents:
    """Where the documents, texts and tokens of an open store are; see `contents_of`."""

    def __init__(self, path: Any, shards: list[Shard], cached: Any, manifest: Any) -> None:
        """Internal: holds the parts of a store, not the store, so that both can be forgotten together."""
        self._path, self._shards, self._cached, self._manifest = path, shards, cached, manifest
        self._offsets = [shard.offset for shard in shards]

    # --- rows of a document ------------------------------------------------------------------------------------
    @cached_property
    def _runs(self) -> dict[str, np.ndarray]:
        """document, row, tokens: [run], in the order in which they make up the documents."""

        def compute() -> pa.Table:
            parts = list(over_shards(self, _shard_runs))  # pyright: ignore[reportArgumentType]
            columns = [np.concatenate(each) for each in zip(*parts, strict=True)] if parts else [np.empty(0, int)] * 5
            document, sequence, position, row, tokens = columns
            order = np.lexsort((row, position, sequence, document))
            return pa.table({"document": document[order], "row": row[order], "tokens": tokens[order]})

        found = self._cached("document-rows", compute)
        return {name: found[name].to_numpy() for name in found.column_names}

    @cached_property
    def documents(self) -> Int[np.ndarray, " document"]:
        """Numbers of the documents with a stored token, ascending."""
        return np.unique(self._runs["document"])

    @cached_property
    def stored_tokens(self) -> Int[np.ndarray, " document"]:
        """Stored tokens of each of `documents`."""
        place = np.searchsorted(self.documents, self._runs["document"])
        return np.bincount(place, weights=self._runs["tokens"], minlength=self.documents.size).astype(np.int64)

    def n_tokens(self, document: int) -> int:
        """Stored tokens of one document.

        Raises:
            StoreError: it has none.
        """
        place = int(np.searchsorted(self.documents, document))
        if place == self.documents.size or self.documents[place] != document:
            raise StoreError(f"no document {document} has a token in this store.")
        return int(self.stored_tokens[place])

    def stretches(self, document: int, start: int, stop: int) -> Iterator[Stretch]:
        """The rows of tokens start:stop of a document, in its own order, rows that touch taken together."""
        runs = self._runs
        first, last = np.searchsorted(runs["document"], [document, document + 1])
        held: list[int] = []
        before = 0
        for row, tokens in zip(runs["row"][first:last].tolist(), runs["tokens"][first:last].tolist(), strict=True):
            begin, end = max(start - before, 0), min(stop - before, tokens)
            before += tokens
            if begin >= end:
                continue
            if held and held[1] == row + begin and row not in self._offsets:
                held[1] = row + end
                continue
            if held:
                yield self._stretch(*held)
            held = [row + begin, row + end]
        if held:
            yield self._stretch(*held)

    def place_of(self, document: int, row: int) -> int:
        """Which of a document's stored tokens a row is, from 0."""
        runs = self._runs
        first, last = np.searchsorted(runs["document"], [document, document + 1])
        begin, tokens = runs["row"][first:last], runs["tokens"][first:last]
        run = int(np.flatnonzero((begin <= row) & (row < begin + tokens))[0])
        return int(tokens[:run].sum()) + row - int(begin[run])

    def _stretch(self, first: int, last: int) -> Stretch:
        shard = self.shard_of(first)
        return Stretch(shard, slice(first - shard.offset, last - shard.offset))

    def shard_of(self, row: int) -> Shard:
        """The shard that has a row of the store.

        Raises:
            StoreError: there is no such row.
        """
        total = self._offsets[-1] + self._shards[-1].n_tokens if self._shards else 0
        if not 0 <= row < total:
            raise StoreError(f"no token row {row}; the store has {total} rows.")
        return self._shards[bisect_right(self._offsets, row) - 1]

    # --- texts -------------------------------------------------------------------------------------------------
    @cached_property
    def table(self) -> pa.Table:
        """One row per listed document, by number: document, id, source, n_tokens, the labels, opening, shard, place."""
        from moescope.store.tables import document_schema

        columns = ["document", "id", "source", "n_tokens", *self._manifest.corpus.labels]

        def compute() -> pa.Table:
            parts = list(over_shards(self, _shard_openings))  # pyright: ignore[reportArgumentType]
            place = pa.schema([("document", pa.int64()), ("place", pa.int64()), ("opening", pa.string())])
            tables = [place.empty_table(), *(part.cast(place) for part in parts)]
            shard = np.repeat(np.arange(len(parts)), [part.num_rows for part in parts]).astype(np.int64)
            return pa.concat_tables(tables).append_column("shard", pa.array(shard)).sort_by("document")

        where = self._cached("document-openings", compute)
        empty = document_schema(self._manifest.corpus.labels).empty_table().select(columns)
        listed = pa.concat_tables([empty, *(shard.documents(columns) for shard in self._shards)]).sort_by("document")
        for name in ("opening", "shard", "place"):
            listed = listed.append_column(name, where[name])
        return listed.combine_chunks()

    def row_of(self, document: int) -> int | None:
        """The row of `table` that lists a document; None if an interrupted capture has its end alone."""
        numbers = self._numbers
        row = int(np.searchsorted(numbers, document))
        return row if row < numbers.size and numbers[row] == document else None

    @cached_property
    def _numbers(self) -> np.ndarray:
        return self.table["document"].to_numpy()

    @cached_property
    def has_texts(self) -> bool:
        """Whether documents came with texts: one of the first shard that lists any has one."""
        for shard in self._shards:
            texts = shard.documents(["text"])["text"]
            if len(texts):
                return bool(np.any(pc.utf8_length(pc.utf8_trim_whitespace(texts)).to_numpy()))
        return False

    def text_of(self, document: int) -> str | None:
        """The text of a document; None if the store has it not."""
        row = self.row_of(document)
        if row is None:
            return None
        if self._texts is not None:
            return self._texts[row].as_py()
        shard = self._shards[self.table["shard"][row].as_py()]
        return shard.documents(["text"])["text"][self.table["place"][row].as_py()].as_py()

    @cached_property
    def _texts(self) -> pa.ChunkedArray | None:
        """The texts in the order of `table`, or None where they are too large to be held."""
        parts, held = [], 0
        for shard in self._shards:
            parts.append(shard.documents(["document", "text"]))
            held += parts[-1].nbytes
            if held > HELD_TEXT:
                return None
        whole = (
            pa.concat_tables(parts).sort_by("document")["text"] if parts else pa.chunked_array([], pa.large_string())
        )
        return pa.chunked_array([whole.combine_chunks()] if whole.num_chunks else [], pa.large_string())

    def having(self, text: str) -> np.ndarray:
        """[row of `table`] bool: whether a document's text has `text` in it, whatever the case of its letters."""
        if self._texts is not None:
            return _has(self._texts, text)
        found = np.zeros(self.table.num_rows, dtype=bool)
        for shard in self._shards:
            part = shard.documents(["document", "text"])
            hits = part["document"].to_numpy()[_has(part["text"], text)]
            found[np.searchsorted(self._numbers, hits)] = True
        return found

    # --- tokens ------------------------------------------------------------------------------------------------
    @cached_property
    def _shards_of_tokens(self) -> dict[str, np.ndarray]:
        """token_id, shard, tokens: how often each shard has each token id, by token id and shard."""

        def compute() -> pa.Table:
            parts = list(over_shards(self, _shard_tokens))  # pyright: ignore[reportArgumentType]
            sizes = [token.size for token, _ in parts]
            token, tokens = (
                (np.concatenate(each) for each in zip(*parts, strict=True)) if parts else [np.empty(0, int)] * 2
            )
            shard = np.repeat(np.arange(len(parts)), sizes)
            order = np.lexsort((shard, token))
            columns = {"token_id": token, "shard": shard, "tokens": tokens}
            return pa.table({name: values[order].astype(np.int32) for name, values in columns.items()})

        found = self._cached("token-shards", compute)
        return {name: found[name].to_numpy() for name in found.column_names}

    def shards_of_token(self, token_id: int) -> list[tuple[Shard, int]]:
        """(shard, occurrences) of every shard that has a token id, in the store's order."""
        found = self._shards_of_tokens
        first, last = np.searchsorted(found["token_id"], [token_id, token_id + 1])
        pairs = zip(found["shard"][first:last].tolist(), found["tokens"][first:last].tolist(), strict=True)
        return [(self._shards[shard], tokens) for shard, tokens in pairs]

    @cached_property
    def occurrences(self) -> tuple[np.ndarray, np.ndarray]:
        """(token id [n], ascending; occurrences [n])."""
        found = self._shards_of_tokens
        token, first = np.unique(found["token_id"], return_index=True)
        sums = np.add.reduceat(found["tokens"].astype(np.int64), first) if token.size else np.empty(0, np.int64)
        return token, sums

    def index(self) -> None:
        """Make, or read, all three tables."""
        _ = self._runs, self.table, self._shards_of_tokens

    # --- what `over_shards` asks of a store ----------------------------------------------------------------------
    @property
    def path(self) -> Any:
        """The store's folder."""
        return self._path

    @property
    def shards(self) -> list[Shard]:
        """The committed shards."""
        return self._shards


_KNOWN: WeakKeyDictionary[Store, Contents] = WeakKeyDictionary()


def contents_of(store: Store) -> Contents:
    """The contents of an open store: the same ones at every call, as long as it is open."""
    known = _KNOWN.get(store)
    if known is None:
        # Without the store itself, which the contents would keep from being forgotten.
        from moescope.store import aggregates

        path, store_id, shards = store.path, store.manifest.store_id, store.shards
        folders = [shard.path for shard in shards]

        def cached(name: str, compute: Any) -> pa.Table:
            return aggregates.cached(path, store_id, folders, name, compute, {})

        known = _KNOWN.setdefault(store, Contents(path, shards, cached, store.manifest))
    return known


def _has(texts: pa.ChunkedArray, text: str) -> np.ndarray:
    return np.asarray(pc.match_substring(texts, text, ignore_case=True).to_numpy(zero_copy_only=False), dtype=bool)


def _shard_runs(shard: Any) -> tuple[np.ndarray, ...]:
    """document, sequence, first position, first row of the store, tokens: [run] of one shard."""
    table = shard.tokens(["document", "sequence", "position"])
    document, sequence, position = (table[name].to_numpy().astype(np.int64) for name in table.column_names)
    new = np.flatnonzero((np.diff(document) != 0) | (np.diff(sequence) != 0)) + 1
    edge = np.concatenate([[0], new, [document.size]]) if document.size else np.zeros(1, np.int64)
    first = edge[:-1]
    return document[first], sequence[first], position[first], first + shard.offset, np.diff(edge)


def _shard_openings(shard: Any) -> pa.Table:
    table = shard.documents(["document", "text"])
    opening = pc.utf8_slice_codeunits(table["text"], 0, OPENING)
    return pa.table({"document": table["document"], "place": np.arange(table.num_rows), "opening": opening})


def _shard_tokens(shard: Any) -> tuple[np.ndarray, np.ndarray]:
    return np.unique(shard.tokens(["token_id"])["token_id"].to_numpy(), return_counts=True)
