"""Cached results: small tables computed once from the committed shards and kept under aggregates/."""

from __future__ import annotations

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
        StoreError: `name` is not a plain word, or `params` are not plain JSON values.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    key = _key(store_id, shards, name, params)
    path = folder / AGGREGATES / f"{name}-{hashlib.blake2b(key, digest_size=8).hexdigest()}.parquet"
    if path.is_file():
        try:
            table = pq.read_table(path)
        except (OSError, pa.ArrowException):
            table = None
        if table is not None and (table.schema.metadata or {}).get(_KEY) == key:
            return _without_key(table)
    table = compute()
    marked = table.replace_schema_metadata({**(table.schema.metadata or {}), _KEY: key})
    try:
        path.parent.mkdir(exist_ok=True)
        # Sorted numbers, mostly: differences are small, and quick to write and read.
        delta = {field.name: "DELTA_BINARY_PACKED" for field in table.schema if pa.types.is_integer(field.type)}
        write_table(path, marked, durable=False, use_dictionary=False, column_encoding=delta)
    except OSError:
        return table  # read-only or full: a cache is not worth an error
    return table


def _key(store_id: str, shards: Sequence[Path], name: str, params: Mapping[str, Any]) -> bytes:
    if not re.fullmatch(r"[A-Za-z0-9_-]{1,64}", name):
        raise StoreError(f"an aggregate's name is letters, digits, - and _ (at most 64), not {name!r}.")
    digest = hashlib.blake2b(digest_size=16)
    for shard in shards:
        digest.update((shard / COMMIT).read_bytes())
    try:
        return json.dumps([COUNTED_AS, store_id, digest.hexdigest(), name, dict(params)], sort_keys=True).encode()
    except TypeError as error:
        raise StoreError(f"the parameters of aggregate {name!r} must be plain values: {error}.") from error


def _without_key(table: pa.Table) -> pa.Table:
    metadata = {key: value for key, value in (table.schema.metadata or {}).items() if key != _KEY}
    return table.replace_schema_metadata(metadata or None)
