"""Disks that fill, files that break, folders that are taken: a clear line each, and nothing lost that was committed."""

import errno
import json
import os
import shutil
import subprocess

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from moescope.errors import StoreError
from moescope.store import Store, StoreWriter, check_store, commit

from .compare import assert_holds
from .made import a_manifest, made_batches


@pytest.fixture
def small():
    """A manifest that gives three shards for eight batches, and the batches."""
    manifest = a_manifest(settings={"shard_tokens": 50})
    return manifest, made_batches(manifest, 8)


@pytest.fixture
def folder(tmp_path, small):
    """A complete store."""
    manifest, batches = small
    with StoreWriter.create(tmp_path / "s", manifest) as writer:
        for batch in batches:
            writer.append(batch)
    return tmp_path / "s"


def append_all(writer, batches):
    for batch in batches:
        writer.append(batch)


def fill(path, manifest, batches):
    with StoreWriter.create(path, manifest) as writer:
        append_all(writer, batches)


def one_line(caught):
    assert "\n" not in str(caught.value)
    return str(caught.value)


def leftovers(folder):
    return [name for _, folders, files in os.walk(folder) for name in [*folders, *files] if name.startswith(".tmp")]


# Damage


def test_a_truncated_file_is_found_at_opening(folder):
    path = folder / "shards/00001/routing.parquet"
    path.write_bytes(path.read_bytes()[:-7])
    with pytest.raises(StoreError, match=r"shards/00001/routing\.parquet has \d+ bytes, its commit says \d+") as caught:
        Store.open(folder)
    assert "moescope check" in one_line(caught)
    (problem,) = check_store(folder)
    assert problem.where == "shards/00001/routing.parquet"


