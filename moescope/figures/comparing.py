"""Two stores of the same tokens: how far their routers agree, where the load moved, what it did to the loss."""

from __future__ import annotations

from typing import Any

import numpy as np
import plotly.graph_objects as go
import xarray as xr

from moescope.figures.axes import expert_axis, layer_axis, layer_names
from moescope.figures.marks import chance_ticks, limits, whiskers
from moescope.figures.menus import menu
from moescope.figures.pale import beyond, pale_and_full, untested
from moescope.figures.sheets import Sheet
from moescope.figures.theme import BLUE, GREY, colour_bar, plain, row_height, signed_shares

READ = (
    "Above, layer by layer: the share of a token's experts that both stores selected, of tokens with the same "
    "first expert, and how far the load moved (Jensen-Shannon divergence). Whiskers are 95 % limits; the orange ticks "
    "are what is left of the first two when tokens are mixed up within their sequence, and what the third reaches once "
    "in 100 when stores are exchanged at random. Below: orange, the expert has more of the layer's load in the other "
    "store, blue less; full colour stands at q ≤ {level:g}.{loss}"
)
"""How to read the figure; filled in by `read`."""
LOSS = (
    " Last, where both stores hold losses: how much worse (right) or better the other store's model predicts each "
    "label, in nats per token."
)


def read(result: xr.Dataset, level: float = 0.05) -> str:
    """How to read the figure of this result."""
    return READ.format(level=level, loss=LOSS if "nll_change" in result else "")


def compare(result: xr.Dataset, level: float = 0.05) -> go.Figure:
    """Draws agreement and divergence by layer, the change of every expert's load, and the change of loss by label.

    How to read it: see `READ`.

    Args:
        result: from `analysis.compare`; with several labels, a menu chooses among them.
        level: the false discovery rate below which a change of load stands in full colour.

    Returns:
        A plotly Figure whose height fits the number of layers and labels; its title says how much differs at all.
    """
    labels, lossy = [str(name) for name in result["label"].values], "nll_change" in result
    rows = max(row_height(result.sizes["layer"]) * result.sizes["layer"], 90)
    heights = [rows, rows, 26 * len(labels) + 30][: 2 + lossy]
    gap = 86
    sheet = Sheet(
        ["experts in common", "same first expert", "divergence of load (bits)"]
        + [f"change of load{', not tested' if untested(result['share_q'].values) else ''}"]
        + ["change of loss (nats per token)"] * lossy,
        rows=len(heights),
        cols=3,
        specs=[[{}, {}, {}], *[[{"colspan": 3}, None, None]] * (len(heights) - 1)],
        row_heights=[height / sum(heights) for height in heights],
        vertical_spacing=gap / (sum(heights) + gap * (len(heights) - 1)),
        horizontal_spacing=0.05,
    )
    groups, reach = [], _reach(result)
    for index in range(len(labels)):
        part = result.isel(label=index)
        traces: list[tuple[Any, int, int]] = []
        for column, name in enumerate(("overlap", "top1"), 1):
            traces += [(trace, 1, column) for trace in _agreement(part, name)]
        traces += [(trace, 1, 3) for trace in _divergence(part)]
        traces += [(trace, 2, 1) for trace in _changes(part, level)]
        groups.append(len(traces))
        for trace, row, column in traces:
            trace.visible = index == 0
            sheet.add_trace(trace, row=row, col=column)
    if lossy:
        sheet.add_trace(_losses(result), row=3, col=1)
        sheet.update_yaxes(type="category", autorange="reversed", showgrid=False, row=3, col=1)
        sheet.update_xaxes(zeroline=True, zerolinecolor=GREY, tickformat="+.2~g", row=3, col=1)
    for column in (1, 2):
        sheet.update_xaxes(tickformat=".0%", range=[0, 1.04], nticks=5, row=1, col=column)
    sheet.update_xaxes(rangemode="tozero", nticks=3, tickformat="~g", row=1, col=3)
    sheet.update_yaxes(layer_axis(result, title={"text": ""}), row=1)
    sheet.update_yaxes(title={"text": "layer"}, row=1, col=1)
    sheet.update_xaxes(expert_axis(result, most=32), row=2, col=1)
    sheet.update_yaxes(layer_axis(result), row=2, col=1)
    top = sheet.axes(2, 1)[1]["domain"][1]
    sheet.update_layout(
        title={
            "text": differing(result, level),
            "font": {"size": 13},
            "yref": "container",
            "y": 1,
            "yanchor": "top",
            "pad": {"t": 10},
        },
        margin={"t": 80},
        height=sum(heights) + gap * (len(heights) - 1) + 164,
        showlegend=False,
        bargap=0.35,
        coloraxis={
            "cmin": -reach,
            "cmax": reach,
            "colorbar": {"title": {"text": "points of share", "side": "right"}}
            | signed_shares(reach)
            | colour_bar(rows)
            | {"y": top, "len": int(max(rows, 110))},
        },
    )
    if len(labels) > 1:
        sheet.update_layout(updatemenus=[menu(labels, groups, int(lossy))], margin={"t": 116})
    return sheet.figure()


