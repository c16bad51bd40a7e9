"""One committed shard: the unit that analyses stream, and that bounds their memory."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from moescope.errors import StoreError
from moescope.store.activations import Vectors, file_name, of_expert, read_vectors
from moescope.store.columns import storage_dtype, unpack_rows, widen
from moescope.store.commit import Commit
from moescope.store.manifest import Manifest, SiteRecord
from moescope.store.routing import ExpertOutputs, Routing
from moescope.store.tables import LOGITS_ROW_GROUP

if TYPE_CHECKING:
    import pyarrow as pa
    import pyarrow.parquet as pq
    from jaxtyping import Float

HOW_TO_CAPTURE = {
    "routing": "ids and weights",
    "logits": "the router's logits",
    "experts": "each selected expert's output norm",
    "outliers": "maxima per expert and layer",
    "activations": "chosen vectors",
}
# Files that do not have one row for each token:
FREE_LENGTH = ("documents", "vocabulary", "outliers", "hidden_outliers", "attention_sinks", "activations")


class Shard:
    """A committed shard, with the same per-layer methods as the store.

    Attributes:
        path: the shard's folder.
        n_tokens: rows of the shard.
        offset: number of the shard's first row in the store.
        first_batch: number of the first batch in this shard (batches 0 .. first_batch - 1 are in earlier shards).
    """

    def __init__(self, path: Path, commit: Commit, manifest: Manifest, offset: int) -> None:
        self.path = path
        self.commit = commit
        self.manifest = manifest
        self.n_tokens = commit.rows
        self.offset = offset

    def tokens(self, columns: Sequence[str] | None = None, rows: slice | None = None) -> pa.Table:
        """Rows of tokens.parquet, one per token; of `rows` alone if given, counted from the shard's first."""
        return self.table("tokens", columns, rows)

    def documents(self, columns: Sequence[str] | None = None) -> pa.Table:
        """The documents that begin in this shard."""
        return self.table("documents", columns)

    def routing(self, layer: int | str, fields: Iterable[str] | None = None, rows: slice | None = None) -> Routing:
        """Routing of one layer (or site key); see `Routing`. `fields` are read at once, others when asked for.

        Of the shard's rows start:stop alone if `rows` are given: only the row groups they touch are read.
        """
        site = find_site(self.manifest, layer)
        need_tier(self.manifest, "routing")
        return Routing(site, lambda names: self.site_columns("routing", site, names, rows), fields)

    def routings(self, fields: Sequence[str], rows: slice) -> dict[str, Routing]:
        """`routing` of every site, by key, for a few rows: one read of the file for all of them."""
        need_tier(self.manifest, "routing")
        wanted = {
            site.key: [name for name in fields if name != "valid" or site.slots_can_miss]
            for site in self.manifest.sites
        }
        table = self.table("routing", [f"{key}.{name}" for key, names in wanted.items() for name in names], rows)

        def columns_of(key: str) -> Callable[[Sequence[str]], Mapping[str, pa.ChunkedArray]]:
            return lambda names: {name: table[f"{key}.{name}"] for name in names}

        return {site.key: Routing(site, columns_of(site.key), wanted[site.key]) for site in self.manifest.sites}

    def experts(self, layer: int | str) -> ExpertOutputs:
        """Output norms and magnitudes of one layer's selected experts."""
        site = find_site(self.manifest, layer)
        need_tier(self.manifest, "experts")
        return ExpertOutputs(site, lambda names: self.site_columns("experts", site, names))

    def logits(self, layer: int | str, rows: slice | None = None) -> Float[np.ndarray, "token expert"]:
        """Router logits [T, E] float32 of the rows start:stop of this shard; reads only the row groups they touch."""
        site = find_site(self.manifest, layer)
        need_tier(self.manifest, "logits")
        start, stop = row_bounds(rows, self.n_tokens)
        first, last = start // LOGITS_ROW_GROUP, -(-stop // LOGITS_ROW_GROUP)
        dtype = storage_dtype(site.logit_dtype)
        if start >= stop:
            return np.empty((0, site.n_experts), np.float32)
        name = f"{site.key}.logits"
        with self._reading("logits"), self._file("logits") as file:
            column = file.read_row_groups(list(range(first, last)), columns=[name], use_threads=False)[name]
            stored = unpack_rows(column, dtype, site.n_experts)
        begin = first * LOGITS_ROW_GROUP
        return widen(stored[start - begin : stop - begin], site.logit_dtype)

    def activations(self, kind: str, layer: int | str, expert: int | None = None) -> Vectors:
        """Chosen vectors of one layer, of one expert if asked; see `Vectors`. Rows are rows of the store.

        Raises:
            StoreError: this kind or layer was not kept.
        """
        site = find_site(self.manifest, layer)
        need_tier(self.manifest, "activations")
        record = self.manifest.activations
        assert record is not None
        if kind not in record.kinds or site.key not in record.sites:
            raise StoreError(
                f"no {kind} of {site.key} were kept; there are {', '.join(record.kinds)} of {', '.join(record.sites)}."
            )
        return of_expert(read_vectors(self.table(file_name(kind, site.key)), self.offset), expert)

    def site_columns(
        self, tier: str, site: SiteRecord, names: Sequence[str], rows: slice | None = None
    ) -> Mapping[str, pa.ChunkedArray]:
        """Raw columns of one site, by field name."""
        full = {f"{site.key}.{name}": name for name in names}
        table = self.table(tier, list(full), rows)
        return {name: table[column] for column, name in full.items()}

    def table(self, name: str, columns: Sequence[str] | None = None, rows: slice | None = None) -> pa.Table:
        """Columns of one of the shard's files, and of one row per token, the rows start:stop alone if asked for.

        Raises:
            StoreError: the file is damaged, or has no such column.
        """
        with self._reading(name), self._file(name) as file:
            known = file.schema_arrow.names
            for column in columns or ():
                if column not in known:
                    raise StoreError(f"{name} has no column {column!r}; it has {', '.join(known[:12])}.")
            wanted = None if columns is None else list(columns)
            if rows is not None:
                table = _read_rows(file, wanted, *row_bounds(rows, self.n_tokens))
                return table.select(columns) if columns is not None else table
            table = file.read(columns=wanted)
        if name.partition(".")[0] not in FREE_LENGTH and table.num_rows != self.n_tokens:
            raise StoreError(f"{self.path / name}.parquet has {table.num_rows} rows, its commit says {self.n_tokens}.")
        return table.select(columns) if columns is not None else table

    @contextmanager
    def _file(self, name: str) -> Iterator[pq.ParquetFile]:
        import pyarrow.parquet as pq

        metadata = self._footers.get(name)
        with pq.ParquetFile(self.path / f"{name}.parquet", metadata=metadata, pre_buffer=False) as file:
            self._footers[name] = file.metadata
            yield file

    @cached_property
    def _footers(self) -> dict[str, pq.FileMetaData]:
        return {}

    @contextmanager
    def _reading(self, name: str) -> Iterator[None]:
        import pyarrow as pa

        try:
            yield
        except (OSError, pa.ArrowException, ValueError) as error:
            reason = str(error).splitlines()[0]
            raise StoreError(f"{self.path / name}.parquet cannot be read ({reason}); run `moescope check`.") from error

    def __len__(self) -> int:
        return self.n_tokens

    def __repr__(self) -> str:
        return f"Shard({self.path.name}, {self.n_tokens:,} tokens)"


