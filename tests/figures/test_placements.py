"""The figure of placements holds what was measured, with chance and the bound as lines across all bars."""

import numpy as np
import pytest

from moescope import analysis, figures
from moescope.figures.placements import read

SAVED = "of its crossings could still be saved where fitted"


@pytest.fixture(scope="module")
def found():
    rng = np.random.default_rng(0)
    counts = [rng.integers(1, 30, (6, 6)) for _ in range(3)]
    return analysis.placement_from_counts(counts, 3, draws=19, layers=[1, 2, 4, 7], bytes_per_token=4096, time_limit=1)


def test_bars_rings_and_lines(found):
    figure = figures.draw(found)
    named = {trace.name: trace for trace in figure.data}
    assert list(named["crossings"].y) == ["ExFlow", "MoETuner", "EPLB", "contiguous", "round robin", "random"]
    np.testing.assert_allclose(named["crossings"].x, found["crossings_per_step"])
    np.testing.assert_allclose(named["where fitted"].x, found["solved_crossings_per_step"])
    np.testing.assert_allclose(named["imbalance"].x, found["imbalance_mean"])
    np.testing.assert_allclose(named["worst layer"].x, found["imbalance_max"])
    np.testing.assert_allclose(named["time"].x, found["microseconds"])
    high = named["crossings"].x + named["crossings"].error_x["array"]
    np.testing.assert_allclose(high[5] * 3, found["crossings_high"][5])
    lines = [shape.x0 for shape in figure.layout.shapes]
    np.testing.assert_allclose(lines, [2 / 3, found["bound_per_step"]])
    for gap, told in zip(found["gap"].values, named["crossings"].hovertext, strict=True):
        assert told == ("no bound is known" if np.isnan(gap) else f"at most {gap:.1%} {SAVED}")
    assert "67%" in read(found)
    assert "counted token" in read(found)


def test_one_map_for_each_method(found):
    figure = figures.placement(found)
    maps = [trace for trace in figure.data if trace.type == "heatmap"]
    assert [trace.visible for trace in maps] == [True] + [False] * 5
    for index, trace in enumerate(maps):
        np.testing.assert_array_equal(trace.z, found["home"].values[..., index])
        assert list(trace.y) == ["1", "2", "4", "7"]
        shown = figure.layout.updatemenus[0].buttons[index].args[0]["visible"]
        kept = [place for place, on in enumerate(shown) if on]
        assert kept == [*range(len(figure.data) - 6), len(figure.data) - 6 + index]


def test_an_expert_on_several_devices_is_a_gap():
    rng = np.random.default_rng(1)
    counts = [rng.integers(1, 30, (6, 6))]
    found = analysis.placement_from_counts(counts, 2, "eplb", redundant=2, draws=5)
    figure = figures.placement(found)
    assert "time" not in {trace.name for trace in figure.data}  # nothing is known of bytes
    drawn = next(trace for trace in figure.data if trace.type == "heatmap")
    assert figure.data[0].hovertext[0] == "no bound is known"
    split = (found["hosts"].values[..., 0] < 1).all(axis=2)
    assert split.any()
    np.testing.assert_array_equal(np.isnan(drawn.z), split)


def test_many_devices_have_colours_in_order_of_lightness():
    found = analysis.placement_from_counts([np.full((12, 12), 3)], 12, "eplb", draws=2)
    scale = figures.placement(found).layout.coloraxis.colorscale
    channels = np.array([[int(colour[1 + 2 * n : 3 + 2 * n], 16) for n in range(3)] for _, colour in scale])
    lightness = channels @ [0.2126, 0.7152, 0.0722]
    assert (np.diff(lightness) > 0).all()
