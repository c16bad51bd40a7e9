"""The reader: a store folder as tokens, documents and per-layer arrays. Reads only what is committed."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from moescope.errors import StoreError
from moescope.store import aggregates, documents
from moescope.store.activations import Vectors, joined
from moescope.store.commit import read_commits, wrong_sizes
from moescope.store.manifest import Manifest, SiteRecord, read_manifest
from moescope.store.outliers import merged_tables
from moescope.store.routing import ExpertOutputs, Routing
from moescope.store.selection import selection_scores
from moescope.store.shard import Shard, find_site, need_tier, row_bounds
from moescope.store.sinks import SINKS, merged_sinks, with_share
from moescope.store.tables import token_schema

if TYPE_CHECKING:
    import pandas as pd
    import pyarrow as pa
    from jaxtyping import Float

    from moescope.store.check import Problem


class Store:
    """A captured store. Open one with `Store.open` (or `moescope.open`); it shows the shards committed at that moment.

    Attributes:
        path: the folder.
        manifest: what was captured.
        shards: committed shards in order, each with the same per-layer methods; the way to stream.
    """

    def __init__(self, path: Path, manifest: Manifest, shards: list[Shard]) -> None:
        """Internal: see `open`."""
        self.path = path
        self.manifest = manifest
        self.shards = shards

    @classmethod
    def open(cls, path: str | Path) -> Store:
        """Open a store, also one that is still being written or was interrupted.

        Raises:
            StoreError: not a store, of a newer version, or damaged (a file is missing or has another size).
        """
        path = Path(path)
        manifest = read_manifest(path)
        shards, offset = [], 0
        for folder, commit in read_commits(path):
            for name, wrong in wrong_sizes(folder, commit):
                raise StoreError(f"{path} is damaged: shards/{folder.name}/{name} {wrong}; run `moescope check`.")
            shards.append(Shard(folder, commit, manifest, offset))
            offset += commit.rows
        expected = len(manifest.shards)
        if manifest.status == "complete" and expected != len(shards):
            raise StoreError(f"{path} is damaged: it has {len(shards)} of {expected} shards; run `moescope check`.")
        return cls(path, manifest, shards)

    @property
    def status(self) -> str:
        """'complete', 'interrupted', or 'capturing' (also what a killed capture leaves)."""
        return self.manifest.status

    @cached_property
    def n_tokens(self) -> int:
        """Committed rows."""
        return sum(shard.n_tokens for shard in self.shards)

    @cached_property
    def n_documents(self) -> int:
        """Documents that begin in a committed shard."""
        return sum(shard.commit.n_documents for shard in self.shards)

    @property
    def sites(self) -> list[SiteRecord]:
        """Records of the captured MoE layers."""
        return self.manifest.sites

    @property
    def layers(self) -> list[int]:
        """Model layer indices of the sites, in order."""
        return sorted({site.layer for site in self.sites})

    @property
    def labels(self) -> list[str]:
        """Label columns of the documents."""
        return list(self.manifest.corpus.labels)

    @property
    def tiers(self) -> list[str]:
        """What was captured."""
        return list(self.manifest.tiers)

    def site(self, layer: int | str) -> SiteRecord:
        """The site of a model layer number or of a key such as "L003"."""
        return find_site(self.manifest, layer)

    def tokens(self, columns: Sequence[str] | None = None) -> pa.Table:
        """One row per token: document, sequence, position, token_id, start, end, phase, loss."""
        import pyarrow as pa

        schema = token_schema()
        for column in columns or ():
            if column not in schema.names:
                raise StoreError(f"tokens has no column {column!r}; it has {', '.join(schema.names)}.")
        empty = schema.empty_table().select(list(columns) if columns is not None else schema.names)
        parts = [shard.tokens(columns) for shard in self.shards]
        return pa.concat_tables(parts) if parts else empty

    def documents(self, columns: Sequence[str] | None = None) -> pa.Table:
        """One row per document, sorted by `document`: id, text, source, n_tokens and the labels.

        While a store is incomplete, numbers can be missing in between: batches are cut by length.
        """
        if self._is_consolidated("documents"):
            return self._root_table("documents", columns)
        whole = documents.joined_documents([shard.documents() for shard in self.shards], self.labels)
        return whole.select(list(columns)) if columns is not None else whole

    def vocabulary(self) -> Mapping[int, str]:
        """Text of every token id that occurs."""
        return self._vocabulary

    @cached_property
    def _vocabulary(self) -> dict[int, str]:
        table = self.vocabulary_table()
        return dict(zip(table["token_id"].to_pylist(), table["text"].to_pylist(), strict=True))

    def vocabulary_table(self) -> pa.Table:
        """The same as a table (token_id, text), sorted by id."""
        if self._is_consolidated("vocabulary"):
            return self._root_table("vocabulary")
        return documents.joined_vocabulary([shard.table("vocabulary") for shard in self.shards])

    def routing(self, layer: int | str, fields: Iterable[str] | None = None) -> Routing:
        """What one layer's router decided for all tokens; see `Routing`. For much data stream `shards` instead."""
        site = self.site(layer)
        need_tier(self.manifest, "routing")
        return Routing(site, lambda names: self._site_columns("routing", site, names), fields)

    def experts(self, layer: int | str) -> ExpertOutputs:
        """Output norms and magnitudes of one layer's selected experts, for all tokens."""
        site = self.site(layer)
        need_tier(self.manifest, "experts")
        return ExpertOutputs(site, lambda names: self._site_columns("experts", site, names))

    def logits(self, layer: int | str, rows: slice | None = None) -> Float[np.ndarray, "token expert"]:
        """Router logits [T, E] float32 of the token rows start:stop."""
        site = self.site(layer)
        need_tier(self.manifest, "logits")
        start, stop = row_bounds(rows, self.n_tokens)
        parts = []
        for shard in self.shards:
            a, b = max(start - shard.offset, 0), min(stop - shard.offset, shard.n_tokens)
            if a < b:
                parts.append(shard.logits(site.key, slice(a, b)))
        if len(parts) == 1:
            return parts[0]
        return np.concatenate(parts) if parts else np.empty((0, site.n_experts), np.float32)

    def activations(self, kind: str, layer: int | str, expert: int | None = None) -> Vectors:
        """Chosen vectors of one layer ("outputs", "neurons" or "router_inputs"), of one expert if asked; `Vectors`."""
        site = self.site(layer)
        need_tier(self.manifest, "activations")
        if not self.shards:
            raise StoreError(f"{self.path} holds no tokens yet.")
        return joined([shard.activations(kind, site.key, expert) for shard in self.shards])

    def selection_scores(self, layer: int | str, rows: slice | None = None) -> Float[np.ndarray, "token expert"]:
        """What the router compared when it chose, [T, E] float32, from the logits tier; see `selection_scores`."""
        return selection_scores(self.site(layer), self.logits(layer, rows))

    def outliers(self) -> pa.Table:
        """Maxima per (site, expert); null where an expert was never selected."""
        return self._outlier_tables()[0]

    def hidden_outliers(self) -> pa.Table:
        """The largest value of each layer's output residual, its token and channel."""
        return self._outlier_tables()[1]

    def attention_sinks(self) -> pa.Table:
        """Attention on a sequence's first token by layer and head: mass, queries and share; see `sinks`.

        Raises:
            StoreError: they were not captured.
        """
        if not self.manifest.setting(SINKS, 0):
            raise StoreError("This store has no attention sinks; capture again with sinks=True (--sinks).")
        if self._is_consolidated(SINKS):
            return with_share(self._root_table(SINKS))
        return with_share(merged_sinks(shard.table(SINKS) for shard in self.shards))

    def _outlier_tables(self) -> tuple[pa.Table, pa.Table]:
        need_tier(self.manifest, "outliers")
        if self._is_consolidated("outliers"):
            return self._root_table("outliers"), self._root_table("hidden_outliers")
        pairs = ((shard.table("outliers"), shard.table("hidden_outliers")) for shard in self.shards)
        return merged_tables(pairs, {site.key: site.layer for site in self.sites})

    def sql(self, query: str) -> pd.DataFrame:
        """Answer one SELECT over the store's views; `moescope.store.sql` lists them.

        Raises:
            StoreError: not a SELECT, a name or a value is wrong, or the query reaches outside the store.
        """
        from moescope.store.sql import run

        return run(self, query)

    def cached(self, name: str, compute: Callable[[], pa.Table], params: Mapping[str, Any] | None = None) -> pa.Table:
        """The table `compute()` gives, read from aggregates/ when it was saved for these shards and `params`."""
        return aggregates.cached(*self._cached_for, name, compute, params or {})

    def kept(self, name: str, params: Mapping[str, Any] | None = None) -> pa.Table | None:
        """The table that `keep` or `cached` saved for these shards and `params`; None if there is none."""
        return aggregates.kept(*self._cached_for, name, params or {})

    def keep(self, name: str, params: Mapping[str, Any], table: pa.Table) -> None:
        """Saves a table under aggregates/ for these shards and `params`, if it can be written there."""
        aggregates.keep(*self._cached_for, name, params, table)

    @property
    def _cached_for(self) -> tuple[Path, str, list[Path]]:
        return self.path, self.manifest.store_id, [shard.path for shard in self.shards]

    def check(self, *, checksums: bool = True) -> list[Problem]:
        """Everything that is wrong with the store, an empty list if nothing is; reads all of it."""
        from moescope.store.check import check_store

        return check_store(self.path, checksums=checksums)

    def context(self, row: int, before: int = 40, after: int = 40) -> documents.Context:
        """The text around token row `row`, with `before` and `after` characters (not bytes, not tokens).

        Raises:
            StoreError: there is no such row.
        """
        if not 0 <= row < self.n_tokens:
            raise StoreError(f"no token row {row}; the store has {self.n_tokens} rows.")
        shard = next(s for s in self.shards if row < s.offset + s.n_tokens)
        table = shard.tokens(["document", "sequence", "token_id", "start", "end"])
        at = row - shard.offset
        here = {name: table[name][at].as_py() for name in table.column_names}
        text = self._texts.get(here["document"])
        if here["start"] is not None and here["end"] is not None and text is not None:
            return documents.context_in_text(text, here["start"], here["end"], before, after)
        same = np.flatnonzero(table["sequence"].to_numpy() == here["sequence"])
        ids = table["token_id"].to_numpy()[same].tolist()
        return documents.context_in_tokens(ids, int(np.searchsorted(same, at)), self._vocabulary, before, after)

    @cached_property
    def _texts(self) -> dict[int, str]:
        table = self.documents(["document", "text"])
        return dict(zip(table["document"].to_pylist(), table["text"].to_pylist(), strict=True))

    def _site_columns(self, tier: str, site: SiteRecord, names: Sequence[str]) -> Mapping[str, pa.ChunkedArray]:
        import pyarrow as pa

        if not self.shards:
            raise StoreError(f"{self.path} has no committed shard yet.")
        parts = [shard.site_columns(tier, site, names) for shard in self.shards]
        return {
            name: pa.chunked_array([c for part in parts for c in part[name].chunks], type=parts[0][name].type)
            for name in names
        }

    def _is_consolidated(self, name: str) -> bool:
        return self.status == "complete" and f"{name}.parquet" in self.manifest.files

    def _root_table(self, name: str, columns: Sequence[str] | None = None) -> pa.Table:
        import pyarrow as pa
        import pyarrow.parquet as pq

        try:
            return pq.read_table(self.path / f"{name}.parquet", columns=columns and list(columns))
        except (OSError, pa.ArrowException) as error:
            raise StoreError(f"{self.path}/{name}.parquet cannot be read; run `moescope check`.") from error

    def __len__(self) -> int:
        return self.n_tokens

    def __repr__(self) -> str:
        return (
            f"Store({str(self.path)!r}: {self.manifest.model.name}, {self.n_tokens:,} tokens of {self.n_documents:,} "
            f"documents, {len(self.sites)} MoE layers, {'+'.join(self.tiers)}, {self.status})"
        )

    def explore(self, page: str = "overview", height: int = 820, **place: Any) -> Any:
        """The app on this store, inline in a notebook: `store.explore("expert", layer=3, expert=7)`.

        Args:
            page: the page to begin with: overview, expert, text, specialisation, flow, map, outliers, compare, lab,
                analyses.
            height: pixels of the frame.
            place: what is chosen: layer, expert, by, label, …; see `moescope.app.Place`. `framed_by` names pages from
                elsewhere that may show the app: see `moescope.app.explore`.
        """
        # A shortcut to the face, found when it is asked for: the store knows nothing of it.
        from moescope.app import explore

        return explore(self.path, page, height, **place)

    def _repr_html_(self) -> str:
        from moescope.store.html import store_html

        return store_html(self)


def open_store(path: str | Path) -> Store:
    """Open a store folder: `Store.open`, under the name `moescope.open`."""
    return Store.open(path)
