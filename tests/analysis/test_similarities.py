"""Similarity of experts: against plain loops, in its invariances, with planted copies found and nothing by chance."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import kendalltau, spearmanr

from moescope.analysis.alignment import linear_cka, output_similarity, output_similarity_from_arrays
from moescope.analysis.labelled import table
from moescope.analysis.output_norms import norm_against_score, rank_correlations
from moescope.analysis.pairwise import redundant_pairs
from moescope.analysis.router_columns import logit_similarity
from moescope.analysis.similarities import cosine, gate_similarity, weight_similarity
from moescope.errors import MoescopeError
from tests.analysis.function_stores import random_truth, write


def experts(rng, n=8, neurons=10, width=6):
    return {name: rng.normal(size=(n, neurons, width)).astype(np.float32) for name in ("gate", "up", "down")}


def by_hand(a, b):
    return float((a * b).sum() / np.sqrt((a * a).sum() * (b * b).sum()))


def test_cosine_of_matrices_by_hand_and_of_layers_of_different_width():
    rng = np.random.default_rng(0)
    layers = {3: experts(rng, 5), 7: experts(rng, 3)}
    result = weight_similarity(layers, draws=3)
    for layer, parts in layers.items():
        flat = np.concatenate([part.reshape(len(part), -1) for part in parts.values()], axis=1).astype(float)
        for i in range(len(flat)):
            for j in range(len(flat)):
                cell = result.sel(layer=layer, expert=i, other=j)
                if i == j:
                    assert np.isnan(cell["similarity"])
                    continue
                assert cell["similarity"].item() == pytest.approx(by_hand(flat[i], flat[j]), abs=1e-6)
                up = parts["up"].astype(float)
                assert cell["cosine_up"].item() == pytest.approx(by_hand(up[i], up[j]), abs=1e-6)
    assert np.isnan(result["similarity"].sel(layer=7, expert=4)).all()
    assert not result["redundant"].sel(layer=7, expert=4).any()
    again = weight_similarity(iter(layers.items()), draws=3)
    np.testing.assert_array_equal(again["similarity"], result["similarity"])
    np.testing.assert_array_equal(again["null_extreme"], result["null_extreme"])


def test_the_null_of_matrices_is_what_permuted_neurons_give():
    rng = np.random.default_rng(1)
    common = rng.normal(size=(1, 1, 6))
    parts = {"up": (rng.normal(size=(2, 40, 6)) + common).astype(np.float32)}
    result = weight_similarity({0: parts}, draws=400, seed=5)
    a, b = parts["up"].astype(float)
    # The mean over all permutations is exact: sums of neurons meet sums of neurons.
    expected = float(a.sum(0) @ b.sum(0)) / 40 / np.sqrt((a * a).sum() * (b * b).sum())
    assert result["null_mean"].item() == pytest.approx(expected, abs=0.01)
    assert result["p_max"].sel(expert=0, other=1).item() > 0.01


def test_a_planted_copy_is_the_only_redundant_pair():
    found = wrong = 0
    for seed in range(12):
        rng = np.random.default_rng(seed)
        parts = experts(rng, 8, 12)
        for values in parts.values():
            values[5] = values[2] + 0.3 * rng.normal(size=values[2].shape)
        pairs = redundant_pairs(weight_similarity({4: parts}, draws=19, seed=seed))
        listed = list(zip(pairs["pair_expert"].values.tolist(), pairs["pair_other"].values.tolist(), strict=True))
        found += listed[:1] == [(2, 5)]
        wrong += len(listed) - ((2, 5) in listed)
        assert (pairs["pair_layer"] == 4).all()
    assert found == 12
    assert wrong <= 2  # at most 1 layer in 20 by chance


def test_gate_rows_shared_direction_is_taken_away():
    rng = np.random.default_rng(2)
    rows = rng.normal(size=(16, 40)) + 5 * rng.normal(size=(1, 40))
    result = gate_similarity({0: rows}, draws=19)
    assert np.nanmin(result["cosine"]) > 0.8
    assert abs(np.nanmean(result["similarity"])) < 0.1
    centred = rows - rows.mean(axis=0)
    cell = result.sel(layer=0, expert=3, other=9)
    assert cell["similarity"].item() == pytest.approx(by_hand(centred[3], centred[9]))
    assert cell["cosine"].item() == pytest.approx(by_hand(rows[3], rows[9]))
    plain = gate_similarity({0: rows}, centred=False, draws=0)
    np.testing.assert_allclose(plain["similarity"], result["cosine"])
    assert np.isnan(plain["null_extreme"]).all()
    with pytest.raises(MoescopeError, match="no null"):
        redundant_pairs(plain)


@pytest.mark.parametrize("null", ["covariance", "shuffle"])
def test_twin_gate_rows_are_found_and_nothing_by_chance(null):
    false = 0
    for seed in range(40):
        rng = np.random.default_rng(seed)
        rows = rng.normal(size=(24, 64))
        false += bool(gate_similarity({0: rows}, null=null, draws=39, seed=seed)["redundant"].any())
        rows[7] = rows[11] + 0.05 * rng.normal(size=64)
        twins = redundant_pairs(gate_similarity({0: rows}, null=null, draws=39, seed=seed))
        assert (int(twins["pair_expert"][0]), int(twins["pair_other"][0])) == (7, 11)
    # 39 draws: 1 layer in 40 exceeds all of them by chance.
    assert false <= 5


def test_rows_in_a_subspace_do_not_exceed_the_covariance_null():
    """Rows that share four directions are alike more often than independent channels would be."""
    shared = fooled = 0
    for seed in range(20):
        rng = np.random.default_rng(seed)
        rows = rng.normal(size=(24, 4)) @ rng.normal(size=(4, 64)) + 0.05 * rng.normal(size=(24, 64))
        shared += bool(gate_similarity({0: rows}, draws=39, seed=seed)["redundant"].any())
        fooled += bool(gate_similarity({0: rows}, null="shuffle", draws=39, seed=seed)["redundant"].any())
    assert shared <= 3
    assert fooled >= 18


def test_what_is_missing_stays_missing():
    rng = np.random.default_rng(3)
    parts = experts(rng, 4)
    for values in parts.values():
        values[3] = np.nan
        values[1] = 0
    result = weight_similarity({0: parts}, draws=2)
    assert np.isnan(result["similarity"].sel(expert=[1, 3])).all()
    assert not np.isnan(result["similarity"].sel(expert=0, other=2)).any()
    assert not result["redundant"].sel(expert=[1, 3]).any()
    alone = weight_similarity({0: experts(rng, 1)}, draws=2)
    assert np.isnan(alone["similarity"]).all()
    assert np.isnan(alone["null_extreme"]).all()
    assert alone.sizes["pair"] == 0
    with pytest.raises(MoescopeError, match="No layer"):
        weight_similarity({})
    with pytest.raises(MoescopeError, match="one E and neuron"):
        weight_similarity({0: {"up": np.ones((2, 3, 4)), "down": np.ones((2, 4, 3))}})
    with pytest.raises(MoescopeError, match="one router row per expert"):
        gate_similarity({0: np.ones(3)})


def test_the_closest_pairs_are_the_results_table():
    frame = table(weight_similarity({0: experts(np.random.default_rng(4))}, draws=3))
    assert len(frame) == 28
    assert frame["pair_similarity"].is_monotonic_decreasing
    assert (frame["pair_expert"] < frame["pair_other"]).all()


# Logit columns


def test_logit_columns_by_hand_in_any_number_of_shards(tmp_path):
    truth = random_truth(np.random.default_rng(5), documents=20)
    results = []
    for cuts in (1, 5):
        result = logit_similarity(write(tmp_path / str(cuts), truth, cuts), draws=4, seed=3)
        results.append(result)
        for layer, logits in enumerate(truth.logits):
            values = logits.astype(float)
            free = values - values.mean(axis=1, keepdims=True)
            for i in range(values.shape[1]):
                for j in range(i):
                    cell = result.sel(layer=layer, expert=i, other=j)
                    expected = (by_hand(values[:, i], values[:, j]) + 1) / 2
                    assert cell["similarity"].item() == pytest.approx(expected)
                    assert cell["correlation"].item() == pytest.approx(np.corrcoef(free[:, i], free[:, j])[0, 1])
                    assert cell["low"].item() <= expected <= cell["high"].item()
        assert result["tokens"].values.tolist() == [truth.tokens] * 2
    for name in ("similarity", "null_mean", "null_extreme", "low", "high"):
        np.testing.assert_allclose(results[0][name], results[1][name], err_msg=name)


def test_twin_columns_are_found_and_slow_drifts_are_not(tmp_path):
    """Documents have their own offsets for experts: alike over documents, not token by token."""
    false = 0
    for seed in range(8):
        rng = np.random.default_rng(seed)
        truth = random_truth(rng, documents=30, n_experts=(8,), longest=40)
        mood = rng.normal(size=(30, 8))
        mood[:, 6] = mood[:, 1]
        truth.logits[0] = (rng.normal(size=(truth.tokens, 8)) + mood[truth.document]).astype(np.float32)
        result = logit_similarity(write(tmp_path / f"{seed}-null", truth), draws=19, seed=seed)
        false += bool(result["redundant"].any())
        truth.logits[0][:, 5] = truth.logits[0][:, 2] + 0.3 * rng.normal(size=truth.tokens)
        pairs = redundant_pairs(logit_similarity(write(tmp_path / f"{seed}-twin", truth), draws=19, seed=seed))
        assert (int(pairs["pair_expert"][0]), int(pairs["pair_other"][0])) == (2, 5)
    assert false <= 2


def test_logits_that_are_not_finite_are_left_out(tmp_path):
    truth = random_truth(np.random.default_rng(6), documents=4, n_experts=(4,))
    truth.logits[0][:3, 1] = -np.inf
    result = logit_similarity(write(tmp_path / "s", truth), draws=2)
    assert result["tokens"].item() == truth.tokens - 3
    assert np.isnan(result["low"]).all()  # four documents are too few to resample
    kept = truth.logits[0][3:].astype(float)
    expected = (by_hand(kept[:, 0], kept[:, 1]) + 1) / 2
    assert result["similarity"].sel(expert=0, other=1).item() == pytest.approx(expected)


# CKA


def direct_cka(x, y, debiased):
    """From Gram matrices, element by element of the definitions."""
    n = len(x)

    def hsic(a, b):
        if not debiased:
            centre = np.eye(n) - 1 / n
            return np.trace(a @ centre @ b @ centre)
        a, b, one = a - np.diag(np.diag(a)), b - np.diag(np.diag(b)), np.ones(n)
        middle = (one @ a @ one) * (one @ b @ one) / ((n - 1) * (n - 2))
        return (np.trace(a @ b) + middle - 2 / (n - 2) * (one @ a @ b @ one)) / (n * (n - 3))

    k, m = x @ x.T, y @ y.T
    return hsic(k, m) / np.sqrt(hsic(k, k) * hsic(m, m))


@settings(deadline=None, max_examples=40)
@given(st.integers(5, 30), st.integers(1, 6), st.integers(1, 6), st.booleans(), st.integers(0, 10**6))
def test_cka_is_its_definition(n, width, other, debiased, seed):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(n, width)) + rng.normal(size=width)
    y = x @ rng.normal(size=(width, other)) + rng.normal(size=(n, other))
    expected = direct_cka(x, y, debiased)
    if np.isfinite(expected) and abs(expected) < 5:  # an unbiased HSIC of itself may be about 0, and its root nothing
        assert linear_cka(x, y, debiased) == pytest.approx(expected, rel=1e-6, abs=1e-8)


@pytest.mark.parametrize("debiased", [False, True])
def test_cka_does_not_see_rotations_factors_or_offsets(debiased):
    rng = np.random.default_rng(7)
    x, y = rng.normal(size=(50, 6)), rng.normal(size=(50, 4))
    y[:, 0] += x[:, 0]
    turn = np.linalg.qr(rng.normal(size=(6, 6)))[0]
    value = linear_cka(x, y, debiased)
    assert linear_cka(3.5 * x @ turn + 2, y, debiased) == pytest.approx(value)
    assert linear_cka(y, x, debiased) == pytest.approx(value)
    assert linear_cka(x, -0.1 * x @ turn, debiased) == pytest.approx(1)
    # A map that is no rotation does change it.
    assert linear_cka(x @ np.diag([9, 1, 1, 1, 1, 0.1]), y, debiased) != pytest.approx(value, abs=1e-3)


def test_debiased_cka_of_unrelated_vectors_is_about_zero_where_the_plain_one_is_not():
    values = [
        [linear_cka(rng.normal(size=(20, 40)), rng.normal(size=(20, 40)), debiased) for debiased in (True, False)]
        for rng in map(np.random.default_rng, range(40))
    ]
    debiased, plain = np.mean(values, axis=0)
    assert abs(debiased) < 0.03
    assert plain > 0.5


def test_cka_of_what_does_not_vary_is_undefined():
    assert np.isnan(linear_cka(np.ones((9, 3)), np.random.default_rng(0).normal(size=(9, 3))))
    assert np.isnan(linear_cka(np.ones((3, 2)), np.ones((3, 2))))
    with pytest.raises(MoescopeError, match="same tokens"):
        linear_cka(np.ones((9, 3)), np.ones((8, 3)))


def test_a_rotated_twin_is_the_only_redundant_pair_of_outputs():
    wrong = 0
    for seed in range(8):
        rng = np.random.default_rng(seed)
        outputs = rng.normal(size=(1, 6, 60, 8))
        outputs[0, 4] = outputs[0, 1] @ np.linalg.qr(rng.normal(size=(8, 8)))[0] * 3
        outputs[0, 3, 50:] = np.nan
        result = output_similarity_from_arrays(outputs, layers=[9], draws=19, seed=seed)
        assert result["similarity"].sel(expert=1, other=4).item() == pytest.approx(1)
        assert result["common"].sel(expert=3, other=0).item() == 50
        expected = linear_cka(outputs[0, 3, :50], outputs[0, 0, :50])
        assert result["similarity"].sel(expert=0, other=3).item() == pytest.approx(expected)
        pairs = redundant_pairs(result)
        assert (int(pairs["pair_expert"][0]), int(pairs["pair_other"][0])) == (1, 4)
        wrong += pairs.sizes["pair"] - 1
    assert wrong <= 2


def test_outputs_of_a_store_are_compared_on_tokens_that_selected_both(tmp_path):
    truth = random_truth(np.random.default_rng(8), documents=15, k=3, missing=0.1)
    results = [
        output_similarity(write(tmp_path / str(cuts), truth, cuts, can_miss=True), min_tokens=10, draws=3)
        for cuts in (1, 4)
    ]
    seen = 0
    for layer in range(2):
        width = truth.logits[layer].shape[1]
        held = [{} for _ in range(width)]
        for token in range(truth.tokens):
            for slot in range(3):
                if truth.valid[layer][token, slot]:
                    held[truth.expert[layer][token, slot]][token] = truth.outputs[layer][token, slot].astype(float)
        for i in range(width):
            for j in range(i):
                both = sorted(set(held[i]) & set(held[j]))
                cell = results[0].sel(layer=layer, expert=i, other=j)
                assert cell["common"].item() == len(both)
                if len(both) < 10:
                    assert np.isnan(cell["similarity"])
                    continue
                seen += 1
                x, y = (np.array([held[e][token] for token in both]) for e in (i, j))
                assert cell["similarity"].item() == pytest.approx(direct_cka(x, y, True))
    assert seen > 10
    for name in ("similarity", "common", "null_extreme"):
        np.testing.assert_allclose(results[0][name], results[1][name], err_msg=name)


# Output norm against router score


@settings(deadline=None, max_examples=60)
@given(st.integers(2, 6), st.integers(0, 10**6))
def test_rank_correlations_are_scipys_with_ties_and_gaps(k, seed):
    rng = np.random.default_rng(seed)
    score, norm = rng.integers(0, 4, (2, 5, k)).astype(float)
    score[rng.random((5, k)) < 0.2] = np.nan
    rho, tau = rank_correlations(score, norm)
    for row in range(5):
        there = ~np.isnan(score[row])
        a, b = score[row, there], norm[row, there]
        if there.sum() < 2 or np.ptp(a) == 0 or np.ptp(b) == 0:
            assert np.isnan(rho[row])
            assert np.isnan(tau[row])
            continue
        assert rho[row] == pytest.approx(spearmanr(a, b).statistic)
        assert tau[row] == pytest.approx(kendalltau(a, b).statistic)


def test_norms_against_scores_by_hand_in_any_number_of_shards(tmp_path):
    truth = random_truth(np.random.default_rng(9), documents=15, missing=0.15)
    results = [norm_against_score(write(tmp_path / str(cuts), truth, cuts, can_miss=True)) for cuts in (1, 4)]
    for layer in range(2):
        weight, norm, valid, ids = (getattr(truth, n)[layer] for n in ("weight", "norm", "valid", "expert"))
        mean = [norm[valid & (ids == e)].astype(float).mean() for e in range(truth.logits[layer].shape[1])]
        rho, within, count = [], [], np.zeros((3, 3))
        for token in range(truth.tokens):
            keep = valid[token]
            if keep.sum() < 2:
                continue
            a, b = weight[token, keep], norm[token, keep]
            quiet = [x / mean[e] for x, e in zip(b, ids[token, keep], strict=True)]
            rho.append(spearmanr(a, b).statistic)
            within.append(spearmanr(a, quiet).statistic)
            if keep.all():
                for slot in range(3):
                    count[(a > a[slot]).sum(), (b > b[slot]).sum()] += 1
        found = results[0].sel(layer=layer)
        assert found["spearman"].item() == pytest.approx(np.mean(rho))
        assert found["spearman_within"].item() == pytest.approx(np.mean(within))
        assert found["tokens"].item() == len(rho)
        np.testing.assert_array_equal(found["count"], count)
        np.testing.assert_allclose(found["mean_norm"].values[: len(mean)], mean)
        assert found["spearman_low"] <= found["spearman"] <= found["spearman_high"]
    for name in results[0].data_vars:
        np.testing.assert_allclose(results[0][name], results[1][name], err_msg=str(name))


def test_norms_that_follow_scores_are_told_from_loud_experts(tmp_path):
    rng = np.random.default_rng(10)
    truth = random_truth(rng, documents=20, n_experts=(6, 6))
    truth.norm[0] = truth.weight[0] * 2 + 0.01
    # Layer 1: expert e is always e + 1 loud and weighs e + 1; within an expert nothing follows anything.
    loud = truth.expert[1] + 1.0
    truth.norm[1] = (loud * (1 + 0.05 * rng.random(loud.shape))).astype(np.float32)
    truth.weight[1] = (loud * (1 + 0.05 * rng.random(loud.shape)) / 20).astype(np.float32)
    result = norm_against_score(write(tmp_path / "s", truth))
    assert result["spearman"].values[0] == pytest.approx(1)
    np.testing.assert_allclose(np.diag(result["share"].values[0]), 1)
    assert result["spearman"].values[1] > 0.95
    assert abs(result["spearman_within"].values[1]) < 0.15
    assert result["spearman_experts"].values[1] == pytest.approx(1)
    assert result["spearman_p"].values[0] <= 0.01


def test_p_of_norms_against_scores_is_not_small_by_chance(tmp_path):
    small = 0
    for seed in range(20):
        truth = random_truth(np.random.default_rng(seed), documents=12, n_experts=(6, 6))
        result = norm_against_score(write(tmp_path / str(seed), truth), draws=199, seed=seed)
        small += int((result["spearman_p"] <= 0.05).sum())
    assert small <= 7  # of 40, 2 expected


def test_tiers_that_are_not_there_are_asked_for(tmp_path):
    from tests.analysis import made_stores

    rng = np.random.default_rng(0)
    made = made_stores.random_truth(rng, 3, [4], [2])
    store = made_stores.write(tmp_path / "s", made, [4], {"domain": ["a", "b", "a"]})
    for run in (logit_similarity, norm_against_score):
        with pytest.raises(MoescopeError, match="tier"):
            run(store)
    with pytest.raises(MoescopeError, match="keeps no expert outputs"):
        output_similarity(store)


def test_cosine_of_rows():
    rows = np.array([[1.0, 0], [1, 1], [0, 0], [-2, 0]])
    found = cosine(rows)
    assert found[0, 1] == pytest.approx(np.sqrt(0.5))
    assert found[0, 3] == -1
    assert np.isnan(found[2]).all()
