"""Importance: every criterion by loops over made stores, agreement against scipy, and what a planted expert does."""

import numpy as np
import pytest
import xarray as xr
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import kendalltau, spearmanr

from moescope import analysis
from moescope.analysis.importance_table import OF_OUTPUTS, OF_ROUTING
from moescope.analysis.rank_agreement import across_halves, agreement
from moescope.errors import MoescopeError
from tests.analysis import made_stores
from tests.analysis.function_stores import random_truth, write


def brute(truth, layer, expert, kept, missing, alpha=1.0, beta=1.0):
    """Every criterion of one expert, one slot at a time (ESFT before it is divided by its total)."""
    w, f = [], []
    for t in np.flatnonzero(kept):
        for slot in range(truth.expert[layer].shape[1]):
            if truth.expert[layer][t, slot] == expert and (truth.valid[layer][t, slot] or not missing):
                w.append(float(truth.weight[layer][t, slot]))
                f.append(float(truth.norm[layer][t, slot]))
    n, k = int(kept.sum()), truth.expert[layer].shape[1]
    mean = lambda values: float(np.mean(values)) if len(values) else np.nan  # noqa: E731
    product = [a * b for a, b in zip(w, f, strict=True)]
    return {
        "frequency": len(w) / n,
        "mean_weight": mean(w),
        "mc_moe": (len(w) / n) ** alpha * (sum(w) / n) ** beta,
        "esft_token": len(w) / k,
        "esft_gate": sum(w),
        "reap": mean(product),
        "reap_total": sum(product) / n,
        "ean": mean(f),
        "ean_total": sum(f) / n,
        "msan": mean([x * x for x in f]),
    }


@given(
    seed=st.integers(0, 10_000), widths=st.sampled_from([(6, 4), (3, 3, 5), (3,)]), k=st.integers(1, 3),
    missing=st.sampled_from([0.0, 0.3]), cuts=st.integers(1, 4), by=st.booleans(),
    definition=st.sampled_from(["paper", "code"]),
)  # fmt: skip
@settings(deadline=None, max_examples=20)
def test_every_criterion_is_what_a_loop_says(tmp_path_factory, seed, widths, k, missing, cuts, by, definition):
    rng = np.random.default_rng(seed)
    truth = random_truth(rng, 5, widths, k, longest=9, missing=missing)
    labels = ["ab"[d % 2] for d in range(5)]
    store = write(tmp_path_factory.mktemp("s"), truth, cuts, can_miss=missing > 0, labels=labels)
    found = analysis.importance(
        store, by="domain" if by else None, definition=definition, alpha=0.5, beta=2.0, resamples=5, splits=1,
        permutations=0,
    )  # fmt: skip
    for code in range(2) if by else [None]:
        kept = np.ones(truth.tokens, bool) if code is None else truth.document % 2 == code
        part = found if code is None else found.isel(label=code)
        want = {name: np.full((len(widths), max(widths)), np.nan) for name in (*OF_ROUTING, *OF_OUTPUTS)}
        for layer, width in enumerate(widths):
            for expert in range(width):
                for name, value in brute(truth, layer, expert, kept, missing > 0, 0.5, 2.0).items():
                    want[name][layer, expert] = value
        over = 1 if definition == "paper" else 0
        for name in ("esft_token", "esft_gate"):
            total = np.nansum(want[name], axis=over, keepdims=True)
            want[name] = want[name] / np.where(total > 0, total, np.nan)
        for name, values in want.items():
            np.testing.assert_allclose(part[name], values, rtol=1e-5, err_msg=name)
            with np.errstate(invalid="ignore"):
                assert not (part[name + "_low"] > part[name + "_high"]).any()
    shares = found["esft_token"].sum("expert" if definition == "paper" else "layer").values
    assert np.allclose(shares[shares > 0], 1)


def test_shards_and_filters_do_not_matter(tmp_path):
    rng = np.random.default_rng(1)
    truth = random_truth(rng, 20)
    labels = ["ab"[d % 2] for d in range(20)]
    whole, cut = (write(tmp_path / str(cuts), truth, cuts, labels=labels) for cuts in (1, 7))
    same = [analysis.importance(store, by="domain", seed=4) for store in (whole, cut)]
    xr.testing.assert_allclose(*same)
    only = analysis.importance(whole, where={"domain": "a"}, seed=4)
    for name in (*OF_ROUTING, *OF_OUTPUTS):
        np.testing.assert_allclose(only[name], same[0][name].sel(label="a"))


def test_agreement_is_scipys(tmp_path):
    rng = np.random.default_rng(0)
    values = [rng.integers(0, 6, (3, 9)).astype(float) for _ in range(3)]
    values[0][1, 4:] = np.nan
    values[2][2, :6] = np.nan  # three are left: nothing to say
    found = agreement(values, ["a", "b", "c"], 99, 0)
    for layer in range(3):
        for i in range(3):
            for j in range(3):
                both = ~(np.isnan(values[i][layer]) | np.isnan(values[j][layer]))
                x, y = values[i][layer][both], values[j][layer][both]
                if both.sum() < 4:
                    assert np.isnan(found["spearman"][layer, i, j])
                    continue
                assert found["spearman"][layer, i, j].item() == pytest.approx(spearmanr(x, y)[0])
                assert found["kendall"][layer, i, j].item() == pytest.approx(kendalltau(x, y)[0])
    within = found["spearman"].mean("layer", skipna=True)
    np.testing.assert_allclose(found["spearman_within"], within)
    assert np.isnan(np.diag(found["p"])).all()
    # Doubling one criterion changes no rank.
    again = agreement([values[0] * 2, values[1], values[2]], ["a", "b", "c"], 99, 0)
    xr.testing.assert_equal(again.drop_vars("spearman_pooled"), found.drop_vars("spearman_pooled"))