def differing(result: xr.Dataset, level: float = 0.05) -> str:
    """How much differs between the two stores at all, in a sentence; "" where no token could be compared.

    A map of changes is as empty where nothing differs as where all that differs is chance.
    """
    overlap, top1 = result["overlap"].values, result["top1"].values
    if np.isnan(overlap).all():
        return ""
    moved = (overlap < 1).any(axis=1)
    if not moved.any():
        first = "but not always the same one first" if (top1 < 1).any() else "the same one first"
        loss = "" if "nll_change" not in result or result["nll_change"].values.any() else "; no loss changes"
        return f"The two choose the same experts for every token, {first}{loss}."
    where = "every layer" if moved.all() else f"{moved.sum()} of {moved.size} layers"
    words = f"The two choose different experts for some tokens in {where}"
    q = result["share_q"].values
    if np.isnan(q).all():
        return f"{words}."
    stands, tested = int((q <= level).sum()), int(np.isfinite(q).sum())
    verb = "stand" if stands > 1 else "stands"
    return f"{words}; {stands or 'none'} of {tested:,} changes of load {verb} beyond chance."


def _agreement(part: xr.Dataset, name: str) -> list[go.Scatter]:
    value = part[name].values
    low, high = limits(part, name)
    control = part[f"control_{name}"].values
    seen = go.Scatter(
        x=value,
        y=layer_names(part),
        mode="markers",
        marker={"size": 9, "color": BLUE},
        error_x=whiskers(value, low, high),
        customdata=np.stack([low, high, control, part[f"{name}_tokens"].values], axis=-1),
        name=name,
        hovertemplate=(
            "layer %{y}<br><b>%{x:.1%}</b> (%{customdata[0]:.1%} to %{customdata[1]:.1%})<br>tokens mixed up within "
            "their sequence: %{customdata[2]:.1%}<br>%{customdata[3]:,.0f} tokens<extra></extra>"
        ),
    )
    return [
        seen,
        chance_ticks(control, layer_names(part), "layer %{y}<br>tokens mixed up within their sequence: %{x:.1%}"),
    ]


def _divergence(part: xr.Dataset) -> list[go.Bar | go.Scatter]:
    bar = go.Bar(
        x=part["jsd"].values,
        y=layer_names(part),
        orientation="h",
        marker={"color": BLUE, "opacity": 0.6, "line": {"width": 0}},
        customdata=np.stack([part[name].values for name in ("jsd_p", "jsd_q", "jsd_null_p99")], axis=-1),
        name="divergence",
        hovertemplate=(
            "layer %{y}<br><b>%{x:.4f} bits</b><br>stores exchanged at random: below %{customdata[2]:.4f} in 99 of 100"
            "<br>p = %{customdata[0]:.2g}, q = %{customdata[1]:.2g}<extra></extra>"
        ),
    )
    said = "layer %{y}<br>stores exchanged at random: below %{x:.4f} in 99 of 100"
    return [bar, chance_ticks(part["jsd_null_p99"].values, layer_names(part), said)]


def _changes(part: xr.Dataset, level: float) -> list[go.Heatmap]:
    """Two maps, what chance explains below and what stands above it, which nothing does where nothing was tested."""
    names = ("share", "other_share", "share_change", "share_p", "share_q")
    return pale_and_full(
        part["share_change"].values,
        beyond(part["share_q"].values, level),
        x=part["expert"].values,
        y=layer_names(part),
        coloraxis="coloraxis",
        customdata=np.stack([part[name].values for name in names], axis=-1),
        xgap=1,
        ygap=1,
        name="change of load",
        hovertemplate=(
            "layer %{y}, expert %{x}<br><b>%{customdata[0]:.1%} → %{customdata[1]:.1%} of the layer's load</b><br>"
            "p = %{customdata[3]:.2g}, q = %{customdata[4]:.2g}<extra></extra>"
        ),
    )


def _losses(result: xr.Dataset) -> go.Scatter:
    value = result["nll_change"].values
    low, high = limits(result, "nll_change")
    names = ("nll", "other_nll", "nll_p", "nll_q", "nll_tokens")
    return go.Scatter(
        x=value,
        y=[plain(name) for name in result["label"].values],
        mode="markers",
        marker={"size": 9, "color": BLUE},
        error_x=whiskers(value, low, high),
        customdata=np.stack([low, high, *(result[name].values for name in names)], axis=-1),
        name="change of loss",
        hovertemplate=(
            "%{y}<br><b>%{x:+.3f} nats per token</b> (%{customdata[0]:+.3f} to %{customdata[1]:+.3f})<br>"
            "%{customdata[2]:.3f} → %{customdata[3]:.3f}; p = %{customdata[4]:.2g}, q = %{customdata[5]:.2g}<br>"
            "%{customdata[6]:,.0f} tokens"
            "<extra></extra>"
        ),
    )


def _reach(result: xr.Dataset) -> float:
    """Where colour saturates: the largest change, and half a point at least."""
    return max(float(np.nanmax(np.abs(result["share_change"].values), initial=0.0)), 0.005)
