"""Whoever counts, threads or processes, the counts are the same; and what waits in memory is bounded."""

from __future__ import annotations

import multiprocessing
from concurrent.futures import Future, ProcessPoolExecutor

import numpy as np
import pytest

from moescope import analysis
from moescope.analysis import spreading
from moescope.analysis.counts import document_tables, token_tables
from moescope.errors import StoreError
from moescope.store import Store
from tests.analysis.made_stores import random_truth, write


@pytest.fixture
def made(tmp_path):
    truth = random_truth(np.random.default_rng(3), 30, [7, 4, 5], [3, 1, 2], missing=0.1)
    store = write(tmp_path / "s", truth, [7, 4, 5], {"domain": list("abc") * 10}, cuts=7, slots_can_miss=True)
    return truth, store


def uncached(store: Store) -> Store:
    """The store without what it has kept, so that it counts anew."""
    for file in (store.path / "aggregates").glob("*"):
        file.unlink()
    return Store.open(store.path)


def brute(truth, group, layer):
    count = np.zeros((int(group.max()) + 1, truth.expert[layer].max() + 1), int)
    for row, (ids, valid) in enumerate(zip(truth.expert[layer], truth.valid[layer], strict=True)):
        for expert, there in zip(ids, valid, strict=True):
            count[group[row], expert] += there
    return count


def all_counts(store):
    return [
        (pairs.group, pairs.expert, pairs.count, pairs.weight)
        for tables in (document_tables(store, store.sites, weighted=True), token_tables(store, store.sites))
        for pairs in tables
    ]


def test_one_thread_many_threads_and_processes_agree_with_brute_force(made, monkeypatch):
    truth, store = made
    threads = all_counts(uncached(store))
    monkeypatch.setattr(spreading, "THREADS", 1)
    single = all_counts(uncached(store))
    with ProcessPoolExecutor(2, mp_context=multiprocessing.get_context("spawn")) as pool, analysis.spread(pool, 2):
        processes = all_counts(uncached(store))
    for one, many, elsewhere in zip(single, threads, processes, strict=True):
        for a, b, c in zip(one, many, elsewhere, strict=True):
            np.testing.assert_array_equal(a, b)
            np.testing.assert_array_equal(a, c)
    for layer in range(3):
        for tables, group in ((single[:3], truth.document), (single[3:], truth.token_id)):
            names, expert, count, _ = tables[layer]
            expected = brute(truth, group, layer)
            np.testing.assert_array_equal(expected[names, expert], count)
            assert expected.sum() == count.sum()


class Counting:
    """An executor that runs at once and remembers how many answers have not been taken."""

    def __init__(self):
        self.waiting = self.most = self.calls = 0

    def submit(self, function, /, *arguments):
        self.calls += 1
        self.waiting += 1
        self.most = max(self.most, self.waiting)
        counting, value = self, function(*arguments)

        class Answer(Future):
            def result(self, timeout=None):
                counting.waiting -= 1
                return value

        return Answer()


def test_answers_in_flight_are_bounded_and_the_block_ends(made):
    _, store = made
    executor = Counting()
    with analysis.spread(executor, workers=2):
        document_tables(uncached(store), store.sites)
    passes = executor.calls
    assert passes == 2 * len(store.shards) >= 12  # how large the documents are, then the counts
    assert executor.most == 4
    document_tables(uncached(store), store.sites)  # outside the block it is not asked
    assert executor.calls == passes


def test_a_damaged_shard_is_named_from_a_worker_too(made):
    _, store = made
    file = store.shards[3].path / "routing.parquet"
    file.write_bytes(file.read_bytes()[:40] + b"?" * (file.stat().st_size - 40))
    fresh = uncached(store)
    with pytest.raises(StoreError, match=r"shards/\d+/routing|moescope check"):
        document_tables(fresh, fresh.sites)


def answers(store):
    """Everything that follows tokens from layer to layer, or looks at what fewer experts would do, as plain arrays."""
    found = [
        analysis.affinity(store, "all", pairs="all", permutations=5),
        analysis.paths(store, draws=3, capacity=60),
        analysis.coactivation(store, groups=4),
        analysis.what_if(store, by="domain", resamples=20),
        analysis.placement(store, 2, "eplb", uneven=True, draws=5),
    ]
    counts = [analysis.transition_counts(store, 0, 2, "weighted", phase=phase) for phase in (None, "prefill")]
    return counts + [result[name].values for result in found for name in result.data_vars if name != "seconds"]


def test_transitions_paths_and_what_if_are_the_same_wherever_they_are_counted(made, monkeypatch):
    _, store = made
    threads = answers(uncached(store))
    monkeypatch.setattr(spreading, "THREADS", 1)
    single = answers(uncached(store))
    with ProcessPoolExecutor(2, mp_context=multiprocessing.get_context("spawn")) as pool, analysis.spread(pool, 2):
        processes = answers(uncached(store))
    assert len(single) > 60
    for one, many, elsewhere in zip(single, threads, processes, strict=True):
        np.testing.assert_array_equal(one, many)
        np.testing.assert_array_equal(one, elsewhere)
