"""Outlier scores against a loop over columns, planted outliers, and the figure that shows them."""

import numpy as np
import pytest

from moescope import analysis, figures
from moescope.analysis.column_outliers import weight_outliers
from moescope.errors import MoescopeError

RNG = np.random.default_rng(0)


def layer(experts, neurons=24, channels=16, scale=1.0):
    shape = (experts, neurons, channels)
    return {name: scale * RNG.normal(size=shape).astype(np.float32) for name in ("gate", "up", "down")}


def by_loops(weights, columns):
    """Each matrix as the library stores it, [output, input]; its columns one at a time."""
    found = []
    for expert in range(len(weights["gate"])):
        scores = []
        for name in ("gate", "up", "down"):
            stored = weights[name][expert].T if name == "down" else weights[name][expert]
            lines = stored if columns == "output" else stored.T
            scores.append(max(np.abs(line).max() / np.abs(line).mean() for line in lines))
        found.append(scores)
    return np.array(found)


@pytest.mark.parametrize("columns", ["output", "input"])
def test_scores_are_what_a_loop_says(columns):
    given = {2: layer(5), 4: layer(3, 10, 7)}
    result = weight_outliers(given, columns, draws=2)
    for row, weights in enumerate(given.values()):
        truth = by_loops(weights, columns)
        n = len(truth)
        for place, name in enumerate(("gate", "up", "down")):
            np.testing.assert_allclose(result[f"score_{name}"].values[row, :n], truth[:, place], rtol=1e-5)
        np.testing.assert_allclose(result["score"].values[row, :n], truth.max(axis=1), rtol=1e-5)
    assert np.isnan(result["score"].values[1, 3:]).all()
    assert result["layer"].values.tolist() == [2, 4]


def test_a_planted_outlier_stands_and_normal_weights_do_not():
    weights = layer(6, scale=0.02)
    weights["down"][4, 3, 2] = 1.0
    result = weight_outliers({0: weights}, draws=199)
    beyond = result["score"].values[0] > result["gaussian_max"].values[0]
    assert np.flatnonzero(beyond).tolist() == [4]
    assert result["score_down"].values[0, 4] == result["score"].values[0, 4]
    np.testing.assert_allclose(np.delete(result["score"].values[0], 4).mean(), result["gaussian"].values[0], rtol=0.2)
    drawn = [trace for trace in figures.draw(result).data if trace.type == "heatmap"]
    np.testing.assert_array_equal(np.isnan(drawn[1].z[0]), ~beyond)
    bits = analysis.bits_from_importance(result["score"].values, budget=2.5, widths=[1, 2, 4])
    assert int(bits["bits"].values[0].argmax()) == 4


def test_experts_without_weights_and_columns_of_zeros():
    weights = layer(3)
    for matrix in weights.values():
        matrix[1] = np.nan
    weights["up"][2, 0] = 0
    result = weight_outliers({0: weights}, draws=0)
    assert np.isnan(result["score"].values[0, 1])
    assert np.isfinite(result["score"].values[0, [0, 2]]).all()
    assert np.isnan(result["gaussian"]).all()
    with pytest.raises(MoescopeError, match='`columns` is "output" or "input"'):
        weight_outliers({0: weights}, "rows")