def find_site(manifest: Manifest, layer: int | str) -> SiteRecord:
    """The site of a model layer number or of a site key.

    Raises:
        StoreError: there is none, or the layer has several and a key is needed.
    """
    found = [site for site in manifest.sites if layer in (site.key, site.layer)]
    if len(found) == 1:
        return found[0]
    if found:
        raise StoreError(f"layer {layer} has several sites; name one: {', '.join(site.key for site in found)}.")
    layers = sorted({site.layer for site in manifest.sites})
    raise StoreError(f"no MoE layer {layer!r} in this store; it has {_spans(layers)}.")


def need_tier(manifest: Manifest, tier: str) -> None:
    """Raise StoreError, saying how to capture it, if a tier is absent."""
    if tier not in manifest.tiers:
        wanted = ", ".join([*manifest.tiers, tier])
        raise StoreError(
            f"This store has no {tier} tier ({HOW_TO_CAPTURE[tier]}); capture again with the tiers {wanted}."
        )


def _read_rows(file: pq.ParquetFile, columns: list[str] | None, start: int, stop: int) -> pa.Table:
    """Rows start:stop of a file, from the row groups that they touch."""
    metadata, groups, begin, first = file.metadata, [], 0, 0
    for number in range(metadata.num_row_groups):
        end = begin + metadata.row_group(number).num_rows
        if begin < stop and start < end:
            first = begin if not groups else first
            groups.append(number)
        begin = end
    if stop > begin:
        raise ValueError(f"it has {begin} rows, not {stop}")
    return file.read_row_groups(groups, columns=columns, use_threads=False).slice(start - first, stop - start)


def row_bounds(rows: slice | None, n: int) -> tuple[int, int]:
    """(start, stop) of a plain slice of n rows."""
    if rows is None:
        return 0, n
    start, stop, step = rows.indices(n)
    if step != 1:
        raise StoreError("rows must be a slice without a step.")
    return start, max(start, stop)


def _spans(numbers: Sequence[int]) -> str:
    """1, 2, 3, 7 as "1-3, 7"."""
    spans: list[list[int]] = []
    for n in numbers:
        if spans and spans[-1][1] == n - 1:
            spans[-1][1] = n
        else:
            spans.append([n, n])
    return ", ".join(f"{a}-{b}" if a != b else str(a) for a, b in spans)
