"""Finding one's way in a store: documents by text and label, tokens by their text, and where a token occurs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
from pyarrow import compute

from moescope.analysis.contents import Contents, contents_of
from moescope.analysis.contexts import text_of_token, token_pieces
from moescope.errors import MoescopeError
from moescope.store.documents import Context

pc: Any = compute  # its functions are made when it is imported: no type checker sees them

if TYPE_CHECKING:
    from jaxtyping import Bool, Int

    from moescope.store import Store

APART = 8192
"""Rows between two occurrences that are not worth reading along."""
SORTS = ("document", "id", "source", "n_tokens")


@dataclass(frozen=True)
class FoundDocument:
    """A document in a list.

    Attributes:
        document: its number; id: its own id, if it has one; source: the file it came from.
        labels: its labels; None where it has none.
        n_tokens: its tokens, also those that an interrupted capture has not stored.
        opening: its first 120 characters.
    """

    document: int
    id: str | None
    source: str
    labels: Mapping[str, str | None]
    n_tokens: int
    opening: str


@dataclass(frozen=True)
class FoundDocuments:
    """One page of a list of documents: of `total` that fit, those from `offset` on."""

    documents: tuple[FoundDocument, ...]
    total: int
    offset: int


@dataclass(frozen=True)
class Occurrence:
    """One place where a token occurs.

    Attributes:
        row: of the store, what `token_routing` takes.
        document, sequence, position: where that is.
        place: which token of its document it is, what `passage` counts in.
        phase: "prefill" or "decode".
        context: the text around it, with `before`, `token` and `after`.
    """

    row: int
    document: int
    sequence: int
    position: int
    place: int
    phase: str
    context: Context


@dataclass(frozen=True)
class Occurrences:
    """One page of a token's occurrences, in the store's order: of `total`, those from `offset` on."""

    token_id: int
    text: str
    occurrences: tuple[Occurrence, ...]
    total: int
    offset: int


@dataclass(frozen=True)
class TokenMatch:
    """An entry of the vocabulary, and how often it occurs in the store."""

    token_id: int
    text: str
    occurrences: int


def find_documents(
    store: Store,
    text: str | None = None,
    where: Mapping[str, str | Sequence[str]] | None = None,
    sort: str = "document",
    descending: bool = False,
    offset: int = 0,
    limit: int = 50,
) -> FoundDocuments:
    """One page of the documents that have a text in them and carry some labels.

    Args:
        store: an open store.
        text: what their text must hold, whatever the case of its letters; no pattern, every character is itself.
        where: label -> value or values to keep; "document" -> numbers.
        sort: "document" (its number), "id", "source", "n_tokens" or a label; what has none comes last.
        descending: the largest first.
        offset, limit: which of them to return.

    Returns:
        FoundDocuments: the page, and how many fit in all.

    Raises:
        MoescopeError: no such label or order, or a negative page.
    """
    _page(offset, limit)
    table = contents_of(store).table
    if sort not in SORTS and sort not in store.labels:
        raise MoescopeError(f"Documents have no {sort!r} to sort by; they have {', '.join([*SORTS, *store.labels])}.")
    row = np.flatnonzero(_fit(store, text, where))
    if sort != "document" or descending:
        keys = [(sort, "descending" if descending else "ascending")]
        keys += [("document", "ascending")] if sort != "document" else []
        row = row[pc.sort_indices(table.take(row).select(sorted({"document", sort})), sort_keys=keys).to_numpy()]
    page = table.take(row[offset : offset + limit]).to_pylist()
    documents = tuple(
        FoundDocument(
            document=one["document"],
            id=one["id"],
            source=one["source"] or "",
            labels={label: one[label] for label in store.labels},
            n_tokens=one["n_tokens"],
            opening=one["opening"],
        )
        for one in page
    )
    return FoundDocuments(documents, int(row.size), offset)


def documents_with(
    store: Store, text: str | None = None, where: Mapping[str, str | Sequence[str]] | None = None
) -> Int[np.ndarray, " document"]:
    """The numbers of all documents that have a text in them and carry some labels; see `find_documents`.

    Raises:
        MoescopeError: no such label.
    """
    return contents_of(store).table["document"].to_numpy()[_fit(store, text, where)]


def _fit(
    store: Store, text: str | None, where: Mapping[str, str | Sequence[str]] | None
) -> Bool[np.ndarray, " document"]:
    contents = contents_of(store)
    table = contents.table
    kept = np.ones(table.num_rows, dtype=bool)
    for label, wanted in (where or {}).items():
        if label == "document":
            numbers = pa.array([wanted] if isinstance(wanted, int | str) else list(wanted)).cast(pa.int64())
            kept &= pc.is_in(table["document"], numbers).to_numpy(zero_copy_only=False)
            continue
        if label not in store.labels:
            known = ", ".join(store.labels) or "none"
            raise MoescopeError(f"The store has no label {label!r}; its labels: {known}.")
        values = [wanted] if isinstance(wanted, str) else list(wanted)
        kept &= pc.is_in(table[label], pa.array(values, pa.string())).to_numpy(zero_copy_only=False)
    if text:
        kept &= contents.having(text)
    return kept


def token_occurrences(store: Store, token_id: int, offset: int = 0, limit: int = 20, around: int = 12) -> Occurrences:
    """One page of the places where a token occurs, each with the text around it.

    Args:
        store: an open store.
        token_id: its id; one that does not occur has an empty page.
        offset, limit: which of them to return, in the store's order.
        around: tokens of the same sequence shown before and after it.
    """
    _page(offset, limit)
    contents = contents_of(store)
    found: list[Occurrence] = []
    before, total = 0, 0
    for shard, tokens in contents.shards_of_token(token_id):
        skip, take = max(offset - before, 0), limit - len(found)
        before += tokens
        total += tokens
        if skip < tokens and take > 0:
            ids = shard.tokens(["token_id"])["token_id"].to_numpy()
            at = np.flatnonzero(ids == token_id)[skip : skip + take]
            found += _in_context(store, contents, shard, at, around)
    return Occurrences(token_id, text_of_token(store.vocabulary(), token_id), tuple(found), total, offset)


def _in_context(store: Store, contents: Contents, shard: Any, at: np.ndarray, around: int) -> list[Occurrence]:
    """The occurrences at some rows of a shard; rows far apart are read apart."""
    columns = ["document", "sequence", "position", "token_id", "start", "end", "phase"]
    out = []
    for group in np.split(at, np.flatnonzero(np.diff(at) > APART) + 1):
        begin, end = max(int(group[0]) - around, 0), min(int(group[-1]) + around + 1, shard.n_tokens)
        table = shard.tokens(columns, slice(begin, end))
        for row in group.tolist():
            first, last = max(row - around, 0), min(row + around + 1, shard.n_tokens)
            rows = table.slice(first - begin, last - first).to_pylist()
            here = rows[row - first]
            near = range(first, last)
            whole = [i for i in near if rows[i - first]["sequence"] == here["sequence"]]
            pieces = token_pieces(
                [rows[i - first] for i in whole], contents.text_of(here["document"]), store.vocabulary()
            )
            middle = whole.index(row)
            context = Context("".join(pieces[:middle]), pieces[middle], "".join(pieces[middle + 1 :]))
            out.append(
                Occurrence(
                    row=shard.offset + row,
                    document=here["document"],
                    sequence=here["sequence"],
                    position=here["position"],
                    place=contents.place_of(here["document"], shard.offset + row),
                    phase=here["phase"],
                    context=context,
                )
            )
    return out


def tokens_matching(store: Store, text: str, limit: int = 20) -> tuple[TokenMatch, ...]:
    """Entries of the vocabulary that have a text in them, whatever its case: the text itself, then what begins with it.

    Among equals, the most frequent first; space around an entry does not count against it.
    """
    _page(0, limit)
    if not text:
        return ()
    token, times = contents_of(store).occurrences
    table = store.vocabulary_table()
    hits = table.filter(pc.match_substring(table["text"], text, ignore_case=True))
    wanted = text.strip().casefold() or text
    ranked = []
    for token_id, entry in zip(hits["token_id"].to_pylist(), hits["text"].to_pylist(), strict=True):
        place = int(np.searchsorted(token, token_id))
        count = int(times[place]) if place < token.size and token[place] == token_id else 0
        bare = entry.strip().casefold()
        kind = 0 if bare == wanted else 1 if bare.startswith(wanted) else 2
        ranked.append((kind, -count, token_id, entry))
    return tuple(TokenMatch(token_id, entry, -count) for _, count, token_id, entry in sorted(ranked)[:limit])


def _page(offset: int, limit: int) -> None:
    if offset < 0 or limit < 0:
        raise MoescopeError(f"A page begins at 0 or later and holds 0 or more, not {limit} from {offset}.")
