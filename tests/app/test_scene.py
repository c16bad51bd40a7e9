"""A question that several panels wait for: cancelled once, it is cancelled for all of them, and can be asked again."""

from __future__ import annotations

import threading
import time

import pytest

from moescope.analysis.watching import report
from moescope.app import scene as scenes
from moescope.app.answers import Pending
from moescope.app.place import Place
from moescope.errors import CancelledError
from tests.app.made_desk import made_desk, made_shelf


@pytest.fixture(scope="module")
def desk(tmp_path_factory):
    return made_desk(made_shelf(tmp_path_factory.mktemp("shelf")))


def _slow(desk, key):
    """A question that is answered with 7 once it may: (a 1 for each time it began, what lets it, a panel that asks)."""
    begun, go = [], threading.Event()

    def work():
        begun.append(1)
        while not go.wait(0.005):
            report("steps", 1, 2)
        return 7

    def panel(patience):
        return desk.scene(Place("flow", "a"), patience=patience).compute(key, "a slow question", work)

    return begun, go, panel


def _cancel(job, begun):
    """Once it has begun: a thread may take its time."""
    while not begun:
        time.sleep(0.01)
    job.cancel()
    assert job.wait(60)


def test_a_cancelled_question_is_not_begun_anew_by_the_next_panel_that_asks(desk, monkeypatch):
    class Clock:
        now = 100.0

        @classmethod
        def monotonic(cls):
            return cls.now

    monkeypatch.setattr(scenes, "time", Clock)
    begun, go, panel = _slow(desk, "slow")

    for patience in (0.05, 0.05, 0.05, 0, 0, 0):
        with pytest.raises(Pending) as pending:
            panel(patience)
    _cancel(pending.value.job, begun)
    for Clock.now in (100.0, 101.0, 109.0):
        with pytest.raises(CancelledError, match="ancelled"):
            panel(0)
    assert begun == [1]
    with pytest.raises(Pending) as pending:
        panel(0.05)  # "Try again"
    with pytest.raises(Pending):
        panel(0)
    go.set()
    assert pending.value.job.wait(60)
    assert panel(0) == 7
    assert begun == [1, 1]


def test_try_again_begins_though_nobody_has_asked_since_the_cancel(desk):
    begun, go, panel = _slow(desk, "again")

    with pytest.raises(Pending) as pending:
        panel(0.05)
    _cancel(pending.value.job, begun)
    with pytest.raises(Pending) as pending:
        panel(0.05)
    go.set()
    assert pending.value.job.wait(60)
    assert panel(0.05) == 7
    assert begun == [1, 1]
