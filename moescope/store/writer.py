"""The writer: batches in, committed shards out, from a background thread; killed anywhere, it can be resumed."""

from __future__ import annotations

import contextlib
import errno
import logging
import queue
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

from moescope.errors import MoescopeError, StoreError
from moescope.store.activations import activation_tables
from moescope.store.batch import Batch, check_batch
from moescope.store.commit import (
    Commit,
    new_shard,
    read_commits,
    remove_leftovers,
    write_bytes,
    write_commit,
    write_table,
    wrong_sizes,
)
from moescope.store.lock import LOCK, WriterLock
from moescope.store.manifest import (
    MANIFEST,
    FileRecord,
    Manifest,
    ShardSummary,
    Status,
    first_difference,
    read_manifest,
    validated,
)
from moescope.store.outliers import OutlierMaxima, merged_tables
from moescope.store.sinks import SINKS, merged_sinks, sinks_table
from moescope.store.tables import documents_table, parquet_options, site_tables, tokens_table, vocabulary_table

if TYPE_CHECKING:
    import pyarrow as pa

# A shard is closed at the batch boundary where it reaches either bound. Up to three shards are in memory at once:
# the one being filled, one waiting, one being written.
SHARD_TOKENS = 65_536
SHARD_BYTES = 512 * 2**20

log = logging.getLogger(__name__)


