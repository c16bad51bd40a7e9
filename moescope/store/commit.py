"""How files and shards become visible: whole or not at all, with a checksum, and the commit record last."""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from moescope.errors import StoreError
from moescope.store.manifest import FileRecord

if TYPE_CHECKING:
    import pyarrow as pa

COMMIT = "commit.json"
SHARDS = "shards"
_TMP = ".tmp-"
_READ_BLOCK = 1 << 20


class Commit(BaseModel):
    """shards/N/commit.json: its presence makes the shard part of the store.

    Attributes:
        rows: tokens of this shard.
        batches: capture batches up to and including this shard, where a resumed capture goes on.
        n_documents: documents that begin in this shard.
        files: size and checksum of every file of the shard.
    """

    model_config = ConfigDict(extra="forbid")

    rows: int = Field(ge=0)
    batches: int = Field(ge=1)
    n_documents: int = Field(ge=0)
    files: dict[str, FileRecord]

    @property
    def bytes(self) -> int:
        """Size of the shard's files."""
        return sum(record.bytes for record in self.files.values())


class _HashingFile:
    """A binary file for writing that hashes what passes through, so that no file is read back for its checksum."""

    def __init__(self, raw: IO[bytes]) -> None:
        self._raw = raw
        self._hash = _new_hash()
        self._bytes = 0

    closed = False
    mode = "wb"

    def write(self, data: Any) -> int:
        view = memoryview(data)
        self._raw.write(view)
        self._hash.update(view)
        self._bytes += view.nbytes
        return view.nbytes

    def tell(self) -> int:
        return self._bytes

    def flush(self) -> None:
        self._raw.flush()

    def close(self) -> None:
        """Parquet's writer closes its sink; the file itself is synced and closed by `write_file`."""

    def readable(self) -> bool:
        return False

    def writable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return False

    def record(self) -> FileRecord:
        return FileRecord(bytes=self._bytes, checksum=self._hash.hexdigest())


def _new_hash() -> hashlib.blake2b:
    return hashlib.blake2b(digest_size=16)


def checksum(path: Path) -> str:
    """blake2b-128 of a file, in hex."""
    digest = _new_hash()
    with path.open("rb") as file:
        while block := file.read(_READ_BLOCK):
            digest.update(block)
    return digest.hexdigest()


def sync_folder(folder: Path) -> None:
    """Make the names inside a folder durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_file(path: Path, fill: Callable[[Any], None], *, durable: bool = True) -> FileRecord:
    """Create `path` from `fill(file)` through a temporary name: synced and renamed, or removed if anything fails.

    What can be made again need not be `durable`: it is then not waited for until it is on the disk.
    """
    temporary = path.with_name(f"{_TMP}{os.getpid()}-{threading.get_ident()}-{path.name}")
    try:
        with temporary.open("wb") as raw:
            sink = _HashingFile(raw)
            fill(sink)
            raw.flush()
            if durable:
                os.fsync(raw.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    if durable:
        sync_folder(path.parent)
    return sink.record()


def write_bytes(path: Path, data: bytes) -> FileRecord:
    """Create or replace a small file atomically."""
    return write_file(path, lambda file: file.write(data))


def write_table(path: Path, table: pa.Table, *, durable: bool = True, **options: Any) -> FileRecord:
    """Create or replace a Parquet file atomically; zstd-1 unless `options` say otherwise."""
    import pyarrow.parquet as pq

    if options.setdefault("compression", "zstd") == "zstd":
        options.setdefault("compression_level", 1)
    options.setdefault("row_group_size", max(table.num_rows, 1))
    return write_file(path, lambda file: pq.write_table(table, file, **options), durable=durable)


@contextlib.contextmanager
def new_shard(folder: Path, number: int) -> Iterator[Path]:
    """A folder to fill; it takes its place under shards/ when the block ends well, and vanishes if it does not."""
    shards = folder / SHARDS
    shards.mkdir(exist_ok=True)
    temporary = shards / f"{_TMP}{shard_name(number)}"
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        temporary.mkdir()
        yield temporary
        sync_folder(temporary)
        temporary.rename(shards / shard_name(number))
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    sync_folder(shards)


def write_commit(folder: Path, commit: Commit) -> None:
    """Write commit.json, the last file of a shard."""
    write_bytes(folder / COMMIT, commit.model_dump_json(indent=1).encode())


def shard_name(number: int) -> str:
    """Folder name of a shard."""
    return f"{number:05d}"


def read_commits(folder: Path) -> list[tuple[Path, Commit]]:
    """Every committed shard, in order. Folders without a commit record are invisible.

    Raises:
        StoreError: a record is damaged, or a shard before the last is missing.
    """
    shards = folder / SHARDS
    found = sorted((p.parent for p in shards.glob(f"*/{COMMIT}") if p.parent.name.isdigit()), key=lambda p: int(p.name))
    commits = []
    for number, shard in enumerate(found):
        if int(shard.name) != number:
            raise StoreError(f"{folder} is damaged: shard {shard_name(number)} is missing. {REPAIR}")
        try:
            commit = Commit.model_validate_json((shard / COMMIT).read_bytes())
        except (ValidationError, OSError) as error:
            raise StoreError(f"{folder} is damaged: {shard.name}/{COMMIT} cannot be read. {REPAIR}") from error
        commits.append((shard, commit))
    return commits


REPAIR = "Restore it from a copy, or delete that shard and those after it and resume the capture."


def wrong_sizes(shard: Path, commit: Commit) -> Iterator[tuple[str, str]]:
    """(file, what is wrong) for each file that is absent or not as long as the commit says."""
    for name, record in commit.files.items():
        try:
            size = (shard / name).stat().st_size
        except OSError:
            yield name, "is missing"
            continue
        if size != record.bytes:
            yield name, f"has {size} bytes, its commit says {record.bytes}"


def remove_leftovers(folder: Path) -> None:
    """Remove what a killed writer left: temporary files, and shard folders that never got their commit record."""
    for path in [*folder.glob(f"{_TMP}*"), *folder.glob(f"{SHARDS}/*/{_TMP}*")]:
        path.unlink(missing_ok=True)
    for path in folder.glob(f"{SHARDS}/*"):
        if path.is_dir() and (path.name.startswith(_TMP) or not (path / COMMIT).exists()):
            shutil.rmtree(path)
