"""Tokenise a corpus and cut it into batches of similar length: the same batches every time, so a capture can resume."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from typing import Any, Literal, TypeVar

import numpy as np

from moescope.capturing.corpus import Corpus, Document

WINDOW_BATCHES = 16  # sorting this many batches' worth of text together leaves a few per cent of padding
TOKENIZE_AT_ONCE = 64  # documents; enough for the tokenizer's own threads

T = TypeVar("T")


@dataclass(frozen=True)
class Sequence:
    """One model context: a document, or a piece of one that is longer than the context.

    Attributes:
        number: position among all sequences of the corpus.
        document: the document it is from.
        first: whether it begins the document.
        n_document_tokens: tokens of the whole document.
        ids: token ids [n] int64.
        start, end: character span of each token in the document [n] int32, -1 where the tokenizer gives none.
        n_prompt: tokens that were given and not written by the model; None means all.
    """

    number: int
    document: Document
    first: bool
    n_document_tokens: int
    ids: np.ndarray
    start: np.ndarray
    end: np.ndarray
    n_prompt: int | None = None

    def __len__(self) -> int:
        return len(self.ids)


@dataclass(frozen=True)
class TextBatch:
    """Sequences that go through the model together, longest first."""

    sequences: list[Sequence]

    @property
    def n_tokens(self) -> int:
        """Real tokens."""
        return sum(map(len, self.sequences))

    def padded(self, pad_id: int, side: Literal["left", "right"] = "right") -> tuple[np.ndarray, np.ndarray]:
        """Token ids and attention mask [B, S] int64, padded on that side."""
        longest = max(map(len, self.sequences))
        ids = np.full((len(self.sequences), longest), pad_id, np.int64)
        mask = np.zeros_like(ids)
        for row, sequence in enumerate(self.sequences):
            place = slice(0, len(sequence)) if side == "right" else slice(longest - len(sequence), longest)
            ids[row, place] = sequence.ids
            mask[row, place] = 1
        return ids, mask


def sequences(corpus: Corpus, tokenizer: Any, max_length: int) -> Iterator[Sequence]:
    """Tokenise documents and cut those longer than ``max_length`` into pieces that do not overlap.

    Raises:
        CorpusError: the corpus holds conversations that no chat template has written out.
    """
    corpus.require_text()
    number = 0
    documents = iter(corpus)
    while group := list(islice(documents, TOKENIZE_AT_ONCE)):
        encoded = tokenizer(
            [document.text for document in group],
            return_offsets_mapping=bool(tokenizer.is_fast),
            return_attention_mask=False,
            add_special_tokens=corpus.chat is None,  # a chat template writes them itself
            verbose=False,
        )
        spans = encoded["offset_mapping"] if tokenizer.is_fast else [None] * len(group)
        for document, ids, span in zip(group, encoded["input_ids"], spans, strict=True):
            for sequence in _pieces(number, document, ids, span, max_length):
                number += 1
                yield sequence


def _pieces(number: int, document: Document, ids: list[int], spans: Any, max_length: int) -> Iterator[Sequence]:
    tokens = np.asarray(ids, np.int64)
    ends = np.asarray(spans, np.int32) if spans is not None else np.full((len(tokens), 2), -1, np.int32)
    if len(ends):
        # Special tokens stand for no characters: the tokenizers give them the empty span (0, 0).
        ends = np.where((ends[:, :1] == ends[:, 1:]), -1, ends)
    for offset in range(0, len(tokens), max_length):
        cut = slice(offset, offset + max_length)
        yield Sequence(
            number + offset // max_length, document, offset == 0, len(tokens), tokens[cut], ends[cut, 0], ends[cut, 1]
        )


def batches(
    corpus: Corpus, tokenizer: Any, *, max_length: int, batch_tokens: int, prompts: bool = False
) -> Iterator[TextBatch]:
    """Cut a corpus into batches of at most ``batch_tokens`` padded tokens (or one sequence, if that is longer).

    Sequences are sorted by length inside a window of some batches, so padding is small and memory is bounded; the
    order depends on the corpus and these numbers alone. As ``prompts``, documents that are too long are cut to their
    first piece and the rest is left out.
    """
    window: list[Sequence] = []
    held = 0
    for sequence in sequences(corpus, tokenizer, max_length):
        if prompts and not sequence.first:
            continue
        window.append(sequence)
        held += len(sequence)
        if held >= WINDOW_BATCHES * batch_tokens:
            yield from _cut(window, batch_tokens)
            window, held = [], 0
    yield from _cut(window, batch_tokens)


def _cut(window: list[Sequence], batch_tokens: int) -> Iterator[TextBatch]:
    window = sorted(window, key=lambda sequence: (-len(sequence), sequence.number))
    while window:
        size = max(1, batch_tokens // len(window[0]))
        yield TextBatch(window[:size])
        window = window[size:]


def ahead(items: Iterable[T]) -> Iterator[T]:
    """Work out the next item in a thread while the caller is busy with this one."""
    iterator, done = iter(items), object()
    with ThreadPoolExecutor(1, thread_name_prefix="moescope-tokenize") as pool:
        coming = pool.submit(next, iterator, done)
        while (item := coming.result()) is not done:
            coming = pool.submit(next, iterator, done)
            yield item  # type: ignore[misc]
