"""Rows of a shard as they are counted: which the filters keep, which experts each selected, which belong together."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pyarrow as pa

from moescope.analysis.counts import Phase
from moescope.errors import StoreError

if TYPE_CHECKING:
    from jaxtyping import Int


Ranks = Literal["top1", "all", "weighted"]


def kept_rows(shard: Any, documents: Int[np.ndarray, " document"] | None, phase: Phase | None) -> np.ndarray | None:
    """[row] bool: the rows of a shard that the filters keep; None where they keep all."""
    if documents is None and phase is None:
        return None
    columns = [name for name, wanted in (("document", documents), ("phase", phase)) if wanted is not None]
    tokens = shard.tokens(columns)
    kept = np.ones(shard.n_tokens, dtype=bool)
    if documents is not None:
        kept &= np.isin(tokens["document"].to_numpy(), np.asarray(documents))
    if phase is not None:
        kept &= np.asarray(tokens["phase"].cast(pa.string()).to_numpy(zero_copy_only=False)) == phase
    return kept


def slot_ids(shard: Any, site: Any, ranks: Ranks, rows: np.ndarray | None) -> Int[np.ndarray, "row rank"]:
    """Ids of one layer's slots in a shard, rank order, -1 where a slot is missing; the first rank alone for "top1".

    Raises:
        StoreError: an id beyond the layer's experts.
    """
    routing = shard.routing(site.key, fields=["expert", "valid"])
    depth = 1 if ranks == "top1" else site.top_k
    stored = routing.expert[:, :depth]
    beyond = stored >= site.n_experts
    ids = stored.astype(np.int16 if site.n_experts <= 2**15 else np.int32)
    if routing.valid is not None:
        valid = routing.valid[:, :depth]
        beyond &= valid
        ids[~valid] = -1
    if beyond.any():
        raise StoreError(
            f"Slots of layer {site.layer} name an expert beyond the {site.n_experts} it has: "
            "the store is damaged; run `moescope check` on it."
        )
    return ids if rows is None else ids[rows]


def runs_of(shard: Any, rows: np.ndarray | None) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Rows that belong to one sequence of one document: (first row of each run and the end, document, sequence)."""
    tokens = shard.tokens(["document", "sequence"])
    document, sequence = (tokens[name].to_numpy().astype(np.int64) for name in ("document", "sequence"))
    if rows is not None:
        document, sequence = document[rows], sequence[rows]
    fresh = np.ones(document.size, dtype=bool)
    fresh[1:] = (document[1:] != document[:-1]) | (sequence[1:] != sequence[:-1])
    first = np.flatnonzero(fresh)
    return np.append(first, document.size), document[first], sequence[first]


def rank_worth(ranks: Ranks, width: int) -> Int[np.ndarray, " rank"]:
    """What each rank counts: 1, or k - rank for "weighted"."""
    return np.arange(width, 0, -1, dtype=np.int64) if ranks == "weighted" else np.ones(width, dtype=np.int64)
