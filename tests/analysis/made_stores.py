"""Small stores with routing made to order, written through the real writer."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from moescope.store import (
    Batch,
    CorpusRecord,
    DocumentRow,
    ExpertMaxima,
    HiddenMaximum,
    Manifest,
    ModelRecord,
    OutlierBatch,
    SiteBatch,
    SiteRecord,
    Store,
    StoreWriter,
    TokenizerRecord,
)


class Made:
    """The truth behind a made store, for brute force: plain arrays over all its tokens."""

    def __init__(self, document, sequence, position, token_id, expert, weight, valid):
        self.document, self.sequence, self.position, self.token_id = document, sequence, position, token_id
        self.expert, self.weight, self.valid = expert, weight, valid  # one [T, k] array per layer

    def part(self, rows: np.ndarray) -> Made:
        """The truth of some of its tokens."""
        layers = [[values[rows] for values in each] for each in (self.expert, self.weight, self.valid)]
        return Made(self.document[rows], self.sequence[rows], self.position[rows], self.token_id[rows], *layers)


def random_truth(
    rng: np.random.Generator,
    documents: int,
    n_experts: Sequence[int],
    top_k: Sequence[int],
    longest: int = 30,
    context: int = 12,
    vocabulary: int = 20,
    missing: float = 0.0,
    prefer: np.ndarray | None = None,
) -> Made:
    """Random routing of documents cut into contexts.

    Args:
        prefer: [document, layer, widest] log-preferences added to the Gumbel scores that pick the experts.
    """
    sizes = rng.integers(1, longest + 1, documents)
    document = np.repeat(np.arange(documents), sizes)
    place = np.concatenate([np.arange(size) for size in sizes])
    cut = place // context
    sequence = np.unique(document * 1000 + cut, return_inverse=True)[1]
    tokens = document.size
    expert, weight, valid = [], [], []
    for layer, (width, k) in enumerate(zip(n_experts, top_k, strict=True)):
        scores = rng.gumbel(size=(tokens, width))
        if prefer is not None:
            scores = scores + prefer[document, layer, :width]
        expert.append(np.argsort(-scores, axis=1)[:, :k])
        weight.append(rng.random((tokens, k)).astype(np.float32))
        valid.append(rng.random((tokens, k)) >= missing)
    return Made(document, sequence, place % context, rng.integers(0, vocabulary, tokens), expert, weight, valid)


def write(
    path: Path,
    made: Made,
    n_experts: Sequence[int],
    labels: dict[str, list[str | None]],
    layers: Sequence[int] | None = None,
    cuts: int = 1,
    slots_can_miss: bool = False,
    texts: list[str] | None = None,
    vocabulary: dict[int, str] | None = None,
    spans: tuple[np.ndarray, np.ndarray] | None = None,
    maxima: np.ndarray | None = None,
    hidden: Sequence[float] | None = None,
    name: str = "made/up",
    phase: np.ndarray | None = None,
    keys: Sequence[str] | None = None,
    ids: Sequence[str | None] | None = None,
) -> Store:
    """Writes the truth as a store in `cuts` shards, cut between contexts."""
    numbers = list(layers) if layers is not None else list(range(len(n_experts)))
    sites = [
        SiteRecord(
            key=f"L{layer:03d}" if keys is None else keys[ordinal],
            layer=layer,
            ordinal=ordinal,
            path=f"model.layers.{layer}.mlp",
            n_experts=n_experts[ordinal],
            top_k=made.expert[ordinal].shape[1],
            slots_can_miss=slots_can_miss,
            score_function="softmax",
            rank_by="score",
        )
        for ordinal, layer in enumerate(numbers)
    ]
    tiers = ["routing"] if maxima is None else ["routing", "outliers"]
    manifest = Manifest(
        model=ModelRecord(
            name=name,
            config_hash="0",
            model_type="made",
            architecture="MadeForCausalLM",
            dtype="float32",
            device="cpu",
            n_parameters=8_500_000,
            n_active_parameters=3_000_000,
            n_layers=max(numbers) + 1,
            hidden_size=16,
        ),
        tokenizer=TokenizerRecord(name=name, hash="0", vocab_size=100),
        corpus=CorpusRecord(source="made.jsonl", max_length=64, labels=list(labels)),
        sites=sites,
        tiers=tiers,  # pyright: ignore[reportArgumentType]
        settings={"shard_tokens": 1},
        versions={"moescope": "test"},
    )
    words = vocabulary or {int(token): f"w{token} " for token in np.unique(made.token_id)}
    edges = np.flatnonzero(np.diff(made.sequence, prepend=-1))
    groups = np.array_split(edges, min(cuts, edges.size))
    starts = [int(group[0]) for group in groups] + [made.sequence.size]
    written: set[int] = set()
    with StoreWriter.create(path, manifest) as writer:
        for first, last in itertools.pairwise(starts):
            rows = slice(first, last)
            fresh = [int(d) for d in np.unique(made.document[rows]) if int(d) not in written]
            written.update(fresh)
            tokens = {
                "document": made.document[rows].astype(np.int64),
                "sequence": made.sequence[rows].astype(np.int64),
                "position": made.position[rows].astype(np.int32),
                "token_id": made.token_id[rows].astype(np.int32),
            }
            if spans is not None:
                tokens |= {"start": spans[0][rows].astype(np.int32), "end": spans[1][rows].astype(np.int32)}
            if phase is not None:
                tokens["phase"] = phase[rows]
            n = last - first
            writer.append(
                Batch(
                    tokens=tokens,
                    documents=[
                        DocumentRow(
                            document=d,
                            id=f"doc-{d}" if ids is None else ids[d],
                            text=texts[d] if texts else "some text",
                            source="made.jsonl",
                            labels={label: values[d] for label, values in labels.items()},
                            n_tokens=int((made.document == d).sum()),
                        )
                        for d in fresh
                    ],
                    vocabulary=words,
                    sites={
                        site.key: SiteBatch(
                            expert=made.expert[i][rows],
                            weight=made.weight[i][rows],
                            valid=made.valid[i][rows] if slots_can_miss else None,
                            logsumexp=np.zeros(n, np.float32),
                            entropy=np.zeros(n, np.float32),
                            margin=np.zeros(n, np.float32),
                        )
                        for i, site in enumerate(sites)
                    },
                    outliers=None if maxima is None else _outliers(sites, maxima, hidden),
                )
            )
    return Store.open(path)


def _outliers(sites, maxima: np.ndarray, hidden: Sequence[float] | None) -> OutlierBatch:
    experts = {}
    for row, site in enumerate(sites):
        values = maxima[row, : site.n_experts].astype(np.float32)
        zeros = np.zeros(site.n_experts, dtype=np.int64)
        experts[site.key] = ExpertMaxima(
            absmax_out=np.nan_to_num(values),
            document=zeros,
            position=zeros.astype(np.int32),
            token_id=zeros.astype(np.int32),
            absmax_in=np.nan_to_num(values),
            first_row_max=np.nan_to_num(values) * np.float32(0.5),
            tokens=np.where(np.isnan(values), 0, 5).astype(np.int64),
        )
    places = {
        layer: HiddenMaximum(absmax=float(value), document=0, position=0, token_id=0, channel=3)
        for layer, value in enumerate(hidden or [])
    }
    return OutlierBatch(experts=experts, hidden=places)
