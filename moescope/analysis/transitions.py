"""Transitions: how many tokens go from each expert of one layer to each expert of another (METHODS 3)."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from moescope.analysis.counts import Phase
from moescope.analysis.routed_rows import Ranks, kept_rows, rank_worth, slot_ids
from moescope.analysis.spreading import over_shards
from moescope.analysis.transition_kernels import count_transitions
from moescope.errors import MoescopeError

if TYPE_CHECKING:
    from jaxtyping import Int

    from moescope.store import Store


CELLS = 4_000_000
"""Cells (pairs x source x target experts) counted in one pass: 32 MB for each shard whose counts wait to be added."""
Pairs = str | Sequence[str | tuple[Any, Any]] | None


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


def chosen_pairs(store: Store, pairs: Pairs) -> list[tuple[Any, Any]]:
    """Site records of what `affinity` takes as `pairs`.

    Raises:
        MoescopeError: there is none.
    """
    words = [pairs] if isinstance(pairs, str) else pairs
    if words is None or list(words) == ["neighbours"]:
        found = site_pairs(store, None)
    elif list(words) == ["all"]:
        found = list(itertools.combinations(store.sites, 2))
    else:
        found = site_pairs(store, [_parsed(word) for word in words])
    if not found:
        raise MoescopeError(f"Affinity needs two MoE layers; the store has {len(store.sites)}, and no pair was named.")
    return found


def _parsed(pair: str | tuple[Any, Any]) -> tuple[Any, Any]:
    parts = pair.split("-") if isinstance(pair, str) else list(pair)
    if len(parts) != 2:
        raise MoescopeError(f"{pair!r} is no pair of layers: write it as source-target, for instance 3-4.")
    source, target = (int(part) if isinstance(part, str) and part.strip().isdecimal() else part for part in parts)
    return source, target


def site_pairs(store: Store, pairs: Sequence[tuple[Any, Any]] | None) -> list[tuple[Any, Any]]:
    """The site records of pairs of layers; neighbouring MoE layers, in the store's order, if None."""
    if pairs is None:
        return list(itertools.pairwise(store.sites))
    return [
        (store.site(getattr(source, "key", source)), store.site(getattr(target, "key", target)))
        for source, target in pairs
    ]


def pair_names(sites: list[tuple[Any, Any]]) -> list[str]:
    """ "3-4" for each pair of layers; with site keys where a layer number names two routers."""
    keys: dict[int, set[str]] = {}
    for site in itertools.chain.from_iterable(sites):
        keys.setdefault(site.layer, set()).add(site.key)
    plain = all(len(found) == 1 for found in keys.values())
    return [f"{a.layer}-{b.layer}" if plain else f"{a.key}-{b.key}" for a, b in sites]


def pair_coordinates(sites: list[tuple[Any, Any]]) -> dict[str, Any]:
    """Coordinates along `pair`: its name, layers and site keys."""
    return {
        "pair": pair_names(sites),
        "source_layer": ("pair", [source.layer for source, _ in sites]),
        "target_layer": ("pair", [target.layer for _, target in sites]),
        "source_site": ("pair", np.array([source.key for source, _ in sites], dtype=object)),
        "target_site": ("pair", np.array([target.key for _, target in sites], dtype=object)),
    }


def _scan(
    store: Store,
    sites: list[tuple[Any, Any]],
    shapes: list[tuple[int, int]],
    ranks: Ranks,
    documents: Int[np.ndarray, " document"] | None,
    phase: Phase | None,
) -> list[Int[np.ndarray, "source_expert target_expert"]]:
    """Counts as many pairs in one pass over the shards as `CELLS` allows."""
    found: list[np.ndarray] = []
    at_once = max(1, CELLS // max((a * b for a, b in shapes), default=1))
    for first in range(0, len(sites), at_once):
        part = slice(first, first + at_once)
        totals = [np.zeros(shape, dtype=np.int64) for shape in shapes[part]]
        for tables in over_shards(store, _shard_tables, tuple(sites[part]), ranks, documents, phase):
            for total, table in zip(totals, tables, strict=True):
                total += table
        found += totals
    return found


def _shard_tables(
    shard: Any,
    sites: tuple[tuple[Any, Any], ...],
    ranks: Ranks,
    documents: Int[np.ndarray, " document"] | None,
    phase: Phase | None,
) -> list[Int[np.ndarray, "source_expert target_expert"]]:
    """The counts of one shard, each layer that takes part decoded once."""
    rows = kept_rows(shard, documents, phase)
    ids = {key: slot_ids(shard, site, ranks, rows) for key, site in {s.key: s for pair in sites for s in pair}.items()}
    tables = []
    for source, target in sites:
        a, b = ids[source.key], ids[target.key]
        table = np.zeros((source.n_experts, target.n_experts), dtype=np.int64)
        count_transitions(a, b, rank_worth(ranks, a.shape[1]), rank_worth(ranks, b.shape[1]), table)
        tables.append(table)
    return tables


def _joined(parts: list[np.ndarray], dtype: Any) -> np.ndarray:
    return np.concatenate([np.empty(0, dtype), *(part.astype(dtype) for part in parts)])
