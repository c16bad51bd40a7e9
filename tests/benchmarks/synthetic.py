"""A synthetic store of any size, written through the real writer: Zipf-like experts that lean by label and by layer.

    python -m tests.benchmarks.synthetic FOLDER [--rows 50_000_000]     one to look at, as for the app's benchmark

Such a store has texts, three labels, a document of 100k tokens, and what the first pages read is counted beforehand.
"""

from __future__ import annotations

import argparse
import itertools
import time
from pathlib import Path

import numpy as np

from moescope.store import (
    Batch,
    CorpusRecord,
    DocumentRow,
    Manifest,
    ModelRecord,
    SiteBatch,
    SiteRecord,
    Store,
    StoreWriter,
    TokenizerRecord,
)

LABELS = ("stories", "german", "spanish", "python", "records", "arithmetic", "facts", "poems")
DOCUMENT, BATCH, VOCABULARY = 512, 8192, 8192


LANGUAGES, YEARS = ("English", "German", "Spanish"), tuple(str(year) for year in range(2015, 2025))
LONG = 200
"""Sequences of the one long document, the first, of a store with texts: 102,400 tokens."""


def synthetic(
    path: Path, tokens: int = 2**20, layers: int = 16, experts: int = 64, top_k: int = 8, texts: bool = False
) -> Store:
    """Writes, or opens if it is there, a store of `tokens` x `layers` rows in documents of 512 tokens.

    Weights are bf16, as a bf16 model's are. Each expert's score is a Zipf-like base, a lean by label, and noise.

    Args:
        texts: with words, spans, entropies and margins, three labels, and a long first document.
    """
    if (path / "manifest.json").exists():
        return Store.open(path)
    rng = np.random.default_rng(0)
    base = -np.log1p(rng.permuted(np.tile(np.arange(experts), (layers, 1)), axis=1)).astype(np.float32) * 0.3
    lean = rng.normal(0, 0.7, (len(LABELS), layers, experts)).astype(np.float32)
    keys = [f"L{layer:03d}" for layer in range(layers)]
    zipf = 1 / np.arange(1, VOCABULARY + 1)
    vocabulary = [f"w{token} " for token in range(VOCABULARY)]
    words = Words(zipf / zipf.sum()) if texts else None
    with StoreWriter.create(path, _manifest(keys, experts, top_k, texts)) as writer:
        for start in range(0, tokens, BATCH):
            n = min(BATCH, tokens - start)
            row = np.arange(start, start + n)
            sequence = row // DOCUMENT
            document = sequence if words is None else np.maximum(sequence - LONG + 1, 0)
            label = document % len(LABELS)
            sites = {}
            for layer, key in enumerate(keys):
                if texts:  # half the time, and 0 now and then
                    noise = np.maximum(rng.standard_exponential((n, experts), np.float32), np.float32(1e-30))
                else:
                    noise = rng.exponential(size=(n, experts)).astype(np.float32)
                scores = base[layer] + lean[label, layer] - np.log(noise)
                sites[key] = _routed(scores, top_k, texts)
            ids = rng.choice(VOCABULARY, n, p=zipf / zipf.sum()) if words is None else words.ids(sequence)
            columns = {
                "document": document.astype(np.int64),
                "sequence": sequence.astype(np.int64),
                "position": (row % DOCUMENT).astype(np.int32),
                "token_id": ids.astype(np.int32),
            }
            if words is not None:
                columns["start"], columns["end"] = words.spans(document, sequence, ids)
            begins = (row % DOCUMENT == 0) & ((sequence == 0) | (sequence >= (LONG if texts else 0)))
            writer.append(
                Batch(
                    tokens=columns,
                    documents=[_document(int(number), tokens, words) for number in document[begins]],
                    vocabulary=dict(enumerate(vocabulary if words is None else words.words)),
                    sites=sites,
                    outliers=None,
                )
            )
    return Store.open(path)


def _routed(scores: np.ndarray, top_k: int, summaries: bool) -> SiteBatch:
    depth = top_k + 1 if summaries else top_k
    top = np.argpartition(-scores, depth, axis=1)[:, :depth]
    order = np.argsort(-np.take_along_axis(scores, top, axis=1), axis=1)
    ranked = np.take_along_axis(top, order, axis=1)
    expert = np.ascontiguousarray(ranked[:, :top_k])
    weight = np.exp(np.take_along_axis(scores, expert, axis=1))
    weight /= weight.sum(axis=1, keepdims=True)
    weight = (weight.view("<u4") >> 16).astype("<u2")  # bits of bfloat16
    entropy = margin = level = np.zeros(len(scores), np.float32)
    if summaries:
        share = np.exp(scores)
        total = share.sum(axis=1, keepdims=True)
        share /= total
        level = np.log(total[:, 0])
        entropy = -(share * np.log(share)).sum(axis=1)
        edge = np.take_along_axis(share, ranked[:, top_k - 1 : top_k + 1], axis=1)
        margin = edge[:, 0] - edge[:, 1]
    return SiteBatch(expert=expert, weight=weight, valid=None, logsumexp=level, entropy=entropy, margin=margin)


