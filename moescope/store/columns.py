"""Fixed-width columns: how an array [token, slot] becomes one Parquet value a row, and comes back as a NumPy view.

A row of ``L003.expert`` is k little-endian ids in rank order, a row of ``L003.weight`` k little-endian numbers. Nothing
else is done to the bytes: any reader of Parquet gets them back with one ``frombuffer``. Plane order (all high bytes
first) would save 1.3 of 26 bytes in bfloat16 and 2 of 44 in float32, and cost that property and the zero-copy view.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import numpy as np

if TYPE_CHECKING:
    import pyarrow as pa
    from jaxtyping import Bool, Float, Shaped, UInt8

FloatName = Literal["float32", "float16", "bfloat16"]
IdName = Literal["uint8", "uint16"]

# bfloat16 has no NumPy type: its bits travel as uint16.
_STORAGE = {"float32": "<f4", "float16": "<f2", "bfloat16": "<u2", "uint8": "u1", "uint16": "<u2"}


def storage_dtype(name: str) -> np.dtype:
    """NumPy type that holds a declared type bit for bit (bfloat16 as uint16 bits)."""
    return np.dtype(_STORAGE[name])


def id_dtype(n_experts: int, slots_can_miss: bool = False) -> IdName:
    """Smallest id type for `n_experts`; where a slot can be missing one id is kept free for it."""
    return "uint8" if n_experts + slots_can_miss <= 256 else "uint16"


def missing_id(name: str) -> int:
    """The id that fills a missing slot: the largest of its type, so never an expert (and never expert 0)."""
    return int(np.iinfo(storage_dtype(name)).max)


def widen(values: Shaped[np.ndarray, ...], name: str) -> Float[np.ndarray, ...]:
    """Stored floats as float32, exactly. float32 comes back as the same view, without a copy."""
    if name == "bfloat16":
        bits = values.astype("<u4")
        bits <<= 16
        return bits.view("<f4")
    return values.astype("<f4", copy=False)


def pack_rows(values: Shaped[np.ndarray, "token slot"]) -> pa.Array:
    """A C-ordered [T, m] array as T fixed-width values of m * itemsize bytes, without a copy."""
    import pyarrow as pa

    values = np.ascontiguousarray(values)
    width = values.shape[1] * values.dtype.itemsize
    return pa.Array.from_buffers(pa.binary(width), len(values), [None, pa.py_buffer(values)])


def unpack_rows(column: pa.ChunkedArray, dtype: np.dtype, slots: int) -> Shaped[np.ndarray, "token slot"]:
    """The inverse of `pack_rows`: a read-only view, copied only when Arrow hands the column over in several chunks.

    Raises:
        ValueError: the column is not fixed-width bytes of slots * itemsize.
    """
    import pyarrow as pa

    width = slots * dtype.itemsize
    if column.type != pa.binary(width):
        raise ValueError(f"expected rows of {width} bytes, found {column.type}")
    parts = []
    for chunk in column.chunks:
        whole = np.frombuffer(chunk.buffers()[1], np.uint8, count=len(chunk) * width, offset=chunk.offset * width)
        parts.append(whole.view(dtype).reshape(len(chunk), slots))
    if len(parts) == 1:
        return parts[0]
    return np.concatenate(parts) if parts else np.empty((0, slots), dtype)


def unpack_floats(column: pa.ChunkedArray) -> Float[np.ndarray, " token"]:
    """A float32 column without nulls as a read-only view (Arrow's own `to_numpy` would import pandas)."""
    parts = [np.frombuffer(c.buffers()[1], "<f4", count=len(c), offset=c.offset * 4) for c in column.chunks if len(c)]
    if len(parts) == 1:
        return parts[0]
    return np.concatenate(parts) if parts else np.empty(0, np.float32)


def pack_mask(valid: Bool[np.ndarray, "token slot"]) -> UInt8[np.ndarray, "token byte"]:
    """Slot r of a row is bit r % 8 of byte r // 8; set means present."""
    return np.packbits(valid, axis=1, bitorder="little")


def unpack_mask(packed: UInt8[np.ndarray, "token byte"], slots: int) -> Bool[np.ndarray, "token slot"]:
    """The inverse of `pack_mask`."""
    return np.unpackbits(packed, axis=1, count=slots, bitorder="little").view(bool)
