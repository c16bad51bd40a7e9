"""Local routing consistency: the segment score of the model, its layers and its experts, and what it is made of."""

from __future__ import annotations

from typing import Any

import numpy as np
import plotly.graph_objects as go
import xarray as xr

from moescope.errors import MoescopeError
from moescope.figures.axes import expert_axis, layer_axis, layer_names
from moescope.figures.caching import switch
from moescope.figures.sheets import Sheet
from moescope.figures.theme import BLUE, GREY, ORANGE, plain, row_height

READ = (
    "Left: the best F1 that a router held fixed for m tokens can reach in the whole model (blue, with 95 % limits). "
    "Right: the same for each layer at one m. Up to the grey ticks it is k of E experts and their loads alone; from "
    "there to the orange tick each sequence has its own experts; only what is right of the orange tick is that "
    "neighbouring tokens are routed alike. Below: each expert's own score beyond what its load gives."
)
"""How to read the figure."""
FAINT = "rgba(139, 145, 154, 0.5)"
"""Grey that recedes on a light and on a dark page."""
CONTROLS = (
    ("shuffled", "tokens shuffled", ORANGE, "dash"),
    ("independent", "loads alone", GREY, "dash"),
    ("uniform", "k of E alone", FAINT, "dot"),
)
"""Controls of `srp`: name, what is said, colour, dash."""


