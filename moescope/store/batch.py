"""What a capture hands to the writer: one batch of tokens as NumPy arrays, checked against the manifest."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from moescope.errors import StoreError
from moescope.store.columns import storage_dtype

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int, Shaped

    from moescope.store.activations import Vectors
    from moescope.store.manifest import Manifest, SiteRecord
    from moescope.store.outliers import OutlierBatch
    from moescope.store.sinks import SinkSums

INTEGER_COLUMNS = ("document", "sequence", "position", "token_id")
SPAN_COLUMNS = ("start", "end")
PHASES = ("prefill", "decode")
SUMMARIES = ("logsumexp", "entropy", "margin")


@dataclass(frozen=True)
class DocumentRow:
    """One document of the corpus; `n_tokens` counts all its tokens, also those of later batches."""

    document: int
    id: str | None
    text: str
    source: str
    labels: Mapping[str, str | None] = field(default_factory=dict)
    n_tokens: int = 0


@dataclass(frozen=True)
class SiteBatch:
    """One site's arrays for the T tokens of a batch. Fields of tiers that are not captured are ignored.

    Attributes:
        expert: ids [T, k] in rank order, any integer type; missing slots may hold anything.
        weight: routing weights [T, k] in the site's `weight_dtype` (bfloat16 as uint16 bits).
        logsumexp, entropy, margin: [T] float32; nats, nats of the score distribution, k-th minus (k+1)-th
            selection score. NaN where the router defines none.
        valid: [T, k]; False marks a missing slot. None means that all are present.
        logits: [T, E] in the site's `logit_dtype`.
        norm, absmax: [T, k] float32; L2 norm and largest magnitude of each expert's output before its weight.
    """

    expert: Int[np.ndarray, "token slot"] | None = None
    weight: Shaped[np.ndarray, "token slot"] | None = None
    logsumexp: Float[np.ndarray, " token"] | None = None
    entropy: Float[np.ndarray, " token"] | None = None
    margin: Float[np.ndarray, " token"] | None = None
    valid: Bool[np.ndarray, "token slot"] | None = None
    logits: Shaped[np.ndarray, "token expert"] | None = None
    norm: Float[np.ndarray, "token slot"] | None = None
    absmax: Float[np.ndarray, "token slot"] | None = None


@dataclass(frozen=True)
class Batch:
    """One batch: real tokens only, rows of one sequence together and in position order.

    The writer keeps the arrays themselves until their shard is written: do not reuse their memory.

    Attributes:
        tokens: columns of length T: document, sequence, position, token_id (integers); start, end (integers, -1 where
            the tokenizer gives no span; may be left out); phase ('prefill' or 'decode'; left out means prefill);
            loss (float32 nats, NaN where undefined; may be left out).
        documents: documents whose *first* token is in this batch.
        vocabulary: text of every token id in this batch (more do no harm).
        sites: arrays by site key.
        outliers: maxima by site key and by layer; needed when the outliers tier is captured.
        sinks: attention on the first token by model layer, for the layers where it could be read; when captured.
        activations: chosen vectors by (kind, site key); needed when the activations tier is captured.
    """

    tokens: Mapping[str, np.ndarray]
    documents: list[DocumentRow]
    vocabulary: Mapping[int, str]
    sites: Mapping[str, SiteBatch]
    outliers: OutlierBatch | None = None
    sinks: Mapping[int, SinkSums] = field(default_factory=dict)
    activations: Mapping[tuple[str, str], Vectors] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.tokens["token_id"])

    @property
    def nbytes(self) -> int:
        """Bytes of the per-token arrays, to bound what a shard holds in memory."""
        arrays = [*self.tokens.values()]
        for site in self.sites.values():
            arrays += [a for a in vars(site).values() if a is not None]
        return sum(a.nbytes for a in arrays) + sum(vectors.nbytes for vectors in self.activations.values())


def check_batch(batch: Batch, manifest: Manifest) -> None:
    """Compare a batch with the manifest.

    Raises:
        StoreError: a column, field, site or label is missing or unknown, or has a wrong shape, type or id.
    """
    _check_tokens(batch, manifest)
    labels = set(manifest.corpus.labels)
    for row in batch.documents:
        unknown = set(row.labels) - labels
        if unknown:
            raise StoreError(
                f"document {row.document} has the label {min(unknown)!r}, which the manifest does not name."
            )
    missing = np.setdiff1d(batch.tokens["token_id"], np.fromiter(batch.vocabulary, np.int64, len(batch.vocabulary)))
    if len(missing):
        raise StoreError(f"the batch's vocabulary has no text for token id {missing[0]}.")
    sites = {site.key: site for site in manifest.sites}
    if set(batch.sites) != set(sites) and set(manifest.tiers) != {"outliers"}:
        odd = min(set(batch.sites) ^ set(sites))
        raise StoreError(f"site {odd} is {'not in the batch' if odd in sites else 'not in the manifest'}.")
    for key, arrays in batch.sites.items():
        _check_site(sites[key], arrays, len(batch), manifest)
    if manifest.activations is not None:
        _check_activations(batch, manifest)
    if "outliers" in manifest.tiers:
        if batch.outliers is None:
            raise StoreError("the outliers tier is captured but the batch has no outliers.")
        batch.outliers.check({key: site.n_experts for key, site in sites.items()})


def _check_activations(batch: Batch, manifest: Manifest) -> None:
    assert manifest.activations is not None
    sites = {site.key: site for site in manifest.sites}
    for kind in manifest.activations.kinds:
        for key in manifest.activations.sites:
            what, vectors = f"activations {kind} of {key}", batch.activations.get((kind, key))
            if vectors is None:
                raise StoreError(f"{what} are missing from the batch.")
            row, n = _expect(f"{what}: row", vectors.row, (len(vectors),), "iu"), len(vectors)
            for name in ("slot", "expert"):
                _expect(f"{what}: {name}", getattr(vectors, name), (n,), "iu")
            _expect(what, vectors.values, (n, vectors.values.shape[-1]), storage_dtype(vectors.dtype))
            if n and (row.min() < 0 or row.max() >= len(batch)):
                raise StoreError(f"{what} name a row outside the batch.")
            expert = batch.sites[key].expert
            if kind == "router_inputs" or not n or expert is None:
                continue
            if vectors.slot.max() >= sites[key].top_k or (expert[row, vectors.slot] != vectors.expert).any():
                raise StoreError(f"{what} name experts that the routing of their tokens does not.")


def _check_tokens(batch: Batch, manifest: Manifest) -> None:
    known = {*INTEGER_COLUMNS, *SPAN_COLUMNS, "phase", "loss"}
    for name in INTEGER_COLUMNS:
        if name not in batch.tokens:
            raise StoreError(f"the batch has no token column {name!r}.")
    for name, values in batch.tokens.items():
        if name not in known:
            raise StoreError(f"unknown token column {name!r}; known: {', '.join(sorted(known))}.")
        _expect(f"token column {name!r}", values, (len(batch),))
        kind = {"phase": "UO", "loss": "f"}.get(name, "iu")
        if values.dtype.kind not in kind:
            raise StoreError(f"token column {name!r} has type {values.dtype}.")
    phases = batch.tokens.get("phase")
    if phases is not None and not np.isin(phases, PHASES).all():
        raise StoreError("token column 'phase' may hold only 'prefill' and 'decode'.")
    if manifest.loss and "loss" not in batch.tokens:
        raise StoreError("the manifest says that the loss is captured, but the batch has no 'loss' column.")


def _check_site(site: SiteRecord, arrays: SiteBatch, rows: int, manifest: Manifest) -> None:
    slots, experts = (rows, site.top_k), (rows, site.n_experts)
    if "routing" in manifest.tiers:
        expert = _expect(f"{site.key}.expert", arrays.expert, slots, "iu")
        _expect(f"{site.key}.weight", arrays.weight, slots, storage_dtype(site.weight_dtype))
        for name in SUMMARIES:
            _expect(f"{site.key}.{name}", getattr(arrays, name), (rows,), np.dtype("<f4"))
        if arrays.valid is not None:
            _expect(f"{site.key}.valid", arrays.valid, slots, np.dtype(bool))
            if not site.slots_can_miss and not arrays.valid.all():
                raise StoreError(f"{site.key} has missing slots, but its record says slots_can_miss = false.")
            expert = expert[arrays.valid]
        if expert.size and (expert.max() >= site.n_experts or expert.min() < 0):
            raise StoreError(f"{site.key}.expert holds an id outside 0..{site.n_experts - 1}.")
    if "logits" in manifest.tiers:
        _expect(f"{site.key}.logits", arrays.logits, experts, storage_dtype(site.logit_dtype))
    if "experts" in manifest.tiers:
        for name in ("norm", "absmax"):
            _expect(f"{site.key}.{name}", getattr(arrays, name), slots, np.dtype("<f4"))


def _expect(what: str, values: object, shape: tuple[int, ...], dtype: np.dtype | str | None = None) -> np.ndarray:
    """The array, if it has this shape and this type (a string names allowed kinds)."""
    if not isinstance(values, np.ndarray):
        raise StoreError(f"{what} is missing from the batch (expected an array of shape {shape}).")
    if values.shape != shape:
        raise StoreError(f"{what} has shape {values.shape}, expected {shape}.")
    if isinstance(dtype, str) and values.dtype.kind not in dtype:
        raise StoreError(f"{what} has type {values.dtype}, expected integers.")
    if isinstance(dtype, np.dtype) and values.dtype != dtype:
        raise StoreError(f"{what} has type {values.dtype}, expected {dtype}.")
    return values
