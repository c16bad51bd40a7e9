"""Caches of every size against naive simulators of one size, the true optimum, and planted memory."""

import math
import multiprocessing
from concurrent.futures import ProcessPoolExecutor

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from moescope.analysis.caching import caches, replay_ids
from moescope.analysis.local_routing import consistency
from moescope.analysis.spreading import spread
from moescope.errors import MoescopeError
from tests.analysis.made_stores import random_truth, write
from tests.analysis.ordered_stores import recut
from tests.analysis.test_local_routing import memory_store

cases = settings(
    max_examples=10, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)
WIDTHS, K = [7, 4, 1], [3, 2, 1]
POLICIES = ["lru", "lfu", "sch-1", "sch-3", "sch-9", "belady"]


def worth(policy, expert, tokens, now):
    """How much a policy wants to keep an expert after token `now`, by looking through the whole sequence."""
    uses = [t for t, token in enumerate(tokens) if expert in token]
    past = [t for t in uses if t <= now]
    recency = (past[-1], tokens[past[-1]].index(expert))
    if policy == "lru":
        return recency
    if policy == "lfu":
        return (len(past), *recency)
    if policy == "belady":
        return -min([t for t in uses if t > now], default=10**9)
    window = int(policy.removeprefix("sch-"))
    return (len([t for t in uses if now <= t < now + window]), *recency)


def simulate(policy, tokens, size):
    """(hits, hits that were loads into a cache not yet full) of one cache of one size, token by token."""
    cache, seen, hits, cold = set(), set(), 0, 0
    for now, token in enumerate(tokens):
        hits += len(cache & set(token))
        for expert in token:
            if expert not in seen:
                cold += len(seen) < size
                seen.add(expert)
        others = sorted(cache - set(token), key=lambda e: worth(policy, e, tokens, now), reverse=True)
        cache = set(token) | set(others[: size - len(token)])
    return hits, cold


def tokens_of(ids, valid=None):
    """Each token's experts, once, in rank order."""
    present = [[int(e) for e, ok in zip(row, oks, strict=True) if ok and e >= 0]
               for row, oks in zip(ids, np.ones(ids.shape, bool) if valid is None else valid, strict=True)]  # fmt: skip
    return [list(dict.fromkeys(token)) for token in present]


random_ids = st.builds(
    lambda seed, tokens, width, k: np.argsort(-np.random.default_rng(seed).gumbel(size=(tokens, width)), axis=1)[
        :, : min(k, width)
    ],
    st.integers(0, 10**6), st.integers(1, 25), st.integers(1, 7), st.integers(1, 3),
)  # fmt: skip


@settings(deadline=None, max_examples=60)
@given(random_ids, st.sampled_from(POLICIES), st.randoms(use_true_random=False))
def test_one_stack_is_every_cache(ids, policy, random):
    ids = np.array([[e if random.random() < 0.8 else -1 for e in row] for row in ids])
    width = int(ids.max(initial=0)) + 1
    tokens = tokens_of(ids)
    sizes = range(ids.shape[1], width + 3)
    found = replay_ids(ids, width, policy)
    assert found.selections[0] == sum(map(len, tokens))
    for size in sizes:
        hits, cold = simulate(policy, tokens, size)
        assert found.hits([size], full=False)[0, 0] == hits
        assert found.hits([size])[0, 0] == hits + cold


@pytest.mark.parametrize(
    ("ids", "hits"), [([0, 1, 2, 1], 1), ([0, 1, 2, 0], 0), ([0, 0, 1, 2, 0], 2), ([0, 0, 1, 2, 1], 1)]
)
def test_lfu_keeps_the_one_used_most_and_of_equals_the_one_used_last(ids, hits):
    """Two places, by hand: 0 and 1 are equal when 2 comes, and 0 goes; used twice, it stays and 1 goes."""
    assert replay_ids(np.array(ids)[:, None], 3, "lfu").hits([2], full=False)[0, 0] == hits


