"""Outlier experts: all maxima in order with the published thresholds, and layer by layer with the ratio drawn in."""

from __future__ import annotations

import numpy as np
import plotly.graph_objects as go
import xarray as xr

from moescope.analysis.labelled import expert_name, layer_names
from moescope.figures.sheets import Sheet
from moescope.figures.theme import BLUE, GREY, ORANGE

READ = (
    "Left: the largest output of every expert, in order; an expert of the pooled layers is a super expert by the "
    "published rule if it is above both broken lines, which always admits the largest. Right: the same numbers layer "
    "by layer; the bars are {ratio:g} times each layer's median, which an outlier must pass here to be believed. The "
    "grey line is the largest value of the residual stream after each layer: where it jumps, massive activations form."
)
"""How to read the figure; filled in by `read`."""


_SAID = (
    "largest |output| %{y:.4g}<br>%{customdata[2]:.2f} × its layer's median, robust z %{customdata[3]:.1f}"
    "<extra></extra>"
)


def read(result: xr.Dataset) -> str:
    """How to read the figure of this result."""
    return READ.format(ratio=result.attrs["ratio"])


def super_experts(result: xr.Dataset) -> go.Figure:
    """Draws every expert's largest output: sorted with both thresholds, and by layer with the ratio criterion.

    How to read it: see `READ`.

    Args:
        result: from `analysis.super_experts` or `super_experts_from_maxima`.
    """
    sheet = Sheet(
        ["all experts, largest first", "layer by layer"],
        cols=2,
        column_widths=[0.5, 0.5],
        horizontal_spacing=0.07,
        shared_yaxes=True,
    )
    for trace in [*_thresholds(result), *_sorted(result)]:
        sheet.add_trace(trace, row=1, col=1)
    for trace in _by_layer(result):
        sheet.add_trace(trace, row=1, col=2)
    sheet.update_xaxes(title={"text": "rank"}, row=1, col=1)
    step = -(-(int(np.ptp(result["layer"].values)) + 1) // 16)
    sheet.update_xaxes(title={"text": "layer"}, showgrid=False, tick0=0, dtick=step, row=1, col=2)
    if not _numbered(result):
        sheet.update_xaxes(type="category", row=1, col=2)
    sheet.update_yaxes(type="log", dtick=1, tickformat="~g", row=1)
    sheet.update_yaxes(showticklabels=True, row=1, col=2)
    sheet.update_yaxes(title={"text": "largest |output|"}, row=1, col=1)
    sheet.update_layout(
        height=420,
        meta={"points": layer_names(result)},
        legend={"orientation": "h", "x": 0, "xanchor": "left", "y": -0.23, "yanchor": "top"},
        margin={"b": 96},
    )
    return sheet.figure()


def _sorted(result: xr.Dataset) -> list[go.Scatter]:
    rank, value = result["rank"].values.ravel(), result["absmax"].values.ravel()
    seen = np.flatnonzero(~np.isnan(rank))
    order = seen[np.argsort(rank[seen])]
    details = _details(result).reshape(rank.size, -1)
    hover = f"<b>%{{customdata[4]}}</b>, rank %{{x:.0f}}<br>{_SAID}"
    pooled, named = result["pooled"].values.ravel()[order], result["super"].values.ravel()[order]
    traces = []
    for kept, colour, name, size in (
        (~pooled, GREY, "not pooled", 5),
        (pooled & ~named, BLUE, "pooled", 6),
        (named, ORANGE, "super expert by the rule", 10),
    ):
        places = order[kept]
        traces.append(
            go.Scatter(
                x=rank[places],
                y=value[places],
                customdata=details[places],
                mode="markers+text" if name.startswith("super") else "markers",
                text=details[places, 4] if name.startswith("super") else None,
                textposition="top right",
                marker={"color": colour, "size": size, "opacity": 0.85, "line": {"width": 0}},
                name=name,
                legendgroup=name,
                hovertemplate=hover,
            )
        )
    return traces


def _numbered(result: xr.Dataset) -> bool:
    """Whether layers go by number: those without experts then keep their place on the axis."""
    return all(name.isdigit() for name in layer_names(result))


def _by_layer(result: xr.Dataset) -> list[go.Scatter]:
    layers = result["layer"].values if _numbered(result) else np.array(layer_names(result), dtype=object)
    value = result["absmax"].values
    row, expert = np.nonzero(~np.isnan(value))
    named = result["super"].values[row, expert]
    dots = go.Scatter(
        x=layers[row],
        y=value[row, expert],
        customdata=_details(result)[row, expert],
        mode="markers",
        marker={
            "color": np.where(named, ORANGE, BLUE),
            "size": np.where(named, 10, 5),
            "opacity": 0.7,
            "line": {"width": 0},
        },
        showlegend=False,
        name="expert",
        hovertemplate=f"<b>%{{customdata[4]}}</b><br>{_SAID}",
    )
    bar = go.Scatter(
        x=layers,
        y=result["layer_median"].values * float(result.attrs["ratio"]),
        mode="markers",
        marker={"symbol": "line-ew", "size": 16, "line": {"width": 2.5, "color": ORANGE}},
        name=f"{result.attrs['ratio']:g} × layer median",
        hovertemplate="layer %{x}<br>"
        + f"{result.attrs['ratio']:g} × the layer's median: "
        + "%{y:.4g}<extra></extra>",
    )
    residual = go.Scatter(
        x=layers,
        y=result["massive"].values,
        mode="lines+markers",
        line={"color": GREY, "width": 1.5, "dash": "dot"},
        marker={"size": 4, "color": GREY},
        name="residual stream",
        hovertemplate="layer %{x}<br>largest |residual| after it: %{y:.4g}<extra></extra>",
    )
    return [dots, bar] if np.isnan(result["massive"].values).all() else [dots, bar, residual]


def _details(result: xr.Dataset) -> np.ndarray:
    """[layer, expert, 5]: layer and expert as links name them, ratio, robust z, and both as people write them."""
    layers, experts = layer_names(result), result["expert"].values.tolist()
    data = np.empty((len(layers), len(experts), 5), dtype=object)
    data[..., 0] = np.array(layers, dtype=object)[:, None]
    data[..., 1] = np.array(experts, dtype=object)
    data[..., 2], data[..., 3] = result["ratio_to_median"].values, result["robust_z"].values
    data[..., 4] = [[expert_name(layer, expert) for expert in experts] for layer in layers]
    return data


def _thresholds(result: xr.Dataset) -> list[go.Scatter]:
    """Both lines of the published rule. Traces, because plotly places a shape's label wrongly on a logarithmic axis."""
    ends = [1, max(2, int(np.nanmax(result["rank"].values, initial=2)))]
    lines = [
        ("99.5th percentile", float(result["percentile"]), "dash"),
        ("largest / 10", float(result["tenth"]), "dot"),
    ]
    return [
        go.Scatter(
            x=ends,
            y=[value, value],
            mode="lines",
            line={"color": ORANGE, "width": 1.4, "dash": dash},
            name=f"{name}: {value:.3g}",
            hovertemplate=f"{name}: {value:.4g}<extra></extra>",
        )
        for name, value, dash in lines
        if value > 0  # the released code's floor division may give 0, which a logarithmic axis cannot show
    ]
