"""A watched program gives what the same program gives unwatched, and ends when the watcher wants it to."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from scipy.sparse import csr_array

from moescope.analysis import integer_programs, watched
from moescope.analysis.integer_programs import INFEASIBLE, solve
from moescope.analysis.placement_programs import exflow
from moescope.analysis.watching import look, report
from moescope.errors import CancelledError, MoescopeError


def knapsack(capacity=50.0, least=-np.inf):
    """12 things, as much worth as fits."""
    rng = np.random.default_rng(0)
    worth, weight = rng.integers(5, 30, (2, 12)).astype(float)
    rows = [(csr_array(weight[None]), -np.inf, capacity), (csr_array(np.ones((1, 12))), [least], [12])]
    best = max(
        sum(worth[place] for place in range(12) if one >> place & 1)
        for one in range(1 << 12)
        if sum(weight[place] for place in range(12) if one >> place & 1) <= capacity
    )
    return (-worth, rows, np.ones(12), np.zeros(12), np.ones(12)), best


@pytest.fixture
def processes(monkeypatch):
    """Every process that is begun."""
    begun, real = [], subprocess.Popen
    monkeypatch.setattr(integer_programs.subprocess, "Popen", lambda *a, **k: begun.append(real(*a, **k)) or begun[-1])
    return begun


def test_watched_or_not_it_is_the_same_program(processes):
    program, best = knapsack()
    alone = solve(*program, time_limit=20, gap=0.0)
    assert not processes
    told = []
    with watched(lambda *step: told.append(step)):
        aside = solve(*program, time_limit=20, gap=0.0)
        assert solve(*program, time_limit=0.5, gap=0.0).status == 0  # too short to be worth a process
        impossible = solve(*knapsack(least=12)[0], time_limit=20, gap=0.0)
    assert len(processes) == 2
    assert told[0] == ("seconds of the solver", 0, 20)
    assert alone.status == aside.status == 0
    assert -program[0] @ alone.x == -program[0] @ aside.x == best
    assert alone.bound == aside.bound == pytest.approx(-best)
    assert (impossible.status, impossible.x) == (INFEASIBLE, None)
    assert solve(*knapsack(least=12)[0], time_limit=20, gap=0.0).status == INFEASIBLE


def test_a_program_larger_than_a_pipe_gets_there_and_back(processes):
    """Costs of 30,000 variables, each free to be 0 or 1: more than a pipe holds, either way."""
    n = 30_000
    cost = np.random.default_rng(0).choice([-1.0, 1.0], n)
    rows = [(csr_array(np.ones((1, n))), 0, n)]
    with watched(lambda *step: None):
        found = solve(cost, rows, np.ones(n), np.zeros(n), np.ones(n), time_limit=60, gap=0.0)
    assert len(processes) == 1
    assert np.array_equal(found.x.round(), cost < 0)


def test_a_placement_that_nobody_wants_any_more_ends_at_once(processes):
    """Unwatched it would take ten minutes, and pytest with it."""
    counts = [np.random.default_rng(step).integers(0, 200, (16, 16)) for step in range(4)]

    def stops(what, done, total):
        if what == "seconds of the solver" and processes:
            raise CancelledError("enough")

    with watched(stops), pytest.raises(CancelledError, match="enough"):
        exflow(counts, 4, time_limit=600)
    (process,) = processes
    assert process.poll() not in (None, 0)


LONG = """
import subprocess
import numpy as np
from moescope.analysis import integer_programs, watched
from moescope.analysis.placement_programs import exflow

real = subprocess.Popen
def told(*args, **kwargs):
    process = real(*args, **kwargs)
    print(process.pid, flush=True)
    return process
integer_programs.subprocess.Popen = told
counts = [np.random.default_rng(step).integers(0, 200, (16, 16)) for step in range(4)]
with watched(lambda *step: None):
    exflow(counts, 4, time_limit=600)
"""


def seconds_of_work(pid):
    """Processor time of a process; None once it has ended, whether or not anybody took note."""
    state, time = (subprocess.run(["ps", "-o", what, "-p", pid], capture_output=True, text=True, check=False).stdout
                   for what in ("stat=", "time="))  # fmt: skip
    if not time.strip() or state.strip().startswith("Z"):
        return None
    hours, minutes, seconds = time.strip().rpartition("-")[2].split(":")
    return int(hours) * 3600 + int(minutes) * 60 + float(seconds)


def until(true, deadline=120.0):
    """Waits for it."""
    begun = time.monotonic()
    while not true():
        assert time.monotonic() - begun < deadline
        time.sleep(0.1)


def test_a_solver_ends_soon_after_the_process_that_waits_for_it_is_killed():
    parent = subprocess.Popen([sys.executable, "-c", LONG], stdout=subprocess.PIPE, text=True)
    solver = parent.stdout.readline().strip()
    try:
        until(lambda: seconds_of_work(solver) >= 3)  # past its imports: HiGHS runs
        parent.kill()
        parent.wait()
        until(lambda: seconds_of_work(solver) is None)
    finally:
        parent.kill()
        parent.communicate()
        if seconds_of_work(solver) is not None:
            os.kill(int(solver), signal.SIGKILL)


def test_a_solver_that_dies_is_one_sentence(tmp_path, monkeypatch):
    monkeypatch.setattr(integer_programs, "_SCRIPT", tmp_path / "none.py")
    with watched(lambda *step: None), pytest.raises(MoescopeError, match=r"ended early \(.*none\.py"):
        solve(*knapsack()[0], time_limit=20, gap=0.0)


def test_a_look_tells_the_same_again():
    told = []
    with watched(lambda *step: told.append(step)):
        report("steps", 1, 3)
        look()
    assert told == [("steps", 1, 3)] * 2
    look()  # nobody watches
    assert len(told) == 2
