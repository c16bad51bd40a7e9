"""Load and balance: shares, published measures on cases with known answers, and the null against simulation."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from moescope import analysis
from moescope.analysis.loads import balance, balance_null
from moescope.errors import MoescopeError
from tests.analysis.made_stores import random_truth, write

loads = arrays(np.int64, st.tuples(st.integers(1, 3), st.integers(1, 6)), elements=st.integers(0, 50))


@given(loads)
@settings(deadline=None)
def test_shares_sum_to_one_and_measures_keep_their_bounds(counts):
    result = analysis.load_from_counts(counts, draws=5)
    total, width = counts.sum(axis=1), counts.shape[1]
    for row in range(counts.shape[0]):
        share = result["share"].values[row]
        if total[row] == 0:
            assert np.isnan(share).all()
            assert np.isnan(result["entropy"].values[row])
            continue
        assert share.sum() == pytest.approx(1)
        assert -1e-9 <= result["entropy"].values[row] <= np.log(width) + 1e-9
        assert 1 - 1e-9 <= result["effective_experts"].values[row] <= width + 1e-9
        assert -1e-9 <= result["gini"].values[row] <= (width - 1) / width + 1e-9
        assert -1e-9 <= result["max_vio"].values[row] <= width - 1 + 1e-9
    np.testing.assert_array_equal(result["dead"], (counts == 0).sum(axis=1))


def test_known_balances():
    even = balance(np.array([5.0, 5, 5, 5]))
    assert even["entropy"] == pytest.approx(np.log(4))
    assert [even[name] for name in ("gini", "cv", "max_vio", "dead")] == pytest.approx([0, 0, 0, 0])
    one = balance(np.array([0.0, 0, 0, 8]))
    assert [one[n] for n in ("effective_experts", "gini", "max_vio", "dead")] == pytest.approx([1, 0.75, 3, 3])
    assert one["cv"] == pytest.approx(np.std([0, 0, 0, 8]) / 2)
    # Gini by its definition: the mean absolute difference over twice the mean.
    values = np.array([1.0, 4, 2, 9, 3])
    by_definition = np.abs(values[:, None] - values).mean() / (2 * values.mean())
    assert balance(values)["gini"] == pytest.approx(by_definition)


@pytest.mark.parametrize(("n_experts", "k"), [(8, 2), (16, 1), (8, 8), (1, 1), (6, 3)])
def test_the_null_is_what_uniform_distinct_choice_gives(n_experts, k):
    rng = np.random.default_rng(0)
    tokens, draws = 300, 300
    picks = np.argsort(rng.random((draws, tokens, n_experts)), axis=2)[:, :, :k].reshape(draws, -1)
    simulated = balance(np.stack([np.bincount(row, minlength=n_experts) for row in picks]).astype(float))
    null = balance_null(tokens * k, n_experts, k, 2000, np.random.default_rng(1))
    for name in ("max_vio", "cv", "gini"):
        assert null[name][0] == pytest.approx(simulated[name].mean(), rel=0.08, abs=1e-6)
        assert null[name][1] == pytest.approx(np.percentile(simulated[name], 99), rel=0.15, abs=1e-6)
    assert null["entropy"][0] == pytest.approx(simulated["entropy"].mean(), rel=1e-3, abs=1e-9)


def test_a_store_and_plain_counts_say_the_same(tmp_path):
    rng = np.random.default_rng(3)
    width, k = [8, 5], [2, 1]
    made = random_truth(rng, 12, width, k)
    domain = ["ab"[d % 2] for d in range(12)]
    store = write(tmp_path / "s", made, width, {"domain": domain}, layers=[1, 3], cuts=4)
    counts = np.full((2, 8, 2), np.nan)
    weights = counts.copy()
    side = np.array([d % 2 for d in range(12)])[made.document]
    for layer in range(2):
        for label in range(2):
            ids, w = made.expert[layer][side == label], made.weight[layer][side == label]
            counts[layer, : width[layer], label] = np.bincount(ids.ravel(), minlength=width[layer])
            weights[layer, : width[layer], label] = np.bincount(ids.ravel(), w.ravel(), minlength=width[layer])
    found = analysis.load(store, by="domain")
    np.testing.assert_array_equal(found["count"], counts)
    np.testing.assert_allclose(found["weight"], weights, rtol=1e-6)
    plain = analysis.load_from_counts(counts, weights, labels=["a", "b"], layers=[1, 3])
    for name in ("share", "weighted_share", "relative_load", "entropy", "gini", "cv", "max_vio", "dead"):
        np.testing.assert_allclose(found[name], plain[name], rtol=1e-6)
    # Counts add up to tokens x k, in every layer and label.
    np.testing.assert_array_equal(found["selections"], np.outer(k, np.bincount(side)))
    overall = analysis.load(store)
    assert overall["count"].dims == ("layer", "expert")
    np.testing.assert_array_equal(overall["count"], counts.sum(axis=2))
    assert overall.attrs["store_id"] == store.manifest.store_id


def test_layers_of_unequal_width_are_padded_with_absence(tmp_path):
    made = random_truth(np.random.default_rng(0), 5, [6, 2], [1, 1])
    result = analysis.load(write(tmp_path / "s", made, [6, 2], {}))
    assert np.isnan(result["count"].values[1, 2:]).all()
    assert result["exists"].values.sum() == 8
    assert result["dead"].values[1] == 0
    assert len(analysis.table(result)) == 8
    assert not analysis.table(result)["count"].isna().any()


def test_every_selection_missing_is_defined(tmp_path):
    made = random_truth(np.random.default_rng(0), 3, [4], [2])
    made.valid[0][:] = False
    result = analysis.load(write(tmp_path / "s", made, [4], {}, slots_can_miss=True))
    assert result["dead"].item() == 4
    assert np.isnan(result["max_vio"].item())


def test_bad_counts_are_refused():
    with pytest.raises(MoescopeError, match="0 or more"):
        analysis.load_from_counts(np.array([[-1.0, 2]]))
    with pytest.raises(MoescopeError, match="2 labels were named for 3"):
        analysis.load_from_counts(np.ones((1, 2, 3)), labels=["a", "b"])
    with pytest.raises(MoescopeError, match="axes"):
        analysis.load_from_counts(np.ones(3))
