"""Small stores with logits, output norms and output vectors made to order, written through the real writer."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
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
from moescope.store.activations import Vectors
from moescope.store.manifest import ActivationsRecord


@dataclass
class Truth:
    """Plain arrays over all tokens of one made store; lists have one entry per layer."""

    document: np.ndarray
    position: np.ndarray
    logits: list[np.ndarray]
    expert: list[np.ndarray]
    weight: list[np.ndarray]
    norm: list[np.ndarray]
    valid: list[np.ndarray]
    outputs: list[np.ndarray]  # [token, slot, channel]

    @property
    def tokens(self) -> int:
        return self.document.size


def random_truth(
    rng: np.random.Generator,
    documents: int = 12,
    n_experts: tuple[int, ...] = (6, 4),
    k: int = 3,
    longest: int = 25,
    missing: float = 0.0,
    channels: int = 5,
) -> Truth:
    """Independent numbers everywhere; every document is one sequence."""
    sizes = rng.integers(1, longest + 1, documents)
    document = np.repeat(np.arange(documents), sizes)
    tokens = document.size
    logits = [rng.normal(size=(tokens, width)).astype(np.float32) for width in n_experts]
    expert = [np.argsort(-values, axis=1)[:, :k] for values in logits]
    return Truth(
        document=document,
        position=np.concatenate([np.arange(size) for size in sizes]),
        logits=logits,
        expert=expert,
        weight=[rng.random((tokens, k)).astype(np.float32) for _ in n_experts],
        norm=[rng.random((tokens, k)).astype(np.float32) + 0.1 for _ in n_experts],
        valid=[rng.random((tokens, k)) >= missing for _ in n_experts],
        outputs=[rng.normal(size=(tokens, k, channels)).astype(np.float32) for _ in n_experts],
    )


def write(path: Path, truth: Truth, cuts: int = 1, can_miss: bool = False, labels: list[str] | None = None) -> Store:
    """Writes the truth in `cuts` shards, cut between documents."""
    sites = [
        SiteRecord(
            key=f"L{layer:03d}",
            layer=layer,
            ordinal=layer,
            path=f"model.layers.{layer}.mlp",
            n_experts=truth.logits[layer].shape[1],
            top_k=truth.expert[layer].shape[1],
            slots_can_miss=can_miss,
            score_function="softmax",
            rank_by="score",
        )
        for layer in range(len(truth.logits))
    ]
    manifest = Manifest(
        model=ModelRecord(
            name="made/up", config_hash="0", model_type="made", architecture="Made", dtype="float32", device="cpu",
            n_parameters=1, n_active_parameters=1, n_layers=len(sites), hidden_size=truth.outputs[0].shape[2],
        ),
        tokenizer=TokenizerRecord(name="made", hash="0", vocab_size=100),
        corpus=CorpusRecord(source="made.jsonl", max_length=64, labels=["domain"] if labels else []),
        sites=sites,
        tiers=["routing", "logits", "experts", "activations"],
        activations=ActivationsRecord(
            kinds=["outputs"], sites=[site.key for site in sites], sample=1.0, max_bytes=10**9
        ),
        settings={"shard_tokens": 1},
        versions={"moescope": "test"},
    )  # fmt: skip
    names = np.unique(truth.document)
    with StoreWriter.create(path, manifest) as writer:
        edges = [int(part[0]) for part in np.array_split(names, min(cuts, names.size))] + [int(names[-1]) + 1]
        for first, last in itertools.pairwise(edges):
            rows = np.flatnonzero((truth.document >= first) & (truth.document < last))
            writer.append(_batch(truth, sites, rows, can_miss, labels))
    return Store.open(path)


def _batch(truth: Truth, sites: list[SiteRecord], rows: np.ndarray, can_miss: bool, labels: list[str] | None) -> Batch:
    zeros = np.zeros(rows.size, np.float32)
    vectors = {}
    for layer, site in enumerate(sites):
        token, slot = np.nonzero(truth.valid[layer][rows])
        vectors["outputs", site.key] = Vectors(
            row=token,
            slot=slot,
            expert=truth.expert[layer][rows][token, slot].astype(np.int64),
            values=truth.outputs[layer][rows][token, slot],
            dtype="float32",
        )
    return Batch(
        tokens={
            "document": truth.document[rows].astype(np.int64),
            "sequence": truth.document[rows].astype(np.int64),
            "position": truth.position[rows].astype(np.int32),
            "token_id": (truth.position[rows] % 20).astype(np.int32),
        },
        documents=[
            DocumentRow(
                document=int(d), id=f"doc-{d}", text="text", source="made.jsonl",
                labels={"domain": labels[d]} if labels else {}, n_tokens=int((truth.document == d).sum()),
            )
            for d in np.unique(truth.document[rows])
        ],
        vocabulary={token: f"w{token} " for token in range(20)},
        sites={
            site.key: SiteBatch(
                expert=truth.expert[layer][rows],
                weight=np.where(truth.valid[layer][rows], truth.weight[layer][rows], np.nan).astype(np.float32),
                valid=truth.valid[layer][rows] if can_miss else None,
                logits=truth.logits[layer][rows],
                norm=np.where(truth.valid[layer][rows], truth.norm[layer][rows], np.nan).astype(np.float32),
                absmax=truth.norm[layer][rows],
                logsumexp=zeros, entropy=zeros, margin=zeros,
            )
            for layer, site in enumerate(sites)
        },
        activations=vectors,
    )  # fmt: skip