class StoreWriter:
    """Writes one store. Use as a context manager; make one with `create` or `resume`.

    Attributes:
        path: the store's folder.
        cursor: number of batches already committed when the writer was made: a resumed capture skips that many.
        n_tokens: rows appended so far, committed ones included.
    """

    def __init__(self, path: Path, manifest: Manifest, lock: WriterLock, commits: Sequence[tuple[Path, Commit]]):
        """Internal: see `create` and `resume`."""
        self.path = path
        self.manifest = manifest
        self.cursor = commits[-1][1].batches if commits else 0
        self.n_tokens = sum(commit.rows for _, commit in commits)
        self._lock = lock
        self._layers = {site.key: site.layer for site in manifest.sites}
        self._pending: list[Batch] = []
        self._pending_rows = self._pending_bytes = 0
        self._handed_over = self.cursor
        self._n_shards = len(commits)
        self._known_tokens = _known_tokens(commits)
        self._closed = False
        self._error: BaseException | None = None
        self._committed = self.cursor
        self._queue: queue.Queue[tuple[int, list[Batch]] | None] = queue.Queue(maxsize=1)
        self._thread = threading.Thread(target=self._write_shards, name="moescope-store-writer", daemon=True)
        self._thread.start()

    @classmethod
    def create(cls, path: str | Path, manifest: Manifest) -> StoreWriter:
        """Begin a new store.

        Raises:
            StoreError: `path` is not a new or empty folder, cannot be written, or the manifest is not valid.
        """
        path = Path(path)
        fresh = {"status": "capturing", "n_tokens": None, "n_documents": None, "shards": [], "files": {}}
        manifest = validated({**manifest.model_dump(), **fresh}, path)
        if path.exists() and not path.is_dir():
            raise StoreError(f"{path} is a file; name a new folder for the store.")
        if path.is_dir() and any(entry.name != LOCK for entry in path.iterdir()):
            kind = "already a store: resume it, or" if (path / MANIFEST).exists() else "not empty:"
            raise StoreError(f"{path} is {kind} name another folder.")
        with _locked(path) as lock:
            if (path / MANIFEST).exists():  # another writer was faster
                raise StoreError(f"{path} is already a store: resume it, or name another folder.")
            write_bytes(path / MANIFEST, _json(manifest))
            return cls(path, manifest, lock, [])

    @classmethod
    def resume(cls, path: str | Path, manifest: Manifest) -> StoreWriter:
        """Go on with a store that was interrupted; `writer.cursor` says how many batches it already holds.

        Raises:
            StoreError: not a store, complete, damaged, in use, or captured with another manifest (the field is named).
        """
        path = Path(path)
        old = read_manifest(path)
        difference = first_difference(old, validated(manifest, path))
        if difference:
            raise StoreError(f"{path} cannot be resumed: it was begun with another {difference}. Name another folder.")
        with _locked(path) as lock:
            old = read_manifest(path)  # the last writer may just have finished it
            if old.status == "complete":
                raise StoreError(f"{path} is complete: there is nothing to resume. Open it with moescope.open.")
            commits = read_commits(path)
            for shard, commit in commits:
                for name, wrong in wrong_sizes(shard, commit):
                    raise StoreError(
                        f"{path} is damaged: shards/{shard.name}/{name} {wrong}. "
                        f"Delete shards/{shard.name} and those after it, then resume."
                    )
            remove_leftovers(path)
            old.status = "capturing"
            write_bytes(path / MANIFEST, _json(old))
            return cls(path, old, lock, commits)

    def append(self, batch: Batch) -> None:
        """Add one batch; a full shard goes to the background thread (and this waits while one is already waiting).

        Raises:
            StoreError: the batch does not fit the manifest, or writing an earlier shard failed.
        """
        if self._closed:
            raise StoreError(f"{self.path}: this writer is closed.")
        self._raise_failure()
        check_batch(batch, self.manifest)
        self._pending.append(batch)
        self._pending_rows += len(batch)
        self._pending_bytes += batch.nbytes
        self.n_tokens += len(batch)
        setting = self.manifest.setting
        full = self._pending_rows >= setting("shard_tokens", SHARD_TOKENS)
        if full or self._pending_bytes >= setting("shard_bytes", SHARD_BYTES):
            self._hand_over()

    def close(self, *, complete: bool = True) -> None:
        """Commit the last shard, write the consolidated files and set the status; safe to call twice.

        Raises:
            StoreError: something could not be written; what was committed before stays.
        """
        if self._closed:
            return
        self._closed = True
        try:
            if self._pending and self._error is None:
                self._hand_over()
            self._queue.put(None)
            self._thread.join()
            if self._error is not None:
                with contextlib.suppress(OSError, StoreError):  # the failure itself is what the caller must see
                    self._finish("interrupted")
            self._raise_failure()
            self._finish("complete" if complete else "interrupted")
        except OSError as error:
            raise _disk_error(self.path, error) from error
        finally:
            self._lock.release()

    def __enter__(self) -> StoreWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None):
        if error is None:
            self.close()
            return
        try:
            self.close(complete=False)
        except MoescopeError as second:
            # The caller's own error is the one to show; this one only says that the status could not be updated.
            if str(second) != str(error):
                log.warning("%s", second)

    def _hand_over(self) -> None:
        # Ctrl-C often comes while this waits: then the same batches may be handed over again, and `_write_shards`
        # leaves out those that it has written.
        self._queue.put((self._handed_over, self._pending))
        self._handed_over, self._pending = self._handed_over + len(self._pending), []
        self._pending_rows = self._pending_bytes = 0

    def _raise_failure(self) -> None:
        if isinstance(self._error, OSError):
            raise _disk_error(self.path, self._error) from self._error
        if self._error is not None:
            raise StoreError(f"{self.path}: writing a shard failed: {self._error}") from self._error

    def _write_shards(self) -> None:
        """The background thread. After a failure it only empties the queue, so that `append` never blocks on it."""
        while (job := self._queue.get()) is not None:
            if self._error is None:
                try:
                    self._write_shard(*job)
                except BaseException as error:  # noqa: BLE001 - kept whole and raised by the next append or close
                    self._error = error
            del job  # or its arrays stay in memory until the next shard

    def _write_shard(self, first: int, batches: list[Batch]) -> None:
        batches = batches[self._committed - first :]
        if not batches:
            return
        cursor = self._committed + len(batches)
        documents = [row for batch in batches for row in batch.documents]
        texts = {t: text for batch in batches for t, text in batch.vocabulary.items() if t not in self._known_tokens}
        tables = {
            "tokens": tokens_table(batches),
            "documents": documents_table(documents, self.manifest.corpus.labels),
            "vocabulary": vocabulary_table(texts),
            **site_tables(self.manifest, batches),
            **activation_tables(self.manifest, batches),
        }
        if "outliers" in self.manifest.tiers:
            maxima = OutlierMaxima()
            for batch in batches:
                if batch.outliers is not None:
                    maxima.add(batch.outliers)
            tables["outliers"], tables["hidden_outliers"] = maxima.tables(self._layers)
        if self._has_sinks:
            tables[SINKS] = sinks_table(batch.sinks for batch in batches)
        with new_shard(self.path, self._n_shards) as folder:
            files: dict[str, FileRecord] = {}
            for name, table in tables.items():
                options = parquet_options(name, table, self.manifest)
                files[f"{name}.parquet"] = write_table(folder / f"{name}.parquet", table, **options)
            rows = tables["tokens"].num_rows
            write_commit(folder, Commit(rows=rows, batches=cursor, n_documents=len(documents), files=files))
        self._n_shards += 1
        self._committed = cursor
        self._known_tokens.update(texts)

    @property
    def _has_sinks(self) -> bool:
        return bool(self.manifest.setting(SINKS, 0))

    def _finish(self, status: Status) -> None:
        commits = read_commits(self.path)
        update: dict[str, object] = {"status": status}
        if status == "complete":
            update |= {
                "n_tokens": sum(commit.rows for _, commit in commits),
                "n_documents": sum(commit.n_documents for _, commit in commits),
                "shards": [ShardSummary(name=p.name, rows=c.rows, bytes=c.bytes) for p, c in commits],
                "files": self._consolidate([path for path, _ in commits]),
            }
        self.manifest = self.manifest.model_copy(update=update)
        write_bytes(self.path / MANIFEST, _json(self.manifest))

    def _consolidate(self, shards: list[Path]) -> dict[str, FileRecord]:
        """Write the small tables of all shards as one file each, for readers who want one file."""
        from moescope.store.documents import joined_documents, joined_vocabulary

        tables: dict[str, pa.Table] = {
            "documents": joined_documents(_parts(shards, "documents"), self.manifest.corpus.labels),
            "vocabulary": joined_vocabulary(_parts(shards, "vocabulary")),
        }
        if "outliers" in self.manifest.tiers:
            pairs = zip(_parts(shards, "outliers"), _parts(shards, "hidden_outliers"), strict=True)
            tables["outliers"], tables["hidden_outliers"] = merged_tables(pairs, self._layers)
        if self._has_sinks:
            tables[SINKS] = merged_sinks(_parts(shards, SINKS))
        return {f"{name}.parquet": write_table(self.path / f"{name}.parquet", table) for name, table in tables.items()}


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[WriterLock]:
    """The folder, made if need be, and its lock, which stays held unless the block fails."""
    lock = None
    try:
        path.mkdir(parents=True, exist_ok=True)
        lock = WriterLock(path)
        yield lock
    except BaseException as error:
        if lock is not None:
            lock.release()
        if isinstance(error, OSError):
            raise _disk_error(path, error) from error
        raise


def _parts(shards: Sequence[Path], name: str) -> list[pa.Table]:
    import pyarrow.parquet as pq

    return [pq.read_table(shard / f"{name}.parquet") for shard in shards]


def _known_tokens(commits: Sequence[tuple[Path, Commit]]) -> set[int]:
    return {i for table in _parts([p for p, _ in commits], "vocabulary") for i in table["token_id"].to_pylist()}


def _json(manifest: Manifest) -> bytes:
    return manifest.model_dump_json(indent=1).encode()


def _disk_error(path: Path, error: OSError) -> StoreError:
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return StoreError(
            f"No space left for {path}: its committed shards are whole. Free some space, then resume the capture."
        )
    reason = error.strerror or str(error)
    return StoreError(f"{path} cannot be written: {reason}. Its committed shards are whole.")
