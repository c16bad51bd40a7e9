"""What fewer experts would do: how many a share of the score needs, what the first ranks keep, beside chance."""

from __future__ import annotations

from typing import Any

import numpy as np
import plotly.graph_objects as go
import xarray as xr

from moescope.figures.axes import depth_colours, layer_axis, layer_names
from moescope.figures.marks import limits, whiskers
from moescope.figures.menus import menu
from moescope.figures.sheets import Sheet
from moescope.figures.theme import BLUE, GREY, row_height

READ = (
    "Left: how many experts a token needs, on average, to reach a share p of the router's score. The colour holds that "
    "against a router that scores all alike: the fuller the blue, the fewer it needs; the palest is no better. "
    "Right: what stays of the selected experts' weight when only the first n are used{overlap}; a line for each layer, "
    "blue for the first to orange for the last, the dashed line for chance.{zero} The menu chooses the label."
)
"""How to read the figure; filled in by `read`."""
OVERLAP = ", and how many of the n largest scores are among the n selected first"
ZERO = " Bars: the share of selections that compute nothing."


def read(result: xr.Dataset) -> str:
    """How to read the figure of this result."""
    overlap = OVERLAP if "top_overlap" in result else ""
    return READ.format(overlap=overlap, zero=ZERO if _has_zeros(result) else "")


def what_if(result: xr.Dataset) -> go.Figure:
    """Draws the experts needed at each threshold, and what the first ranks keep.

    How to read it: see `READ`.

    Args:
        result: from `analysis.what_if`; with several labels, a menu chooses among them.

    Returns:
        A plotly Figure whose height fits the number of layers.
    """
    curves = [("kept_mass", "kept_uniform", "weight kept by the first n")]
    if "top_overlap" in result:
        curves.append(("top_overlap", "overlap_chance", "largest n among the first n"))
    titles = ["experts needed for a share p of the score", *(title for *_, title in curves)]
    zeros = _has_zeros(result)
    titles += ["computing nothing"] if zeros else []
    sheet = Sheet(
        titles, cols=len(titles), column_widths=[0.46, *[0.3] * len(curves), *[0.2] * zeros], horizontal_spacing=0.09
    )
    labels = [str(name) for name in result["label"].values]
    groups = []
    for index in range(len(labels)):
        part = result.isel(label=index)
        traces: list[tuple[Any, int]] = [(_needed(part), 1)]
        for column, (name, chance, _) in enumerate(curves, 2):
            traces += [(trace, column) for trace in _curves(part, name, chance)]
        traces += [(_zero(part), len(titles))] if zeros else []
        groups.append(len(traces))
        for trace, column in traces:
            trace.visible = index == 0
            sheet.add_trace(trace, row=1, col=column)
    rows = max(row_height(result.sizes["layer"]) * result.sizes["layer"], 260)
    sheet.update_xaxes(title={"text": "share p of the score"}, type="category", showgrid=False, row=1, col=1)
    sheet.update_yaxes(layer_axis(result), row=1, col=1)
    for column in range(2, 2 + len(curves)):
        sheet.update_xaxes(title={"text": "experts n"}, dtick=max(1, result.sizes["rank"] // 8), row=1, col=column)
        sheet.update_yaxes(tickformat=".0%", range=[0, 1.03], row=1, col=column)
    if zeros:
        sheet.update_xaxes(tickformat=".0%", rangemode="tozero", row=1, col=len(titles))
        sheet.update_yaxes(layer_axis(result, title={"text": ""}), row=1, col=len(titles))
    sheet.update_layout(
        height=rows + 150,
        showlegend=False,
        bargap=0.35,
        coloraxis={"cmin": 0, "cmax": 1, "showscale": False},
    )
    if len(labels) > 1:
        sheet.update_layout(updatemenus=[menu(labels, groups, 0)], margin={"t": 92})
    return sheet.figure()


def _needed(part: xr.Dataset) -> go.Heatmap:
    needed, uniform = part["experts"].values, part["experts_uniform"].values
    with np.errstate(invalid="ignore"):
        fewer = np.maximum(1 - needed / uniform, 0.0)
    names = ("experts", "experts_low", "experts_high", "experts_uniform")
    top_k = np.broadcast_to(part["top_k"].values[:, None], needed.shape)
    return go.Heatmap(
        z=fewer,
        x=[f"{100 * level:g}%" for level in part["threshold"].values],
        y=layer_names(part),
        coloraxis="coloraxis",
        customdata=np.stack([*(part[name].values for name in names), top_k], axis=-1),
        text=[["" if np.isnan(value) else f"{value:.2g}" for value in row] for row in needed],
        texttemplate="%{text}",
        xgap=1,
        ygap=1,
        hoverongaps=False,
        name="needed",
        hovertemplate=(
            "layer %{y}, %{x} of the score<br><b>%{customdata[0]:.2f} experts</b> (%{customdata[1]:.2f} to "
            "%{customdata[2]:.2f}); the router selects %{customdata[4]:.0f}<br>scoring all alike it would need "
            "%{customdata[3]:.0f}<extra></extra>"
        ),
    )


def _curves(part: xr.Dataset, name: str, chance: str) -> list[go.Scatter]:
    """One line for each layer, and one of chance for each kind of layer."""
    ranks, names = part["rank"].values, layer_names(part)
    lines = [
        go.Scatter(
            x=ranks,
            y=values,
            mode="lines",
            line={"color": GREY, "width": 1.6, "dash": "dash"},
            name="chance",
            hovertemplate="chance, n = %{x}: %{y:.1%}<extra></extra>",
        )
        for values in np.unique(part[chance].values, axis=0)
    ]
    limits = [part[f"{name}_{end}"].values if f"{name}_{end}" in part else None for end in ("low", "high")]
    for row, colour in enumerate(depth_colours(len(names))):
        details = [np.full(ranks.shape, np.nan) if limit is None else limit[row] for limit in limits]
        said = " (%{customdata[0]:.1%} to %{customdata[1]:.1%})" if limits[0] is not None else ""
        lines.append(
            go.Scatter(
                x=ranks,
                y=part[name].values[row],
                mode="lines+markers",
                line={"color": colour, "width": 1.6},
                marker={"size": 5},
                opacity=0.85,
                customdata=np.stack(details, axis=-1),
                name=f"layer {names[row]}",
                hovertemplate=f"layer {names[row]}, n = %{{x}}<br><b>%{{y:.1%}}</b>{said}<extra></extra>",
            )
        )
    return lines


def _zero(part: xr.Dataset) -> go.Bar:
    value = part["zero_share"].values
    low, high = limits(part, "zero_share")
    return go.Bar(
        x=value,
        y=layer_names(part),
        orientation="h",
        marker={"color": BLUE, "opacity": 0.6, "line": {"width": 0}},
        error_x=whiskers(value, low, high),
        customdata=part["computed"].values,
        name="computing nothing",
        hovertemplate="layer %{y}<br><b>%{x:.1%}</b> of selections<br>%{customdata:.2f} experts compute<extra></extra>",
    )


def _has_zeros(result: xr.Dataset) -> bool:
    return bool(np.nan_to_num(result["zero_share"].values).any())
