"""A recipe at several strengths: loss by label and problems solved, beside random experts."""

from __future__ import annotations

from typing import Any

import numpy as np
import plotly.graph_objects as go
import xarray as xr

from moescope.figures.sheets import Sheet
from moescope.figures.theme import BLUE, GREY, ORANGE, plain

READ = (
    "Orange: what the recipe adds to the loss at each strength, with its 95 % interval (documents drawn anew). Blue "
    "band: 95 % of the same edits on random experts of the same layers. Where orange leaves the band, it is these "
    "experts that matter. At strength 1 nothing is changed."
)
READ_SOLVING = (
    "Share of the problems solved, with 95 % intervals (Wilson): grey plainly, orange under the recipe, blue under the "
    "same edits on random experts. Strengths where orange differs from grey and blue does not are the recipe's own."
)
COLOURS = {"plain": GREY, "recipe": ORANGE, "random experts": BLUE}
ACROSS, PANEL = 4, 170


def sweep(result: xr.Dataset) -> go.Figure:
    """Draws what a recipe does to the loss of each label at each strength, beside its controls.

    How to read it: see `READ`.

    Args:
        result: from `effects.sweep`.
    """
    labels = [str(label) for label in result["label"].values]
    ordered = result.sortby("factor")
    across = min(ACROSS, len(labels))
    down = -(-len(labels) // across)
    titles = [plain(label) for label in labels]
    sheet = Sheet(titles, rows=down, cols=across, horizontal_spacing=0.03, vertical_spacing=0.34 / down)
    ticks = _ticks(ordered)
    for place, label in enumerate(labels):
        part = ordered.sel(label=label)
        row, column = place // across + 1, place % across + 1
        if int(result.attrs.get("controls", 0)):
            for edge in _band(ticks, part["control_low"].values, part["control_high"].values):
                sheet.add_trace(edge, row=row, col=column)
        line = _line(ticks, part["change"].values, part["low"].values, part["high"].values, ORANGE)
        sheet.add_trace(line, row=row, col=column)
    sheet.update_xaxes(type="category", showgrid=False)
    sheet.update_yaxes(
        zeroline=True, zerolinecolor=GREY, zerolinewidth=1, tickformat="~g", matches="y", showticklabels=False
    )  # fmt: skip
    sheet.update_yaxes(title={"text": "change, nats per token"}, showticklabels=True, col=1)
    sheet.update_xaxes(title={"text": "factor"}, row=down)
    sheet.update_layout(height=110 + PANEL * down, showlegend=False, margin={"t": 60})
    return sheet.figure()


def solving(result: xr.Dataset) -> go.Figure:
    """Draws the share of problems solved under each routing, at each strength.

    How to read it: see `READ_SOLVING`.

    Args:
        result: from `effects.solving`.
    """
    ordered = result.sortby("factor")
    ticks = _ticks(ordered)
    sheet = Sheet()
    for routing in ordered["routing"].values:
        part = ordered.sel(routing=routing)
        line: Any = _line(
            ticks, part["solved"].values, part["low"].values, part["high"].values, COLOURS[str(routing)], str(routing)
        )
        line.customdata = np.stack([part[name].values for name in ("gained", "lost", "p", "tokens")], axis=-1)
        line.hovertemplate = (
            f"{routing}, factor %{{x}}<br><b>%{{y:.1%}}</b><br>gained %{{customdata[0]}}, lost %{{customdata[1]}}, p "
            "%{customdata[2]:.3g}<br>%{customdata[3]:.1f} tokens<extra></extra>"
        )
        sheet.add_trace(line)
    sheet.update_xaxes(type="category", title={"text": "factor"}, showgrid=False)
    sheet.update_yaxes(title={"text": "solved"}, tickformat=".0%", rangemode="tozero")
    sheet.update_layout(
        height=360,
        margin={"t": 60},
        showlegend=True,
        scattermode="group",
        scattergap=0.75,
        legend={"orientation": "h", "x": 0, "xanchor": "left", "y": 1, "yanchor": "bottom"},
    )
    return sheet.figure()


def _ticks(result: xr.Dataset) -> list[str]:
    return ["as given" if np.isnan(factor) else f"{factor:g}" for factor in result["factor"].values]


def _line(
    ticks: list[str], values: np.ndarray, low: np.ndarray, high: np.ndarray, colour: str, name: str = ""
) -> go.Scatter:
    return go.Scatter(
        x=ticks,
        y=values,
        name=name,
        mode="lines+markers",
        line={"color": colour, "width": 2},
        marker={"size": 6},
        error_y={
            "type": "data",
            "symmetric": False,
            "array": np.nan_to_num(high - values),
            "arrayminus": np.nan_to_num(values - low),
            "color": colour,
            "thickness": 1,
            "width": 3,
        },
        hovertemplate="factor %{x}<br><b>%{y:+.4f} nats per token</b><extra></extra>",
    )


def _band(ticks: list[str], low: np.ndarray, high: np.ndarray) -> list[go.Scatter]:
    edge = {"x": ticks, "mode": "lines", "line": {"width": 0, "color": BLUE}, "hoverinfo": "skip"}
    return [go.Scatter(y=low, **edge), go.Scatter(y=high, fill="tonexty", fillcolor="rgba(63,132,201,0.25)", **edge)]
