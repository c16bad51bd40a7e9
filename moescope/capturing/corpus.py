"""Corpora: labelled documents from files or from memory, checked whole before a model sees the first of them."""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from moescope.errors import CorpusError
from moescope.store.manifest import DOCUMENT_COLUMNS

TEXT_SUFFIXES = (".txt", ".md")
JSON_SUFFIXES = (".jsonl", ".ndjson")
SampleBy = Literal["line", "paragraph", "document"]


@dataclass(frozen=True)
class Document:
    """One document: its number in the corpus, its own id if it has one, its text, where it came from, its labels."""

    number: int
    id: str | None
    text: str
    source: str
    labels: Mapping[str, str | None]


@dataclass(frozen=True)
class Census:
    """What a corpus holds: documents with text, documents without, characters, and a hash of texts and labels."""

    documents: int
    empty: int
    characters: int
    hash: str


class Corpus:
    """Labelled documents, read again from their source on every pass.

    Args:
        source: a JSONL file (one object a line), a text file, a Parquet file, a folder of such files, or any iterable
            of strings or mappings (a Hugging Face dataset, a list, a generator, which is read into memory once).
        labels: names of the fields to keep as labels.
        text: name of the field that holds the text.
        chat: name of a field that holds a conversation instead, [{"role": …, "content": …}, …] (or JSON that says the
            same): its text is what the model's own chat template makes of it, special tokens and all.
        id: name of the field that holds a document's own id; used if it is there.
        sample_by: what one document is in a text file: a "line", a "paragraph" (blank lines between), or the whole
            "document".
        limit: use only the first so many documents.

    Raises:
        CorpusError: the source is not there, of an unknown kind, or a label has a reserved name.
    """

    def __init__(
        self,
        source: str | Path | Iterable[Any],
        labels: Sequence[str] = (),
        *,
        text: str = "text",
        chat: str | None = None,
        id: str = "id",
        sample_by: SampleBy = "line",
        limit: int | None = None,
    ) -> None:
        self.labels = [labels] if isinstance(labels, str) else list(labels)
        self.text = text
        self.chat = chat
        self._template: Callable[[list[dict[str, Any]]], str] | None = None
        self._id = id
        self._sample_by: SampleBy = sample_by
        self._limit = limit
        self._files: list[Path] = []
        self._rows: Sequence[Any] | None = None
        self._census: Census | None = None
        clash = next((label for label in self.labels if label.casefold() in DOCUMENT_COLUMNS), None)
        if clash is not None:
            raise CorpusError(f"The label {clash!r} has the name of a column that every store has; rename the field.")
        if isinstance(source, str | Path):
            self._files = _files(Path(source))
            self.name = str(source)
        else:
            self._rows = source if isinstance(source, Sequence) else list(source)
            self.name = f"{type(source).__name__} in memory"

    def __repr__(self) -> str:
        return f"Corpus({self.name!r}, labels={self.labels})"

    def __iter__(self) -> Iterator[Document]:
        """Every document that has text, in order.

        Raises:
            CorpusError: a malformed row, with its place.
        """
        for number, (row, where) in enumerate(self._raw()):
            if self._limit is not None and number >= self._limit:
                return
            document = self._document(number, row, where)
            if document.text.strip():
                yield document

    def templated(self, tokenizer: Any, *, answer: bool = False) -> Corpus:
        """This corpus with its conversations written out by a tokenizer's chat template; itself if it holds texts.

        Args:
            tokenizer: whose template.
            answer: end each conversation with what opens an answer, for the model to write it.

        Raises:
            CorpusError: the tokenizer has no chat template.
        """
        if self.chat is None:
            return self
        if not getattr(tokenizer, "chat_template", None):
            raise CorpusError(
                f"{self.name} holds conversations, and this model's tokenizer has no chat template; "
                "capture plain texts, or set tokenizer.chat_template."
            )

        def written(messages: list[dict[str, Any]]) -> str:
            return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=answer)

        corpus = copy.copy(self)
        corpus._template, corpus._census = written, None
        return corpus

    def require_text(self) -> None:
        """Refuse conversations that no template has written out.

        Raises:
            CorpusError: it holds such.
        """
        if self.chat is not None and self._template is None:
            raise CorpusError(f"{self.name} holds conversations; write them out with corpus.templated(tokenizer).")

    def rows(self) -> Iterator[tuple[Any, str]]:
        """Every row as its source has it, with its place; what is in it is not looked at."""
        yield from self._raw()

    def census(self) -> Census:
        """Read the whole corpus once: counts it, and finds what is wrong with it before anything else is begun.

        Raises:
            CorpusError: empty, malformed (with the place), or without the text field or a label.
        """
        if self._census is not None:
            return self._census
        digest = hashlib.blake2b(digest_size=16)
        documents = characters = last = 0
        for document in self:
            documents += 1
            characters += len(document.text)
            last = document.number + 1
            facts = [document.number, document.id, document.text, dict(document.labels)]
            digest.update(json.dumps(facts, sort_keys=True).encode())
        if not documents:
            raise CorpusError(f"{self.name} has no document with text in it.")
        self._census = Census(documents, last - documents, characters, digest.hexdigest())
        return self._census

    def _raw(self) -> Iterator[tuple[Any, str]]:
        if self._rows is not None:
            for number, row in enumerate(self._rows):
                yield row, f"{self.name}, item {number}"
        for file in self._files:
            yield from _read(file, self._sample_by)

    def _document(self, number: int, row: Any, where: str) -> Document:
        if isinstance(row, str):
            row = {self.text: row}
        if not isinstance(row, Mapping):
            raise CorpusError(f"{where}: expected an object with a field {self.text!r}, found {type(row).__name__}.")
        text = row.get(self.text) if self.chat is None else self._conversation(row, where)
        if not isinstance(text, str):
            raise CorpusError(f"{where}: no text in the field {self.text!r}; {_fields(row)}. Name it with --text.")
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise CorpusError(f"{where}: the text holds half a surrogate pair at character {error.start}.") from error
        labels = {}
        for label in self.labels:
            if label not in row:
                raise CorpusError(f"{where}: no label {label!r}; {_fields(row)}.")
            value = row[label]
            labels[label] = None if value is None or value != value else str(value)  # NaN: pandas' missing
        own = row.get(self._id)
        return Document(number, None if own is None else str(own), text, where, labels)

    def _conversation(self, row: Mapping[str, Any], where: str) -> str:
        """A conversation as the template writes it, or its bare contents before there is one (to be counted)."""
        from jinja2 import TemplateError

        assert self.chat is not None
        messages = row.get(self.chat)
        if isinstance(messages, str):
            messages = _json(messages, f"{where}, field {self.chat!r}")
        if not isinstance(messages, Sequence) or not messages or not all(map(_is_message, messages)):
            raise CorpusError(
                f"{where}: no conversation in the field {self.chat!r}, a list of objects with role and content; "
                f"{_fields(row)}."
            )
        messages = [dict(message) for message in messages]
        if self._template is None:
            return "\n".join(message["content"] for message in messages)
        try:
            return self._template(messages)
        except TemplateError as error:
            raise CorpusError(f"{where}: the chat template refuses this conversation: {error}.") from error


