"""`store.sql`: DuckDB over views of a store, with no way out of it: no file, no network, no setting, only SELECT.

Views:
    tokens, documents, vocabulary       as in the files
    outliers, hidden_outliers           when captured
    sites                               site, layer, n_experts, top_k, score_function
    routing                             document, sequence, position, layer, rank (0 first), expert, weight: one row per
                                        token, layer and slot; expert and weight are null where a slot is missing
    scores                              document, sequence, position, layer, logsumexp, entropy, margin
    load                                layer, expert, n (selections), weight (summed)

Nothing is decoded before a query names it, and then only the layers it asks for, shard by shard. The data reach DuckDB
through Arrow, never through its own file access, which is switched off: with `allowed_directories` a COPY could
overwrite the shards.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from moescope.errors import StoreError
from moescope.store.batch import SUMMARIES
from moescope.store.outliers import hidden_schema, outlier_schema
from moescope.store.tables import document_schema, token_schema, vocabulary_schema

if TYPE_CHECKING:
    import duckdb
    import pandas as pd
    import pyarrow as pa

    from moescope.store.manifest import SiteRecord
    from moescope.store.reader import Store
    from moescope.store.shard import Shard

_ROWS = 16_384  # tokens per decoded batch: 8 slots of them are about 5 MB

_KEYS = ("document", "sequence", "position")


def run(store: Store, query: str) -> pd.DataFrame:
    """Answer one SELECT.

    Raises:
        StoreError: another kind of statement, an error in the query, or one that reaches outside the store.
    """
    import duckdb

    connection = _connect(store)
    try:
        statements = connection.extract_statements(query)
        kinds = (duckdb.StatementType.SELECT, duckdb.StatementType.EXPLAIN)
        if len(statements) != 1 or statements[0].type not in kinds:
            raise StoreError("store.sql answers one SELECT at a time; the store itself is never changed.")
        return connection.execute(statements[0]).df()
    except duckdb.Error as error:
        raise StoreError(f"SQL: {_first_lines(error)}") from error
    finally:
        connection.close()


class _Stream:
    """A table that is made anew, batch by batch, each time DuckDB scans it."""

    def __init__(self, schema: pa.Schema, batches: Callable[[], Iterator[pa.RecordBatch]]) -> None:
        self._schema = schema
        self._batches = batches

    def __arrow_c_schema__(self) -> Any:
        return self._schema.__arrow_c_schema__()

    def __arrow_c_stream__(self, requested_schema: Any = None) -> Any:
        import pyarrow as pa

        reader = pa.RecordBatchReader.from_batches(self._schema, self._batches())
        return reader.__arrow_c_stream__(requested_schema)


def _connect(store: Store) -> duckdb.DuckDBPyConnection:
    import duckdb
    import pyarrow.dataset as ds

    connection = duckdb.connect(":memory:")
    if store.shards:
        files = [str(shard.path / "tokens.parquet") for shard in store.shards]
        connection.register("tokens", ds.dataset(files, schema=token_schema(), format="parquet"))
    else:
        connection.register("tokens", store.tokens())
    _register_lazily(connection, store)
    # Nothing of the session may reach outside: no file system, no extension, no Python variable, no spilling to disk.
    for setting in (
        "python_enable_replacements = false",
        "autoload_known_extensions = false",
        "autoinstall_known_extensions = false",
        "temp_directory = ''",
        "enable_external_access = false",
        "lock_configuration = true",
    ):
        connection.execute(f"SET {setting}")
    return connection


def _register_lazily(connection: duckdb.DuckDBPyConnection, store: Store) -> None:
    """Small tables, and streams per site: in a view over all of them DuckDB skips the layers a query leaves out."""
    import pyarrow as pa

    connection.register("documents", _once(store.documents, document_schema(store.labels)))
    connection.register("vocabulary", _once(store.vocabulary_table, vocabulary_schema()))
    records = [
        site.model_dump(include={"key", "layer", "n_experts", "top_k", "score_function"}) for site in store.sites
    ]
    connection.register("sites", pa.Table.from_pylist(records).rename_columns({"key": "site"}))
    if "outliers" in store.manifest.tiers:
        connection.register("outliers", _once(store.outliers, outlier_schema()))
        connection.register("hidden_outliers", _once(store.hidden_outliers, hidden_schema()))
    if "routing" not in store.manifest.tiers:
        return
    for view, (schema, batches) in {
        "routing": (_routing_schema(), _routing_batches),
        "scores": (_scores_schema(), _scores_batches),
        "load": (_load_schema(), _load_batches),
    }.items():
        names = ", ".join(schema.names)
        parts = []
        for number, site in enumerate(store.sites):
            connection.register(f"_{view}_{number}", _Stream(schema, partial(batches, store, site)))
            parts.append(f"SELECT {site.layer}::INTEGER AS layer, {names} FROM _{view}_{number}")
        connection.execute(f"CREATE VIEW {view} AS {' UNION ALL '.join(parts)}")


def _once(make: Callable[[], pa.Table], schema: pa.Schema) -> _Stream:
    """A table that is read only if a query names it."""
    return _Stream(schema, lambda: iter(make().cast(schema).to_batches()))


def _token_keys(shard: Shard) -> list[np.ndarray]:
    table = shard.tokens(_KEYS)
    return [table[name].to_numpy() for name in _KEYS]


def _key_fields() -> list[tuple[str, pa.DataType]]:
    import pyarrow as pa

    return [("document", pa.int64()), ("sequence", pa.int64()), ("position", pa.int32())]


def _routing_schema() -> pa.Schema:
    import pyarrow as pa

    return pa.schema([*_key_fields(), ("rank", pa.int16()), ("expert", pa.int32()), ("weight", pa.float32())])


def _routing_batches(store: Store, site: SiteRecord) -> Iterator[pa.RecordBatch]:
    import pyarrow as pa

    schema, k = _routing_schema(), site.top_k
    for shard in store.shards:
        keys, routing = _token_keys(shard), shard.routing(site.key, ["expert", "weight", "valid"])
        for start in range(0, shard.n_tokens, _ROWS):
            rows = slice(start, min(start + _ROWS, shard.n_tokens))
            n = rows.stop - rows.start
            missing = None if routing.valid is None else ~routing.valid[rows].ravel()
            columns = [
                *(pa.array(np.repeat(key[rows], k)) for key in keys),
                pa.array(np.tile(np.arange(k, dtype=np.int16), n)),
                pa.array(routing.expert[rows].ravel().astype(np.int32), mask=missing),
                pa.array(routing.weight[rows].ravel(), mask=missing),
            ]
            yield pa.record_batch(columns, schema=schema)


def _scores_schema() -> pa.Schema:
    import pyarrow as pa

    return pa.schema([*_key_fields(), *((name, pa.float32()) for name in SUMMARIES)])


def _scores_batches(store: Store, site: SiteRecord) -> Iterator[pa.RecordBatch]:
    import pyarrow as pa

    for shard in store.shards:
        routing = shard.routing(site.key, SUMMARIES)
        columns = [*_token_keys(shard), *(getattr(routing, name) for name in SUMMARIES)]
        yield pa.record_batch([pa.array(column) for column in columns], schema=_scores_schema())


def _load_schema() -> pa.Schema:
    import pyarrow as pa

    return pa.schema([("expert", pa.int32()), ("n", pa.int64()), ("weight", pa.float64())])


def _load_batches(store: Store, site: SiteRecord) -> Iterator[pa.RecordBatch]:
    import pyarrow as pa

    n, weight = np.zeros(site.n_experts, np.int64), np.zeros(site.n_experts)
    for shard in store.shards:
        routing = shard.routing(site.key, ["expert", "weight", "valid"])
        present = ... if routing.valid is None else routing.valid
        ids = routing.expert[present].ravel()
        n += np.bincount(ids, minlength=site.n_experts)
        weight += np.bincount(ids, routing.weight[present].ravel(), minlength=site.n_experts)
    yield pa.record_batch([pa.array(np.arange(site.n_experts, dtype=np.int32)), n, weight], schema=_load_schema())


def _first_lines(error: Exception) -> str:
    """The two lines of a DuckDB error that say what is wrong (and its suggestion), without the quoted query."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return " ".join(line for line in lines[:3] if not line.startswith(("LINE", "^")))
