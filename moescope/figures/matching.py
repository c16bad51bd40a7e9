"""Neuron matching: how alike matched neurons are beside what chance gives, and whether they kept their places."""

from __future__ import annotations

from typing import Any

import numpy as np
import plotly.graph_objects as go
import xarray as xr

from moescope.errors import MoescopeError
from moescope.figures.axes import layer_names
from moescope.figures.sheets import Sheet
from moescope.figures.theme import BLUE, GREY, ORANGE

READ = (
    "A dot is a pair of experts whose neurons were matched. Left: how alike those are; the grey bar goes from "
    "the null's mean to what no pair of any layer reached in any draw, and orange stands above it. Right: against the "
    "same neurons in the places they have. On the line the best match is the neuron of the same number (copied and "
    "trained apart); far above it the neurons are the same in another order."
)
"""How to read the figure."""


def read(result: xr.Dataset) -> str:
    """How to read the figure of this result."""
    return READ


def neuron_matching(result: xr.Dataset) -> go.Figure:
    """Draws every matched pair beside its null, and against the order that its neurons stand in.

    How to read it: see `READ`.

    Args:
        result: from `analysis.neuron_matching`.

    Raises:
        MoescopeError: not such a result.
    """
    if "kendall_tau" not in result or "in_place" not in result:
        raise MoescopeError("This is not a result of neuron matching.")
    names = layer_names(result)
    values = result["similarity"].values
    row, first, second = np.nonzero(~np.isnan(values))
    keep = first < second
    at = row[keep], first[keep], second[keep]
    beyond = result["redundant"].values[at]
    sheet = Sheet(
        ["matched neurons", "matched against in place"], cols=2, column_widths=[0.58, 0.42], horizontal_spacing=0.13
    )
    sheet.add_trace(_null(result, names), row=1, col=1)
    for which, colour, words in ((~beyond, BLUE, "within the null"), (beyond, ORANGE, "beyond the null")):
        chosen = tuple(part[which] for part in at)
        look: dict[str, Any] = {
            "mode": "markers",
            "marker": {"color": colour, "size": 8, "opacity": 0.8, "line": {"width": 0}},
            "y": values[chosen],
            "customdata": _details(result, chosen, names),
            "name": words,
            "legendgroup": words,
            "hovertemplate": (
                "layer %{customdata[0]}: experts %{customdata[1]} and %{customdata[2]}<br><b>matched %{y:.3f}</b>, in "
                "place %{customdata[3]:.3f}<br>Kendall τ of the two orders %{customdata[4]:.2f}<br>"
                "p = %{customdata[5]:.2g} over all matched pairs<extra></extra>"
            ),
        }
        sheet.add_trace(go.Scatter(x=[names[r] for r in chosen[0]], **look), row=1, col=1)
        sheet.add_trace(go.Scatter(x=result["in_place"].values[chosen], showlegend=False, **look), row=1, col=2)
    both = np.concatenate([values[at], result["in_place"].values[at]])
    low, high = (float(both.min()), float(both.max())) if both.size else (0.0, 1.0)
    edge = 0.06 * max(high - low, 0.01)
    sheet.add_trace(
        go.Scatter(x=[low, high], y=[low, high], mode="lines", line={"color": GREY, "width": 1.2, "dash": "dot"},
                   hoverinfo="skip", showlegend=False, name="same places"),
        row=1, col=2,
    )  # fmt: skip
    sheet.update_xaxes(
        title={"text": "layer"},
        type="category",
        categoryorder="array",
        categoryarray=names,
        showgrid=False,
        row=1,
        col=1,
    )
    sheet.update_yaxes(title={"text": "mean cosine of matched neurons"}, row=1, col=1)
    sheet.update_xaxes(
        title={"text": "mean cosine of neurons of the same number"}, range=[low - edge, high + edge], row=1, col=2
    )
    sheet.update_yaxes(title={"text": "of matched neurons"}, range=[low - edge, high + edge], row=1, col=2)
    sheet.update_layout(
        height=420,
        legend={"orientation": "h", "x": 0, "y": -0.2, "yanchor": "top"},
    )
    return sheet.figure()


def _null(result: xr.Dataset, names: list[str]) -> go.Bar:
    mean, extreme = result["null_mean"].values, result["null_extreme"].values
    return go.Bar(
        x=names,
        y=extreme - mean,
        base=mean,
        width=0.5,
        marker={"color": GREY, "opacity": 0.28, "line": {"width": 0}},
        customdata=np.stack([mean, extreme], axis=-1),
        name="null: mean to farthest",
        hovertemplate=("layer %{x}<br>null's mean %{customdata[0]:.3f}, farthest %{customdata[1]:.3f}<extra></extra>"),
    )


def _details(result: xr.Dataset, at: tuple[np.ndarray, ...], names: list[str]) -> np.ndarray:
    columns = [np.array([names[row] for row in at[0]], dtype=object), at[1].astype(object), at[2].astype(object)]
    columns += [result[name].values[at].astype(object) for name in ("in_place", "kendall_tau", "p_max")]
    return np.stack(columns, axis=-1) if at[0].size else np.empty((0, 6), dtype=object)
