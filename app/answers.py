"""Results by question: each is computed once for a store as it stands, whoever asks, and never blocks a page.

`ask` gives the result if it is there within a moment; else the work goes on in a job and `Pending` carries it.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Any

import pandas as pd

from moescope.analysis.watching import watched
from moescope.app.jobs import Job, Jobs
from moescope.errors import CancelledError, MoescopeError

PATIENCE = 0.05
"""Seconds that a page waits for an answer before it shows progress instead."""

_LARGEST = 192 << 20  # bytes of results kept
_NICE = 10  # of what is counted: clicks go first (at 5 the slowest twentieth of callbacks takes half as long again)
_KEPT = 1000  # questions of which it is known for how long they may be left
_LEFT = 5.0  # seconds after which who has not asked again has gone elsewhere: panels that wait ask every second


class Pending(Exception):
    """The answer is being computed."""

    def __init__(self, job: Job) -> None:
        """Carries the job."""
        super().__init__(job.title)
        self.job = job


class Answers:
    """A bounded memory of results."""

    def __init__(self, jobs: Jobs) -> None:
        """Empty."""
        self._jobs = jobs
        self._known: OrderedDict[Hashable, tuple[Any, int]] = OrderedDict()
        self._running: dict[Hashable, tuple[Job, list[Any]]] = {}  # the work, and what it gave: not kept by the job
        self._asked: dict[Hashable, float] = {}  # when somebody last asked for what is running
        self._left: dict[Hashable, float] = {}  # seconds after which nobody waits for it, where not `_LEFT`
        self._lock = threading.Lock()

    def ask(
        self, key: Hashable, title: str, compute: Callable[[], Any], patience: float = PATIENCE, anew: bool = False
    ) -> Any:
        """The result of `compute()`, from memory if it is there.

        Args:
            key: what the result follows from: the store's version, the question, its parameters.
            title: for people, while they wait.
            compute: reports to `moescope.analysis.watching` if it takes long.
            patience: seconds to wait.
            anew: what was cancelled begins again, though nobody has heard of its end yet.

        Raises:
            Pending: it takes longer.
            MoescopeError: the work failed with this sentence, or was cancelled.
        """
        with self._lock:
            self._collect()
            if key in self._known:
                self._known.move_to_end(key)
                return self._known[key][0]
            if anew and key in self._running and self._running[key][0].stopping:
                self._forget(key)
            if key not in self._running:
                gave: list[Any] = []
                job = self._jobs.start(title, lambda job: gave.append(_watched(job, compute)))
                self._running[key] = job, gave
            job, gave = self._running[key]
            self._asked[key] = time.monotonic() + patience  # who waits here is still here
            if job.state == "waiting":
                self._make_room()
        if not job.wait(patience):
            raise Pending(job)
        with self._lock:
            if self._running.get(key, (None,))[0] is job:
                self._forget(key)
            if job.state == "done":
                self._keep(key, gave[0])
                return gave[0]
        if job.state == "cancelled":
            raise CancelledError(f"{job.title}: cancelled.")
        raise MoescopeError(job.error)

    def make_way(self, seconds: float) -> None:
        """What is being computed rests a moment; what is asked from now on does not."""
        with self._lock:
            for job, _ in self._running.values():
                job.pause(seconds)

    def _collect(self) -> None:
        """Takes in what was found after everybody who asked had left: it counts in the bound like all else.

        What failed or was cancelled is forgotten then: who asks the same later asks it anew.
        """
        now = time.monotonic()
        for key, (job, gave) in list(self._running.items()):
            left = now - self._asked[key] > _LEFT
            if job.over and (left or job.state == "done"):
                self._forget(key)
                if job.state == "done":
                    self._keep(key, gave[0])

    def _make_room(self) -> None:
        """Work that nobody waits for any more ends where other work waits for its turn; asked again, it begins anew.

        Each time it has to, it is left twice as long: browsers on a busy machine ask late, and must not take each
        other's work away for ever.
        """
        now = time.monotonic()
        for key, (job, _) in list(self._running.items()):
            allowed = self._left.get(key, _LEFT)
            if not job.over and now - self._asked[key] > allowed:
                job.cancel()
                self._forget(key)
                self._left[key] = 2 * allowed
                while len(self._left) > _KEPT:
                    del self._left[next(iter(self._left))]

    def _forget(self, key: Hashable) -> None:
        del self._running[key], self._asked[key]

    def _keep(self, key: Hashable, result: Any) -> None:
        self._left.pop(key, None)
        self._known[key] = result, _size(result)
        while sum(size for _, size in self._known.values()) > _LARGEST and len(self._known) > 1:
            self._known.popitem(last=False)


def _watched(job: Job, compute: Callable[[], Any]) -> Any:
    if sys.platform == "linux":  # where each thread has a priority of its own: answers to clicks go first
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _NICE)
    with watched(job.report):
        return compute()


def _size(result: Any) -> int:
    """Bytes of a labelled result or of a table; others (cards, passages) count as a megabyte."""
    if isinstance(result, pd.DataFrame):
        return int(result.memory_usage(deep=True).sum())
    return int(getattr(result, "nbytes", 1 << 20))
