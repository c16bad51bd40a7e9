"""Documents, token texts and the text around a token."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from moescope.store.tables import document_schema, vocabulary_schema

if TYPE_CHECKING:
    import pyarrow as pa


def joined_documents(parts: Sequence[pa.Table], labels: Sequence[str]) -> pa.Table:
    """The documents of several shards, sorted by number (batches are cut by length, so shards are not in order)."""
    import pyarrow as pa

    schema = document_schema(labels)
    return pa.concat_tables([schema.empty_table(), *parts]).sort_by("document")


def joined_vocabulary(parts: Sequence[pa.Table]) -> pa.Table:
    """The token texts of several shards, sorted by id."""
    import pyarrow as pa

    return pa.concat_tables([vocabulary_schema().empty_table(), *parts]).sort_by("token_id")


class Context(str):
    """The text around one token: a plain string, with its three parts as attributes.

    Attributes:
        before, token, after: the parts; together they are the string.
    """

    before: str
    token: str
    after: str

    __slots__ = ("after", "before", "token")

    def __new__(cls, before: str, token: str, after: str) -> Context:
        self = super().__new__(cls, before + token + after)
        self.before, self.token, self.after = before, token, after
        return self


def context_in_text(text: str, start: int, end: int, before: int, after: int) -> Context:
    """Cut a document's text around the characters [start, end); `before` and `after` count characters."""
    return Context(text[max(start - before, 0) : start], text[start:end], text[end : end + after])


def context_in_tokens(ids: Sequence[int], at: int, texts: Mapping[int, str], before: int, after: int) -> Context:
    """The same from token texts alone, for tokens without a character span; `ids` are one sequence's tokens."""
    left = "".join(texts.get(i, "") for i in ids[:at])
    right = "".join(texts.get(i, "") for i in ids[at + 1 :])
    return Context(left[max(len(left) - before, 0) :], texts.get(ids[at], ""), right[:after])
