"""The load map: every expert of every layer against its fair share, and each layer's balance against chance."""

from __future__ import annotations

import math

import numpy as np
import plotly.graph_objects as go
import xarray as xr

from moescope.figures.axes import expert_axis, layer_axis, layer_names
from moescope.figures.sheets import Sheet
from moescope.figures.theme import BLUE, GREY, ORANGE, colour_bar, plain, row_height

READ = (
    "Each cell is one expert of one layer: orange does more than a fair share of its layer's work, blue less, a cross "
    "none at all. The bars show how many fair shares each layer's busiest expert does; uniform random choice would "
    "leave it left of the orange tick 99 times in 100."
)
"""How to read the figure."""


def load(result: xr.Dataset) -> go.Figure:
    """Draws the load of every (layer, expert) with each layer's balance beside it.

    How to read it: see `READ`.

    Args:
        result: from `analysis.load` or `load_from_counts`; with labels, a menu chooses among them.

    Returns:
        A plotly Figure whose height fits the number of layers.
    """
    by_label = "label" in result["count"].dims
    labels = [str(name) for name in result["label"].values] if by_label else ["all"]
    parts = [result.isel(label=index) if by_label else result for index in range(len(labels))]
    sheet = Sheet(
        ["load of each expert", "busiest expert"],
        cols=2,
        shared_yaxes=True,
        column_widths=[0.8, 0.2],
        horizontal_spacing=0.02,
    )
    groups = []
    for index, part in enumerate(parts):
        traces = [(_map(part), 1), (_never(part), 1), (_busiest(part), 2), (_chance(part), 2)]
        groups.append(len(traces))
        for trace, column in traces:
            trace.visible = index == 0
            sheet.add_trace(trace, row=1, col=column)
    reach = _reach(result)
    ticks = list(range(-reach, reach + 1)) if reach <= 3 else [-reach, -reach // 2, 0, reach // 2, reach]
    sheet.update_xaxes(expert_axis(result), row=1, col=1)
    sheet.update_xaxes(title={"text": "× fair share"}, rangemode="tozero", nticks=5, row=1, col=2)
    sheet.update_yaxes(layer_axis(result), row=1, col=1)
    sheet.update_yaxes(layer_axis(result, title={"text": ""}), row=1, col=2)
    sheet.update_layout(
        height=130 + row_height(result.sizes["layer"]) * result.sizes["layer"],
        showlegend=False,
        bargap=0.35,
        coloraxis={
            "cmin": -reach,
            "cmax": reach,
            "colorbar": {
                "title": {"text": "× fair share", "side": "right"},
                "tickvals": ticks,
                "ticktext": [_times(tick) for tick in ticks],
            }
            | colour_bar(row_height(result.sizes["layer"]) * result.sizes["layer"]),
        },
    )
    if len(parts) > 1:
        sheet.update_layout(updatemenus=[_menu(labels, groups)], margin={"t": 84})
    return sheet.figure()


def _map(part: xr.Dataset) -> go.Heatmap:
    relative = part["relative_load"].values
    with np.errstate(divide="ignore"):
        shown = np.where(relative > 0, np.log2(relative), np.nan)
    shared = part["weighted_share"].values if "weighted_share" in part else np.full(relative.shape, np.nan)
    return go.Heatmap(
        z=shown,
        x=part["expert"].values,
        y=layer_names(part),
        coloraxis="coloraxis",
        customdata=np.stack([relative, part["count"].values, part["share"].values, shared], axis=-1),
        hoverongaps=False,
        xgap=1,
        ygap=1,
        name="load",
        hovertemplate=(
            "layer %{y}, expert %{x}<br><b>%{customdata[0]:.2f} × its fair share</b><br>%{customdata[1]:,.0f} "
            "selections, %{customdata[2]:.1%} of the layer's<br>%{customdata[3]:.1%} of its routing weight"
            "<extra></extra>"
        ),
    )


def _never(part: xr.Dataset) -> go.Scatter:
    names = layer_names(part)
    rows, experts = np.nonzero((part["count"].values == 0) & (part["selections"].values > 0)[:, None])
    return go.Scatter(
        x=part["expert"].values[experts],
        y=[names[row] for row in rows],
        mode="markers",
        marker={"symbol": "x-thin", "size": 7, "line": {"width": 1.5, "color": GREY}},
        name="never selected",
        hovertemplate="layer %{y}, expert %{x}<br><b>never selected</b><extra></extra>",
    )


def _busiest(part: xr.Dataset) -> go.Bar:
    names = ("entropy", "effective_experts", "gini", "cv", "dead", "null_max_vio_p99")
    return go.Bar(
        x=part["max_vio"].values + 1,
        y=layer_names(part),
        orientation="h",
        marker={"color": BLUE, "opacity": 0.6, "line": {"width": 0}},
        customdata=np.stack([part[name].values for name in names] + [part["n_experts"].values], axis=-1),
        name="busiest",
        hovertemplate=(
            "layer %{y}<br><b>busiest expert: %{x:.2f} × its fair share</b><br>MaxVio = that minus 1; chance stays "
            "below %{customdata[5]:.3f} in 99 of 100<br>effective experts %{customdata[1]:.1f} of %{customdata[6]:.0f} "
            "(entropy %{customdata[0]:.2f} nats)<br>Gini %{customdata[2]:.2f}, coefficient of variation "
            "%{customdata[3]:.2f}<br>never selected: %{customdata[4]:.0f}<extra></extra>"
        ),
    )


def _chance(part: xr.Dataset) -> go.Scatter:
    return go.Scatter(
        x=part["null_max_vio_p99"].values + 1,
        y=layer_names(part),
        mode="markers",
        marker={"symbol": "line-ns", "size": 14, "line": {"width": 2.5, "color": ORANGE}},
        name="chance",
        hovertemplate="layer %{y}<br>uniform random choice: below %{x:.2f} × in 99 of 100<extra></extra>",
    )


def _reach(result: xr.Dataset) -> int:
    """Colour saturates at 2 ** reach times a fair share, either way: enough for the busiest expert, 16 at most."""
    busiest = np.nanmax(result["relative_load"].values, initial=1.0)
    return int(min(4, max(1, math.ceil(math.log2(max(busiest, 2))))))


def _times(power: int) -> str:
    return f"{2**power}×" if power >= 0 else f"1/{2**-power}×"


def _menu(labels: list[str], groups: list[int]) -> dict:
    buttons = [
        {
            "label": plain(name),
            "method": "restyle",
            "args": [{"visible": [which == index for which, size in enumerate(groups) for _ in range(size)]}],
        }
        for index, name in enumerate(labels)
    ]
    return {"buttons": buttons, "x": 0, "xanchor": "left", "y": 1, "yanchor": "bottom", "pad": {"b": 30}}
