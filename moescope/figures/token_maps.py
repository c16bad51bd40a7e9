"""One token through the model: its experts in every layer, by rank, with how sure each router was."""

from __future__ import annotations

from typing import Any

import numpy as np
import plotly.graph_objects as go
import xarray as xr

from moescope.figures.axes import layer_axis, layer_names
from moescope.figures.sheets import Sheet
from moescope.figures.theme import BLUE, plain, row_height

READ = (
    "Each row is one layer; the numbers are the experts that this token went to, the one its router wanted most first; "
    "the stronger the colour, the larger their share of the token's routing weight there. High entropy: the router "
    "spread its score over many experts. Margin near 0: the last expert chosen was barely ahead of the first one left "
    "out."
)
"""How to read the figure."""


def token_routing(result: xr.Dataset) -> go.Figure:
    """Draws the experts of one token in every layer, with entropy and margin beside them.

    How to read it: see `READ`. Each cell's customdata is (site key, layer, expert).

    Args:
        result: from `analysis.token_routing`.
    """
    height = row_height(result.sizes["layer"]) * result.sizes["layer"]
    sheet = Sheet(
        [f"experts of “{_short(result.attrs['text'])}”", "entropy", "margin"],
        cols=3,
        shared_yaxes=True,
        column_widths=[0.64, 0.18, 0.18],
        horizontal_spacing=0.02,
    )
    sheet.add_trace(_experts(result), row=1, col=1)
    sheet.add_trace(_numbers(result), row=1, col=1)
    for column, name, unit in ((2, "entropy", " nats"), (3, "margin", "")):
        sheet.add_trace(_level(result, name, unit), row=1, col=column)
        sheet.update_yaxes(layer_axis(result, title={"text": ""}), row=1, col=column)
        ends = _ends(float(np.nanmax(result[name].values, initial=0)))
        sheet.update_xaxes(rangemode="tozero", tickmode="array", tickvals=ends, tickformat="~g", row=1, col=column)
        if len(ends) == 1:  # plotly would draw to -1 and 1
            sheet.update_xaxes(range=[0, 1], row=1, col=column)
    sheet.update_xaxes(title={"text": "nats"}, row=1, col=2)
    ranks = result.sizes["rank"]
    sheet.update_xaxes(
        title={"text": "rank"},
        tickmode="array",
        tickvals=list(range(1, ranks + 1, 1 + ranks // 12)),
        range=[0.5, ranks + 0.5],
        showgrid=False,
        row=1,
        col=1,
    )
    sheet.update_yaxes(layer_axis(result), row=1, col=1)
    sheet.update_layout(
        height=130 + height,
        showlegend=False,
        hoverdistance=-1,  # the nearest expert answers, wherever in its cell the pointer is
        bargap=0.35,
        # The faint part of the scale alone, on which numbers can be read in either mode; the tooltip has the shares.
        coloraxis={"cmin": 0, "cmax": 2.5 * float(np.nanmax(result["share"].values, initial=1e-9)), "showscale": False},
    )
    return sheet.figure()


def _ends(largest: float) -> list[float]:
    """Two ticks, since more would run into each other: 0, and the largest value cut to one digit."""
    if not largest > 0:
        return [0]
    digit = 10.0 ** np.floor(np.log10(largest))
    return [0, float(np.floor(largest / digit) * digit)]


def _short(text: str, most: int = 16) -> str:
    return plain(text if len(text) <= most else text[:most] + "…")


def _facts(result: xr.Dataset) -> np.ndarray:
    """[layer, rank, 5]: site key, layer, expert, weight, experts of the layer."""
    expert = result["expert"].values
    data = np.empty((*expert.shape, 5), dtype=object)
    data[..., 0] = result["site"].values[:, None]
    data[..., 1] = result["layer"].values[:, None]
    data[..., 2] = expert
    data[..., 3] = result["weight"].values
    data[..., 4] = result["n_experts"].values[:, None]
    return data


def _experts(result: xr.Dataset) -> go.Heatmap:
    return go.Heatmap(
        z=np.where(result["expert"].values >= 0, result["share"].values, np.nan),
        x=result["rank"].values + 1,
        y=np.array(layer_names(result), dtype=object),
        coloraxis="coloraxis",
        customdata=_facts(result),
        hoverinfo="skip",
        xgap=1,
        ygap=1,
        name="experts",
    )


def _numbers(result: xr.Dataset) -> go.Scatter:
    """Their own trace, in the template's ink: of the colours plotly picks for a map's text, some cannot be read.

    It answers the pointer too: dash tells which point of a scatter was clicked, and of a map only where.
    """
    rows, ranks = np.nonzero(result["expert"].values >= 0)
    names = layer_names(result)
    facts = np.concatenate([_facts(result), result["share"].values[..., None].astype(object)], axis=-1)
    return go.Scatter(
        x=ranks + 1,
        y=[names[row] for row in rows],
        mode="text",
        text=[str(expert) for expert in result["expert"].values[rows, ranks]],
        textfont={"size": 9 if len(names) > 40 else 11},
        customdata=facts[rows, ranks],
        name="numbers",
        hovertemplate=(
            "layer %{y}, <b>expert %{customdata[2]}</b> of %{customdata[4]}<br>rank %{x}: weight "
            "%{customdata[3]:.3g}, %{customdata[5]:.0%} of the token's<extra></extra>"
        ),
    )


def _level(result: xr.Dataset, name: str, unit: str) -> go.Bar:
    bar: Any = go.Bar(
        x=result[name].values,
        y=layer_names(result),
        orientation="h",
        marker={"color": BLUE, "opacity": 0.6, "line": {"width": 0}},
        name=name,
        hovertemplate=f"layer %{{y}}<br><b>{name} %{{x:.3g}}{unit}</b><extra></extra>",
    )
    return bar
