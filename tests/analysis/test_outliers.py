"""Super experts: the published example, the structural cap by counting, and both definitions apart."""

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moescope import analysis
from moescope.analysis.outliers import formed_depth, structural_cap
from moescope.analysis.summary import outlier_finding
from moescope.cli.analyze import _show
from moescope.errors import MoescopeError
from tests.analysis.made_stores import random_truth, write

PUBLISHED = {(1, 68): 900.0, (2, 92): 3000.0, (3, 82): 5000.0}


def qwen3_30b_shaped():
    """Maxima shaped as Qwen3-30B-A3B's: the three published super experts, and large outputs in the last layers."""
    rng = np.random.default_rng(0)
    maxima = np.exp(rng.normal(1.0, 0.5, (48, 128)))
    maxima[44:] *= 400
    for cell, value in PUBLISHED.items():
        maxima[cell] = value
    hidden = np.concatenate([[5.0, 1000.0, 3800.0], np.full(41, 8200.0) + np.arange(41), np.full(4, 20000.0)])
    return maxima, hidden


def named(result, variable="super"):
    rows = np.argwhere(result[variable].values)
    return {(int(result["layer"].values[row]), int(expert)) for row, expert in rows}


def test_the_published_super_experts_are_found():
    maxima, hidden = qwen3_30b_shaped()
    result = analysis.super_experts_from_maxima(maxima, hidden=hidden)
    assert named(result) == set(PUBLISHED)
    assert result.attrs["depth"] == 3
    assert int(result["n_pooled"]) == 4 * 128
    assert int(result["cap"]) == 3
    assert named(result, "by_ratio") >= set(PUBLISHED)
    top = analysis.table(result)
    assert top["absmax"].is_monotonic_decreasing
    for cell in PUBLISHED:
        z = result["robust_z"].values[cell]
        assert z > result["z_null_p99"].values[cell[0]]


def test_the_code_pools_by_depth_and_divides_without_remainder():
    maxima, hidden = qwen3_30b_shaped()
    result = analysis.super_experts_from_maxima(maxima, hidden=hidden, definition="code")
    assert result.attrs["depth"] == 35  # the last layer below 0.75 x 48
    assert result["tenth"].item() == 500
    assert named(result) == set(PUBLISHED)
    small = np.ones((4, 128)) * np.linspace(0.5, 0.9, 128)
    small[1, 7] = 9.0
    small[1, 8] = 0.95
    assert analysis.super_experts_from_maxima(small, definition="code")["tenth"].item() == 0
    assert named(analysis.super_experts_from_maxima(small, definition="code")) == {(1, 7), (1, 8)}
    assert named(analysis.super_experts_from_maxima(small, definition="paper", depth=2)) == {(1, 7), (1, 8)}
    small[1, 8] = 0.85
    assert named(analysis.super_experts_from_maxima(small, definition="paper", depth=2)) == {(1, 7)}


@given(st.integers(1, 900), st.integers(0, 1000))
def test_the_cap_is_what_counting_gives(n, seed):
    values = np.random.default_rng(seed).permutation(n).astype(float)
    assert (values > np.percentile(values, 99.5)).sum() == structural_cap(n)
    if 2 <= n <= 201:
        assert structural_cap(n) == 1


def test_the_rule_always_names_somebody_and_the_null_does_not():
    """On maxima without any outlier the published rule still names the largest; ratio and z do not confirm it."""
    confirmed = 0
    for seed in range(60):
        maxima = np.exp(np.random.default_rng(seed).normal(0, 0.3, (6, 16)))
        result = analysis.super_experts_from_maxima(maxima)
        assert len(named(result)) == 1
        assert outlier_finding(result).holds is False
        beyond = result["robust_z"].max("expert") > result["z_null_p99"]
        confirmed += int(beyond.sum())
    assert confirmed / (60 * 6) <= 0.03  # nominal 0.01 per layer


def test_never_selected_is_null():
    maxima = np.ones((2, 4)) * np.arange(1, 5)
    maxima[1, 2] = np.nan
    result = analysis.super_experts_from_maxima(maxima)
    assert np.isnan(result["rank"].values[1, 2])
    assert not result["super"].values[1, 2]
    assert result.attrs["never_selected"] == 1
    assert int(result["n_pooled"]) == 7
    with pytest.raises(MoescopeError, match="give a larger `depth`"):
        analysis.super_experts_from_maxima(np.full((2, 4), np.nan))


def test_depth_is_where_the_residual_reaches_its_plateau():
    assert formed_depth(np.array([1, 2, 50, 100, 101, 103, 300, 900.0])) == 3
    assert formed_depth(np.array([1, np.nan, 100.0, 100])) == 2
    assert formed_depth(np.array([3, 4, 5, 20.0])) is None
    late = analysis.super_experts_from_maxima(
        np.ones((2, 3)),
        layers=[4, 5],
        n_layers=8,
        hidden=np.array([1, 7.0, 7, 7, 7, 7, 7, 7]) * [1, 9, 9, 9, 9, 9, 9, 9],
    )
    assert late.attrs["depth"] == 4
    assert "first MoE layer" in late.attrs["depth_from"]


def test_a_place_that_is_none_is_no_number_in_a_table(tmp_path, capsys):
    made = random_truth(np.random.default_rng(0), 6, [4], [2])
    maxima = np.array([[1.0, 2.0, 3.0, 4.0]])
    result = analysis.super_experts(write(tmp_path / "s", made, [4], {}, maxima=maxima, hidden=[1.0]))
    result["position"][0, 2] = -1
    assert analysis.table(result)["position"].isna().tolist() == [False, True, False, False]  # the largest first
    _show(result, None, True, None, None)
    rows = json.loads(capsys.readouterr().out)["rows"]
    assert [row["position"] for row in rows] == [0, None, 0, 0]
    _show(result, None, False, None, None)
    assert "NA" not in capsys.readouterr().out


def test_from_a_store(tmp_path):
    maxima = np.exp(np.random.default_rng(0).normal(0, 0.2, (3, 16)))
    maxima[1, 5] = 80.0
    maxima[2, 14:] = np.nan
    made = random_truth(np.random.default_rng(0), 6, [16, 16, 14], [2, 2, 2])
    hidden = [1.0, 2.0, 90.0, 95.0]
    store = write(tmp_path / "s", made, [16, 16, 14], {}, layers=[1, 2, 3], cuts=3, maxima=maxima, hidden=hidden)
    result = analysis.super_experts(store)
    np.testing.assert_allclose(result["absmax"], maxima, rtol=1e-6)
    assert named(result) == {(2, 5)}
    assert result.attrs["depth"] == 2
    np.testing.assert_allclose(result["massive"], hidden[1:])
    code = analysis.super_experts(store, definition="code")
    np.testing.assert_allclose(code["absmax"], maxima * 0.5, rtol=1e-6)
    without = write(tmp_path / "t", made, [16, 16, 14], {})
    with pytest.raises(MoescopeError, match="no outliers tier"):
        analysis.super_experts(without)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"maxima": np.ones(3)}, "axes"),
        ({"maxima": -np.ones((1, 3))}, "not negative"),
        ({"maxima": np.full((1, 3), np.inf)}, "finite"),
        ({"maxima": np.ones((1, 3)), "definition": "mine"}, "paper"),
        ({"maxima": np.ones((1, 3)), "ratio": 0}, "ratio"),
    ],
    ids=["axes", "negative", "infinite", "definition", "ratio"],
)
def test_mistakes_are_named(arguments, says):
    with pytest.raises(MoescopeError, match=says):
        analysis.super_experts_from_maxima(**arguments)
