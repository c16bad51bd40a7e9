"""The figures of traces show the numbers of their results."""

from __future__ import annotations

import numpy as np

from moescope import figures
from moescope.effects import Case, trace_experts, trace_layers, trace_paths, trace_positions
from tests.capturing.texts import model

CASE = Case("sun moon river stone", " bird tree <wind>", None, "rain fire snow road")


def test_maps_show_effects_and_mark_what_is_larger_than_all_controls() -> None:
    result = trace_positions(model(), CASE, controls=3)
    figure = figures.draw(result)
    assert np.array_equal(figure.data[0].z, result["effect"].values, equal_nan=True)
    marked = ((result["p"] <= 0.25) & (result["effect"] != 0)).sum()
    assert len(figure.data[1].x) == marked > 0
    assert list(figure.layout.xaxis.ticktext) == ["&lt;s&gt;", "sun", "moon", "rive", "r", "ston", "e"]
    assert "&lt;wind&gt;" in figure.layout.title.text
    result = trace_experts(model(), [CASE], kind="zero")
    figure = figures.draw(result)
    assert np.array_equal(figure.data[0].z, result["effect"].values, equal_nan=True)
    assert not len(figure.data[1].x)  # one case has no interval


def test_bars_stand_beside_their_controls_and_their_parts() -> None:
    layers = trace_layers(model(), [CASE], controls=4)
    figure = figures.draw(layers)
    assert np.array_equal(figure.data[0].x, layers["effect"].values)
    for place, trace in enumerate(figure.data[1:]):
        assert np.array_equal(trace.x, layers["control_effect"].values[:, place])
    paths = trace_paths(model(), [CASE], length=2, top=5, controls=2)
    figure = figures.draw(paths)
    assert list(figure.data[0].x) == sorted(paths["effect"].values, reverse=True)
    parts = paths["parts"].to_series()
    assert list(figure.data[-1].x) == [parts[name] for name in figure.data[-1].y]