def consistency(result: xr.Dataset, window: int | None = None) -> go.Figure:
    """Draws SRP by window for the model and by layer, with its controls, and every expert's beyond its load.

    How to read it: see `READ`.

    Args:
        result: from `analysis.consistency`; a menu chooses the label, or else the window, of what is drawn by layer.
        window: m that is shown first, or for all labels; 16 or the middle one if None.

    Raises:
        MoescopeError: the result does not have this window.
    """
    by_label = "label" in result.dims
    windows = [int(m) for m in result["window"].values]
    if window is not None and window not in windows:
        raise MoescopeError(f"The result has no window {window}; it has {', '.join(map(str, windows))}.")
    known = window if window is not None else 16 if 16 in windows else windows[len(windows) // 2]
    first = windows.index(known)
    parts = [result.isel(label=i) for i in range(result.sizes["label"])] if by_label else [result]
    options = [(part, first) for part in parts] if by_label else [(result, place) for place in range(len(windows))]
    rows = row_height(result.sizes["layer"]) * result.sizes["layer"]
    height = max(rows, 230)
    sheet = Sheet(
        ["the whole model", "each layer", "each expert, beyond its load"],
        rows=2,
        cols=2,
        specs=[[{}, {}], [{"colspan": 2}, None]],
        column_widths=[0.44, 0.56],
        row_heights=[height / (height + rows), rows / (height + rows)],
        vertical_spacing=100 / (height + rows + 100),
        horizontal_spacing=0.08,
    )
    drawn: list[list[Any]] = []
    for place, (part, at) in enumerate(options):
        traces = [(trace, 1, 1) for trace in (_segments(part) if by_label or not place else [])]
        traces += [(trace, 1, 2) for trace in _layers(part.isel(window=at))]
        traces += [(_experts(result.isel(window=at)), 2, 1)]
        for trace, row, column in traces:
            # Without labels the left panel shows all windows, whichever is chosen.
            trace.visible = place == (0 if by_label else first) or (not by_label and (row, column) == (1, 1))
            sheet.add_trace(trace, row=row, col=column)
        drawn.append([trace for trace, _, _ in traces])
    sheet.update_xaxes(type="log", title={"text": "tokens of a segment, m"}, tickvals=windows, row=1, col=1)
    sheet.update_yaxes(title={"text": "SRP"}, row=1, col=1)
    sheet.update_xaxes(title={"text": "SRP"}, row=1, col=2)
    sheet.update_yaxes(layer_axis(result), row=1, col=2)
    sheet.update_xaxes(expert_axis(result), row=2, col=1)
    sheet.update_yaxes(layer_axis(result), row=2, col=1)
    reach = max(0.05, float(np.nanmax(np.abs(_excess(result)), initial=0.0)))
    sheet.update_layout(
        height=height + rows + 260,
        legend={"orientation": "h", "x": 0, "xanchor": "left", "y": 1, "yanchor": "top", "yref": "container"},
        margin={"t": 72},
        coloraxis={
            "cmin": -reach,
            "cmax": reach,
            "colorbar": {"title": {"text": "SRP beyond its load", "side": "right"}, "lenmode": "pixels"}
            | {"len": int(min(max(rows, 120), 340)), "y": 0, "yanchor": "bottom"},
        },
    )
    if len(options) > 1:
        names = [plain(name) for name in result["label"].values] if by_label else [f"m = {m}" for m in windows]
        sheet.update_layout(updatemenus=[switch(names, drawn, 0 if by_label else first, keep=0 if by_label else 5)])
    return sheet.figure()


def _segments(part: xr.Dataset) -> list[Any]:
    """SRP of the model by window: its limits, itself, and three controls."""
    x, value = part["window"].values, part["model_srp"].values
    low, high = (
        np.where(np.isnan(part[f"model_srp_{end}"].values), value, part[f"model_srp_{end}"].values)
        for end in ("low", "high")
    )
    names = ("model_size_ratio", "model_threshold", "model_p", "model_segments")
    details = np.stack([part[name].values for name in names] + [low, high], axis=-1)
    band = go.Scatter(
        x=[*x, *x[::-1]],
        y=[*low, *high[::-1]],
        fill="toself",
        fillcolor=BLUE,
        opacity=0.18,
        mode="lines",
        line={"width": 0},
        hoverinfo="skip",
        showlegend=False,
        name="limits",
    )
    own = go.Scatter(
        x=x,
        y=value,
        mode="lines+markers",
        line={"color": BLUE, "width": 2.4},
        marker={"size": 7},
        customdata=details,
        name="as routed",
        legendgroup="srp",
        hovertemplate=(
            "m = %{x}<br><b>SRP %{y:.3f}</b> (%{customdata[4]:.3f} to %{customdata[5]:.3f})<br>switches on "
            "%{customdata[0]:.2f} times the active experts, from %{customdata[1]:.0f} activations<br>against shuffled "
            "tokens p = %{customdata[2]:.2g}; %{customdata[3]:,.0f} segments<extra></extra>"
        ),
    )
    controls = [
        go.Scatter(
            x=x,
            y=part[f"model_srp_{name}"].values,
            mode="lines",
            line={"color": colour, "width": 1.8, "dash": dash},
            name=shown,
            legendgroup=name,
            hovertemplate=f"m = %{{x}}<br>{shown}: %{{y:.3f}}<extra></extra>",
        )
        for name, shown, colour, dash in CONTROLS
    ]
    return [band, own, *controls]


def _layers(part: xr.Dataset) -> list[Any]:
    """SRP of each layer at one window and label, with a line from the least control to it."""
    names, value = layer_names(part), part["srp"].values
    x: list[Any] = []
    y: list[Any] = []
    for layer, start, stop in zip(names, part["srp_uniform"].values, value, strict=True):
        x += [start, stop, None]
        y += [layer, layer, None]
    span = go.Scatter(
        x=x, y=y, mode="lines", line={"color": FAINT, "width": 1.4}, hoverinfo="skip", showlegend=False, name="span"
    )
    ticks = [
        go.Scatter(
            x=part[f"srp_{name}"].values,
            y=names,
            mode="markers",
            marker={"symbol": "line-ns", "size": 13, "line": {"width": 2.5, "color": colour}},
            name=shown,
            legendgroup=name,
            showlegend=False,
            hovertemplate=f"layer %{{y}}<br>{shown}: %{{x:.3f}}<extra></extra>",
        )
        for name, shown, colour, _ in CONTROLS[::-1]
    ]
    low, high = (part[f"srp_{end}"].values for end in ("low", "high"))
    own = go.Scatter(
        x=value,
        y=names,
        mode="markers",
        marker={"size": 9, "color": BLUE},
        error_x={
            "type": "data",
            "array": np.nan_to_num(high - value),
            "arrayminus": np.nan_to_num(value - low),
            "thickness": 1.4,
            "width": 0,
            "color": BLUE,
        },
        customdata=np.stack([part[name].values for name in ("size_ratio", "p", "q", "srp_low", "srp_high")], axis=-1),
        name="as routed",
        legendgroup="srp",
        showlegend=False,
        hovertemplate=(
            "layer %{y}<br><b>SRP %{x:.3f}</b> (%{customdata[3]:.3f} to %{customdata[4]:.3f})<br>switches on "
            "%{customdata[0]:.2f} times the active experts<br>against shuffled tokens p = %{customdata[1]:.2g}, "
            "q = %{customdata[2]:.2g}<extra></extra>"
        ),
    )
    return [span, *ticks, own]


def _excess(part: xr.Dataset) -> np.ndarray:
    return part["expert_srp"].values - part["expert_srp_independent"].values


def _experts(part: xr.Dataset) -> go.Heatmap:
    shuffled = part["expert_srp_shuffled"] if "expert_srp_shuffled" in part else part["expert_srp"] * np.nan
    details = [part["expert_srp"], part["expert_srp_independent"], shuffled, part["expert_size_ratio"]]
    return go.Heatmap(
        z=_excess(part),
        x=part["expert"].values,
        y=layer_names(part),
        coloraxis="coloraxis",
        customdata=np.stack([values.values for values in details], axis=-1),
        hoverongaps=False,
        xgap=1,
        ygap=1,
        name="experts",
        hovertemplate=(
            "layer %{y}, expert %{x}<br><b>SRP %{customdata[0]:.3f}</b>, its load alone gives %{customdata[1]:.3f}, "
            "shuffled tokens %{customdata[2]:.3f}<br>switched on for %{customdata[3]:.2f} times its activations"
            "<extra></extra>"
        ),
    )