def test_a_flipped_byte_is_found_by_check(folder):
    for file in sorted(folder.glob("shards/00000/*.parquet")) + sorted(folder.glob("*.parquet")):
        data = bytearray(file.read_bytes())
        data[len(data) // 2] ^= 1
        good = file.read_bytes()
        file.write_bytes(data)
        (problem,) = Store.open(folder).check()
        assert problem.where == str(file.relative_to(folder))
        file.write_bytes(good)
    assert check_store(folder) == []


def test_a_broken_page_reads_as_a_store_error(folder):
    path = folder / "shards/00000/tokens.parquet"
    data = bytearray(path.read_bytes())
    data[4:200] = bytes(196)
    path.write_bytes(data)
    with pytest.raises(StoreError, match=r"tokens\.parquet cannot be read .*moescope check") as caught:
        Store.open(folder).tokens()
    one_line(caught)


def test_a_commit_that_names_a_missing_file(folder):
    (folder / "shards/00002/experts.parquet").unlink()
    with pytest.raises(StoreError, match=r"shards/00002/experts\.parquet is missing"):
        Store.open(folder)
    assert [p.where for p in check_store(folder)] == ["shards/00002/experts.parquet"]


def test_a_missing_shard(folder):
    shutil.rmtree(folder / "shards/00001")
    with pytest.raises(StoreError, match="shard 00001 is missing"):
        Store.open(folder)
    assert check_store(folder)


def test_missing_last_shards(folder):
    shutil.rmtree(folder / "shards/00002")
    with pytest.raises(StoreError, match="2 of 3 shards"):
        Store.open(folder)
    assert [p.where for p in check_store(folder)] == ["manifest.json"]


@pytest.mark.parametrize("text", ["", "{}", '{"rows": -1}', "null"])
def test_a_damaged_commit_record(folder, text):
    (folder / "shards/00001/commit.json").write_text(text)
    with pytest.raises(StoreError, match=r"00001/commit\.json cannot be read") as caught:
        Store.open(folder)
    one_line(caught)


def test_a_missing_root_file(folder):
    (folder / "vocabulary.parquet").unlink()
    assert [str(p) for p in check_store(folder)] == ["vocabulary.parquet: is missing."]
    with pytest.raises(StoreError, match=r"vocabulary\.parquet cannot be read"):
        Store.open(folder).vocabulary()


def test_a_damaged_store_is_not_resumed(tmp_path, small):
    manifest, batches = small
    writer = StoreWriter.create(tmp_path / "s", manifest)
    for batch in batches[:5]:
        writer.append(batch)
    writer.close(complete=False)
    (tmp_path / "s/shards/00001/logits.parquet").unlink()
    with pytest.raises(StoreError, match="Delete shards/00001 and those after it, then resume"):
        StoreWriter.resume(tmp_path / "s", manifest)
    shutil.rmtree(tmp_path / "s/shards/00001")
    with StoreWriter.resume(tmp_path / "s", manifest) as writer:
        assert writer.cursor == 3
        for batch in batches[writer.cursor :]:
            writer.append(batch)
    assert_holds(Store.open(tmp_path / "s"), batches)


# Values that no writer of ours would write


def rewritten(folder, name, change):
    """Replace one table of shard 0 and its checksum, as a faulty writer would."""
    shard = folder / "shards/00000"
    record = commit.write_table(shard / f"{name}.parquet", change(pq.read_table(shard / f"{name}.parquet")))
    raw = json.loads((shard / "commit.json").read_text())
    raw["files"][f"{name}.parquet"] = record.model_dump()
    (shard / "commit.json").write_text(json.dumps(raw))


def with_column(table, name, values):
    at = table.schema.get_field_index(name)
    return table.set_column(at, table.schema.field(at), pa.array(values, table.schema.field(at).type))


@pytest.mark.parametrize(
    ("name", "column", "change", "message"),
    [
        ("routing", "L001.expert", lambda v: [b"\x09\x00", *v[1:]], "L001.expert holds id 9, the site has 8"),
        ("routing", "L003.weight", lambda v: [b"\x00\x00\xc0\x7f" * 2, *v[1:]], "not finite"),
        ("tokens", "position", lambda v: [v[1], v[0], *v[2:]], "positions of sequence 0 do not increase"),
        ("tokens", "sequence", lambda v: [*v[:-1], 0], "not together"),
        ("tokens", "end", lambda v: [-1, *v[1:]], "span ends before"),
        ("tokens", "token_id", lambda v: [4000, *v[1:]], "token id 4000 has no text"),
        ("documents", "document", lambda v: [99, *v[1:]], "document 0 has tokens but no row"),
        ("experts", "L001.norm", lambda v: [b"\x00\x00\x00\x00" * 2, *v[1:]], "exceeds the norm"),
    ],
)
def test_check_finds_values_that_cannot_be(folder, name, column, change, message):
    rewritten(folder, name, lambda table: with_column(table, column, change(table[column].to_pylist())))
    problems = [str(p) for p in check_store(folder)]
    assert any(message in p for p in problems), problems


def test_check_finds_a_shorter_table(folder):
    rewritten(folder, "routing", lambda table: table.slice(1))
    (problem,) = check_store(folder)
    assert "59 rows, its commit says 60" in str(problem)


# Folders


def test_a_folder_that_is_not_a_store(tmp_path):
    for path, message in [(tmp_path / "none", "does not exist"), (tmp_path, "has no manifest.json")]:
        with pytest.raises(StoreError, match=message):
            Store.open(path)
    file = tmp_path / "file"
    file.write_text("x")
    with pytest.raises(StoreError, match="not a folder"):
        Store.open(file)
    with pytest.raises(StoreError, match="is a file"):
        StoreWriter.create(file, a_manifest())


def test_a_newer_format(folder):
    raw = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps({**raw, "version": 7, "colour": "blue"}))
    for open_it in (Store.open, check_store, lambda path: StoreWriter.resume(path, a_manifest())):
        with pytest.raises(StoreError, match=r"format version 7; this MoEscope reads up to 1\. Upgrade"):
            open_it(folder)


def test_a_folder_with_other_files_is_left_alone(tmp_path):
    (tmp_path / "thesis.tex").write_text("x")
    with pytest.raises(StoreError, match="not empty"):
        StoreWriter.create(tmp_path, a_manifest())
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.tex"]


def test_a_store_is_not_overwritten(folder):
    before = (folder / "manifest.json").read_bytes()
    with pytest.raises(StoreError, match="already a store"):
        StoreWriter.create(folder, a_manifest())
    assert (folder / "manifest.json").read_bytes() == before


def test_an_invalid_manifest_creates_nothing(tmp_path):
    bad = a_manifest().model_copy(update={"tiers": ["gossip"]})
    with pytest.raises(StoreError, match=r"tiers\.0"):
        StoreWriter.create(tmp_path / "s", bad)
    assert not (tmp_path / "s").exists()


