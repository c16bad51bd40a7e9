"""Stores with losses, logits and zero-computation experts, their sequences in any order and any sharding."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

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
from tests.analysis.made_stores import Made


def write_tiers(
    path: Path,
    made: Made,
    n_experts: Sequence[int],
    labels: dict[str, list[str | None]] | None = None,
    order: np.ndarray | None = None,
    cuts: int = 1,
    loss: np.ndarray | None = None,
    logits: Sequence[np.ndarray] | None = None,
    slots_can_miss: bool = False,
    tokenizer: str = "0",
    **site: Any,
) -> Store:
    """Writes the truth with its sequences in `order` and in `cuts` shards.

    Args:
        loss: [token] NLL, NaN where there is none.
        logits: per layer, [token, expert].
        site: more fields of every site's record.
    """
    labels = labels or {}
    sites = [
        SiteRecord(
            key=f"L{layer:03d}",
            layer=layer,
            ordinal=layer,
            path=f"model.layers.{layer}.mlp",
            n_experts=width,
            top_k=made.expert[layer].shape[1],
            slots_can_miss=slots_can_miss,
            **({"score_function": "softmax", "rank_by": "score"} | site),
        )
        for layer, width in enumerate(n_experts)
    ]
    manifest = Manifest(
        model=ModelRecord(
            name="made/up",
            config_hash="0",
            model_type="made",
            architecture="MadeForCausalLM",
            dtype="float32",
            device="cpu",
            n_parameters=1,
            n_layers=len(n_experts),
            hidden_size=4,
        ),
        tokenizer=TokenizerRecord(name="made", hash=tokenizer, vocab_size=100),
        corpus=CorpusRecord(source="made.jsonl", max_length=64, labels=list(labels)),
        sites=sites,
        tiers=["routing"] if logits is None else ["routing", "logits"],
        loss=loss is not None,
        settings={"shard_tokens": 1},
        versions={"moescope": "test"},
    )
    runs = [np.flatnonzero(made.sequence == sequence) for sequence in np.unique(made.sequence)]
    runs = [runs[index] for index in (range(len(runs)) if order is None else order)]
    words = {int(token): f"w{token}" for token in np.unique(made.token_id)}
    written: set[int] = set()
    with StoreWriter.create(path, manifest) as writer:
        for part in np.array_split(np.arange(len(runs)), min(cuts, len(runs))):
            rows = np.concatenate([runs[index] for index in part])
            fresh = [int(d) for d in np.unique(made.document[rows]) if int(d) not in written]
            written.update(fresh)
            tokens: dict[str, np.ndarray] = {
                "document": made.document[rows].astype(np.int64),
                "sequence": made.sequence[rows].astype(np.int64),
                "position": made.position[rows].astype(np.int32),
                "token_id": made.token_id[rows].astype(np.int32),
            }
            if loss is not None:
                tokens["loss"] = loss[rows].astype(np.float32)
            blank = np.zeros(rows.size, np.float32)
            writer.append(
                Batch(
                    tokens=tokens,
                    documents=[
                        DocumentRow(
                            document=d,
                            id=str(d),
                            text="text",
                            source="made.jsonl",
                            labels={label: values[d] for label, values in labels.items()},
                            n_tokens=int((made.document == d).sum()),
                        )
                        for d in fresh
                    ],
                    vocabulary=words,
                    sites={
                        record.key: SiteBatch(
                            expert=made.expert[i][rows],
                            weight=made.weight[i][rows],
                            valid=made.valid[i][rows] if slots_can_miss else None,
                            logsumexp=blank,
                            entropy=blank,
                            margin=blank,
                            logits=None if logits is None else logits[i][rows].astype(np.float32),
                        )
                        for i, record in enumerate(sites)
                    },
                )
            )
    return Store.open(path)


def changed(made: Made, **fields: Any) -> Made:
    """The same truth with some of its arrays replaced."""
    names = ("document", "sequence", "position", "token_id", "expert", "weight", "valid")
    return Made(*(fields.get(name, getattr(made, name)) for name in names))
