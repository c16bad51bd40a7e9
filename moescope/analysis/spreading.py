"""Counting spread over threads, processes or a cluster: shard by shard, the same numbers whoever counts.

>>> analysis.load(store)                                  # threads: the kernels hold no Python lock
>>> with analysis.spread(ProcessPoolExecutor(8)):         # processes of this machine
...     analysis.load(store)
>>> with analysis.spread(RayCluster()):                   # a Ray cluster that sees the store's folder
...     analysis.load(store)
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from contextvars import ContextVar
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from moescope.analysis.watching import counted

if TYPE_CHECKING:
    from moescope.store import Store

THREADS = min(4, os.cpu_count() or 1)
"""Threads where no executor is named: reading and counting a shard soon waits for memory, not for cores."""


class Executor(Protocol):
    """What `concurrent.futures` executors, loky's, Dask's client and `RayCluster` have in common."""

    def submit(self, function: Callable[..., Any], /, *arguments: Any) -> Any:
        """Begins `function(*arguments)`; the answer has `.result()`."""
        ...


_EXECUTOR: ContextVar[tuple[Executor, int] | None] = ContextVar("executor", default=None)


@contextmanager
def spread(executor: Executor, workers: int = THREADS) -> Iterator[None]:
    """Counts of analyses inside the block run on `executor`; results are the same to the bit.

    Args:
        executor: its workers must see the store's folder under the same path.
        workers: shards at work at once, twice this many in flight: what bounds memory.
    """
    token = _EXECUTOR.set((executor, workers))
    try:
        yield
    finally:
        _EXECUTOR.reset(token)


def over_shards(store: Store, function: Callable[..., Any], *arguments: Any) -> Iterator[Any]:
    """`function(shard, *arguments)` of each shard, in the store's order, a few of them at a time; see `watched`.

    Args:
        store: an open store.
        function: of a module's top level, and its arguments plain, so that another process can be handed them.
    """
    with closing(_over_shards(store, function, *arguments)) as parts:
        yield from counted("shards", parts, len(store.shards))


def _over_shards(store: Store, function: Callable[..., Any], *arguments: Any) -> Generator[Any, None, None]:
    named = _EXECUTOR.get()
    if named is not None:
        executor, workers = named
        calls = ((_elsewhere, str(store.path), shard.path.name, function, arguments) for shard in store.shards)
        yield from _in_order(executor, calls, 2 * workers)
    elif len(store.shards) < 2 or THREADS < 2:
        for shard in store.shards:
            yield function(shard, *arguments)
    else:
        with ThreadPoolExecutor(THREADS, thread_name_prefix="moescope-counting") as threads:
            yield from _in_order(threads, ((function, shard, *arguments) for shard in store.shards), 2 * THREADS)


def _in_order(executor: Executor, calls: Iterator[tuple[Any, ...]], at_once: int) -> Iterator[Any]:
    """Results in the order of the calls, never more than `at_once` of them waiting to be taken."""
    waiting: deque[Any] = deque()
    try:
        for call in calls:
            if len(waiting) == at_once:
                yield waiting.popleft().result()
            waiting.append(executor.submit(*call))
        while waiting:
            yield waiting.popleft().result()
    finally:  # stopped before the end: what has not begun need not
        for answer in waiting:
            getattr(answer, "cancel", bool)()


def _elsewhere(path: str, shard: str, function: Callable[..., Any], arguments: tuple[Any, ...]) -> Any:
    """Runs in a worker: the shard is found by its folder's name, since the store may have grown in the meantime."""
    found = _opened(path, shard)
    return function(found, *arguments)


@lru_cache(maxsize=256)
def _opened(path: str, shard: str) -> Any:
    from moescope.store import Store

    return next(found for found in Store.open(Path(path)).shards if found.path.name == shard)


class RayCluster:
    """A Ray cluster as an executor: `with spread(RayCluster(), workers=64): …`. Needs the extra `ray`."""

    def __init__(self) -> None:
        """Joins the cluster that Ray is configured for, or starts one on this machine."""
        import ray  # pyright: ignore[reportMissingImports]

        ray.init(ignore_reinit_error=True)
        self._ray = ray

    def submit(self, function: Callable[..., Any], /, *arguments: Any) -> Any:
        """Begins the call on the cluster."""
        return _RayAnswer(self._ray, self._ray.remote(function).remote(*arguments))


class _RayAnswer:
    def __init__(self, ray: Any, reference: Any) -> None:
        self._ray, self._reference = ray, reference

    def result(self) -> Any:
        return self._ray.get(self._reference)