def test_two_writers(tmp_path, small):
    manifest, batches = small
    with StoreWriter.create(tmp_path / "s", manifest) as writer:
        with pytest.raises(StoreError, match="being written by another process"):
            StoreWriter.resume(tmp_path / "s", manifest)
        with pytest.raises(StoreError, match="already a store"):
            StoreWriter.create(tmp_path / "s", manifest)
        for batch in batches:
            writer.append(batch)
    assert_holds(Store.open(tmp_path / "s"), batches)


def test_the_lock_is_free_after_closing(tmp_path, small):
    manifest, _ = small
    writer = StoreWriter.create(tmp_path / "s", manifest)
    writer.close(complete=False)
    writer.close()
    StoreWriter.resume(tmp_path / "s", manifest).close()
    assert Store.open(tmp_path / "s").status == "complete"
    with pytest.raises(StoreError, match="closed"):
        writer.append(made_batches(manifest, 1)[0])


@pytest.fixture
def disk(tmp_path):
    """A file system of 200 kB, and a function that remounts it with other options."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=200k", "tmpfs", str(folder)]
    if os.getuid() != 0 or shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("a small file system cannot be mounted here")
    yield folder, lambda options: subprocess.run(["mount", "-o", f"remount,{options}", str(folder)], check=True)
    subprocess.run(["umount", str(folder)], check=True)


def test_a_folder_that_may_only_be_read(disk, small):
    folder, remount = disk
    manifest, batches = small
    fill(folder / "s", manifest, batches[:4])
    StoreWriter.create(folder / "cut", manifest).close(complete=False)
    remount("ro")
    store = Store.open(folder / "s")
    assert_holds(store, batches[:4])
    assert store.check() == []
    assert store.sql("select count(*) as n from routing")["n"][0] == 320
    table = pa.table({"n": [1]})
    assert store.cached("counts", lambda: table) == table
    for make in (
        lambda: StoreWriter.create(folder / "new", manifest),
        lambda: StoreWriter.resume(folder / "cut", manifest),
    ):
        with pytest.raises(StoreError, match="cannot be written: Read-only file system"):
            make()
    remount("rw")


# Full disks


@pytest.mark.parametrize("at", [1, 40, 100, 200, 260, 400, 630])
def test_a_disk_that_fills_up(tmp_path, small, monkeypatch, at):
    manifest, batches = small
    calls = iter(range(1, 10**9))
    write = commit._HashingFile.write

    def full(self, data):
        if next(calls) >= at:
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(self, data)

    monkeypatch.setattr(commit._HashingFile, "write", full)
    with pytest.raises(StoreError, match=r"No space left for .*/s: .*resume") as caught:
        fill(tmp_path / "s", manifest, batches)
    one_line(caught)
    assert leftovers(tmp_path) == []
    monkeypatch.undo()
    if not (tmp_path / "s/manifest.json").exists():  # it filled up before there was a store
        fill(tmp_path / "s", manifest, batches)
    else:
        cut = Store.open(tmp_path / "s")
        assert cut.check() == []
        with StoreWriter.resume(tmp_path / "s", manifest) as writer:
            assert writer.cursor == (cut.shards[-1].commit.batches if cut.shards else 0)
            for batch in batches[writer.cursor :]:
                writer.append(batch)
    assert_holds(Store.open(tmp_path / "s"), batches)


def test_a_real_disk_that_fills_up(disk, small):
    folder, remount = disk
    manifest, _ = small
    many = made_batches(manifest, 40)
    with pytest.raises(StoreError, match="No space left"):
        fill(folder / "s", manifest, many)
    assert leftovers(folder) == []
    cut = Store.open(folder / "s")
    assert 0 < cut.n_tokens < 800
    assert cut.check() == []
    assert_holds(cut, many[: cut.shards[-1].commit.batches])
    remount("size=8m")
    with StoreWriter.resume(folder / "s", manifest) as writer:
        for batch in many[writer.cursor :]:
            writer.append(batch)
    assert_holds(Store.open(folder / "s"), many)


def test_a_writer_that_failed_refuses_the_next_batch(tmp_path, small, monkeypatch):
    manifest, batches = small
    monkeypatch.setattr("moescope.store.writer.tokens_table", lambda batches: 1 / 0)
    writer = StoreWriter.create(tmp_path / "s", manifest)
    with pytest.raises(StoreError, match="writing a shard failed: division by zero"):
        append_all(writer, batches[:1] * 1000)
    with pytest.raises(StoreError, match="writing a shard failed"):
        writer.close()
    assert Store.open(tmp_path / "s").status == "interrupted"
