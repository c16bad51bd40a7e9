"""The figures of what-if routing and of bits hold the results, with chance drawn in."""

import numpy as np
import pytest

from moescope import analysis, figures
from moescope.figures import bit_budget, whatif
from tests.analysis.made_stores import random_truth, write


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    made = random_truth(np.random.default_rng(0), 12, [6, 4], [3, 2])
    labels = {"domain": ["ab"[d % 2] for d in range(12)]}
    return write(tmp_path_factory.mktemp("f") / "s", made, [6, 4], labels, layers=[1, 3])


def test_experts_needed_and_kept(store):
    result = analysis.what_if(store, by="domain", thresholds=[0.5, 0.9], resamples=20)
    figure = figures.draw(result)
    maps = [trace for trace in figure.data if trace.type == "heatmap"]
    assert [trace.visible for trace in maps] == [True, False]
    for label, trace in enumerate(maps):
        needed, uniform = result["experts"].values[..., label], result["experts_uniform"].values
        np.testing.assert_allclose(trace.z, np.maximum(1 - needed / uniform, 0))
        assert trace.text[0][1] == f"{needed[0, 1]:.2g}"
        assert list(trace.x) == ["50%", "90%"]
    lines = [trace for trace in figure.data if trace.type == "scatter" and trace.visible]
    chance = [trace for trace in lines if trace.name == "chance"]
    assert len(chance) == 2  # one for each k
    assert {tuple(np.round(trace.y[: 3 if np.isfinite(trace.y[2]) else 2], 9)) for trace in chance} == {
        (0.333333333, 0.666666667, 1.0),
        (0.5, 1.0),
    }
    own = {trace.name: trace for trace in lines}
    np.testing.assert_allclose(own["layer 1"].y, result["kept_mass"].values[0, :, 0])
    np.testing.assert_allclose(own["layer 3"].y[:2], result["kept_mass"].values[1, :2, 0])
    buttons = figure.layout.updatemenus[0].buttons
    assert [button.label for button in buttons] == ["a", "b"]
    assert all(len(button.args[0]["visible"]) == len(figure.data) for button in buttons)
    assert "largest scores" not in whatif.read(result)


def test_bits_and_savings(store):
    result = analysis.bits(store, budget=2.5, widths=[1, 2, 4], draws=30)
    figure = figures.draw(result)
    named = {trace.name: trace for trace in figure.data}
    np.testing.assert_allclose(
        named["saving"].x, [result[name] for name in ("saving", "heldout_saving", "random_saving")]
    )
    np.testing.assert_allclose(named["chance"].x, [result["random_saving_p99"]])
    widths = np.unique(result["bits"].values[result["exists"].values])
    shown = np.array(named["bits"].z, dtype=float)
    np.testing.assert_array_equal(np.isnan(shown), ~result["exists"].values)
    np.testing.assert_array_equal(widths[shown[~np.isnan(shown)].astype(int)], result["bits"].values[result["exists"]])
    assert list(figure.layout.coloraxis.colorbar.ticktext) == [f"{width:.0f}" for width in widths]
    np.testing.assert_allclose(named["cost left"].x, result["layer_cost"] / result["layer_uniform_cost"])
    assert "stand-in" in bit_budget.read(result)
    plain = figures.bits(analysis.bits_from_importance(np.array([[1.0, 2, 3], [3, 2, 1]])))
    assert list({trace.name: trace for trace in plain.data}["saving"].y) == ["this choice", "the same widths at random"]
