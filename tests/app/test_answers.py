"""Jobs and answers: one computation for many askers, progress, cancelling, errors as sentences."""

from __future__ import annotations

import gc
import threading
import time
import weakref
from contextlib import suppress

import numpy as np
import pandas as pd
import pytest

from moescope.analysis.watching import report
from moescope.app.answers import Answers, Pending
from moescope.app.arriving import state
from moescope.app.jobs import Jobs
from moescope.app.place import Place
from moescope.errors import CancelledError, MoescopeError
from tests.analysis.made_stores import random_truth, write
from tests.app.made_desk import made_desk


@pytest.fixture
def answers():
    return Answers(Jobs())


def _wait(job):
    assert job.wait(60)


def test_a_quick_answer_comes_at_once_and_is_kept(answers):
    calls = []
    for _ in range(3):
        assert answers.ask("key", "counting", lambda: calls.append(1) or len(calls), patience=60) == 1


def test_a_slow_one_is_pending_and_computed_once_for_ten_askers(answers):
    go, calls = threading.Event(), []

    def slow():
        calls.append(1)
        assert go.wait(60)
        return "found"

    jobs = []
    for _ in range(10):
        with pytest.raises(Pending) as pending:
            answers.ask("key", "counting", slow, patience=0.01)
        jobs.append(pending.value.job)
    assert len(set(jobs)) == 1
    go.set()
    _wait(jobs[0])
    assert answers.ask("key", "counting", slow) == "found"
    assert calls == [1]


def test_a_mistake_is_its_sentence_and_may_be_asked_again(answers):
    def wrong():
        raise MoescopeError("There is no label 'x'.")

    for _ in range(2):
        with pytest.raises(MoescopeError, match=r"There is no label 'x'\."):
            answers.ask("key", "counting", wrong, patience=60)
    assert answers.ask("key", "counting", lambda: 1, patience=60) == 1


