"""A synthetic store of any size, written through the real writer: Zipf-like experts that lean by label and by layer."""

from __future__ import annotations

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


def synthetic(path: Path, tokens: int = 2**20, layers: int = 16, experts: int = 64, top_k: int = 8) -> Store:
    """Writes, or opens if it is there, a store of `tokens` x `layers` rows in documents of 512 tokens.

    Weights are bf16, as a bf16 model's are. Each expert's score is a Zipf-like base, a lean by label, and noise.
    """
    if (path / "manifest.json").exists():
        return Store.open(path)
    rng = np.random.default_rng(0)
    base = -np.log1p(rng.permuted(np.tile(np.arange(experts), (layers, 1)), axis=1)).astype(np.float32) * 0.3
    lean = rng.normal(0, 0.7, (len(LABELS), layers, experts)).astype(np.float32)
    keys = [f"L{layer:03d}" for layer in range(layers)]
    zipf = 1 / np.arange(1, VOCABULARY + 1)
    with StoreWriter.create(path, _manifest(keys, experts, top_k)) as writer:
        for start in range(0, tokens, BATCH):
            n = min(BATCH, tokens - start)
            row = np.arange(start, start + n)
            document = row // DOCUMENT
            numbers = np.unique(document)
            label = document % len(LABELS)
            sites = {}
            for layer, key in enumerate(keys):
                scores = (
                    base[layer] + lean[label, layer] - np.log(rng.exponential(size=(n, experts)).astype(np.float32))
                )
                top = np.argpartition(-scores, top_k, axis=1)[:, :top_k]
                order = np.argsort(-np.take_along_axis(scores, top, axis=1), axis=1)
                expert = np.take_along_axis(top, order, axis=1)
                weight = np.exp(np.take_along_axis(scores, expert, axis=1))
                weight /= weight.sum(axis=1, keepdims=True)
                weight = (weight.view("<u4") >> 16).astype("<u2")  # bits of bfloat16
                nothing = np.zeros(n, np.float32)
                sites[key] = SiteBatch(
                    expert=expert, weight=weight, valid=None, logsumexp=nothing, entropy=nothing, margin=nothing
                )
            writer.append(
                Batch(
                    tokens={
                        "document": document.astype(np.int64),
                        "sequence": document.astype(np.int64),
                        "position": (row % DOCUMENT).astype(np.int32),
                        "token_id": rng.choice(VOCABULARY, n, p=zipf / zipf.sum()).astype(np.int32),
                    },
                    documents=[
                        DocumentRow(
                            document=int(number),
                            id=f"doc-{number}",
                            text="",
                            source="synthetic",
                            labels={"domain": LABELS[int(number) % len(LABELS)]},
                            n_tokens=min(DOCUMENT, tokens - int(number) * DOCUMENT),
                        )
                        for number in numbers
                    ],
                    vocabulary={token: f"w{token} " for token in range(VOCABULARY)},
                    sites=sites,
                    outliers=None,
                )
            )
    return Store.open(path)


def _manifest(keys: list[str], experts: int, top_k: int) -> Manifest:
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
        corpus=CorpusRecord(source="synthetic", max_length=DOCUMENT, labels=["domain"]),
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
