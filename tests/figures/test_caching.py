"""Figures of consistency and caches show the result's own numbers and controls, and menus switch what they say."""

import numpy as np
import pytest

from moescope import analysis, figures
from moescope.errors import MoescopeError
from tests.analysis.made_stores import random_truth, write

HOSTILE = "<b>x</b>"


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    made = random_truth(np.random.default_rng(0), 12, [6, 5], [2, 2])
    domain = [(HOSTILE, "plain")[d % 2] for d in range(12)]
    return write(tmp_path_factory.mktemp("f") / "s", made, [6, 5], {"domain": domain}, layers=[2, 7])


def shown(figure, button):
    visible = button.args[0]["visible"]
    assert len(visible) == len(figure.data)
    return [trace for trace, on in zip(figure.data, visible, strict=True) if on]


def test_consistency_by_window(store):
    result = analysis.consistency(store, [2, 4, 8], draws=3)
    figure = figures.draw(result)
    (menu,) = figure.layout.updatemenus
    assert [button.label for button in menu.buttons] == ["m = 2", "m = 4", "m = 8"]
    assert menu.active == 1
    assert [t for t in figure.data if t.visible] == shown(figure, menu.buttons[1])
    for place, button in enumerate(menu.buttons):
        traces = shown(figure, button)
        model = [trace for trace in traces if trace.xaxis == "x"]
        assert [trace.name for trace in model] == [
            "limits", "as routed", "tokens shuffled", "loads alone", "k of E alone",
        ]  # fmt: skip
        np.testing.assert_array_equal(model[1].y, result["model_srp"])
        np.testing.assert_array_equal(model[2].y, result["model_srp_shuffled"])
        layers = {trace.name: trace for trace in traces if trace.xaxis == "x2"}
        np.testing.assert_array_equal(layers["as routed"].x, result["srp"][:, place])
        np.testing.assert_array_equal(layers["loads alone"].x, result["srp_independent"][:, place])
        assert list(layers["as routed"].y) == ["2", "7"]
        (experts,) = [trace for trace in traces if trace.type == "heatmap"]
        beyond = (result["expert_srp"] - result["expert_srp_independent"])[..., place]
        np.testing.assert_array_equal(experts.z, beyond)
    with pytest.raises(MoescopeError, match="no window 16"):
        figures.consistency(result, window=16)


def test_consistency_by_label_shows_one_label_at_a_time(store):
    result = analysis.consistency(store, [2, 4], by="domain", draws=0)
    figure = figures.consistency(result, window=4)
    (menu,) = figure.layout.updatemenus
    assert "<" not in menu.buttons[0].label
    assert [t for t in figure.data if t.visible] == shown(figure, menu.buttons[0])
    for label, button in enumerate(menu.buttons):
        traces = shown(figure, button)
        assert len(traces) == 11
        np.testing.assert_array_equal(traces[1].y, result["model_srp"][:, label])
        own = next(trace for trace in traces if trace.xaxis == "x2" and trace.name == "as routed")
        np.testing.assert_array_equal(own.x, result["srp"][:, 1, label])


def test_caches(store):
    result = analysis.caches(store, [2, 3, 5], [4], draws=1)
    figure = figures.caches(result, policy="belady")
    (menu,) = figure.layout.updatemenus
    assert [button.label for button in menu.buttons] == ["LRU", "LFU", "SCH, m = 4", "Belady"]
    assert menu.active == 3
    for policy, button in zip(result["policy"].values, menu.buttons, strict=True):
        traces = shown(figure, button)
        curves = {trace.name: trace for trace in traces if trace.type == "scatter"}
        assert len(curves) == 9
        np.testing.assert_array_equal(curves["LRU"].y, result["model_hit_rate"].sel(policy="lru"))
        np.testing.assert_array_equal(curves["LRU, shuffled"].y, result["model_shuffled"].sel(policy="lru"))
        np.testing.assert_array_equal(curves["at random"].y, result["model_chance"])
        np.testing.assert_array_equal(traces[-1].z, result["hit_rate"].sel(policy=policy))
    by_label = figures.caches(analysis.caches(store, [2, 3], [], by="domain"))
    assert len(shown(by_label, by_label.layout.updatemenus[0].buttons[1])) == 8
    assert [t for t in by_label.data if t.visible] == shown(by_label, by_label.layout.updatemenus[0].buttons[0])
    with pytest.raises(MoescopeError, match="no policy 'fifo'"):
        figures.caches(result, policy="fifo")


@pytest.mark.parametrize("size", [None, 3_000_000.0])
def test_offload(store, size):
    """Bytes where they are known, experts where not."""
    result = analysis.offload(store, size, sizes=[2, 3, 5])
    figure = figures.draw(result)
    curves = {trace.name: trace for trace in figure.data if trace.type == "scatter"}
    loads = result["loads"].sel(policy="lru").values
    np.testing.assert_allclose(curves["LRU"].y, loads if size is None else loads * 3)
    np.testing.assert_allclose(curves["LRU"].x, [2, 3, 5] if size is None else np.array([4, 6, 10]) * 3)
    np.testing.assert_allclose(curves["no cache"].y, 4 if size is None else 12)
    wanted = "experts loaded for each token" if size is None else "MB for each token"
    assert figure.layout.yaxis.title.text == wanted
    for policy, button in zip(result["policy"].values, figure.layout.updatemenus[0].buttons, strict=True):
        np.testing.assert_array_equal(shown(figure, button)[-1].z, result["layer_loads"].sel(policy=policy))
