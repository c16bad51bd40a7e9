"""Whoever watches is told of every step, changes no result, and may stop the work without leaving half of it behind."""

from __future__ import annotations

import shutil
import threading
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import numpy as np
import pytest
import xarray as xr

from moescope import analysis
from moescope.analysis.transitions import transition_tables
from moescope.analysis.watching import counted
from moescope.errors import CancelledError
from moescope.store import Store
from tests.analysis.made_stores import random_truth, write

ASKED = {
    "load": lambda store: analysis.load(store, by="domain"),
    "margins": lambda store: analysis.margins(store, resamples=20),
    "npmi": lambda store: analysis.npmi(store, by="domain", permutations=99, resamples=20),
    "affinity": lambda store: analysis.affinity(store, permutations=30),
    "importance": lambda store: analysis.importance(store, resamples=20, splits=3, permutations=19),
    "consistency": lambda store: analysis.consistency(store, windows=[4], draws=2, resamples=20),
    "paths": lambda store: analysis.paths(store, draws=2),
    "find_documents": lambda store: analysis.find_documents(store, text="some"),
}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("watched") / "s"
    truth = random_truth(np.random.default_rng(3), 30, [6, 4, 5], [3, 1, 2])
    write(folder, truth, [6, 4, 5], {"domain": list("abc") * 10}, cuts=6)
    return folder


@pytest.fixture
def fresh(made, tmp_path):
    """A copy of the store with nothing kept."""
    shutil.copytree(made, tmp_path / "copy", ignore=shutil.ignore_patterns("aggregates"))
    return tmp_path / "copy"


def same(a, b):
    return a.equals(b) if isinstance(a, xr.Dataset) else a == b


@pytest.mark.parametrize("name", ASKED)
def test_every_part_is_told_from_its_start_to_its_end(made, fresh, name):
    plain = ASKED[name](Store.open(made))
    told = []
    with analysis.watched(lambda *step: told.append(step)):
        assert same(ASKED[name](Store.open(fresh)), plain)
    assert told
    begun = []  # parts, each inside a step of the one before
    for what, done, total in told:
        if done == 0:
            begun.append((what, 0, total))
        else:
            assert begun.pop() == (what, done - 1, total), "steps are told one by one, the inner part's first"
            begun.append((what, done, total))
        if done == total:
            begun.pop()
    assert not begun
    assert ("shards", 6, 6) in told


@pytest.mark.parametrize("name", ASKED)
def test_stopped_anywhere_it_leaves_nothing_half_done(made, fresh, name):
    plain = ASKED[name](Store.open(made))
    steps = []
    with analysis.watched(lambda *step: steps.append(step)):
        ASKED[name](Store.open(fresh))
    places = sorted({0, 1, 3, len(steps) // 2, len(steps) - 1} & set(range(len(steps))))
    for place in places:
        shutil.rmtree(fresh / "aggregates", ignore_errors=True)
        store, left = Store.open(fresh), place

        def stop(what, done, total):
            nonlocal left
            left -= 1
            if left < 0:
                raise CancelledError("stopped by hand")

        with pytest.raises(CancelledError, match="by hand"), analysis.watched(stop):
            ASKED[name](store)
        assert not [t.name for t in threading.enumerate() if t.name.startswith("moescope-counting")]
        assert same(ASKED[name](store), plain), place  # what it kept, and what it did not, gives the same


def test_shards_counted_in_other_processes_are_told_too(fresh):
    told = []
    with (
        ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool,
        analysis.spread(pool, 1),
        analysis.watched(lambda *step: told.append(step)),
    ):
        analysis.document_tokens(Store.open(fresh))
    assert told == [("shards", done, 6) for done in range(7)]


def test_after_preparing_no_shard_is_read_again_by_what_it_prepares(fresh):
    told = []
    with analysis.watched(lambda *step: told.append(step)):
        analysis.prepare(Store.open(fresh))
    assert told[-1][0] == "tables"
    assert told[-1][1] == told[-1][2]
    kept = sorted(file.name for file in (fresh / "aggregates").iterdir())
    store, told[:] = Store.open(fresh), []
    with analysis.watched(lambda *step: told.append(step)):
        analysis.prepare(store)
        for name in ("load", "margins", "npmi", "importance", "find_documents"):
            ASKED[name](store)
        analysis.load(store, weighted=False)
        analysis.token_occurrences(store, 3)
        transition_tables(store)
        analysis.top_tokens(store, 0, [1])
    assert "shards" not in {what for what, _, _ in told}
    assert sorted(file.name for file in (fresh / "aggregates").iterdir()) == kept


def test_nobody_is_told_outside_the_block_and_the_inner_one_inside(made):
    outer, inner = [], []
    with analysis.watched(lambda *step: outer.append(step)):
        with analysis.watched(lambda *step: inner.append(step)):
            list(counted("a", "xy"))
        list(counted("b", iter("z")))
    assert list(counted("c", range(3))) == [0, 1, 2]
    assert (inner, outer) == ([("a", 0, 2), ("a", 1, 2), ("a", 2, 2)], [("b", 0, 1), ("b", 1, 1)])
