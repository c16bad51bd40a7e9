"""Cached results: small tables computed once from the committed shards and kept under aggregates/."""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moescope.errors import StoreError
from moescope.store.commit import COMMIT, write_table

if TYPE_CHECKING:
    import pyarrow as pa

AGGREGATES = "aggregates"
COUNTED_AS = 1
"""Raised when what a kept table means or how it is laid out changes: older ones are counted anew, not misread."""
_KEY = b"moescope.key"


def cached(
    folder: Path,
    store_id: str,
    shards: Sequence[Path],
    name: str,
    compute: Callable[[], pa.Table],
    params: Mapping[str, Any],
) -> pa.Table:
    """Read the table for (store, committed shards, name, params), or compute and save it.

    The key is in the file as well as in its name; a file that cannot be read or has another key is computed again.
    A folder that cannot be written costs the saving, not the result.

    Raises:
        StoreError: `name` is not a plain word, `params` are not plain JSON values, or the store is gone.
    """
    table = kept(folder, store_id, shards, name, params)
    if table is None:
        table = compute()
        keep(folder, store_id, shards, name, params, table)
    return table


def kept(folder: Path, store_id: str, shards: Sequence[Path], name: str, params: Mapping[str, Any]) -> pa.Table | None:
    """The table saved for (store, committed shards, name, params), None if there is none that can be read."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    key = _key(store_id, shards, name, params)
    path = _path(folder, name, key)
    if not path.is_file():
        return None
    try:
        table = pq.read_table(path)
    except (OSError, pa.ArrowException):
        return None
    metadata = dict(table.schema.metadata or {})
    if metadata.pop(_KEY, None) != key:
        return None
    fields = [field.with_nullable(True) for field in table.schema]
    return pa.Table.from_arrays(table.columns, schema=pa.schema(fields, metadata or None))


def keep(
    folder: Path, store_id: str, shards: Sequence[Path], name: str, params: Mapping[str, Any], table: pa.Table
) -> None:
    """Saves a table under (store, committed shards, name, params); a folder that cannot be written is let be."""
    import pyarrow as pa

    key = _key(store_id, shards, name, params)
    # Read and written often, and small beside the shards: what is quick matters, not the last byte.
    fields = [field.with_nullable(bool(table[field.name].null_count)) for field in table.schema]
    marked = pa.Table.from_arrays(table.columns, schema=pa.schema(fields, {**(table.schema.metadata or {}), _KEY: key}))
    # Sorted numbers, mostly: differences are small, and quick to write and read.
    delta = {field.name: "DELTA_BINARY_PACKED" for field in fields if pa.types.is_integer(field.type)}
    path = _path(folder, name, key)
    how = {"compression": "lz4", "use_dictionary": False, "column_encoding": delta, "write_statistics": False}
    with contextlib.suppress(OSError):  # read-only or full: a cache is not worth an error
        path.parent.mkdir(exist_ok=True)
        write_table(path, marked, durable=False, **how)


def _path(folder: Path, name: str, key: bytes) -> Path:
    return folder / AGGREGATES / f"{name}-{hashlib.blake2b(key, digest_size=8).hexdigest()}.parquet"


def _key(store_id: str, shards: Sequence[Path], name: str, params: Mapping[str, Any]) -> bytes:
    if not re.fullmatch(r"[A-Za-z0-9_-]{1,64}", name):
        raise StoreError(f"an aggregate's name is letters, digits, - and _ (at most 64), not {name!r}.")
    digest = hashlib.blake2b(digest_size=16)
    for shard in shards:
        try:
            digest.update((shard / COMMIT).read_bytes())
        except OSError as error:
            raise StoreError(
                f"{shard}/{COMMIT} cannot be read ({error.strerror}): is the store still there?"
            ) from error
    try:
        return json.dumps([COUNTED_AS, store_id, digest.hexdigest(), name, dict(params)], sort_keys=True).encode()
    except TypeError as error:
        raise StoreError(f"the parameters of aggregate {name!r} must be plain values: {error}.") from error
