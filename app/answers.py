"""Results by question: each is computed once for a store as it stands, whoever asks, and never blocks a page.

`ask` gives the result if it is there within a moment; else the work goes on in a job and `Pending` carries it.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Any

from moescope.analysis.watching import watched
from moescope.app.jobs import Job, Jobs
from moescope.errors import CancelledError, MoescopeError

PATIENCE = 0.08
"""Seconds that a page waits for an answer before it shows progress instead."""

_LARGEST = 256 << 20  # bytes of results kept


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
        self._running: dict[Hashable, Job] = {}
        self._lock = threading.Lock()

    def ask(self, key: Hashable, title: str, compute: Callable[[], Any], patience: float = PATIENCE) -> Any:
        """The result of `compute()`, from memory if it is there.

        Args:
            key: what the result follows from: the store's version, the question, its parameters.
            title: for people, while they wait.
            compute: reports to `moescope.analysis.watching` if it takes long.
            patience: seconds to wait.

        Raises:
            Pending: it takes longer.
            MoescopeError: the work failed with this sentence, or was cancelled.
        """
        with self._lock:
            if key in self._known:
                self._known.move_to_end(key)
                return self._known[key][0]
            job = self._running.get(key)
            if job is None:
                job = self._running[key] = self._jobs.start(title, lambda job: _watched(job, compute))
        if not job.wait(patience):
            raise Pending(job)
        return self._settle(key, job)

    def _settle(self, key: Hashable, job: Job) -> Any:
        with self._lock:
            if self._running.get(key) is job:
                del self._running[key]
            if job.state == "done":
                self._known[key] = job.result, _size(job.result)
                while sum(size for _, size in self._known.values()) > _LARGEST and len(self._known) > 1:
                    self._known.popitem(last=False)
                return job.result
        if job.state == "cancelled":
            raise CancelledError(f"{job.title}: cancelled.")
        raise MoescopeError(job.error)


def _watched(job: Job, compute: Callable[[], Any]) -> Any:
    with watched(job.report):
        return compute()


def _size(result: Any) -> int:
    """Bytes of a labelled result; others (cards, passages) count as a megabyte."""
    return int(getattr(result, "nbytes", 1 << 20))
