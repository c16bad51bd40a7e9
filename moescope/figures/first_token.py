"""Attention sinks by head, and the largest value of each layer's residual stream beside them."""

from __future__ import annotations

from typing import Any

import numpy as np
import plotly.graph_objects as go
import xarray as xr

from moescope.figures.axes import expert_axis, layer_axis
from moescope.figures.sheets import Sheet
from moescope.figures.theme import BLUE, colour_bar, row_height

READ = (
    "Left: the share of a head's attention that goes to a sequence's first token; attending to all tokens alike would "
    "put {uniform:.1%} there, where the colour scale begins. Right: the largest magnitude in each layer's residual "
    "stream, on a logarithmic axis: massive activations form where it jumps and stays."
)
"""How to read the figure; filled in by `read`."""
_PLACES = {"token_id": "token id", "position": "position", "channel": "channel"}


def read(result: xr.Dataset) -> str:
    """How to read the figure of this result."""
    return READ.format(uniform=float(result["uniform"]))


def attention_sinks(result: xr.Dataset) -> go.Figure:
    """Draws the share of every (layer, head) with each layer's largest value beside it.

    How to read it: see `READ`.

    Args:
        result: from `analysis.attention_sinks`.
    """
    sheet = Sheet(
        ["attention on the first token", "largest residual value"],
        cols=2,
        shared_yaxes=True,
        column_widths=[0.7, 0.3],
        horizontal_spacing=0.03,
    )
    names = [str(int(layer)) for layer in result["layer"].values]
    height = row_height(len(names)) * len(names)
    if result.sizes["head"]:
        sheet.add_trace(
            go.Heatmap(
                z=result["share"].values,
                x=result["head"].values,
                y=names,
                coloraxis="coloraxis",
                hoverongaps=False,
                xgap=1,
                ygap=1,
                name="share",
                hovertemplate="layer %{y}, head %{x}<br><b>%{z:.1%} on the first token</b><extra></extra>",
            ),
            row=1,
            col=1,
        )
        heads = expert_axis(result.rename(head="expert"), title={"text": "head"})
        sheet.update_xaxes(heads, row=1, col=1)
    else:
        # An empty trace: without one plotly draws neither the axis nor the words.
        sheet.add_trace(go.Scatter(x=[None] * len(names), y=names, hoverinfo="skip"), row=1, col=1)
        words = {
            "text": "captured without attention sinks (--sinks)",
            "x": 0.5,
            "y": 0.5,
            "xref": "x domain",
            "yref": "y domain",
        }
        sheet.add_annotation(**words)
        sheet.update_xaxes(showticklabels=False, showgrid=False, row=1, col=1)
    sheet.add_trace(
        go.Bar(
            x=result["absmax"].values,
            y=names,
            orientation="h",
            marker={"color": BLUE, "opacity": 0.6, "line": {"width": 0}},
            hovertext=_places(result),
            name="largest value",
            hovertemplate="layer %{y}<br><b>%{x:.4g}</b>%{hovertext}<extra></extra>",
        ),
        row=1,
        col=2,
    )
    largest = result["absmax"].values[result["absmax"].values > 0]
    decades = [np.floor(np.log10(largest.min())), np.ceil(np.log10(largest.max()))] if largest.size else [0, 1]
    sheet.update_xaxes(type="log", range=[decades[0], max(decades[1], decades[0] + 1)], dtick=1, row=1, col=2)
    axis: dict[str, Any] = layer_axis(result)
    sheet.update_yaxes(axis, row=1, col=1)
    sheet.update_yaxes(axis | {"title": {"text": ""}}, row=1, col=2)
    low = float(result["uniform"]) if np.isfinite(result["uniform"]) else 0.0
    sheet.update_layout(
        height=130 + height,
        showlegend=False,
        bargap=0.35,
        coloraxis={
            "cmin": low,
            # Given too: with one end alone plotly finds both for itself.
            "cmax": max(float(np.nanmax(result["share"].values, initial=0.0)), low + 0.01),
            "colorbar": {"tickformat": ".0%", "x": 1.02, "outlinewidth": 0, "thickness": 10} | colour_bar(height),
        },
    )
    return sheet.figure()


def _places(result: xr.Dataset) -> list[str]:
    """How far each layer's largest value stands over the layer before, and where; what is not known is left out."""
    told = []
    for jump, *places in zip(*(result[name].values for name in ("jump", *_PLACES)), strict=True):
        known = [f"{words} {place}" for words, place in zip(_PLACES.values(), places, strict=True) if place >= 0]
        over = f", {jump:.2g} times the layer before" if np.isfinite(jump) else ""
        told.append(over + ("<br>" + ", ".join(known) if known else ""))
    return told