def optimum(tokens, size):
    """The most hits any cache can have that holds the whole token after each: over all ways to evict."""
    states = {frozenset(): 0}
    for token in map(frozenset, tokens):
        after = {}
        for cache, hits in states.items():
            others = sorted(cache - token)
            for kept in range(1 << len(others)):
                chosen = frozenset(e for place, e in enumerate(others) if kept >> place & 1)
                if len(chosen) + len(token) <= size:
                    value = hits + len(cache & token)
                    after[token | chosen] = max(after.get(token | chosen, -1), value)
        states = after
    return max(states.values())


@settings(deadline=None, max_examples=30)
@given(random_ids)
def test_belady_is_the_optimum_and_no_policy_beats_it(ids):
    ids, width = ids[:12], ids.max() + 1
    best = replay_ids(ids, width, "belady")
    sizes = list(range(ids.shape[1], width + 1))
    for size, hits in zip(sizes, best.hits(sizes, full=False)[0], strict=True):
        assert hits == optimum(tokens_of(ids), size)
    for policy in POLICIES:
        assert (replay_ids(ids, width, policy).hits(sizes) <= best.hits(sizes)).all()


@given(random_ids)
@settings(deadline=None, max_examples=30)
def test_laws_of_caches(ids):
    width = ids.max() + 1
    sizes = list(range(ids.shape[1], width + 2))
    lru = replay_ids(ids, width, "lru")
    # Seeing the current token alone is seeing nothing.
    np.testing.assert_array_equal(lru.depth, replay_ids(ids, width, "sch-1").depth)
    for policy in POLICIES:
        found = replay_ids(ids, width, policy)
        hits = found.hits(sizes)[0]
        assert (np.diff(hits) >= 0).all()
        assert hits[-1] == ids.size  # a whole layer fits
        np.testing.assert_array_equal(found.first, lru.first)


@cases
@given(seed=st.integers(0, 10**6), missing=st.sampled_from([0.0, 0.3]), cuts=st.lists(st.integers(1, 60), max_size=3))
def test_hit_rates_are_those_of_naive_caches(tmp_path_factory, seed, missing, cuts):
    """Sequence by sequence, also when shards end inside of them, layers of different width, and a one-expert layer."""
    made = random_truth(np.random.default_rng(seed), 5, WIDTHS, K, missing=missing)
    store = write(tmp_path_factory.mktemp("s") / "s", made, WIDTHS, {}, [0, 2, 5], slots_can_miss=missing > 0)
    store = recut(store, [cut for cut in set(cuts) if cut < made.sequence.size])
    sizes, windows = [1, 2, 3, 5, 9], [1, 4]
    found = caches(store, sizes, windows, draws=1, resamples=0)
    assert list(found["policy"].values) == ["lru", "lfu", "sch-1", "sch-4", "belady"]
    whole = {}
    for layer in range(3):
        sequences = [
            tokens_of(made.expert[layer][rows], made.valid[layer][rows] if missing else None)
            for rows in (made.sequence == number for number in np.unique(made.sequence))
        ]
        total = sum(len(token) for tokens in sequences for token in tokens)
        assert found["selections"][layer] == total
        for policy in found["policy"].values:
            for size in sizes:
                cell = found.isel(layer=layer).sel(policy=policy, size=size)
                if size < K[layer]:
                    assert np.isnan(cell["hit_rate"])
                    assert np.isnan(cell["chance"])
                    continue
                hits, cold = np.sum([simulate(policy, tokens, size) for tokens in sequences], axis=0)
                assert cell["hit_rate"].item() == pytest.approx(
                    (hits + cold) / total if total else math.nan, nan_ok=True
                )
                assert cell["hit_rate_empty"].item() == pytest.approx(hits / total if total else math.nan, nan_ok=True)
                assert cell["chance"] == min(1, size / WIDTHS[layer])
                so_far = whole.get((policy, size), (0, 0))
                whole[policy, size] = (so_far[0] + hits + cold, so_far[1] + total)
    for policy in found["policy"].values:
        for size in sizes:
            value = found["model_hit_rate"].sel(policy=policy, size=size).item()
            hits, total = whole[policy, size]
            assert value == pytest.approx(hits / total) if size >= 3 else math.isnan(value)