class Words:
    """Made-up words, and texts of them: the tokens of a sequence depend on its number alone."""

    def __init__(self, chances: np.ndarray) -> None:
        syllables = [a + b for a in ("b", "d", "f", "k", "l", "m", "n", "r", "s", "t", "z", "ß") for b in "aeiouä"]
        made = itertools.chain(syllables, map("".join, itertools.product(syllables, repeat=2)))
        made = itertools.chain(made, map("".join, itertools.product(syllables, repeat=3)))
        self.words = [f" {word}" for word in itertools.islice(made, len(chances))]
        self.length = np.array([len(word) for word in self.words])
        self.chances = np.cumsum(chances)

    def of(self, sequence: int) -> np.ndarray:
        """The 512 token ids of a sequence."""
        drawn = np.searchsorted(self.chances, np.random.default_rng([1, sequence]).random(DOCUMENT))
        return np.minimum(drawn, len(self.words) - 1)

    def ids(self, sequence: np.ndarray) -> np.ndarray:
        """The token ids of rows that are whole sequences, but for the last."""
        return np.concatenate([self.of(int(number)) for number in np.unique(sequence)])[: sequence.size]

    def spans(self, document: np.ndarray, sequence: np.ndarray, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(start, end) of each token in the text of its document."""
        length = self.length[ids]
        end = np.cumsum(length)
        new = np.flatnonzero(np.diff(document, prepend=-1))
        base = end[new] - length[new]
        if document[0] == 0 and sequence[0]:  # the long document goes on
            base[0] = -sum(int(self.length[self.of(number)].sum()) for number in range(sequence[0]))
        end = end - np.repeat(base, np.diff([*new, document.size]))
        return (end - length).astype(np.int32), end.astype(np.int32)

    def text(self, document: int) -> str:
        """The text of a document."""
        own = range(LONG) if document == 0 else [document + LONG - 1]
        return "".join(self.words[token] for number in own for token in self.of(number))


def _document(number: int, tokens: int, words: Words | None) -> DocumentRow:
    labels = {"domain": LABELS[number % len(LABELS)]}
    first, size = number * DOCUMENT, DOCUMENT
    if words is not None:
        labels |= {"language": LANGUAGES[number % 3], "year": YEARS[number * 7 % len(YEARS)]}
        first, size = (0, LONG * DOCUMENT) if number == 0 else ((number + LONG - 1) * DOCUMENT, DOCUMENT)
    return DocumentRow(
        document=number,
        id=f"doc-{number}",
        text="" if words is None else words.text(number),
        source="synthetic",
        labels=labels,
        n_tokens=min(size, tokens - first),
    )


def _manifest(keys: list[str], experts: int, top_k: int, texts: bool = False) -> Manifest:
    labels = ["domain", "language", "year"] if texts else ["domain"]
    return Manifest(
        model=ModelRecord(
            name="synthetic",
            config_hash="0",
            model_type="synthetic",
            architecture="None",
            dtype="bfloat16",
            device="cpu",
            n_parameters=1,
            n_active_parameters=1,
            n_layers=len(keys),
            hidden_size=1,
        ),
        tokenizer=TokenizerRecord(name="synthetic", hash="0", vocab_size=VOCABULARY),
        corpus=CorpusRecord(source="synthetic", max_length=DOCUMENT, labels=labels),
        sites=[
            SiteRecord(
                key=key,
                layer=layer,
                ordinal=layer,
                path=f"layers.{layer}",
                n_experts=experts,
                top_k=top_k,
                slots_can_miss=False,
                weight_dtype="bfloat16",
                score_function="softmax",
                rank_by="score",
            )
            for layer, key in enumerate(keys)
        ],
        tiers=["routing"],
        settings={},
        versions={"moescope": "benchmark"},
    )


def main() -> None:
    """Write one to look at, and count what first pages read."""
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--rows", type=int, default=50_000_000)
    given = parser.parse_args()
    begun = time.process_time()
    store = synthetic(given.folder, -(-given.rows // 16), texts=True)
    print(f"{store!r}: {time.process_time() - begun:.0f} s of CPU", flush=True)
    begun = time.process_time()
    count_for_pages(store)
    print(f"counted for the first pages: {time.process_time() - begun:.0f} s of CPU")


def count_for_pages(store: Store) -> None:
    """Counts, kept in the store's aggregates, from which an app's first pages are drawn."""
    from moescope import analysis

    analysis.prepare(store)


if __name__ == "__main__":
    main()
