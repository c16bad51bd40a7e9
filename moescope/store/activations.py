"""The activations tier: chosen vectors, one file for each kind and site of a shard.

``activations.<kind>.<site>.parquet`` has the columns ``row`` (token row in the shard), ``slot`` (rank of the expert, -1
for router inputs), ``expert`` (its number, -1 for router inputs) and ``vector`` (fixed-width bytes). The field's
metadata names the type of the numbers (``float32``, ``float16``, ``bfloat16``) and how many there are. Kinds are:

- ``outputs``: f_e(x) of a selected expert, before its routing weight;
- ``neurons``: what entered its down projection;
- ``router_inputs``: the hidden state that entered the router.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, cast, get_args

import numpy as np

from moescope.errors import StoreError
from moescope.store.columns import FloatName, pack_rows, storage_dtype, unpack_rows, widen

if TYPE_CHECKING:
    import pyarrow as pa
    from jaxtyping import Int, Shaped

    from moescope.store.batch import Batch
    from moescope.store.manifest import Manifest

Kind = Literal["outputs", "neurons", "router_inputs"]
KINDS: tuple[Kind, ...] = get_args(Kind)


@dataclass(frozen=True)
class Vectors:
    """Chosen vectors of one kind at one site, n of them.

    Attributes:
        row: token rows [n] int64: of the batch when written, of the store when read.
        slot, expert: rank and number [n] of the expert whose vector it is; -1 for router inputs.
        values: [n, D]; float32 when read, else as the model had them (bfloat16 as uint16 bits).
        dtype: what the values were in the model.
    """

    row: Int[np.ndarray, " vector"]
    slot: Int[np.ndarray, " vector"]
    expert: Int[np.ndarray, " vector"]
    values: Shaped[np.ndarray, "vector channel"]
    dtype: FloatName

    def __len__(self) -> int:
        return len(self.row)

    @property
    def nbytes(self) -> int:
        """Bytes of the vectors themselves."""
        return self.values.nbytes


def file_name(kind: str, site: str) -> str:
    """Name of one file of the tier, without its ending."""
    return f"activations.{kind}.{site}"


def activation_tables(manifest: Manifest, batches: Sequence[Batch]) -> dict[str, pa.Table]:
    """One table for each kind and site that the manifest names; rows are counted from the shard's first token."""
    record = manifest.activations
    if record is None:
        return {}
    starts = np.cumsum([0, *(len(batch) for batch in batches)])
    return {
        file_name(kind, site): _table([batch.activations[kind, site] for batch in batches], starts)
        for kind in record.kinds
        for site in record.sites
    }


def _table(parts: Sequence[Vectors], starts: np.ndarray) -> pa.Table:
    import pyarrow as pa

    values = np.concatenate([part.values for part in parts])
    metadata = {"dtype": parts[0].dtype, "channels": str(values.shape[1])}
    columns = {
        "row": pa.array(np.concatenate([part.row + start for part, start in zip(parts, starts, strict=False)])),
        "slot": pa.array(np.concatenate([part.slot for part in parts]).astype(np.int16)),
        "expert": pa.array(np.concatenate([part.expert for part in parts]).astype(np.int32)),
        "vector": pack_rows(values),
    }
    fields = [pa.field(name, column.type, nullable=False) for name, column in columns.items()]
    fields[-1] = fields[-1].with_metadata(metadata)
    return pa.Table.from_arrays(list(columns.values()), schema=pa.schema(fields))


def read_vectors(table: pa.Table, offset: int = 0) -> Vectors:
    """The vectors of one file, float32; rows are counted from the store's first token.

    Raises:
        StoreError: the file does not say what its numbers are.
    """
    metadata = table.schema.field("vector").metadata or {}
    dtype, channels = metadata.get(b"dtype", b"").decode(), metadata.get(b"channels", b"0").decode()
    if dtype not in get_args(FloatName) or not channels.isdigit():
        raise StoreError("a file of activations does not say what its numbers are; run `moescope check`.")
    name = cast(FloatName, dtype)
    return Vectors(
        row=table["row"].to_numpy() + offset,
        slot=table["slot"].to_numpy(),
        expert=table["expert"].to_numpy(),
        values=widen(unpack_rows(table["vector"], storage_dtype(name), int(channels)), name),
        dtype=name,
    )


def joined(parts: Sequence[Vectors]) -> Vectors:
    """Vectors of several shards, one after another."""
    if len(parts) == 1:
        return parts[0]
    return Vectors(
        *(np.concatenate([getattr(part, name) for part in parts]) for name in ("row", "slot", "expert", "values")),
        dtype=parts[0].dtype,
    )


def of_expert(vectors: Vectors, expert: int | None) -> Vectors:
    """Those of one expert alone."""
    if expert is None:
        return vectors
    keep = vectors.expert == expert
    return Vectors(vectors.row[keep], vectors.slot[keep], vectors.expert[keep], vectors.values[keep], vectors.dtype)
