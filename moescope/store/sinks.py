"""Attention sinks: attention that each head puts on a sequence's first token, summed so that any grouping merges.

One row for each (layer, head) that could be read: ``mass`` over ``queries`` is the share. Of two stores of the same
sequences, before and after an edit, the decay is D = 1 - mean_h sum_S p'_i / sum_S p_i (Super Experts, ICLR 2026).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import pyarrow as pa
    from jaxtyping import Float


SINKS = "attention_sinks"  # name of the file, and of the setting that says how many sequences of a batch are watched


@dataclass(frozen=True)
class SinkSums:
    """One layer: attention on the first token summed over the queries [H], and how many queries."""

    mass: Float[np.ndarray, " head"]
    queries: int


def sinks_table(batches: Iterable[Mapping[int, SinkSums]]) -> pa.Table:
    """attention_sinks.parquet of some batches: layer, head, mass (float64), queries."""
    import pyarrow as pa

    mass: dict[int, np.ndarray] = {}
    queries: dict[int, int] = {}
    for batch in batches:
        for layer, sums in batch.items():
            mass[layer] = mass.get(layer, 0) + sums.mass.astype(np.float64)
            queries[layer] = queries.get(layer, 0) + sums.queries
    rows = [
        {"layer": layer, "head": head, "mass": float(value), "queries": queries[layer]}
        for layer in sorted(mass)
        for head, value in enumerate(mass[layer])
    ]
    return pa.Table.from_pylist(rows, schema=sinks_schema())


def merged_sinks(tables: Iterable[pa.Table]) -> pa.Table:
    """The tables of several shards as one."""
    return sinks_table(_sums(table) for table in tables)


def with_share(table: pa.Table) -> pa.Table:
    """The table with ``share``: mean attention on the first token; null where there was no query."""
    import pyarrow as pa

    mass, queries = table["mass"].to_numpy(), table["queries"].to_numpy()
    return table.append_column("share", pa.array(mass / np.maximum(queries, 1), mask=queries == 0))


def sinks_schema() -> pa.Schema:
    """Schema of attention_sinks.parquet."""
    import pyarrow as pa

    return pa.schema([("layer", pa.int32()), ("head", pa.int32()), ("mass", pa.float64()), ("queries", pa.int64())])


def _sums(table: pa.Table) -> dict[int, SinkSums]:
    layers = table["layer"].to_numpy()
    found = {}
    for layer in np.unique(layers):
        part = table.filter(layers == layer)
        found[int(layer)] = SinkSums(part["mass"].to_numpy(), int(part["queries"][0].as_py()))
    return found
