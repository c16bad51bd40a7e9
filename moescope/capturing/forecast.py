"""What a capture will cost, said before it starts: tokens, layers, bytes, time, and whether the disk has room."""

from __future__ import annotations

import shutil
import time
from collections.abc import Sequence as Many
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from moescope.capturing.activations import Plan
from moescope.capturing.batches import batches
from moescope.capturing.corpus import Census, Corpus
from moescope.capturing.prices import row_bytes
from moescope.errors import MoescopeError
from moescope.hooks.model import Model

BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}
TOKEN_ROW = 12  # document, sequence, position, id and span of one token, compressed
SAMPLE_DOCUMENTS = 256  # spread evenly over the corpus: files are often sorted by label
TIMED_TOKENS = 2048  # padded tokens of the timed batch: a second or two even on a slow machine


@dataclass(frozen=True)
class Forecast:
    """The price of a capture.

    Attributes:
        documents, empty: documents with text, and without.
        tokens: expected tokens, from the tokens per character of a sample (exact for a corpus smaller than that).
        exact: whether ``tokens`` was counted and not estimated.
        sites: MoE layers captured.
        bytes_by_tier: expected bytes on disk.
        free: free bytes on the disk that will hold the store.
        seconds: expected time of the forward passes, from one timed batch of this corpus.
    """

    documents: int
    empty: int
    tokens: int
    exact: bool
    sites: int
    bytes_by_tier: dict[str, int]
    free: int
    seconds: float

    @property
    def bytes(self) -> int:
        """Expected size of the store."""
        return sum(self.bytes_by_tier.values())

    def require_room(self, out: Path, most_activations: int | None = None) -> None:
        """Raises MoescopeError if the store cannot fit on its disk, or its vectors take more than they may."""
        vectors = self.bytes_by_tier.get("activations", 0)
        if most_activations is not None and vectors > most_activations:
            raise MoescopeError(
                f"The chosen activations would take about {vectors / 1e9:.2f} GB, over their limit of "
                f"{most_activations / 1e9:.2f} GB; sample fewer tokens, choose fewer layers, or raise the limit."
            )
        if self.bytes > self.free:
            raise MoescopeError(
                f"The store would take about {self.bytes / 1e9:.1f} GB and {out} has {self.free / 1e9:.1f} GB free; "
                "capture fewer tiers or layers, or limit the corpus."
            )


def forecast(
    model: Model,
    corpus: Corpus,
    census: Census,
    *,
    out: Path,
    tiers: Many[str],
    max_length: int,
    batch_tokens: int,
    loss: bool = False,
    new_tokens: int = 0,
    activations: Plan | None = None,
) -> Forecast:
    """Estimate a capture from its corpus and one timed forward pass.

    Args:
        model, corpus, out, tiers, max_length, batch_tokens, loss: as for `capture`.
        census: the corpus, counted.
        new_tokens: most tokens that the model writes after each document.
        activations: which vectors are kept, if any.
    """
    sample = _sample(corpus, census)
    tokens, exact = _expected_tokens(model.tokenizer, sample, census)
    if new_tokens:  # the last one written is never run; how many fewer they will be, nobody knows
        tokens, exact = tokens + census.documents * (new_tokens - 1), False
    sizes = {tier: int(tokens * _row_bytes(model, tier)) for tier in tiers if tier != "activations"}
    if activations is not None:
        sizes["activations"] = int(tokens * activations.chosen.sample * activations.bytes_per_token)
    return Forecast(
        documents=census.documents,
        empty=census.empty,
        tokens=tokens,
        exact=exact,
        sites=len(model.sites),
        bytes_by_tier=sizes | {"tokens": tokens * TOKEN_ROW},
        free=_free(out),
        seconds=tokens / _speed(model, sample, max_length, batch_tokens, loss),
    )


def _sample(corpus: Corpus, census: Census) -> list[str]:
    """Every n-th text, so that at most `SAMPLE_DOCUMENTS` stand for all."""
    step = -(-census.documents // SAMPLE_DOCUMENTS)
    return [document.text for document in islice(corpus, 0, None, step)]


def _expected_tokens(tokenizer: Any, sample: list[str], census: Census) -> tuple[int, bool]:
    counts = sum(len(ids) for ids in tokenizer(sample, return_attention_mask=False, verbose=False)["input_ids"])
    if len(sample) == census.documents:
        return counts, True
    return round(counts * census.characters / sum(map(len, sample))), False


def _row_bytes(model: Model, tier: str) -> float:
    """Bytes for one token, all layers."""
    return sum(
        row_bytes(
            site.n_experts,
            model.semantics[site.key].top_k,
            weight_bytes=BYTES[model.dtypes[site.key].weight],
            logit_bytes=BYTES[model.dtypes[site.key].logits],
        )[tier]
        for site in model.sites
    )


def _speed(model: Model, sample: list[str], max_length: int, batch_tokens: int, loss: bool) -> float:
    """Tokens per second of a plain forward pass over one batch of the sample (after one to warm up)."""
    import torch

    cut = batches(Corpus(sample), model.tokenizer, max_length=max_length, batch_tokens=min(batch_tokens, TIMED_TOKENS))
    batch = next(cut)
    ids, mask = (torch.from_numpy(a).to(model.device) for a in batch.padded(0))
    seconds = 0.0
    with torch.inference_mode():
        for _ in range(2):
            start = time.perf_counter()
            model.forward(ids, mask, head=loss)
            if model.device.type == "cuda":
                torch.cuda.synchronize()
            seconds = time.perf_counter() - start
    return batch.n_tokens / max(seconds, 1e-6)


def _free(out: Path) -> int:
    place = out.absolute()
    while not place.exists():
        place = place.parent
    return shutil.disk_usage(place).free
