"""Neuron matching: planted copies with permuted neurons found exactly, nothing by chance, the null's invariants."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moescope.analysis.matching import match_neurons, neuron_matching, rotated_neurons
from moescope.analysis.pairwise import redundant_pairs
from moescope.analysis.similarities import weight_similarity
from moescope.errors import MoescopeError


def experts(rng, n=6, neurons=12, width=5, names=("gate", "up", "down")):
    return {name: rng.normal(size=(n, neurons, width)).astype(np.float32) for name in names}


def unit(rows):
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


@settings(deadline=None, max_examples=30)
@given(st.integers(1, 6), st.integers(0, 10**6))
def test_the_assignment_is_the_best_of_all_permutations(n, seed):
    rng = np.random.default_rng(seed)
    a, b = rng.normal(size=(2, n, 4))
    table = unit(a) @ unit(b).T
    best = max(np.mean([table[i, j] for i, j in enumerate(order)]) for order in itertools.permutations(range(n)))
    found = match_neurons(a, b)
    assert found.similarity == pytest.approx(best)
    assert sorted(found.order) == list(range(n))
    np.testing.assert_allclose(found.cosine, table[np.arange(n), found.order])


def test_a_permuted_copy_is_matched_neuron_by_neuron():
    rng = np.random.default_rng(0)
    a = rng.normal(size=(40, 9))
    order = rng.permutation(40)
    found = match_neurons(a, a[order] * rng.uniform(0.5, 2, (40, 1)))  # cosine does not see a neuron's size
    np.testing.assert_array_equal(order[found.order], np.arange(40))
    assert found.similarity == pytest.approx(1)
    assert match_neurons(a, a).kendall_tau == pytest.approx(1)
    assert match_neurons(a, a[::-1]).kendall_tau == pytest.approx(-1)


def test_a_planted_copy_with_permuted_neurons_is_found_and_nothing_else():
    exact = wrong = 0
    for seed in range(10):
        rng = np.random.default_rng(seed)
        parts = experts(rng)
        order = rng.permutation(12)
        for values in parts.values():
            values[4] = values[1][order]
        result = neuron_matching({2: parts}, seed=seed)
        pairs = redundant_pairs(result)
        listed = list(zip(pairs["pair_expert"].values.tolist(), pairs["pair_other"].values.tolist(), strict=True))
        assert listed[0] == (1, 4)
        exact += pairs["pair_similarity"].values[0] == pytest.approx(1, abs=1e-6)
        wrong += len(listed) - 1
        assert abs(result["kendall_tau"].sel(layer=2, expert=1, other=4).item()) < 0.9
        assert result["screen"].sel(layer=2, expert=1, other=4).item() == pytest.approx(1, abs=1e-5)
        # The flattened matrices do not show it: their neurons stand elsewhere.
        assert weight_similarity({2: parts}, draws=0)["similarity"].sel(expert=1, other=4).item() < 0.9
    assert exact == 10
    assert wrong <= 2


def test_unrelated_experts_are_not_redundant_though_their_best_matches_are_never_bad():
    false = 0
    for seed in range(20):
        result = neuron_matching({0: experts(np.random.default_rng(seed), neurons=10)}, seed=seed)
        assert result["null_mean"].item() > 0.1  # which a cosine without its null would take for likeness
        false += bool(result["redundant"].any())
    assert false <= 4  # 19 draws: 1 layer in 20 expected


def test_neurons_that_share_a_direction_are_not_redundant():
    """A direction common to all neurons of all experts raises every cosine; the null has it too."""
    false = 0
    for seed in range(20):
        rng = np.random.default_rng(seed)
        parts = {"up": experts(rng, names=("up",))["up"] + 3, "down": experts(rng, names=("up",))["up"]}
        result = neuron_matching({0: parts}, seed=seed)
        assert np.nanmin(result["similarity"]) > 0.5
        false += bool(result["redundant"].any())
    assert false <= 4


def test_copies_trained_apart_keep_their_order():
    rng = np.random.default_rng(1)
    dense = {name: values[:1] for name, values in experts(rng, neurons=60, width=20).items()}
    parts = {
        name: (np.repeat(values, 4, axis=0) + 0.3 * rng.normal(size=(4, 60, 20))).astype(np.float32)
        for name, values in dense.items()
    }
    result = neuron_matching({0: parts}, draws=3)
    pairs = redundant_pairs(result)
    assert pairs.sizes["pair"] == 6
    assert np.nanmin(result["kendall_tau"]) > 0.95
    np.testing.assert_allclose(result["in_place"], result["similarity"], atol=0.02)


@settings(deadline=None, max_examples=25)
@given(st.integers(2, 20), st.integers(1, 8), st.integers(0, 10**6))
def test_the_null_keeps_mean_and_covariance(n, width, seed):
    rows = np.random.default_rng(seed).normal(size=(n, width)) + 2
    other = rotated_neurons(rows, seed)
    np.testing.assert_allclose(other.mean(axis=0), rows.mean(axis=0), atol=1e-9)
    np.testing.assert_allclose(other.T @ other, rows.T @ rows, atol=1e-8)


def test_only_the_nearest_or_the_named_pairs_are_matched():
    parts = experts(np.random.default_rng(2))
    result = neuron_matching({0: parts}, most=4, draws=1)
    assert int(result["similarity"].notnull().sum()) == 8
    matched = result["screen"].where(result["similarity"].notnull())
    others = result["screen"].where(result["similarity"].isnull())
    assert float(matched.min()) >= float(others.max())
    named = neuron_matching({0: parts}, pairs=[(5, 2)], draws=1)
    assert int(named["similarity"].notnull().sum()) == 2
    by_hand = match_neurons(*(np.concatenate([part[e] for part in parts.values()], axis=1) for e in (2, 5)))
    assert named["similarity"].sel(layer=0, expert=2, other=5).item() == pytest.approx(by_hand.similarity, abs=1e-6)
    with pytest.raises(MoescopeError, match="no pair of two"):
        neuron_matching({0: parts}, pairs=[(1, 1)])


def test_experts_without_matrices_or_with_one_neuron():
    parts = experts(np.random.default_rng(3), n=3)
    for values in parts.values():
        values[2] = np.nan
    result = neuron_matching({0: parts}, draws=1)
    assert np.isnan(result["similarity"].sel(expert=2)).all()
    assert result["similarity"].sel(layer=0, expert=0, other=1).notnull()
    single = neuron_matching({0: experts(np.random.default_rng(4), neurons=1)}, draws=1)
    assert np.isnan(single["kendall_tau"]).all()
    with pytest.raises(MoescopeError, match="one shape"):
        match_neurons(np.ones((2, 3)), np.ones((3, 3)))
    with pytest.raises(MoescopeError, match="not finite"):
        match_neurons(np.full((2, 3), np.nan), np.ones((2, 3)))
