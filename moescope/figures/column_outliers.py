"""How far the largest weight of each expert stands out of its column, with what normal weights reach drawn pale."""

from __future__ import annotations

from typing import Any

import numpy as np
import plotly.graph_objects as go
import xarray as xr

from moescope.figures.axes import expert_axis, layer_axis, layer_names
from moescope.figures.marks import chance_ticks
from moescope.figures.pale import PALE
from moescope.figures.sheets import Sheet
from moescope.figures.theme import BLUE, colour_bar, row_height

READ = (
    "Left: in some column of the expert's matrices one weight is so many times the column's mean magnitude; pale is "
    "within what normal weights of the same shape reach. Right: each layer's largest; the orange tick is the largest "
    "of the normal draws."
)
"""How to read the figure."""


def weight_outliers(result: xr.Dataset) -> go.Figure:
    """Draws the outlier score of every (layer, expert), and each layer's largest beside chance.

    How to read it: see `READ`.

    Args:
        result: from `analysis.weight_outliers`.

    Returns:
        A plotly Figure whose height fits the number of layers.
    """
    sheet = Sheet(
        ["largest weight, of its column's mean magnitude", "largest of the layer"],
        cols=2,
        column_widths=[0.8, 0.2],
        horizontal_spacing=0.02,
    )
    score, chance = result["score"].values, result["gaussian_max"].values
    beyond = np.isfinite(score) if np.isnan(chance).all() else score > chance[:, None]
    named = [str(name) for name in result.data_vars if str(name).startswith("score_")]
    details = np.stack([result[name].values for name in named], axis=-1)
    parts = "<br>".join(f"{name[6:]}: %{{customdata[{place}]:.1f}}" for place, name in enumerate(named))
    for kept, opacity in ((~beyond, PALE), (beyond, 1.0)):
        trace = go.Heatmap(
            z=np.where(kept, score, np.nan),
            x=result["expert"].values,
            y=layer_names(result),
            coloraxis="coloraxis",
            opacity=opacity,
            customdata=details,
            hoverongaps=False,
            xgap=1,
            ygap=1,
            name="score",
            hovertemplate="layer %{y}, expert %{x}<br><b>%{z:.1f} × the mean of its column</b><br>"
            + parts
            + "<extra></extra>",
        )
        sheet.add_trace(trace, row=1, col=1)
    bar = go.Bar(
        x=np.nanmax(score, axis=1),
        y=layer_names(result),
        orientation="h",
        marker={"color": BLUE, "opacity": 0.6, "line": {"width": 0}},
        name="largest",
        hovertemplate="layer %{y}<br><b>%{x:.1f} ×</b><extra></extra>",
    )
    sheet.add_trace(bar, row=1, col=2)
    said = "layer %{y}<br>the largest of the normal draws: %{x:.1f} ×"
    sheet.add_trace(chance_ticks(chance, layer_names(result), said), row=1, col=2)
    sheet.update_xaxes(expert_axis(result), row=1, col=1)
    sheet.update_yaxes(layer_axis(result), row=1, col=1)
    sheet.update_xaxes(title={"text": "× column mean"}, rangemode="tozero", nticks=4, row=1, col=2)
    sheet.update_yaxes(layer_axis(result, title={"text": ""}, showticklabels=False), row=1, col=2)
    rows = row_height(result.sizes["layer"]) * result.sizes["layer"]
    axis: dict[str, Any] = {"cmin": 0, "cmax": float(np.nanmax(score, initial=1.0))}
    sheet.update_layout(
        height=140 + max(rows, 110),
        showlegend=False,
        bargap=0.35,
        coloraxis=axis | {"colorbar": {"title": {"text": "× column mean", "side": "right"}} | colour_bar(rows)},
    )
    return sheet.figure()
