"""The figures of two stores and of a series hold the results, with the control and what chance explains drawn in."""

import numpy as np
import pytest

from moescope import analysis, figures
from moescope.figures import comparing
from tests.analysis.made_stores import random_truth
from tests.analysis.paired_stores import changed, write_tiers

WIDTHS = [5, 4]


@pytest.fixture(scope="module")
def stores(tmp_path_factory):
    """Layer 1 collapses on experts 2 and 3 in the other store; layer 0 stays."""
    rng, folder = np.random.default_rng(0), tmp_path_factory.mktemp("f")
    made = random_truth(rng, 30, WIDTHS, [2, 2])
    labels = {"domain": ["ab"[d % 2] for d in range(30)]}
    picks = [ids.copy() for ids in made.expert]
    picks[1][rng.random(made.document.size) < 0.5] = [2, 3]
    loss = rng.random(made.document.size)
    first = write_tiers(folder / "a", made, WIDTHS, labels, loss=loss)
    return first, write_tiers(folder / "b", changed(made, expert=picks), WIDTHS, labels, loss=loss + 0.1)


def test_agreement_divergence_and_change(stores):
    result = analysis.compare(*stores, by="domain", permutations=99, resamples=30)
    figure = figures.draw(result)
    shown = [trace for trace in figure.data if trace.visible is not False]
    named = {trace.name: trace for trace in shown if trace.name != "chance"}
    for name, column in (("overlap", "overlap"), ("top1", "top1"), ("divergence", "jsd")):
        np.testing.assert_allclose(named[name].x, result[column].values[:, 0])
    chance = [trace for trace in shown if trace.name == "chance"]
    for trace, name in zip(chance, ("control_overlap", "control_top1", "jsd_null_p99"), strict=True):
        np.testing.assert_allclose(trace.x, result[name].values[:, 0])
    pale, full = (trace for trace in shown if trace.type == "heatmap")
    stands = result["share_q"].values[..., 0] <= 0.05
    assert stands[1, 2:4].all()
    assert not stands[0].any()
    np.testing.assert_array_equal(np.isnan(full.z), ~stands)
    np.testing.assert_array_equal(np.where(stands, full.z, pale.z), result["share_change"].values[..., 0])
    np.testing.assert_allclose(named["change of loss"].x, 0.1, atol=1e-6)
    assert list(named["change of loss"].y) == ["a", "b"]
    for index, button in enumerate(figure.layout.updatemenus[0].buttons):
        visible = button.args[0]["visible"]
        assert len(visible) == len(figure.data)
        assert visible[-1]  # the losses of all labels stay
        assert visible.index(True) == index * (len(figure.data) - 1) // 2
    assert "nats per token" in comparing.read(result)


def test_settling_over_checkpoints(stores):
    result = analysis.fluctuation([stores[1], stores[0], stores[0]], steps=[10, 20, 50], resamples=20)
    figure = figures.draw(result)
    for place, (name, control) in enumerate(
        [("settled", None), ("top1", "control_top1"), ("overlap", "control_overlap")]
    ):
        axis = f"x{place + 1}" if place else "x"
        mine = [trace for trace in figure.data if (trace.xaxis or "x") == axis]
        drawn = [trace for trace in mine if trace.name.startswith("layer")]
        for layer, trace in enumerate(drawn):
            assert list(trace.x) == [10, 20, 50]
            np.testing.assert_allclose(trace.y, result[name].values[:, layer, 0])
        controls = [trace for trace in mine if trace.name.startswith("control")]
        assert len(controls) == (2 if control else 0)
        for layer, trace in enumerate(controls):
            np.testing.assert_allclose(trace.y, result[control].values[:, layer, 0])
    assert not figure.layout.updatemenus
