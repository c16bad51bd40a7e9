"""From readings on the host to what the store takes: the one place that knows the names on both sides."""

from __future__ import annotations

from typing import Any

import numpy as np

from moescope.capturing.activations import Plan
from moescope.capturing.batches import Sequence, TextBatch
from moescope.errors import RefusedError
from moescope.hooks.model import Model
from moescope.hooks.sinks import ROUNDING
from moescope.store.batch import PHASES, Batch, DocumentRow, SiteBatch
from moescope.store.outliers import ExpertMaxima, HiddenMaximum, OutlierBatch
from moescope.store.sinks import SinkSums

Arrays = dict[tuple[str, ...], np.ndarray]
SITE_FIELDS = ("expert", "weight", "valid", "logsumexp", "entropy", "margin", "logits", "norm", "absmax")


class TokenTexts:
    """The text of each token id, decoded once."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._texts: dict[int, str] = {}

    def __call__(self, ids: np.ndarray) -> dict[int, str]:
        """Texts of the distinct ids among ``ids``."""
        distinct = np.unique(ids).tolist()
        new = [token for token in distinct if token not in self._texts]
        if new:
            decoded = self._tokenizer.batch_decode([[token] for token in new], clean_up_tokenization_spaces=False)
            self._texts.update(zip(new, decoded, strict=True))
        return {token: self._texts[token] for token in distinct}


def assemble(model: Model, batch: TextBatch, arrays: Arrays, texts: TokenTexts, chosen: Plan | None = None) -> Batch:
    """Join a batch of text with its readings; rows are its real tokens, sequence after sequence."""
    tokens = _token_columns(batch)
    if ("loss",) in arrays:
        tokens["loss"] = arrays[("loss",)]
    sites = {
        site.key: SiteBatch(**{name: arrays.get(("site", site.key, name)) for name in SITE_FIELDS})
        for site in model.sites
    }
    return Batch(
        tokens=tokens,
        documents=[
            DocumentRow(
                document=sequence.document.number,
                id=sequence.document.id,
                text=sequence.document.text,
                source=sequence.document.source,
                labels=sequence.document.labels,
                n_tokens=sequence.n_document_tokens,
            )
            for sequence in batch.sequences
            if sequence.first
        ],
        vocabulary=texts(tokens["token_id"]),
        sites=sites,
        outliers=_outliers(model, arrays, tokens),
        sinks=_sinks(model, arrays),
        activations={} if chosen is None else chosen.vectors(arrays, chosen.rows(batch)),
    )


def _token_columns(batch: TextBatch) -> dict[str, np.ndarray]:
    rows = batch.sequences
    lengths = [len(sequence) for sequence in rows]
    return {
        "document": np.repeat(np.array([s.document.number for s in rows], np.int64), lengths),
        "sequence": np.repeat(np.array([s.number for s in rows], np.int64), lengths),
        "position": np.concatenate([np.arange(n, dtype=np.int32) for n in lengths]),
        "token_id": np.concatenate([s.ids for s in rows]).astype(np.int32),
        "start": np.concatenate([s.start for s in rows]).astype(np.int32),
        "end": np.concatenate([s.end for s in rows]).astype(np.int32),
        "phase": np.concatenate([_phases(s) for s in rows]),
    }


def _phases(sequence: Sequence) -> np.ndarray:
    """'prefill' for what was given, 'decode' for what the model wrote."""
    given = len(sequence) if sequence.n_prompt is None else sequence.n_prompt
    return np.where(np.arange(len(sequence)) < given, *PHASES)


def _sinks(model: Model, arrays: Arrays) -> dict[int, SinkSums]:
    """Attention on first tokens by layer; a layer whose attention was not rebuilt in this batch is left out."""
    allowed = ROUNDING.get(model.hf.dtype, 1e-4)
    return {
        int(layer): SinkSums(arrays[(kind, layer, "mass")], int(arrays[(kind, layer, "queries")]))
        for kind, layer, name in [key for key in arrays if key[0] == "sink" and key[2] == "error"]
        if arrays[(kind, layer, name)] <= allowed
    }


def _outliers(model: Model, arrays: Arrays, tokens: dict[str, np.ndarray]) -> OutlierBatch | None:
    if ("site", model.sites[0].key, "outliers", "output") not in arrays:
        return None
    experts = {}
    for site in model.sites:
        found = {
            name: arrays[("site", site.key, "outliers", name)] for name in ("output", "input", "first", "row", "tokens")
        }
        if np.isnan(found["output"]).any():
            expert = int(np.isnan(found["output"]).argmax())
            raise RefusedError(f"Expert {expert} of {site.key} gave NaN; load the model in a wider --dtype.")
        row = np.minimum(found["row"], len(tokens["document"]) - 1)  # an expert without tokens points past the end
        experts[site.key] = ExpertMaxima(
            absmax_out=found["output"],
            document=tokens["document"][row],
            position=tokens["position"][row],
            token_id=tokens["token_id"][row],
            absmax_in=found["input"],
            first_row_max=found["first"],
            tokens=found["tokens"],
        )
    hidden = {}
    for kind, layer, name in [key for key in arrays if key[0] == "hidden" and key[2] == "absmax"]:
        row = int(arrays[(kind, layer, "row")])
        hidden[int(layer)] = HiddenMaximum(
            absmax=float(arrays[(kind, layer, name)]),
            document=int(tokens["document"][row]),
            position=int(tokens["position"][row]),
            token_id=int(tokens["token_id"][row]),
            channel=int(arrays[(kind, layer, "channel")]),
        )
    return OutlierBatch(experts, hidden)
