"""The store: a folder of immutable Parquet shards that a capture writes and every analysis reads. Knows no torch.

store = Store.open("runs/demo")
store.tokens(); store.routing(layer=3).expert; store.sql("select layer, expert, n from load order by n desc")
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
