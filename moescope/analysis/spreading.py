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
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from contextvars import ContextVar
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from moescope.analysis.watching import counted, report

if TYPE_CHECKING:
    from moescope.store import Store

THREADS = min(4, os.cpu_count() or 1)
"""Threads where no executor is named: reading and counting a shard soon waits for memory, not for cores."""

RUN = 8
"""Shards of a run at most: what is laid out for it is held until it is done."""


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
    calls = ((_elsewhere, str(store.path), shard.path.name, function, arguments) for shard in store.shards)
    with closing(_over(store.shards, calls, function, arguments)) as parts:
        yield from counted("shards", parts, len(store.shards))


def over_runs(store: Store, function: Callable[..., Any], *arguments: Any) -> Iterator[Any]:
    """`function(shards, *arguments)` of consecutive shards, a few runs for each worker, in the store's order.

    For sums of whole numbers, which may be taken in any grouping: what is laid out once for a run, a table of all
    groups, is added to the rest once for it and not once for each of its shards.
    """
    named, total = _EXECUTOR.get(), len(store.shards)
    workers = THREADS if named is None else named[1]
    step = min(max(total // (2 * workers), 1), RUN)
    runs = [store.shards[first : first + step] for first in range(0, total, step)]
    calls = ((_run_elsewhere, str(store.path), [s.path.name for s in run], function, arguments) for run in runs)
    with closing(_over(runs, calls, function, arguments)) as parts:
        report("shards", 0, total)
        for number, part in enumerate(parts, start=1):
            yield part
            report("shards", min(number * step, total), total)


def _over(
    items: Sequence[Any],
    elsewhere: Iterator[tuple[Any, ...]],
    function: Callable[..., Any],
    arguments: tuple[Any, ...],
) -> Generator[Any, None, None]:
    """`function(item, *arguments)` of each item here, or the calls that do it elsewhere if an executor is named."""
    named = _EXECUTOR.get()
    if named is not None:
        executor, workers = named
        yield from _in_order(executor, elsewhere, 2 * workers)
    elif len(items) < 2 or THREADS < 2:
        for item in items:
            yield function(item, *arguments)
    else:
        with ThreadPoolExecutor(THREADS, thread_name_prefix="moescope-counting") as threads:
            yield from _in_order(threads, ((function, item, *arguments) for item in items), 2 * THREADS)


def side_by_side(function: Callable[..., Any], calls: Iterable[tuple[Any, ...]]) -> list[Any]:
    """`function(*call)` of each call, in order, on threads of this process: reading, writing, kernels."""
    if THREADS < 2:
        return [function(*call) for call in calls]
    with ThreadPoolExecutor(THREADS, thread_name_prefix="moescope-keeping") as threads:
        begun = [threads.submit(function, *call) for call in calls]
        return [one.result() for one in begun]


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


def _run_elsewhere(path: str, shards: list[str], function: Callable[..., Any], arguments: tuple[Any, ...]) -> Any:
    return function([_opened(path, shard) for shard in shards], *arguments)


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
