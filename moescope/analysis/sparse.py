"""Several arrays of counts as one sparse table, for the store's aggregates."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa

if TYPE_CHECKING:
    from jaxtyping import Int


def packed(parts: Sequence[Int[np.ndarray, "row column"]]) -> pa.Table:
    """The cells that are not 0: part, row, column, count."""
    filled = [np.nonzero(part) for part in parts]
    return pa.table(
        {
            "part": np.repeat(np.arange(len(parts), dtype=np.int32), [len(rows) for rows, _ in filled]),
            "row": np.concatenate([rows for rows, _ in filled]).astype(np.int32),
            "column": np.concatenate([columns for _, columns in filled]).astype(np.int32),
            "count": np.concatenate([part[at] for part, at in zip(parts, filled, strict=True)]),
        }
    )


def unpack(table: pa.Table, parts: Sequence[Int[np.ndarray, "row column"]]) -> None:
    """Writes a table from `packed` into arrays of zeros of the same shapes."""
    row, column, count = (table[name].to_numpy() for name in ("row", "column", "count"))
    edges = np.searchsorted(table["part"].to_numpy(), np.arange(len(parts) + 1))
    for place, part in enumerate(parts):
        mine = slice(int(edges[place]), int(edges[place + 1]))
        part[row[mine], column[mine]] = count[mine]
