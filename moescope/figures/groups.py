"""Groups of experts that could be merged: one row per layer, members behind their dominant expert."""

from __future__ import annotations

from typing import Any

import numpy as np
import plotly.graph_objects as go
import xarray as xr

from moescope.errors import MoescopeError
from moescope.figures.axes import layer_axis, layer_names
from moescope.figures.sheets import Sheet
from moescope.figures.theme import ORANGE, colour_bar

READ = (
    "One row per layer, one block per group. Each block begins with its dominant expert (orange, with its number); "
    "behind it stand the members that would be merged into it, the most similar first, the darker the more alike the "
    "router scores the two. A ring marks a member that is closer than anything in the null."
)
"""How to read the figure."""
ROW = 30
"""Pixels of one layer."""


def read(result: xr.Dataset) -> str:
    """How to read the figure of this result."""
    return READ


def expert_groups(result: xr.Dataset) -> go.Figure:
    """Draws the groups of every layer.

    How to read it: see `READ`.

    Args:
        result: from `analysis.expert_groups` or `expert_groups_from_usage`.

    Raises:
        MoescopeError: not such a result.
    """
    if "group" not in result or "dominant" not in result:
        raise MoescopeError("This is not a result of grouping experts.")
    names = layer_names(result)
    rows = [_row(result.isel(layer=index)) for index in range(len(names))]
    wide = max(len(row) for row in rows)
    colour = np.full((len(rows), wide), np.nan)
    details = np.full((len(rows), wide, 5), np.nan)
    heads: list[tuple[int, int, int]] = []
    rings: list[tuple[int, int]] = []
    for line, row in enumerate(rows):
        for place, cell in enumerate(row):
            if cell is None:
                continue
            details[line, place] = [cell["expert"], cell["group"], cell["share"], cell["usage"], cell["others"]]
            if cell["dominant"]:
                heads.append((line, place, cell["expert"]))
                continue
            colour[line, place] = cell["similarity"]
            if cell["beyond"]:
                rings.append((line, place))
    sheet = Sheet()
    sheet.add_trace(
        go.Heatmap(
            z=colour,
            x=np.arange(wide),
            y=names,
            coloraxis="coloraxis",
            xgap=1,
            ygap=4,
            customdata=details,
            hoverongaps=False,
            name="members",
            hovertemplate=(
                "layer %{y}: expert %{customdata[0]:.0f} → expert %{customdata[1]:.0f}<br><b>similarity %{z:.3f}</b> "
                "(other dominants %{customdata[4]:.3f})<br>%{customdata[2]:.1%} of its group's use<extra></extra>"
            ),
        )
    )
    side = max(8, min(22, 900 // max(wide, 1)))
    sheet.add_trace(
        go.Scatter(
            x=[place for _, place, _ in heads],
            y=[names[line] for line, _, _ in heads],
            text=[str(expert) for _, _, expert in heads] if side >= 12 else None,
            customdata=[details[line, place] for line, place, _ in heads],
            mode="markers+text" if side >= 12 else "markers",
            textfont={"color": "white", "size": 10},
            marker={"symbol": "square", "size": side, "color": ORANGE},
            name="dominant",
            hovertemplate=(
                "layer %{y}: <b>expert %{customdata[0]:.0f}</b>, dominant<br>%{customdata[2]:.1%} of its group's "
                "selections, %{customdata[3]:.1%} of the layer's most used expert's<extra></extra>"
            ),
        )
    )
    sheet.add_trace(
        go.Scatter(
            x=[place for _, place in rings],
            y=[names[line] for line, _ in rings],
            mode="markers",
            marker={"symbol": "circle-open", "size": max(5, side // 2), "color": ORANGE, "line": {"width": 1.4}},
            hoverinfo="skip",
            name="beyond the null",
        )
    )
    sheet.update_xaxes(showticklabels=False, showgrid=False, range=[-0.7, wide - 0.3], title={"text": "groups"})
    sheet.update_yaxes(layer_axis(result))
    height = ROW * len(rows)
    sheet.update_layout(
        height=height + 130,
        legend={"orientation": "h", "x": 0, "y": 1, "yanchor": "bottom"},
        coloraxis={
            "colorbar": {"title": {"text": "similarity", "side": "right"}, "nticks": 5} | colour_bar(max(height, 120))
        },
    )
    return sheet.figure()


def _row(part: xr.Dataset) -> list[dict[str, Any] | None]:
    """Cells of one layer: groups by size, largest first, each with its dominant in front; None between groups."""
    width = int(part["n_experts"])
    column = {name: part[name].values[:width] for name in ("group", "dominant", "share", "usage", "similarity")}
    others = part["similarity_others"].values[:width]
    beyond = part["beyond"].values[:width] if "beyond" in part else np.zeros(width, dtype=bool)
    group = column["group"].astype(int)
    size = np.bincount(group, minlength=width)
    cells: list[dict[str, Any] | None] = []
    for head in sorted(set(group.tolist()), key=lambda h: (-size[h], h)):
        members = np.flatnonzero(group == head)
        order = sorted(members.tolist(), key=lambda e: (e != head, -np.nan_to_num(column["similarity"][e], nan=-9), e))
        cells += [
            {"expert": e, "others": others[e], "beyond": bool(beyond[e])}
            | {name: values[e] for name, values in column.items()}
            for e in order
        ]
        cells.append(None)
    return cells[:-1]
