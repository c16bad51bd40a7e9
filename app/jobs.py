"""Long work in threads of this process: each job says how far it is and stops when it is told to.

Threads, not processes: a model in the lab is loaded once and shared, and counting holds no Python lock.
"""

from __future__ import annotations

import logging
import secrets
import threading
import time
from collections.abc import Callable
from typing import Any, Literal

from moescope.app.memory import give_back
from moescope.errors import CancelledError, MoescopeError

State = Literal["waiting", "running", "done", "failed", "cancelled"]


class Job:
    """One piece of work.

    Attributes:
        id: names it in the page.
        title: what it does, for people.
        state: where it stands.
        what, done, total: its step, how much of it is done, of how much (0: unknown).
        partial: what it has found so far, if it shows that.
        result: what it gave, once it is done; error: one sentence, once it has failed.
    """

    def __init__(self, title: str) -> None:
        """A job that has not begun."""
        self.id = secrets.token_hex(6)
        self.title = title
        self.state: State = "waiting"
        self.what, self.done, self.total = "", 0, 0
        self.partial: Any = None
        self.result: Any = None
        self.error = ""
        self._begun = time.monotonic()
        self._paused_until = 0.0
        self._stop = threading.Event()
        self._over = threading.Event()
        self._slot: threading.Semaphore | None = None
        self._lock = threading.Lock()

    def report(self, what: str, done: int, total: int) -> None:
        """The work calls this as it goes.

        Raises:
            CancelledError: the person has cancelled; the work stops here.
        """
        self.what, self.done, self.total = what, done, total
        if (left := self._paused_until - time.monotonic()) > 0:
            self._stop.wait(left)
        self.check()

    def check(self) -> None:
        """Raises `CancelledError` if the person has cancelled."""
        if self._stop.is_set():
            raise CancelledError(f"{self.title}: cancelled.")

    def pause(self, seconds: float) -> None:
        """The work rests so long at its next report."""
        self._paused_until = time.monotonic() + seconds

    def cancel(self) -> None:
        """Asks the work to stop; it does at its next report, and others need not wait until then."""
        self._stop.set()
        self.let_go()

    def hold(self, slot: threading.Semaphore) -> None:
        """Waits for a turn and takes it."""
        slot.acquire()
        with self._lock:
            self._slot = slot

    def let_go(self) -> None:
        """Gives its turn to the next."""
        with self._lock:
            slot, self._slot = self._slot, None
        if slot is not None:
            slot.release()

    @property
    def stopping(self) -> bool:
        """It was told to stop; it may not have heard of it yet."""
        return self._stop.is_set()

    @property
    def age(self) -> float:
        """Seconds since it was asked for."""
        return time.monotonic() - self._begun

    @property
    def over(self) -> bool:
        """It has ended, well or not."""
        return self._over.is_set()

    def wait(self, seconds: float) -> bool:
        """Waits for its end; whether it has ended."""
        return self._over.wait(seconds)


class Jobs:
    """Jobs at work, at most `at_once` of them."""

    def __init__(self, at_once: int = 2) -> None:
        """No job yet."""
        self._slots = threading.Semaphore(at_once)
        self._jobs: dict[str, Job] = {}
        self._lock = threading.Lock()

    def start(self, title: str, work: Callable[[Job], Any], free: bool = False) -> Job:
        """Begins `work(job)` in a thread of its own.

        A `free` job takes no slot: it waits for a turn elsewhere, and would hold up others meanwhile.
        """
        job = Job(title)
        with self._lock:
            ended = [known.id for known in self._jobs.values() if known.over]
            for name in ended[:-50]:  # a page may still ask for the last ones
                del self._jobs[name]
            self._jobs[job.id] = job
        threading.Thread(target=self._run, args=(job, work, free), name=f"moescope-{job.title}", daemon=True).start()
        return job

    def get(self, name: str | None) -> Job | None:
        """A job by its id; None if it is long over."""
        with self._lock:
            return self._jobs.get(name or "")

    def _run(self, job: Job, work: Callable[[Job], Any], free: bool) -> None:
        try:
            if not free:
                job.hold(self._slots)
            job.check()
            job.state = "running"
            job.result = work(job)
            job.state = "done"
        except CancelledError:
            job.state = "cancelled"
        except MoescopeError as error:
            job.state, job.error = "failed", str(error)
        except Exception as error:
            logging.getLogger(__name__).exception("%s failed", job.title)
            job.state, job.error = "failed", f"{job.title} failed: {type(error).__name__}: {error}"
        finally:
            job.let_go()
            job._over.set()
            give_back()