def _is_message(value: Any) -> bool:
    return isinstance(value, Mapping) and isinstance(value.get("role"), str) and isinstance(value.get("content"), str)


def _fields(row: Mapping[Any, Any]) -> str:
    return f"its fields are {', '.join(map(str, row))}" if row else "it has no fields"


def _files(path: Path) -> list[Path]:
    if path.is_dir():
        files = sorted(f for f in path.iterdir() if f.suffix in (*JSON_SUFFIXES, *TEXT_SUFFIXES, ".parquet"))
        if not files:
            raise CorpusError(f"{path} holds no .jsonl, .txt or .parquet file.")
        return files
    if not path.exists():
        raise CorpusError(f"There is no corpus at {path}.")
    if path.suffix not in (*JSON_SUFFIXES, *TEXT_SUFFIXES, ".parquet"):
        raise CorpusError(f"{path}: unknown kind of corpus {path.suffix!r}; use .jsonl, .txt or .parquet.")
    return [path]


def _read(file: Path, sample_by: SampleBy) -> Iterator[tuple[Any, str]]:
    if file.suffix == ".parquet":
        yield from _parquet(file)
        return
    try:
        with file.open(encoding="utf-8-sig") as stream:
            if file.suffix in JSON_SUFFIXES:
                for number, line in enumerate(stream, 1):
                    if line.strip():
                        yield _json(line, f"{file}, line {number}"), f"{file.name}:{number}"
            else:
                yield from _pieces(file, stream, sample_by)
    except UnicodeDecodeError as error:
        raise CorpusError(f"{file} is not UTF-8 text (byte {error.start}); convert it first.") from error
    except OSError as error:
        raise CorpusError(f"{file} cannot be read: {error.strerror}.") from error


def _json(line: str, where: str) -> Any:
    try:
        return json.loads(line)
    except json.JSONDecodeError as error:
        raise CorpusError(f"{where} is not valid JSON: {error.msg} at column {error.colno}.") from error


def _pieces(file: Path, stream: Iterable[str], sample_by: SampleBy) -> Iterator[tuple[str, str]]:
    start, held = 1, []
    for number, line in enumerate(stream, 1):
        ends = sample_by == "line" or (sample_by == "paragraph" and not line.strip())
        held.append(line)
        if ends:
            yield "".join(held).strip("\n"), f"{file.name}:{start}"
            start, held = number + 1, []
    if held:
        yield "".join(held), f"{file.name}:{start}"


def _parquet(file: Path) -> Iterator[tuple[Any, str]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        number = 0
        with pq.ParquetFile(file) as table:
            for batch in table.iter_batches(batch_size=1024):
                for row in batch.to_pylist():
                    yield row, f"{file.name}:row {number}"
                    number += 1
    except (pa.ArrowInvalid, OSError) as error:
        raise CorpusError(f"{file} is not a readable Parquet file: {str(error).splitlines()[0]}") from error
