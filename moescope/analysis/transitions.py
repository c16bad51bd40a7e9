"""Transitions: how often a token that visits one expert in one layer visits another in another layer (METHODS 3)."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pyarrow as pa

from moescope.analysis.counts import Phase
from moescope.analysis.transition_kernels import count_transitions
from moescope.errors import MoescopeError, StoreError

if TYPE_CHECKING:
    from jaxtyping import Int

    from moescope.store import Store

Ranks = Literal["top1", "all", "weighted"]


def transition_counts(
    store: Store,
    source: Any,
    target: Any,
    ranks: Ranks = "top1",
    documents: Int[np.ndarray, " document"] | None = None,
    phase: Phase | None = None,
) -> Int[np.ndarray, "source_expert target_expert"]:
    """Tokens by (expert in layer `source`, expert in layer `target`).

    Args:
        store: an open store with the routing tier.
        source, target: two MoE layers, each a site record, a site key or a model layer index; in any order, and not
            necessarily neighbours.
        ranks: "top1" counts each token once, by the first-ranked expert of both layers; "all" counts all k x k pairs of
            selected experts; "weighted" counts all of them by the product of their rank weights, k - rank (Borda: the
            first of 8 counts 8, the last 1).
        documents: document numbers to keep; all if None.
        phase: only tokens of this phase; None for all.

    Returns:
        [E of source, E of target] int64. Missing slots are not counted. Kept in the store's aggregates when
        `documents` is None.

    Raises:
        MoescopeError: no such layer, or an unknown `ranks`.
    """
    return transition_tables(store, [(source, target)], ranks, documents, phase)[0]


def transition_tables(
    store: Store,
    pairs: Sequence[tuple[Any, Any]] | None = None,
    ranks: Ranks = "top1",
    documents: Int[np.ndarray, " document"] | None = None,
    phase: Phase | None = None,
) -> list[Int[np.ndarray, "source_expert target_expert"]]:
    """`transition_counts` of many pairs of layers in one pass over the store, each layer decoded once a shard.

    Args:
        pairs: (source, target) pairs; every MoE layer with the next one if None.
        store, ranks, documents, phase: as in `transition_counts`.
    """
    sites = site_pairs(store, pairs)
    if ranks not in ("top1", "all", "weighted"):
        raise MoescopeError('`ranks` is "top1", "all" or "weighted".')
    shapes = [(source.n_experts, target.n_experts) for source, target in sites]
    if documents is not None:
        return _scan(store, sites, shapes, ranks, documents, phase)

    def compute() -> pa.Table:
        found = _scan(store, sites, shapes, ranks, None, phase)
        cells = [np.nonzero(table) for table in found]
        names = [(source.key, target.key) for source, target in sites]
        sizes = [len(cell[0]) for cell in cells]
        return pa.table(
            {
                "source": pa.array(np.repeat([name[0] for name in names], sizes), pa.string()),
                "target": pa.array(np.repeat([name[1] for name in names], sizes), pa.string()),
                "pair": _joined([np.full(size, index) for index, size in enumerate(sizes)], np.int32),
                "source_expert": _joined([cell[0] for cell in cells], np.int32),
                "target_expert": _joined([cell[1] for cell in cells], np.int32),
                "count": _joined([table[cell] for table, cell in zip(found, cells, strict=True)], np.int64),
            }
        )

    asked = [f"{source.key}>{target.key}" for source, target in sites]
    kept = store.cached("transitions", compute, {"pairs": asked, "ranks": ranks, "phase": phase or "all"})
    edges = np.searchsorted(kept["pair"].to_numpy(), np.arange(len(sites) + 1))
    row, column = kept["source_expert"].to_numpy(), kept["target_expert"].to_numpy()
    count = kept["count"].to_numpy()
    tables = []
    for index, shape in enumerate(shapes):
        part = slice(int(edges[index]), int(edges[index + 1]))
        table = np.zeros(shape, dtype=np.int64)
        table[row[part], column[part]] = count[part]
        tables.append(table)
    return tables


def site_pairs(store: Store, pairs: Sequence[tuple[Any, Any]] | None) -> list[tuple[Any, Any]]:
    """The site records of pairs of layers; neighbouring MoE layers, in the store's order, if None."""
    if pairs is None:
        return list(itertools.pairwise(store.sites))
    return [
        (store.site(getattr(source, "key", source)), store.site(getattr(target, "key", target)))
        for source, target in pairs
    ]


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
    ids = routing.expert[:, :depth].astype(np.int16 if site.n_experts <= 2**15 else np.int32)
    if routing.valid is not None:
        ids[~routing.valid[:, :depth]] = -1
    if ids.max(initial=-1) >= site.n_experts or (routing.valid is None and ids.min(initial=0) < 0):
        raise StoreError(
            f"Slots of layer {site.layer} name an expert beyond the {site.n_experts} it has: "
            "the store is damaged; run `moescope check` on it."
        )
    return ids if rows is None else ids[rows]


def rank_worth(ranks: Ranks, width: int) -> Int[np.ndarray, " rank"]:
    """What each rank counts: 1, or k - rank for "weighted"."""
    return np.arange(width, 0, -1, dtype=np.int64) if ranks == "weighted" else np.ones(width, dtype=np.int64)


def _scan(
    store: Store,
    sites: list[tuple[Any, Any]],
    shapes: list[tuple[int, int]],
    ranks: Ranks,
    documents: Int[np.ndarray, " document"] | None,
    phase: Phase | None,
) -> list[Int[np.ndarray, "source_expert target_expert"]]:
    tables = [np.zeros(shape, dtype=np.int64) for shape in shapes]
    for ids in _decoded(store, sites, ranks, documents, phase):
        for (source, target), table in zip(sites, tables, strict=True):
            a, b = ids[source.key], ids[target.key]
            count_transitions(a, b, rank_worth(ranks, a.shape[1]), rank_worth(ranks, b.shape[1]), table)
    return tables


def _decoded(
    store: Store,
    sites: list[tuple[Any, Any]],
    ranks: Ranks,
    documents: Int[np.ndarray, " document"] | None,
    phase: Phase | None,
) -> Iterator[dict[str, np.ndarray]]:
    """Shard by shard, the ids of every layer that takes part."""
    wanted = {site.key: site for pair in sites for site in pair}
    for shard in store.shards:
        rows = kept_rows(shard, documents, phase)
        yield {key: slot_ids(shard, site, ranks, rows) for key, site in wanted.items()}


def _joined(parts: list[np.ndarray], dtype: Any) -> np.ndarray:
    return np.concatenate([np.empty(0, dtype), *(part.astype(dtype) for part in parts)])
