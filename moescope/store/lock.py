"""One writer at a time: an advisory lock on FOLDER/.lock, released by the system even when the writer is killed."""

from __future__ import annotations

import os
from pathlib import Path

from moescope.errors import StoreError

LOCK = ".lock"


class WriterLock:
    """Holds the lock from construction to `release`. The file stays: deleting it would let two writers in."""

    def __init__(self, folder: Path) -> None:
        import fcntl

        self._descriptor = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            os.close(self._descriptor)
            raise StoreError(f"{folder} is being written by another process; wait for it or stop it.") from error

    def release(self) -> None:
        """Let the next writer in; safe to call twice."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1
