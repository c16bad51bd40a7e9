"""Batches to Arrow tables: the columns of one shard's files, and how each file is encoded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from moescope.store.batch import SUMMARIES, Batch, DocumentRow
from moescope.store.columns import missing_id, pack_mask, pack_rows, storage_dtype
from moescope.store.manifest import DOCUMENT_COLUMNS

if TYPE_CHECKING:
    import pyarrow as pa

    from moescope.store.manifest import Manifest, SiteRecord

# One sequence's logits are read without the rest of the shard (STORE.md: 4-13 ms).
LOGITS_ROW_GROUP = 8192
# One token's routing in 16 layers is then read in 6 ms instead of 58, and a whole shard's ids in 12.8 instead of 11.9.
ROW_GROUP = 8192


def token_schema() -> pa.Schema:
    """Schema of tokens.parquet: one row per real token."""
    import pyarrow as pa

    return pa.schema(
        [
            pa.field("document", pa.int64(), nullable=False),
            pa.field("sequence", pa.int64(), nullable=False),
            pa.field("position", pa.int32(), nullable=False),
            pa.field("token_id", pa.int32(), nullable=False),
            pa.field("start", pa.int32()),
            pa.field("end", pa.int32()),
            pa.field("phase", pa.dictionary(pa.int8(), pa.string()), nullable=False),
            pa.field("loss", pa.float32()),
        ]
    )


def document_schema(labels: Sequence[str]) -> pa.Schema:
    """Schema of documents.parquet. Texts are large_string: all texts of a corpus may exceed 2 GiB."""
    import pyarrow as pa

    return pa.schema(
        [
            pa.field("document", pa.int64(), nullable=False),
            pa.field("id", pa.string()),
            pa.field("text", pa.large_string(), nullable=False),
            pa.field("source", pa.string()),
            pa.field("n_tokens", pa.int64(), nullable=False),
            *(pa.field(name, pa.string()) for name in labels),
        ]
    )


def vocabulary_schema() -> pa.Schema:
    """Schema of vocabulary.parquet."""
    import pyarrow as pa

    return pa.schema([pa.field("token_id", pa.int32(), nullable=False), pa.field("text", pa.string(), nullable=False)])


def tokens_table(batches: Sequence[Batch]) -> pa.Table:
    """tokens.parquet of a shard; -1 spans and NaN losses become null."""
    import pyarrow as pa

    columns = []
    for field in token_schema():
        parts = [_token_column(batch, field.name) for batch in batches]
        values = np.concatenate(parts) if parts else np.empty(0)
        mask = None
        if field.name in ("start", "end"):
            mask = values < 0
        elif field.name == "loss":
            mask = np.isnan(values)
        if field.name == "phase":
            column = pa.DictionaryArray.from_arrays(values.astype(np.int8), ["prefill", "decode"])
        else:
            column = pa.array(values, mask=mask).cast(field.type)
        columns.append(column)
    return pa.Table.from_arrays(columns, schema=token_schema())


def _token_column(batch: Batch, name: str) -> np.ndarray:
    values = batch.tokens.get(name)
    if name == "phase":
        return np.zeros(len(batch), bool) if values is None else values == "decode"
    if values is None:
        return np.full(len(batch), np.nan, np.float32) if name == "loss" else np.full(len(batch), -1)
    return values.astype(np.float32, copy=False) if name == "loss" else values


def documents_table(rows: Sequence[DocumentRow], labels: Sequence[str]) -> pa.Table:
    """documents.parquet of a shard: the documents that begin in it."""
    import pyarrow as pa

    schema = document_schema(labels)
    columns: dict[str, list[Any]] = {name: [getattr(row, name) for row in rows] for name in DOCUMENT_COLUMNS}
    columns |= {name: [row.labels.get(name) for row in rows] for name in labels}
    for name in ("id", "text", "source", *labels):
        columns[name] = [None if value is None else clean_text(value) for value in columns[name]]
    return pa.table(columns, schema=schema)


def vocabulary_table(texts: Mapping[int, str]) -> pa.Table:
    """vocabulary.parquet: token id and text, by id."""
    import pyarrow as pa

    ids = sorted(texts)
    return pa.table({"token_id": ids, "text": [clean_text(texts[i]) for i in ids]}, schema=vocabulary_schema())


def clean_text(text: str) -> str:
    """The text as UTF-8 can hold it: lone surrogates become "?", so character spans stay right."""
    return text if text.isascii() else text.encode("utf-8", "replace").decode("utf-8")


def routing_table(site: SiteRecord, batches: Sequence[Batch]) -> dict[str, pa.Array]:
    """Columns of one site in routing.parquet."""
    import pyarrow as pa

    arrays = [batch.sites[site.key] for batch in batches]
    experts, weights, masks = [], [], []
    for one in arrays:
        assert one.expert is not None
        assert one.weight is not None
        valid = one.valid if site.slots_can_miss else None
        experts.append(_filled(one.expert, valid, missing_id(site.ids)).astype(storage_dtype(site.ids)))
        weights.append(_filled(one.weight, valid, _nan(site.weight_dtype)))
        masks.append(valid if valid is not None else np.ones(one.expert.shape, bool))
    columns = {
        f"{site.key}.expert": pack_rows(np.concatenate(experts)),
        f"{site.key}.weight": pack_rows(np.concatenate(weights)),
    }
    if site.slots_can_miss:
        columns[f"{site.key}.valid"] = pack_rows(pack_mask(np.concatenate(masks)))
    for name in SUMMARIES:
        columns[f"{site.key}.{name}"] = pa.array(np.concatenate([getattr(one, name) for one in arrays]))
    return columns


def logits_table(site: SiteRecord, batches: Sequence[Batch]) -> dict[str, pa.Array]:
    """Columns of one site in logits.parquet."""
    parts = [logits for batch in batches if (logits := batch.sites[site.key].logits) is not None]
    return {f"{site.key}.logits": pack_rows(np.concatenate(parts))}


def experts_table(site: SiteRecord, batches: Sequence[Batch]) -> dict[str, pa.Array]:
    """Columns of one site in experts.parquet; missing slots hold NaN."""
    columns = {}
    for name in ("norm", "absmax"):
        parts = []
        for batch in batches:
            one = batch.sites[site.key]
            parts.append(_filled(getattr(one, name), one.valid if site.slots_can_miss else None, np.float32(np.nan)))
        columns[f"{site.key}.{name}"] = pack_rows(np.concatenate(parts))
    return columns


def _filled(values: np.ndarray, valid: np.ndarray | None, missing: Any) -> np.ndarray:
    return values if valid is None or valid.all() else np.where(valid, values, missing).astype(values.dtype)


def _nan(name: str) -> Any:
    return 0x7FC0 if name == "bfloat16" else np.nan


def site_tables(manifest: Manifest, batches: Sequence[Batch]) -> dict[str, pa.Table]:
    """The tables with one column per (site, field): routing, logits and experts, as far as they are captured."""
    import pyarrow as pa

    makers = {"routing": routing_table, "logits": logits_table, "experts": experts_table}
    tables = {}
    for tier, make in makers.items():
        if tier in manifest.tiers:
            columns: dict[str, pa.Array] = {}
            for site in manifest.sites:
                columns.update(make(site, batches))
            schema = pa.schema([pa.field(name, column.type, nullable=False) for name, column in columns.items()])
            tables[tier] = pa.Table.from_arrays(list(columns.values()), schema=schema)
    return tables


def parquet_options(name: str, table: pa.Table, manifest: Manifest) -> dict[str, Any]:
    """How one file of a shard is encoded (STORE.md): no dictionary and no statistics on fixed-width columns.

    The three float32 summaries are byte-stream-split, which every reader knows for this type: 9.3 instead of 10.1
    bytes. float16 would take 4.6, but round logsumexp to 1 part in 2000 and small margins to a few bits.
    """
    if name == "tokens":
        return {"use_dictionary": ["phase"], "row_group_size": ROW_GROUP}
    if name in ("documents", "vocabulary", "outliers", "hidden_outliers", "attention_sinks"):
        return {}
    if name.startswith("activations."):
        return {"use_dictionary": False}
    options: dict[str, Any] = {"use_dictionary": False, "write_statistics": False, "row_group_size": ROW_GROUP}
    if name == "logits":
        options["compression"] = manifest.setting("logits_compression", "none")
        options["row_group_size"] = LOGITS_ROW_GROUP
    if name == "routing":
        split = [column for column in table.column_names if column.endswith(SUMMARIES)]
        options["column_encoding"] = dict.fromkeys(split, "BYTE_STREAM_SPLIT")
    return options
