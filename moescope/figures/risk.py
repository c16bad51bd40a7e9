"""Risk differences: a map of all experts, and the strongest with their intervals beside what dealing the sets gives."""

from __future__ import annotations

from typing import Any

import numpy as np
import plotly.graph_objects as go
import xarray as xr

from moescope.figures.axes import expert_axis, layer_axis, layer_names
from moescope.figures.pale import beyond, details, pale_and_full, untested
from moescope.figures.sheets import Sheet
from moescope.figures.theme import BLUE, GREY, ORANGE, colour_bar, plain, row_height

READ = (
    "Orange: the expert is active more often on the first set, blue: on the second. In the map full colour stands at "
    "q ≤ 0.05 against sets dealt anew over documents. On the right the strongest both ways, with 95 % intervals over "
    "documents; the grey bar is where 98 % of the dealings lie."
)
"""How to read the figure."""


def risk_difference(result: xr.Dataset, level: float = 0.05, strongest: int = 10) -> go.Figure:
    """Draws the result of `analysis.risk_difference`.

    How to read it: see `READ`.

    Args:
        result: from `analysis.risk_difference` or one of its other forms.
        level: the false discovery rate below which a cell stands in full colour.
        strongest: how many experts to show with intervals, in each direction.
    """
    first, second = plain(result.attrs["first"]), plain(result.attrs["second"])
    value, q = result["risk_difference"].values, result["q"].values
    stands = beyond(q, level)
    cells, same = _strongest(value, strongest), np.nanmax(np.abs(value), initial=-1) == 0
    counted = f"{stands.sum()} of {np.isfinite(value).sum()} experts beyond chance"
    counted = "not tested" if untested(q) else counted
    layers = result.sizes["layer"]
    height = max(row_height(layers) * layers, 17 * len(cells)) + 150
    sheet = Sheet(
        [
            f"<b>P(active | {first}) − P(active | {second})</b><br><span style='font-size:11px'>"
            f"{'every expert is active equally often on both' if same else counted}</span>",
            "<b>The strongest</b><br><span style='font-size:11px'>"
            f"{'none: no expert differs' if same else '95 % intervals; grey: sets dealt anew'}</span>",
        ],
        cols=2,
        column_widths=[0.58, 0.42],
        horizontal_spacing=0.16,
    )
    for trace in pale_and_full(
        value,
        stands,
        x=result["expert"].values,
        y=layer_names(result),
        coloraxis="coloraxis",
        customdata=details(result, ("p_first", "p_second", "low", "high", "p", "q", "p_max")),
        meta=[first, second],
        xgap=1,
        ygap=1,
        hovertemplate=(
            "layer %{y}, expert %{x}<br><b>%{z:+.3f}</b> (%{customdata[2]:+.3f} to %{customdata[3]:+.3f})<br>"
            "active at %{customdata[0]:.1%} of %{meta[0]}, %{customdata[1]:.1%} of %{meta[1]}<br>"
            "p = %{customdata[4]:.2g}, q = %{customdata[5]:.2g}, family-wise p = %{customdata[6]:.2g}<extra></extra>"
        ),
    ):
        sheet.add_trace(trace, row=1, col=1)
    for trace in _forest(result, cells):
        sheet.add_trace(trace, row=1, col=2)
    reach = float(max(0.01, np.nanmax(np.abs(value), initial=0.0)))
    sheet.update_xaxes(expert_axis(result), row=1, col=1)
    sheet.update_yaxes(layer_axis(result), row=1, col=1)
    sheet.update_yaxes(autorange="reversed", showgrid=False, ticklabelstandoff=4, row=1, col=2)
    sheet.update_xaxes(title={"text": "risk difference"}, zeroline=True, zerolinecolor=GREY, row=1, col=2)
    if same:
        sheet.update_xaxes(visible=False, row=1, col=2)
        sheet.update_yaxes(visible=False, row=1, col=2)
    sheet.update_layout(
        height=int(height),
        margin={"t": 70},
        showlegend=False,
        coloraxis={
            "cmin": -reach,
            "cmax": reach,
            "colorbar": colour_bar(height - 150) | {"x": 0.5, "xanchor": "left", "tickformat": "+.3~g", "nticks": 7},
        },
    )
    return sheet.figure()


risk_difference_between = risk_difference


def _strongest(value: np.ndarray, count: int) -> list[tuple[int, int]]:
    """(row, expert) of the largest and the smallest, from the largest down; not those that do not differ at all."""
    flat = np.nan_to_num(value.ravel())
    order = np.argsort(-flat, kind="stable")
    order = order[flat[order] != 0]
    picked = order if order.size <= 2 * count else np.concatenate([order[:count], order[-count:]])
    return [(int(place) // value.shape[1], int(place) % value.shape[1]) for place in picked]


def _forest(result: xr.Dataset, cells: list[tuple[int, int]]) -> list[Any]:
    rows, experts = (np.array([cell[axis] for cell in cells], dtype=int) for axis in (0, 1))
    layers = layer_names(result)
    names = [f"L{layers[row].removeprefix('L')} E{expert}" for row, expert in cells]
    taken = {name: result[name].values[rows, experts] for name in ("risk_difference", "low", "high")}
    below, above = result["null_p01"].values[rows, experts], result["null_p99"].values[rows, experts]
    value = taken["risk_difference"]
    dealt = go.Bar(
        y=names, x=above - below, base=below, orientation="h", width=0.62, marker={"color": GREY, "opacity": 0.28},
        hovertemplate="%{y}: 98 % of dealings from %{base:+.3f} to %{x:+.3f}<extra></extra>",
    )  # fmt: skip
    found = go.Scatter(
        y=names,
        x=value,
        mode="markers",
        marker={"size": 8, "color": [ORANGE if one > 0 else BLUE for one in value]},
        error_x={
            "type": "data",
            "symmetric": False,
            "array": taken["high"] - value,
            "arrayminus": value - taken["low"],
            "thickness": 1.5,
            "width": 3,
            "color": GREY,
        },
        hovertemplate="%{y}: %{x:+.3f}<extra></extra>",
    )
    return [dealt, found]
