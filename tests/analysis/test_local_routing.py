"""SRP against its definition window by window, planted memory, and a null that finds nothing where nothing is."""

import itertools
import math

import numpy as np
import pytest
import xarray as xr
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from moescope.analysis.local_routing import consistency, independent_windows, segment_routing, window_counts
from moescope.errors import MoescopeError
from tests.analysis.made_stores import Made, random_truth, write
from tests.analysis.ordered_stores import recut, sticky_ids

cases = settings(
    max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)
WIDTHS, K = [6, 4, 1], [3, 2, 1]


def windows_of(made, layer, window, keep=lambda row: True, missing=True):
    """{(window, expert): activations} by looking at every window of every sequence on its own."""
    found = {}
    for number in np.unique(made.sequence):
        rows = [row for row in np.flatnonzero(made.sequence == number) if keep(row)]
        for first in range(len(rows) - window + 1):
            for expert in range(WIDTHS[layer]):
                found[number, first, expert] = sum(
                    any(
                        made.expert[layer][row, slot] == expert and (made.valid[layer][row, slot] or not missing)
                        for slot in range(K[layer])
                    )
                    for row in rows[first : first + window]
                )
    return found


def best_score(activations, window):
    """(SRP, rho, all thresholds that reach it) by the definition of F1, threshold by threshold."""
    total = sum(activations)
    if not total:
        return math.nan, math.nan, set()
    found = {}
    for threshold in range(window + 1):
        on = [active for active in activations if active >= threshold]
        right, named = sum(on), window * len(on)
        found[threshold] = (2 * right / (named + total), named / total)
    best = max(score for score, _ in found.values())
    reach = [p for p, (score, _) in found.items() if score == pytest.approx(best, abs=1e-12)]
    return best, found[min(reach)][1], set(reach)


@given(st.lists(st.integers(0, 5), min_size=1, max_size=9))
def test_no_segment_router_is_better(activations):
    """Over every way to switch (segment, expert) pairs on, not only thresholds."""
    m, total = 5, sum(activations)
    histogram = np.bincount(activations, minlength=m + 1)
    found = segment_routing(histogram)
    if not total:
        assert np.isnan(found["srp"])
        return
    best = max(
        2 * sum(a for a, on in zip(activations, router, strict=True) if on) / (m * sum(router) + total)
        for router in itertools.product([False, True], repeat=len(activations))
    )
    assert found["srp"] == pytest.approx(best)
    named = m * histogram[int(found["threshold"]) :].sum()
    assert found["size_ratio"] == pytest.approx(named / total)


@given(st.lists(st.integers(0, 30), min_size=2, max_size=20))
def test_the_threshold_is_half_the_score(histogram):
    """p* = ceil(m SRP / 2), up to empty bins."""
    found, m = segment_routing(histogram), len(histogram) - 1
    if not sum(histogram[1:]):
        assert np.isnan(found["threshold"])
        return
    rule = math.ceil(m * float(found["srp"]) / 2 - 1e-9)
    low, high = sorted((int(found["threshold"]), rule))
    assert not any(histogram[low:high])
    assert 0 < found["srp"] <= 1


@cases
@given(
    seed=st.integers(0, 10**6),
    cuts=st.lists(st.integers(1, 60), max_size=4),
    missing=st.sampled_from([0.0, 0.3]),
    window=st.integers(1, 7),
)
def test_every_score_is_what_the_definition_says(tmp_path_factory, seed, cuts, missing, window):
    """Also when shards end inside sequences."""
    made = random_truth(np.random.default_rng(seed), 5, WIDTHS, K, missing=missing)
    made.sequence = np.sort(made.sequence)
    longest = np.unique(made.sequence, return_counts=True)[1].max()
    store = write(tmp_path_factory.mktemp("s") / "s", made, WIDTHS, {}, [1, 3, 4], slots_can_miss=missing > 0)
    store = recut(store, [cut for cut in set(cuts) if cut < made.sequence.size])
    if longest < window or not all(valid.any() for valid in made.valid):
        return
    found = consistency(store, [window], draws=0, resamples=0).isel(window=0)
    whole = []
    for layer in range(3):
        counted = windows_of(made, layer, window)
        whole += counted.values()
        score, ratio, reach = best_score(list(counted.values()), window)
        assert found["srp"][layer].item() == pytest.approx(score, nan_ok=True)
        assert found["size_ratio"][layer].item() == pytest.approx(ratio, nan_ok=True)
        assert found["threshold"][layer].item() in reach or not reach
        for expert in range(WIDTHS[layer]):
            own = [active for (_, _, e), active in counted.items() if e == expert]
            score, ratio, reach = best_score(own, window)
            assert found["expert_srp"][layer, expert].item() == pytest.approx(score, nan_ok=True)
            assert found["expert_size_ratio"][layer, expert].item() == pytest.approx(ratio, nan_ok=True)
        assert np.isnan(found["expert_srp"][layer, WIDTHS[layer] :]).all()
    score, ratio, reach = best_score(whole, window)
    assert found["model_srp"].item() == pytest.approx(score)
    assert found["model_size_ratio"].item() == pytest.approx(ratio)
    assert found["model_threshold"].item() in reach
    assert found["segments"][0] == len(whole) / sum(WIDTHS)


