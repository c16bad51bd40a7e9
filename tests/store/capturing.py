"""A capture in its own process, to be killed: python -m store.capturing FOLDER N_BATCHES KILL_AT

KILL_AT is OPERATION:N, where the writer kills its own process with SIGKILL in the middle of the N-th write to a file,
or before the N-th sync of a folder, replacement of a file or rename of a shard's folder; or "never"; or "slowly",
which waits after each batch. Prints one line per appended batch.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path

from moescope.store import Manifest, StoreWriter, commit

from .made import a_manifest, made_batches


def capture_manifest() -> Manifest:
    return a_manifest(settings={"shard_tokens": 50})


def die_at(name: str, count: int) -> None:
    """Replace one operation of the writer by one that counts its calls, and dies at the given one."""
    owner, attribute = {
        "write": (commit._HashingFile, "write"),
        "sync": (commit, "sync_folder"),
        "replace": (Path, "replace"),
        "rename": (Path, "rename"),
    }[name]
    operation = getattr(owner, attribute)
    calls = iter(range(1, sys.maxsize))

    def counted(*args):
        if next(calls) == count:
            if name == "write":
                sink, data = args
                view = memoryview(data)
                sink._raw.write(view[: view.nbytes // 2])
                sink._raw.flush()
            os.kill(os.getpid(), signal.SIGKILL)
        return operation(*args)

    setattr(owner, attribute, counted)


def main(folder: str, n_batches: str, kill_at: str) -> None:
    manifest = capture_manifest()
    with StoreWriter.create(folder, manifest) as writer:
        if ":" in kill_at:
            name, count = kill_at.split(":")
            die_at(name, int(count))
        for number, batch in enumerate(made_batches(manifest, int(n_batches))):
            writer.append(batch)
            print(number, flush=True)
            if kill_at == "slowly":
                time.sleep(0.05)


if __name__ == "__main__":
    main(*sys.argv[1:])
