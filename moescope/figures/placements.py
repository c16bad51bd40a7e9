"""Placements: what each method crosses and how evenly it loads devices, beside chance and the bound; and its map."""

from __future__ import annotations

from typing import Any

import numpy as np
import plotly.graph_objects as go
import xarray as xr

from moescope.figures.axes import expert_axis, layer_axis, layer_names
from moescope.figures.marks import chance_ticks, whiskers
from moescope.figures.sheets import Sheet
from moescope.figures.theme import BLUE, GREY, ORANGE, row_height

READ = (
    "Above, left: the share of steps from one MoE layer to the next at which a {judged} token changes device; the ring "
    "is the same on the tokens the method was fitted to, whiskers are 95 % limits. With every expert held once, no "
    "placement gets below the orange line; random ones stand at the grey one ({chance:.0%}). Beside it: how many fair "
    "shares the busiest device of a layer does, averaged over layers (bar) and in the worst layer (tick); 1 is "
    "even{time}. Below: which device holds which expert, one colour per device; choose the method above it. A gap is "
    "an expert with replicas on several devices."
)
"""How to read the figure; filled in by `read`."""
READ_SIMULATED = (
    "Above, left: the share of steps from one MoE layer to the next at which a held-out token changes device; the ring "
    "is the same on the tokens the method was fitted to, whiskers are 95 % limits. With every expert held once, no "
    "placement gets below the orange line; random ones stand at the grey one. Beside it: fair shares of the busiest "
    "device, averaged over layers (bar) and in the worst layer (tick); and the time per token by the bandwidths. "
    "Below: which device holds which expert; a gap is an expert with replicas on several devices."
)
"""How to read the figure of any simulation."""
TIME = "; and the time per token that both cost, by the bandwidths and latencies that were given"
NAMES = {"exflow": "ExFlow", "moetuner": "MoETuner", "eplb": "EPLB", "round_robin": "round robin"}


def read(result: xr.Dataset) -> str:
    """How to read the figure of this result."""
    judged = "held-out" if "held out" in str(result.attrs["judged_on"]) else "counted"
    time = TIME if np.isfinite(result["microseconds"].values).any() else ""
    return READ.format(judged=judged, time=time, chance=float(result["expected_random"]))


def placement(result: xr.Dataset) -> go.Figure:
    """Draws crossings and imbalance of every method, and the map of experts to devices.

    How to read it: see `READ`.

    Args:
        result: from `analysis.placement` or `placement_from_counts`.

    Returns:
        A plotly Figure whose height fits the number of layers and methods; a menu chooses the map's method.
    """
    methods = [str(name) for name in result["plan"].values]
    bars, rows = 30 * len(methods) + 40, row_height(result.sizes["layer"]) * result.sizes["layer"]
    timed = bool(np.isfinite(result["microseconds"].values).any())
    panels = 2 + timed
    sheet = Sheet(
        ["steps at which a token changes device", "busiest device"]
        + ["time per token"] * timed
        + ["device of each expert" + "; blank: replicas on several" * _replicated(result)],
        rows=2,
        cols=panels,
        specs=[[{}] * panels, [{"colspan": panels}, *[None] * (panels - 1)]],
        column_widths=[0.5, *[0.5 / (panels - 1)] * (panels - 1)],
        row_heights=[bars / (bars + rows), rows / (bars + rows)],
        vertical_spacing=110 / (bars + rows + 110),
        horizontal_spacing=0.04,
        shared_yaxes=True,
    )
    for trace in _crossings(result):
        sheet.add_trace(trace, row=1, col=1)
    for trace in _imbalance(result):
        sheet.add_trace(trace, row=1, col=2)
    if timed:
        sheet.add_trace(_times(result), row=1, col=3)
        sheet.update_xaxes(title={"text": "µs"}, rangemode="tozero", nticks=4, exponentformat="none", row=1, col=3)
    lines = [(float(result["expected_random"]), GREY)]
    lines += [(float(result["bound_per_step"]), ORANGE)] if float(result["bound_per_step"]) > 0 else []
    for value, colour in lines:
        line = {"color": colour, "width": 2, "dash": "dash"}
        sheet.add_vline(x=value, line=line, row=1, col=1)
    for index, name in enumerate(methods):
        sheet.add_trace(_map(result.isel(plan=index), name, visible=index == 0), row=2, col=1)
    highest = np.nanmax([*result["crossings_per_step"].values, float(result["expected_random"])])
    sheet.update_xaxes(title={"text": "share of steps"}, tickformat=".0%", range=[0, 1.12 * highest], row=1, col=1)
    sheet.update_xaxes(title={"text": "× fair share"}, rangemode="tozero", nticks=6, row=1, col=2)
    shown = [NAMES.get(name, name) for name in methods]
    category = {"type": "category", "categoryorder": "array", "categoryarray": shown[::-1], "showgrid": False}
    sheet.update_yaxes(category, row=1)
    sheet.update_xaxes(expert_axis(result), row=2, col=1)
    sheet.update_yaxes(layer_axis(result), row=2, col=1)
    fixed = len(sheet.traces) - len(methods)
    sheet.update_layout(
        height=bars + rows + 250,
        showlegend=False,
        bargap=0.35,
        coloraxis=_device_colours(result.sizes["device"])
        | {
            "colorbar": {
                "title": {"text": "device", "side": "right"},
                "tickmode": "array",
                "tickvals": _few(result.sizes["device"]),
                "lenmode": "pixels",
                "len": int(min(max(rows, 110), 340)),
                "y": 0,
                "yanchor": "bottom",
            }
        },
        updatemenus=[_menu(methods, fixed, sheet.axes(2, 1)[1]["domain"][1])],
    )
    return sheet.figure()