def test_plain_ids_give_the_histogram():
    ids = np.array([[0, 1], [0, 2], [2, -1], [0, 0], [1, 2]])  # the fourth names an expert twice: it is used once
    sequence = np.array([7, 7, 7, 3, 3])
    np.testing.assert_array_equal(window_counts(ids, 2, 4, sequence), [[0, 2, 1], [1, 2, 0], [0, 2, 1], [3, 0, 0]])
    np.testing.assert_array_equal(window_counts(ids, 3, 4).sum(axis=1), [3] * 4)
    assert not window_counts(ids, 6, 4).any()
    with pytest.raises(MoescopeError, match="beyond the 2"):
        window_counts(ids, 2, 2)
    with pytest.raises(MoescopeError, match="stand together"):
        window_counts(ids, 2, 4, np.array([0, 1, 0, 1, 1]))
    with pytest.raises(MoescopeError, match="one for each"):
        window_counts(ids, 2, 4, np.array([0, 1]))


def test_independent_choice_is_binomial():
    """Against long made routing of independent tokens, and the loads kept exactly."""
    rng = np.random.default_rng(0)
    liked = np.arange(5) / 2
    ids = np.argsort(-(rng.gumbel(size=(40_000, 5)) + liked), axis=1)[:, :2]
    table = window_counts(ids, 4, 5)
    expected = independent_windows(table)
    np.testing.assert_allclose((expected * np.arange(5)).sum(axis=1), (table * np.arange(5)).sum(axis=1))
    np.testing.assert_allclose(expected / expected.sum(), table / table.sum(), atol=0.003)


def memory_store(path, stick, topic=0.0, seed=0, documents=30, tokens=60, labels=None):
    rng = np.random.default_rng(seed)
    sequence = np.repeat(np.arange(documents), tokens)
    expert = [sticky_ids(rng, sequence, width, k, stick, topic) for width, k in ((8, 2), (6, 2))]
    made = Made(
        sequence, sequence, np.tile(np.arange(tokens), documents), np.zeros(sequence.size, int), expert,
        [np.ones(ids.shape, np.float32) for ids in expert], [np.ones(ids.shape, bool) for ids in expert],
    )  # fmt: skip
    return made, write(path, made, [8, 6], labels or {})


def test_planted_memory_is_found_and_told_from_topics(tmp_path):
    _, sticky = memory_store(tmp_path / "sticky", stick=0.95)
    _, topical = memory_store(tmp_path / "topical", stick=0.0, topic=2.0)
    _, plain = memory_store(tmp_path / "plain", stick=0.0)
    found = {name: consistency(store, [8], draws=99) for name, store in
             (("sticky", sticky), ("topical", topical), ("plain", plain))}  # fmt: skip
    sticky, topical, plain = (found[name].isel(window=0) for name in ("sticky", "topical", "plain"))
    assert (sticky["srp_low"] > sticky["srp_shuffled_p99"] + 0.05).all()
    assert (sticky["q"] <= 0.02).all()
    # Topics alone: far above what loads give, not above the same tokens in another order.
    assert (topical["srp_low"] > topical["srp_independent"] + 0.1).all()
    assert (topical["srp"] <= topical["srp_shuffled_p99"] + 0.01).all()
    for name in ("srp_shuffled", "srp_independent", "srp_uniform"):
        np.testing.assert_allclose(plain[name], plain["srp"], atol=0.03)
    assert (sticky["srp"] > plain["srp"]).all()
    assert sticky["model_p"] == 0.01
    assert (sticky["srp_low"] <= sticky["srp"]).all()
    assert (sticky["srp"] <= sticky["srp_high"]).all()


