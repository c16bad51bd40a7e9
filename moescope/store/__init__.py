"""The store: a folder of immutable Parquet shards that a capture writes and every analysis reads. Knows no torch.

    store = Store.open("runs/demo")
    store.tokens(); store.routing(layer=3).expert; store.sql("select layer, expert, n from load order by n desc")

The folder (format version 1; every file is plain Parquet or JSON):

    manifest.json                     what was captured, from which model and corpus (`Manifest`)
    shards/00000/commit.json          written last; a shard without it does not exist (`Commit`)
    shards/00000/tokens.parquet       one row per token
    shards/00000/routing.parquet      same rows; L003.expert, L003.weight: k little-endian numbers a row, in rank order
                                      (bfloat16 weights as their 16 bits); L003.logsumexp, L003.entropy, L003.margin:
                                      float32; L003.valid: bit mask, where slots can be missing
    shards/00000/logits.parquet       L003.logits: E numbers a row
    shards/00000/experts.parquet      L003.norm, L003.absmax: k float32 a row
    shards/00000/activations.outputs.L003.parquet   chosen vectors; see `activations`
    shards/00000/{documents,vocabulary,outliers,hidden_outliers,attention_sinks}.parquet
    {documents,vocabulary,outliers,hidden_outliers,attention_sinks}.parquet     the same for all shards, when complete
    aggregates/                       caches; may be deleted

Routing at k = 8 of 64 takes 26.1 bytes a token and layer with bfloat16 weights (ids 5.8, weights 11.1, the three
float32 summaries 9.3) and 43.4 with float32 weights, all of it lossless (1M Zipf-like tokens x 4 layers).
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from moescope.store.batch import Batch, DocumentRow, SiteBatch
    from moescope.store.check import Problem, check_store
    from moescope.store.documents import Context
    from moescope.store.manifest import (
        CorpusRecord,
        Manifest,
        ModelRecord,
        Selection,
        SiteRecord,
        TokenizerRecord,
    )
    from moescope.store.outliers import ExpertMaxima, HiddenMaximum, OutlierBatch
    from moescope.store.reader import Store
    from moescope.store.reader import open_store as open
    from moescope.store.routing import ExpertOutputs, Routing
    from moescope.store.shard import Shard
    from moescope.store.writer import StoreWriter

# Read on first use: importing moescope.store loads neither pyarrow nor pydantic.
_HOMES = {
    "Batch": "batch",
    "DocumentRow": "batch",
    "SiteBatch": "batch",
    "Problem": "check",
    "check_store": "check",
    "Context": "documents",
    "CorpusRecord": "manifest",
    "Manifest": "manifest",
    "ModelRecord": "manifest",
    "Selection": "manifest",
    "SiteRecord": "manifest",
    "TokenizerRecord": "manifest",
    "ExpertMaxima": "outliers",
    "HiddenMaximum": "outliers",
    "OutlierBatch": "outliers",
    "Store": "reader",
    "open": "reader",
    "ExpertOutputs": "routing",
    "Routing": "routing",
    "Shard": "shard",
    "StoreWriter": "writer",
}

__all__ = [
    "Batch",
    "Context",
    "CorpusRecord",
    "DocumentRow",
    "ExpertMaxima",
    "ExpertOutputs",
    "HiddenMaximum",
    "Manifest",
    "ModelRecord",
    "OutlierBatch",
    "Problem",
    "Routing",
    "Selection",
    "Shard",
    "SiteBatch",
    "SiteRecord",
    "Store",
    "StoreWriter",
    "TokenizerRecord",
    "check_store",
    "open",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = importlib.import_module(f"{__name__}.{_HOMES[name]}")
    return getattr(module, "open_store" if name == "open" else name)


def __dir__() -> list[str]:
    return sorted(__all__)