def test_planted_memory_is_worth_hits_and_no_memory_is_not(tmp_path):
    _, sticky = memory_store(tmp_path / "sticky", stick=0.95)
    _, plain = memory_store(tmp_path / "plain", stick=0.0)
    found = caches(sticky, [3, 4]).drop_sel(policy="lfu")
    assert (found["hit_rate_low"] > found["shuffled"] + 0.05).all()
    assert (found["hit_rate_low"] <= found["hit_rate"]).all()
    assert (found["hit_rate"] <= found["hit_rate_high"]).all()
    found = caches(plain, [3, 4])
    np.testing.assert_allclose(found["hit_rate"], found["shuffled"], atol=0.03)
    # Without memory the past is worth nothing: an LRU cache holds experts as good as drawn at random.
    np.testing.assert_allclose(found["hit_rate_empty"].sel(policy="lru"), found["chance"], atol=0.05)


def test_shards_filters_labels_and_phases(tmp_path):
    labels = {"domain": ["ab"[d % 2] for d in range(30)]}
    made, store = memory_store(tmp_path / "s", 0.8, labels=labels)
    expected = caches(store, [2, 4], [5], by="domain")
    for other in (recut(store, [17, 60, 61, 700]), store):  # the second time from the aggregates
        again = caches(other, [2, 4], [5], by="domain")
        for name in expected.data_vars:
            np.testing.assert_array_equal(expected[name], again[name])
    own = caches(store, [2, 4], [5], where={"domain": "b"})
    for name in own.data_vars:
        part = expected[name].sel(label="b") if "label" in expected[name].dims else expected[name]
        np.testing.assert_array_equal(own[name], part)
    phase = np.where(made.position < 20, "prefill", "decode").astype(object)
    split = write(tmp_path / "t", made, [8, 6], {}, phase=phase)
    rows = made.position >= 20
    expected = replay_ids(made.expert[0][rows], 8, "lru", made.sequence[rows])
    found = caches(split, [4], [], phase="decode")["hit_rate"].sel(layer=0, policy="lru", size=4).item()
    assert found == pytest.approx(expected.hits([4])[0, 0] / expected.selections[0])


def test_processes_count_the_same(tmp_path):
    labels = {"domain": ["ab"[d % 2] for d in range(30)]}
    made, store = memory_store(tmp_path / "s", 0.8, labels=labels)
    cut = write(tmp_path / "t", made, [8, 6], labels, cuts=3)
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context) as pool, spread(pool):
        elsewhere = [caches(cut, [2, 4], [5], by="domain"), consistency(cut, [3], by="domain", draws=2)]
    here = [caches(store, [2, 4], [5], by="domain"), consistency(store, [3], by="domain", draws=2)]
    for one, other in zip(here, elsewhere, strict=True):
        for name in one.data_vars:
            np.testing.assert_array_equal(one[name], other[name])


def test_sizes_and_mistakes(tmp_path):
    store = write(tmp_path / "s", random_truth(np.random.default_rng(0), 4, WIDTHS, K), WIDTHS, {"who": ["a"] * 4})
    assert caches(store)["size"].values.tolist() == [3, 5, 6]  # 1, 1.5 and 2 times the largest k, below all 7
    (only,) = caches(store, layers=[2])["size"].values
    assert only == 1
    assert np.isnan(caches(store, [3], draws=0)["shuffled"]).all()
    for sizes in ([], [0], [2, 2]):
        with pytest.raises(MoescopeError, match="`sizes` are different"):
            caches(store, sizes)
    with pytest.raises(MoescopeError, match="at least the 3"):
        caches(store, [2], layers=[0])
    with pytest.raises(MoescopeError, match="each 1 or more"):
        caches(store, windows=[0])
    with pytest.raises(MoescopeError, match="0 or more"):
        caches(store, draws=-1)
    nothing = random_truth(np.random.default_rng(0), 3, [4], [2], missing=1.0)
    with pytest.raises(MoescopeError, match="No expert was selected"):
        caches(write(tmp_path / "t", nothing, [4], {}, slots_can_miss=True))
    with pytest.raises(MoescopeError, match="no policy 'fifo'"):
        replay_ids(np.zeros((1, 1), int), 1, "fifo")