def test_the_null_finds_nothing_where_nothing_is(tmp_path):
    """p <= 0.05 for 5 % of 200 labels of topical documents whose tokens have no order."""
    labels = {"trial": [f"{d // 3:03d}" for d in range(600)]}
    _, store = memory_store(tmp_path / "s", 0.0, topic=1.5, documents=600, tokens=20, labels=labels)
    found = consistency(store, [4], by="trial", draws=19, resamples=0)
    p = found["p"].values.ravel()
    assert p.size == 400
    below = np.mean(p <= 0.05)
    assert 0.01 < below < 0.05 + 3 * math.sqrt(0.05 * 0.95 / p.size)
    assert abs(p.mean() - 0.525) < 3 * 0.29 / math.sqrt(p.size)  # uniform over 1/20 .. 20/20
    assert (found["q"] <= 0.05).sum() < 0.05 * p.size


def same(one: xr.Dataset, other: xr.Dataset) -> None:
    for name in one.data_vars:
        np.testing.assert_array_equal(one[name], other[name], err_msg=str(name))


def test_the_cut_into_shards_changes_nothing(tmp_path):
    labels = {"domain": ["ab"[d % 2] for d in range(30)]}
    made, store = memory_store(tmp_path / "s", 0.8, labels=labels)
    expected = consistency(store, [3, 16], by="domain", draws=5)
    same(expected, consistency(recut(store, [17, 60, 61, 700]), [3, 16], by="domain", draws=5))
    cut = write(tmp_path / "t", made, [8, 6], labels, cuts=5)
    assert len(cut.shards) == 5
    same(expected, consistency(cut, [3, 16], by="domain", draws=5))
    same(expected, consistency(store, [3, 16], by="domain", draws=5))  # from the aggregates


def test_filters_labels_and_phases(tmp_path):
    rng = np.random.default_rng(3)
    made = random_truth(rng, 12, WIDTHS, K)
    labels = {"domain": ["ab"[d % 2] for d in range(12)]}
    phase = np.where(made.position < 5, "prefill", "decode").astype(object)
    store = write(tmp_path / "s", made, WIDTHS, labels, phase=phase)
    kept = made.document % 2 == 0
    half = Made(*(value[kept] for value in (made.document, made.sequence, made.position, made.token_id)),
                *([part[kept] for part in parts] for parts in (made.expert, made.weight, made.valid)))  # fmt: skip
    own = write(tmp_path / "t", half, WIDTHS, labels)
    expected = consistency(own, [3], draws=4)
    same(expected, consistency(store, [3], where={"domain": "a"}, draws=4))
    by_label = consistency(store, [3], by="domain", draws=4)
    for name in ("srp", "srp_low", "srp_shuffled", "p", "model_srp", "model_p", "segments"):
        np.testing.assert_array_equal(by_label[name].sel(label="a"), expected[name])
    for name in ("prefill", "decode"):
        counted = windows_of(made, 0, 3, keep=lambda row, name=name: phase[row] == name)
        found = consistency(store, [3], phase=name, draws=0)
        assert found["srp"][0, 0].item() == pytest.approx(best_score(list(counted.values()), 3)[0])


def test_edges(tmp_path):
    made = random_truth(np.random.default_rng(0), 3, WIDTHS, K, longest=8)
    store = write(tmp_path / "s", made, WIDTHS, {"domain": ["a", "a", "b"]})
    found = consistency(store, [1, 500], draws=3)
    assert np.isnan(found["srp"][:, 1]).all()
    assert np.isnan(found["p"][:, 1]).all()
    assert (found["segments"][:, 1] == 0).all()
    np.testing.assert_allclose(found["srp"][:, 0], 1)  # a window of one token is the router itself
    np.testing.assert_allclose(found["size_ratio"][:, 0], 1)
    one = consistency(store, [2], draws=3).sel(layer=2)  # one expert, always on
    assert one["srp"] == one["srp_shuffled"] == one["srp_uniform"] == 1
    assert one["p"] == 1
    assert np.isnan(consistency(store, [2], by="domain", draws=0)["srp_low"].sel(label="b")).all()  # one document
    assert "srp_shuffled" in consistency(store, [2], draws=0)
    with pytest.raises(MoescopeError, match="No sequence has 99 tokens"):
        consistency(store, [99])
    for windows in ([], [0], [2, 2]):
        with pytest.raises(MoescopeError, match="each 1 or more"):
            consistency(store, windows)
    with pytest.raises(MoescopeError, match="0 or more"):
        consistency(store, [2], draws=-1)


def test_all_slots_missing_is_said(tmp_path):
    made = random_truth(np.random.default_rng(0), 3, [4], [2], missing=1.0)
    with pytest.raises(MoescopeError, match="No expert was selected"):
        consistency(write(tmp_path / "s", made, [4], {}, slots_can_miss=True), [2])