def test_a_failure_of_ours_says_what_failed(answers):
    with pytest.raises(MoescopeError, match=r"counting failed: ZeroDivisionError"):
        answers.ask("key", "counting", lambda: 1 // 0, patience=60)


def test_cancelled_work_stops_at_its_next_report():
    jobs, steps = Jobs(), []

    def work(job):
        for step in range(10_000):
            job.report("steps", step, 10_000)
            steps.append(step)
            time.sleep(0.001)

    job = jobs.start("walking", work)
    while not steps:
        time.sleep(0.001)
    job.cancel()
    _wait(job)
    assert job.state == "cancelled"
    assert len(steps) < 10_000


def test_waiting_work_can_be_cancelled_before_it_begins():
    jobs, go = Jobs(at_once=1), threading.Event()
    first = jobs.start("first", lambda job: go.wait(60))
    second = jobs.start("second", lambda job: pytest.fail("it must not begin"))
    second.cancel()
    go.set()
    _wait(first)
    _wait(second)
    assert second.state == "cancelled"


def test_cancelled_answers_say_so(answers):
    go = threading.Event()

    def work():
        go.wait(60)
        raise CancelledError("stopped")

    with pytest.raises(Pending) as pending:
        answers.ask("key", "counting", work, patience=0.01)
    go.set()
    _wait(pending.value.job)
    with pytest.raises(CancelledError, match="counting: cancelled"):
        answers.ask("key", "counting", work)


def test_cancelled_work_begins_anew_for_who_asks_so_though_it_has_not_heard(answers):
    go, begun = threading.Event(), []

    def deaf():
        begun.append(1)
        go.wait(60)
        return len(begun)

    with pytest.raises(Pending) as first:
        answers.ask("key", "counting", deaf, patience=0.05)
    while not begun:
        time.sleep(0.001)
    first.value.job.cancel()
    with pytest.raises(Pending) as waiting:
        answers.ask("key", "counting", deaf, patience=0.05)
    assert waiting.value.job is first.value.job
    with pytest.raises(Pending) as second:
        answers.ask("key", "counting", deaf, patience=0.05, anew=True)
    assert second.value.job is not first.value.job
    go.set()
    _wait(first.value.job)
    assert answers.ask("key", "counting", deaf, patience=60) == 2


def test_a_failure_nobody_heard_of_is_not_said_to_who_asks_much_later(answers, monkeypatch):
    def wrong():
        time.sleep(0.05)
        raise MoescopeError("The disk was away.")

    with pytest.raises(Pending) as pending:
        answers.ask("key", "counting", wrong, patience=0)
    _wait(pending.value.job)
    monkeypatch.setattr("moescope.app.answers._LEFT", -1.0)
    assert answers.ask("key", "counting", lambda: 1, patience=60) == 1


def test_work_that_nobody_waits_for_makes_room_and_begins_anew_when_asked(monkeypatch):
    class Clock:
        now = 100.0

        @classmethod
        def monotonic(cls):
            return cls.now

    monkeypatch.setattr("moescope.app.answers.time", Clock)
    monkeypatch.setattr("moescope.app.answers._LEFT", 2.0)
    answers, begun = Answers(Jobs(at_once=1)), []

    def endless(name):
        begun.append(name)
        while name != "quick" and begun.count(name) < 2:
            report("steps", 0, 0)
            time.sleep(0.01)
        return name

    with pytest.raises(Pending) as left:
        answers.ask("left", "long", lambda: endless("left"), patience=0.01)
    while not begun:
        time.sleep(0.01)
    for _ in range(3):  # while somebody asks, it goes on
        Clock.now += 1.0
        for key in ("left", "quick"):
            with pytest.raises(Pending):
                answers.ask(key, key, lambda key=key: endless(key), patience=0.01)
    Clock.now += 3.0
    assert left.value.job.state == "running"
    assert answers.ask("quick", "quick", lambda: endless("quick"), patience=60) == "quick"
    _wait(left.value.job)
    assert left.value.job.state == "cancelled"
    assert answers.ask("left", "long", lambda: endless("left"), patience=60) == "left"
    assert begun == ["left", "quick", "left"]


def test_work_that_heeds_nobody_gives_its_turn_to_the_next_when_cancelled():
    jobs, go = Jobs(at_once=1), threading.Event()
    deaf = jobs.start("deaf", lambda job: go.wait(60))
    while deaf.state != "running":
        time.sleep(0.001)
    deaf.cancel()
    others = [jobs.start(name, lambda job: job.title) for name in "ab"]
    for other in others:
        _wait(other)
    assert not deaf.over
    go.set()
    _wait(deaf)
    turns = []
    for job in [jobs.start("one", lambda job: turns.append(time.sleep(0.05))) for _ in range(3)]:
        _wait(job)
    assert len(turns) == 3


def test_two_who_ask_late_do_not_take_each_others_work_away_for_ever(monkeypatch):
    monkeypatch.setattr("moescope.app.answers._LEFT", 0.05)
    answers, found = Answers(Jobs(at_once=1)), {}

    def work():
        for step in range(20):
            report("steps", step, 20)
            time.sleep(0.02)
        return "found"

    for _ in range(100):
        for key in {"one", "other"} - set(found):
            with suppress(Pending):
                found[key] = answers.ask(key, key, work, patience=0)
            time.sleep(0.1)  # twice as long as the browser is thought to stay away
        if len(found) == 2:
            break
    assert found == {"one": "found", "other": "found"}


@pytest.fixture
def counted(answers):
    """Work that goes on until it is cancelled: (its job, the steps it has taken)."""
    steps = []

    def counting():
        while True:
            report("steps", len(steps), 0)
            steps.append(1)
            time.sleep(0.005)

    with pytest.raises(Pending) as pending:
        answers.ask("long", "counting", counting, patience=0)
    while not steps:
        time.sleep(0.001)
    yield pending.value.job, steps
    pending.value.job.cancel()
    _wait(pending.value.job)


def test_what_is_computed_rests_while_a_page_opens_and_what_the_page_asks_does_not(answers, counted):
    job, steps = counted
    answers.make_way(300)
    taken = len(steps)
    assert answers.ask("new", "quick", lambda: report("one", 1, 1) or "there", patience=60) == "there"
    time.sleep(0.05)
    assert len(steps) <= taken + 1  # that which it was at
    assert not job.over


def test_what_rested_goes_on(answers, counted):
    _, steps = counted
    answers.make_way(0.2)
    taken = len(steps)
    while len(steps) < taken + 5:
        time.sleep(0.01)


def test_memory_is_bounded(monkeypatch):
    class Large:
        nbytes = 100 << 20

    answers, made = Answers(Jobs()), []
    for key in range(4):
        answers.ask(key, "t", lambda: made.append(1) or Large(), patience=60)
    answers.ask(3, "t", lambda: made.append(1) or Large(), patience=60)
    assert len(made) == 4
    answers.ask(0, "t", lambda: made.append(1) or Large(), patience=60)
    assert len(made) == 5


def test_a_table_counts_with_its_texts(monkeypatch):
    monkeypatch.setattr("moescope.app.answers._LARGEST", 8 << 20)
    answers, made = Answers(Jobs()), []
    for key in ("one", "other", "one"):
        answers.ask(key, "t", lambda: made.append(1) or pd.DataFrame({"text": ["x" * (5 << 20)]}), patience=60)
    assert len(made) == 3


def test_answers_nobody_waited_for_count_in_the_bound():
    class Large:
        nbytes = 100 << 20

    jobs = Jobs()
    answers, kept = Answers(jobs), weakref.WeakSet()

    def make():
        found = Large()
        kept.add(found)
        return found

    for key in range(6):
        with pytest.raises(Pending) as pending:
            answers.ask(key, "t", lambda: time.sleep(0.05) or make(), patience=0)
        _wait(pending.value.job)
    del pending
    assert answers.ask("last", "t", lambda: 1, patience=60) == 1
    gc.collect()
    assert len(kept) <= 2


def test_a_page_comes_though_its_labels_wait_behind_other_work(tmp_path):
    truth = random_truth(np.random.default_rng(0), 6, [4], [2])
    write(tmp_path / "one", truth, [4], {"domain": list("ababab")})
    desk, go = made_desk(tmp_path), threading.Event()
    busy = [desk.jobs.start("long", lambda job: go.wait(60)) for _ in range(2)]
    now = state(desk, Place("overview", "one"))
    assert now["trouble"] is None
    assert now["layers"] == ["0"]
    go.set()
    for job in busy:
        _wait(job)
    while "label" not in (now := state(desk, Place("overview", "one")))["choices"]:
        time.sleep(0.01)
    assert now["choices"]["label"] == ["a", "b"]
