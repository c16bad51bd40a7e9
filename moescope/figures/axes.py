"""Axes that every layer-by-expert figure shares: layers as the model numbers them, from the first at the top."""

from __future__ import annotations

from typing import Any

import xarray as xr
from plotly.colors import sample_colorscale

from moescope.analysis.labelled import layer_names
from moescope.figures.theme import BLUE, GREY, ORANGE

__all__ = ["DEPTH", "depth_colours", "expert_axis", "layer_axis", "layer_names"]

DEPTH = [[0, BLUE], [0.5, GREY], [1, ORANGE]]
"""Colours of layers: blue for the first, through grey, to orange for the last; all stand on white and near-black."""


def layer_axis(result: xr.Dataset, **more: Any) -> dict[str, Any]:
    """Settings of a categorical y axis of layers, the first at the top, with as many ticks as can be read."""
    names = layer_names(result)
    step = max(1, -(-len(names) // 26))
    return {
        "type": "category",
        "categoryorder": "array",
        # In the order of the data: plotly sorts a heat map's z by category, but not what its tooltips say.
        "categoryarray": names,
        # Given, because plotly shifts the range it finds for itself by half a row where axes of categories are matched.
        "range": [len(names) - 0.5, -0.5],
        "tickmode": "array",
        "tickvals": names[::step],
        "ticklabelstandoff": 4,
        "showgrid": False,
        "title": {"text": "layer"},
    } | more


def expert_axis(result: xr.Dataset, most: int = 16, **more: Any) -> dict[str, Any]:
    """Settings of an x axis of expert numbers with at most `most` ticks."""
    widest = result.sizes["expert"]
    step = next(step for step in (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 4096) if widest / step <= most)
    return {
        "title": {"text": "expert"},
        "tick0": 0,
        "dtick": step,
        "range": [-0.5, widest - 0.5],
        "showgrid": False,
        "zeroline": False,
    } | more


def depth_colours(count: int) -> list[str]:
    """One colour for each of `count` layers: blue for the first, through grey, to orange for the last."""
    places = [(index + 0.5) / count for index in range(count)]
    return [str(colour) for colour in sample_colorscale(DEPTH, places)]