def _crossings(result: xr.Dataset) -> list[Any]:
    names, value = _shown(result), result["crossings_per_step"].values
    with np.errstate(invalid="ignore", divide="ignore"):
        scale = value / result["crossings_per_token"].values
    scale = np.where(np.isfinite(scale), scale, 1 / max(int((result["tokens"].values > 0).sum()), 1))
    per_token = [result[name].values for name in ("crossings_low", "crossings_high")]
    low, high = (np.where(np.isnan(limit), value, limit * scale) for limit in per_token)
    details = [result[name].values for name in ("crossings_per_token", "p", "microseconds")]
    saved = [
        "no bound is known" if gap != gap else f"at most {gap:.1%} of its crossings could still be saved where fitted"
        for gap in result["gap"].values
    ]
    bar = go.Bar(
        x=value,
        y=names,
        orientation="h",
        marker={"color": [BLUE if own else GREY for own in _fitted(result)], "opacity": 0.6, "line": {"width": 0}},
        error_x=whiskers(value, low, high),
        customdata=np.stack([*details, low, high], axis=-1),
        hovertext=saved,
        name="crossings",
        hovertemplate=(
            "<b>%{y}</b><br>%{x:.1%} of steps (%{customdata[3]:.1%} to %{customdata[4]:.1%})<br>"
            "%{customdata[0]:.2f} crossings per token, %{customdata[2]:.3g} µs<br>p against random "
            "%{customdata[1]:.3g}; %{hovertext}<extra></extra>"
        ),
    )
    ring = go.Scatter(
        x=result["solved_crossings_per_step"].values,
        y=names,
        mode="markers",
        marker={"symbol": "circle-open", "size": 9, "color": BLUE, "line": {"width": 2}},
        name="where fitted",
        hovertemplate="%{y}<br>on the tokens it was fitted to: %{x:.1%}<extra></extra>",
    )
    return [bar, ring]


def _imbalance(result: xr.Dataset) -> list[Any]:
    bar = go.Bar(
        x=result["imbalance_mean"].values,
        y=_shown(result),
        orientation="h",
        marker={"color": [BLUE if own else GREY for own in _fitted(result)], "opacity": 0.6, "line": {"width": 0}},
        name="imbalance",
        hovertemplate="<b>%{y}</b><br>busiest device: %{x:.2f} × its fair share<extra></extra>",
    )
    worst = chance_ticks(result["imbalance_max"].values, _shown(result), "%{y}<br>in the worst layer: %{x:.2f} ×")
    worst.name = "worst layer"
    return [bar, worst]


def _times(result: xr.Dataset) -> go.Bar:
    names = ("batch_microseconds", "alone_microseconds")
    return go.Bar(
        x=result["microseconds"].values,
        y=_shown(result),
        orientation="h",
        marker={"color": [BLUE if own else GREY for own in _fitted(result)], "opacity": 0.6, "line": {"width": 0}},
        customdata=np.stack([result[name].values for name in names], axis=-1),
        name="time",
        hovertemplate=(
            f"<b>%{{y}}</b><br>%{{x:.4g}} µs per token in a batch of {result.attrs['batch']:,}<br>the batch takes "
            "%{customdata[0]:.4g} µs, a token alone %{customdata[1]:.4g} µs<extra></extra>"
        ),
    )


def _map(part: xr.Dataset, name: str, visible: bool) -> go.Heatmap:
    replicas = part["replicas"].values
    return go.Heatmap(
        z=part["home"].values,
        x=part["expert"].values,
        y=layer_names(part),
        coloraxis="coloraxis",
        customdata=replicas,
        hoverongaps=False,
        xgap=1,
        ygap=1,
        visible=visible,
        name=name,
        hovertemplate="layer %{y}, expert %{x}<br><b>device %{z:.0f}</b>, replicas: %{customdata}<extra></extra>",
    )


def _replicated(result: xr.Dataset) -> bool:
    return bool((result["home"].isnull() & result["exists"]).any())


def _shown(result: xr.Dataset) -> list[str]:
    return [NAMES.get(str(name), str(name)) for name in result["plan"].values]


def _fitted(result: xr.Dataset) -> list[bool]:
    return [str(name) in ("exflow", "moetuner", "eplb") for name in result["plan"].values]


def _device_colours(devices: int) -> dict[str, Any]:
    """Steps of colour, one per device: hues far apart for few, in order of lightness for many."""
    hues = ["#3f84c9", "#dd7a2c", "#2a9d78", "#b65a92", "#c9a227", "#7d8590", "#6a51a3", "#9c4a2f"]
    if devices > len(hues):
        return {"colorscale": "Cividis", "cmin": -0.5, "cmax": devices - 0.5}
    steps = [[(device + side) / devices, hues[device]] for device in range(devices) for side in (0, 1)]
    return {"colorscale": steps, "cmin": -0.5, "cmax": devices - 0.5}


def _few(devices: int) -> list[int]:
    return list(range(0, devices, max(1, -(-devices // 8))))


def _menu(methods: list[str], fixed: int, top: float) -> dict[str, Any]:
    buttons = [
        {
            "label": NAMES.get(name, name),
            "method": "restyle",
            "args": [{"visible": [True] * fixed + [which == index for which in range(len(methods))]}],
        }
        for index, name in enumerate(methods)
    ]
    return {"buttons": buttons, "x": 1, "xanchor": "right", "y": top, "yanchor": "bottom", "pad": {"b": 6}}
