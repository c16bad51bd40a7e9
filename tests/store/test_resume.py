"""Killed anywhere, resumed, and equal to a capture that was left alone."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from moescope.errors import StoreError
from moescope.store import Store, StoreWriter

from .capturing import capture_manifest
from .compare import assert_holds, assert_same_data
from .made import a_manifest, made_batches

N_BATCHES = 10
TESTS = Path(__file__).parents[1]


def run_capture(folder, kill_at):
    command = [sys.executable, "-m", "store.capturing", str(folder), str(N_BATCHES), str(kill_at)]
    return subprocess.Popen(command, cwd=TESTS, stdout=subprocess.PIPE, text=True)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole") / "s"
    assert run_capture(folder, "never").wait() == 0
    return Store.open(folder)


def finish(folder):
    """Resume from the cursor, as a capture does."""
    manifest = capture_manifest()
    batches = made_batches(manifest, N_BATCHES)
    with StoreWriter.resume(folder, manifest) as writer:
        for batch in batches[writer.cursor :]:
            writer.append(batch)
    return Store.open(folder)


# Per shard: 8 tables, then commit.json (the 9th replacement, the 10th sync), then the folder's rename and its sync.
@pytest.mark.parametrize(
    "kill_at",
    [
        "write:1",
        "write:60",
        "write:400",
        "replace:1",
        "replace:9",
        "sync:10",
        "rename:1",
        "sync:11",
        "replace:18",
        "rename:2",
        "rename:4",
        "replace:37",  # documents.parquet of the store
        "replace:41",  # the manifest that says "complete"
    ],
)
def test_killed_in_the_middle_of_writing(tmp_path, uninterrupted, kill_at):
    folder = tmp_path / "s"
    assert run_capture(folder, kill_at).wait() == -signal.SIGKILL
    cut = Store.open(folder)
    assert cut.status == "capturing"
    assert cut.check() == []
    done = cut.shards[-1].commit.batches if cut.shards else 0
    if done:
        assert_holds(cut, made_batches(capture_manifest(), N_BATCHES)[:done])
    whole = finish(folder)
    assert whole.status == "complete"
    assert whole.check() == []
    assert_same_data(whole, uninterrupted)
    assert [s.n_tokens for s in whole.shards] == [s.n_tokens for s in uninterrupted.shards]
    assert not [name for _, folders, files in os.walk(folder) for name in [*folders, *files] if "tmp" in name]


def test_killed_from_outside_at_some_moment(tmp_path, uninterrupted):
    process = run_capture(tmp_path / "s", "slowly")
    assert process.stdout is not None
    for line in process.stdout:
        if line.strip() == "6":
            process.kill()
            break
    process.wait()
    assert Store.open(tmp_path / "s").status == "capturing"
    assert_same_data(finish(tmp_path / "s"), uninterrupted)


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError("the model failed")], ids=["ctrl-c", "error"])
def test_an_interrupted_capture_keeps_every_batch_and_goes_on(tmp_path, uninterrupted, error):
    manifest = capture_manifest()
    batches = made_batches(manifest, N_BATCHES)

    def capture():
        with StoreWriter.create(tmp_path / "s", manifest) as writer:
            for batch in batches[:4]:
                writer.append(batch)
            raise error

    with pytest.raises((KeyboardInterrupt, RuntimeError)):
        capture()
    cut = Store.open(tmp_path / "s")
    assert cut.status == "interrupted"
    assert_holds(cut, batches[:4])  # three fill a shard, the fourth makes a short one
    assert cut.documents().num_rows == 4
    whole = finish(tmp_path / "s")
    assert_same_data(whole, uninterrupted)
    assert_holds(whole, batches)


@pytest.mark.parametrize("queued", [False, True], ids=["before", "after"])
def test_ctrl_c_while_a_shard_is_handed_over(tmp_path, uninterrupted, queued):
    """The interrupt may come before or after the queue took the shard: neither loses nor doubles a batch."""
    manifest = capture_manifest()
    batches = made_batches(manifest, N_BATCHES)

    def capture():
        with StoreWriter.create(tmp_path / "s", manifest) as writer:
            put = writer._queue.put

            def interrupted(job):
                writer._queue.put = put
                if queued:
                    put(job)
                raise KeyboardInterrupt

            for number, batch in enumerate(batches[:6]):
                if number == 5:
                    writer._queue.put = interrupted
                writer.append(batch)

    with pytest.raises(KeyboardInterrupt):
        capture()
    assert_holds(Store.open(tmp_path / "s"), batches[:6])
    assert_same_data(finish(tmp_path / "s"), uninterrupted)


def test_a_store_being_written_shows_its_committed_shards(tmp_path):
    manifest = capture_manifest()
    batches = made_batches(manifest, 7)
    with StoreWriter.create(tmp_path / "s", manifest) as writer:
        for batch in batches:
            writer.append(batch)
        store = Store.open(tmp_path / "s")
        assert store.status == "capturing"
        assert store.n_tokens in (0, 60, 120)  # a background thread writes
        if store.shards:
            assert_holds(store, batches[: store.shards[-1].commit.batches])
            assert store.outliers().num_rows == 16
    assert_holds(Store.open(tmp_path / "s"), batches)


def test_resuming_with_another_manifest_names_the_field(tmp_path):
    StoreWriter.create(tmp_path / "s", capture_manifest()).close(complete=False)
    with pytest.raises(StoreError, match=r"settings\.shard_tokens: 50 -> 60"):
        StoreWriter.resume(tmp_path / "s", a_manifest(settings={"shard_tokens": 60}))


def test_a_complete_store_is_not_resumed(tmp_path):
    with StoreWriter.create(tmp_path / "s", capture_manifest()):
        pass
    with pytest.raises(StoreError, match="nothing to resume"):
        StoreWriter.resume(tmp_path / "s", capture_manifest())


def test_resume_needs_a_store(tmp_path):
    with pytest.raises(StoreError, match="does not exist"):
        StoreWriter.resume(tmp_path / "none", capture_manifest())