def test_independent_rankings_are_called_alike_no_more_often_than_the_level():
    rng = np.random.default_rng(0)
    p = [agreement(list(rng.random((2, 4, 8))), ["a", "b"], 99, seed)["p"].values[0, 1] for seed in range(200)]
    assert np.mean(np.array(p) <= 0.05) <= 0.09
    assert np.mean(np.array(p) <= 0.5) == pytest.approx(0.5, abs=0.1)


def test_halves_agree_as_far_as_experts_differ():
    rng = np.random.default_rng(0)
    truth = rng.random((2, 1, 3, 12))
    sharp = [truth + 0.01 * rng.random((2, 9, 3, 12)) for _ in range(2)]
    noise = [rng.random((2, 9, 3, 12)) for _ in range(2)]
    assert np.diagonal(across_halves(*sharp), axis1=1, axis2=2).min() > 0.95
    assert abs(np.diagonal(across_halves(*noise), axis1=1, axis2=2)).mean() < 0.3
    cross = across_halves(*sharp)
    np.testing.assert_allclose(cross, cross.transpose(0, 2, 1))


@pytest.mark.parametrize("planted", [True, False])
def test_a_planted_expert_is_found_and_none_where_there_is_none(tmp_path, planted):
    truth = random_truth(np.random.default_rng(3), 60, (8, 8), 2, longest=30)
    if planted:
        truth.norm[1][truth.expert[1] == 5] *= 4
    found = analysis.importance(write(tmp_path / "s", truth))
    apart = {}
    for name in ("reap", "ean", "msan"):
        low, high = found[name + "_low"].values, found[name + "_high"].values
        # An expert whose interval lies above those of all others of its layer.
        apart[name] = {
            (layer, e) for layer in range(2) for e in range(8) if low[layer, e] > np.delete(high[layer], e).max()
        }
    for cells in apart.values():
        assert cells == ({(1, 5)} if planted else set())
    assert (found["rank"].sel(criterion="reap").values[1].argmin() == 5) or not planted
    assert found["rank"].sel(criterion="frequency").sum("expert").values.tolist() == [36, 36]


def test_without_norms_the_routing_is_what_there_is(tmp_path):
    made = made_stores.random_truth(np.random.default_rng(0), 9, [4, 1], [2, 1])
    store = made_stores.write(tmp_path / "s", made, [4, 1], {"domain": ["a"] * 8 + ["b"]})
    found = analysis.importance(store, by="domain")
    assert "reap" not in found
    assert "no experts tier" in found.attrs["outputs"]
    assert not np.isnan(found["frequency_low"].sel(label="a").values[0, :4]).any()
    assert np.isnan(found["frequency_low"].sel(label="b")).all()  # one document
    assert np.isnan(found["spearman"].values[1]).all()  # one expert
    np.testing.assert_allclose(found["frequency"].values[1, 0], 1)
    assert np.isnan(found["frequency"].values[1, 1:]).all()


def test_an_expert_never_selected_has_no_mean_and_a_share_of_0(tmp_path):
    truth = random_truth(np.random.default_rng(0), 8, (6, 6), 2)
    for layer in range(2):
        truth.expert[layer] = np.where(truth.expert[layer] == 3, 2, truth.expert[layer])
    found = analysis.importance(write(tmp_path / "s", truth)).sel(expert=3)
    assert np.isnan(found[["mean_weight", "reap", "ean", "msan"]].to_array()).all()
    assert (found[["frequency", "mc_moe", "esft_gate", "reap_total", "ean_total"]].to_array() == 0).all()


def test_criteria_from_outside_join_by_layer(tmp_path):
    truth = random_truth(np.random.default_rng(0), 8, (6, 5), 2)
    store = write(tmp_path / "s", truth)
    mine = xr.DataArray(
        np.arange(12.0).reshape(2, 6), dims=("layer", "expert"), coords={"layer": [1, 7], "expert": range(6)}
    )
    found = analysis.importance(store, extra={"mine": mine, "also": np.ones((2, 6))}, permutations=9)
    assert found["mine"].values[1].tolist()[:5] == [0, 1, 2, 3, 4]
    assert np.isnan(found["mine"].values[0]).all()
    assert np.isnan(found["mine"].values[1, 5])  # no such expert
    assert found.attrs["criteria"].endswith("msan, mine, also")
    assert "mine" in analysis.table(found)
    assert np.isnan(found["spearman_within"].sel(criterion="also", against="reap"))  # all equal: no order
    assert np.isnan(found["split_half"].sel(criterion="mine")).all()
    for extra, says in (
        ({"reap": mine}, "name of a column"),
        ({"x": np.ones((2, 4))}, "shape"),
        ({"x": mine.expand_dims("label")}, "needs the dimensions"),
        ({"x": mine.assign_coords(layer=[8, 9])}, "none of these layers"),
    ):
        with pytest.raises(MoescopeError, match=says):
            analysis.importance(store, extra=extra)
    with pytest.raises(MoescopeError, match="definition"):
        analysis.importance(store, definition="mine")
