"""What long work has let go of goes back to the system: a server that ran for days must not hold its largest moment."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable
from functools import cache

import pyarrow as pa


def give_back() -> None:
    """Returns freed memory of Arrow and of the C library, which both keep it otherwise for what may come."""
    pa.default_memory_pool().release_unused()
    _trim()(0)


@cache
def _trim() -> Callable[[int], int]:
    """glibc's `malloc_trim`, which frees whole pages inside all arenas; elsewhere nothing."""
    library = ctypes.CDLL(None) if sys.platform == "linux" else None
    return getattr(library, "malloc_trim", lambda keep: 0)
