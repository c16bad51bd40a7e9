"""Vocabulary specialisation: the spread of shares in each layer against chance, and the tokens settled most."""

from __future__ import annotations

from typing import Any

import numpy as np
import plotly.graph_objects as go
import xarray as xr

from moescope.figures.axes import layer_axis, layer_names
from moescope.figures.pale import untested
from moescope.figures.sheets import Sheet
from moescope.figures.theme import BLUE, GREY, ORANGE, plain, row_height

READ = (
    "Left: the share of a token's occurrences that its favourite expert takes, for all tokens of a layer: the box "
    "holds the middle half of them, the orange dot is their mean, the grey bar what chance gives on average. By label: "
    "a line of means each, dotted what chance gives. Right: the tokens furthest above what chance reaches once in a "
    "hundred (grey bar), with their favourite expert."
)
"""How to read the figure."""
LINES = ("#3f84c9", "#dd7a2c", "#2a9d78", "#b65a92", "#c9a227", "#8b919a", "#5a6acf", "#9a6a3a")


def vocabulary_specialisation(result: xr.Dataset, strongest: int = 20) -> go.Figure:
    """Draws the result of `analysis.vocabulary_specialisation`; by label, one line of means for each value.

    How to read it: see `READ`.

    Args:
        result: from `analysis.vocabulary_specialisation` or its form on counts.
        strongest: how many tokens to name.
    """
    by_label = "label" in result.dims
    tokens = int(result["tokens"].max())
    layers = layer_names(result)
    height = int(max(row_height(len(layers)) * len(layers) * 1.2, 19 * strongest) + 130)
    sheet = Sheet(
        [
            "<b>Share of the favourite expert</b><br><span style='font-size:11px'>"
            f"{tokens:,} tokens of at least {result.attrs['least']} occurrences</span>",
            f"<b>Settled most{_beyond(result, strongest)}</b><br>"
            "<span style='font-size:11px'>layer, token, favourite expert</span>",
        ],
        cols=2,
        column_widths=[0.55, 0.45],
        horizontal_spacing=0.25 if by_label else 0.17,
    )
    for trace in _lines(result, layers) if by_label else _boxes(result, layers):
        sheet.add_trace(trace, row=1, col=1)
    for trace in _tokens(result, layers, strongest):
        sheet.add_trace(trace, row=1, col=2)
    sheet.update_yaxes(layer_axis(result), row=1, col=1)
    sheet.update_xaxes(range=[0, 1.02], tickformat=".0%", title={"text": "share of occurrences"})
    sheet.update_yaxes(type="category", autorange="reversed", showgrid=False, ticklabelstandoff=4, row=1, col=2)
    sheet.update_layout(
        height=height,
        margin={"t": 70, "b": 90},
        barmode="overlay",
        legend={"orientation": "h", "x": 0, "y": -0.16, "yanchor": "top"},
    )
    return sheet.figure()


def _listed(result: xr.Dataset, strongest: int) -> tuple[np.ndarray, ...]:
    """Where the tokens stand that are furthest above what chance reaches once in a hundred, the furthest first."""
    share = result["share"].values
    above = np.where(np.isnan(share), -np.inf, share - result["null_p99"].values).ravel()
    least = np.partition(above, -strongest)[-strongest] if above.size > strongest else -np.inf
    best = np.flatnonzero(above >= least)  # all are too many to sort
    best = best[np.argsort(-above[best], kind="stable")][:strongest]
    return np.unravel_index(best[np.isfinite(above[best])], share.shape)


def _beyond(result: xr.Dataset, strongest: int) -> str:
    """How many of the tokens listed stand at q <= 0.05."""
    q = result["q"].values
    if untested(q):
        return ", not tested"
    stands = q[_listed(result, strongest)] <= 0.05
    return ", beyond chance" if stands.all() else f"; {stands.sum() or 'none'} of {stands.size} beyond chance"


def _boxes(result: xr.Dataset, layers: list[str]) -> list[Any]:
    boxes = go.Box(
        **_quartiles(result["share"].values), y=layers, orientation="h",
        line={"color": BLUE, "width": 1.5}, fillcolor="rgba(63,132,201,0.18)", width=0.5, showlegend=False,
        hoverinfo="skip",
    )  # fmt: skip
    chance = go.Bar(
        y=layers, x=result["null_mean_share"].values, orientation="h", width=0.7, name="mean by chance",
        marker={"color": GREY, "opacity": 0.28}, hovertemplate="layer %{y}: chance gives %{x:.1%}<extra></extra>",
    )  # fmt: skip
    mean = go.Scatter(
        y=layers, x=result["mean_share"].values, mode="markers", name="mean over tokens",
        marker={"color": ORANGE, "size": 9}, customdata=np.stack([result["specialised"], result["tokens"]], axis=-1),
        hovertemplate=(
            "layer %{y}: mean %{x:.1%}<br>%{customdata[0]:,.0f} of %{customdata[1]:,.0f} tokens beyond chance "
            "(q ≤ 0.05)<extra></extra>"
        ),
    )  # fmt: skip
    return [chance, boxes, mean]


def _quartiles(share: np.ndarray) -> dict[str, np.ndarray]:
    """The boxes as plotly makes them of the values themselves, which are too many to send: a vocabulary per layer."""
    found = np.full((5, len(share)), np.nan)
    for place, row in enumerate(share):
        known = row[~np.isnan(row)]
        if known.size:
            low, middle, high = np.quantile(known, [0.25, 0.5, 0.75], method="hazen")
            reach = 1.5 * (high - low)
            inside = known[(known >= low - reach) & (known <= high + reach)]
            found[:, place] = low, middle, high, inside.min(), inside.max()
    return dict(zip(("q1", "median", "q3", "lowerfence", "upperfence"), found, strict=True))


def _lines(result: xr.Dataset, layers: list[str]) -> list[Any]:
    lines: list[Any] = []
    for place, name in enumerate(result["label"].values):
        part = result.isel(label=place)
        style = {"color": LINES[place % len(LINES)], "width": 2}
        text = plain(name)
        lines.append(
            go.Scatter(
                y=layers, x=part["mean_share"].values, mode="lines+markers", name=text, line=style, meta=text,
                legendgroup=text, hovertemplate="%{meta}, layer %{y}: %{x:.1%}<extra></extra>",
            )
        )  # fmt: skip
        lines.append(
            go.Scatter(
                y=layers, x=part["null_mean_share"].values, mode="lines", line=style | {"dash": "dot", "width": 1},
                meta=text, legendgroup=text, showlegend=False, name=text,
                hovertemplate="%{meta}, layer %{y}: chance gives %{x:.1%}<extra></extra>",
            )
        )  # fmt: skip
    return lines


def _tokens(result: xr.Dataset, layers: list[str], strongest: int) -> list[Any]:
    share, chance, at = result["share"].values, result["null_p99"].values, _listed(result, strongest)
    labels = result["label"].values if "label" in result.dims else None
    words, favourite, names = result["token"][at[1]].values, result["favourite"].values[at], []
    for place, (row, word) in enumerate(zip(at[0], words, strict=True)):
        shown = plain(str(word)).replace("&quot;", '"').replace("&#x27;", "'")
        of = f" · {plain(labels[at[2][place]])}" if labels is not None else ""
        names.append(f"L{layers[row].removeprefix('L')}  <b>{shown}</b>{of}  E{favourite[place]:.0f}")
    counted = result["count"].values[at]
    return [
        go.Bar(
            y=names, x=chance[at], orientation="h", width=0.6, marker={"color": GREY, "opacity": 0.28},
            showlegend=False, hovertemplate="chance reaches %{x:.1%} once in a hundred<extra></extra>",
        ),
        go.Scatter(
            y=names, x=share[at], mode="markers", marker={"color": ORANGE, "size": 8}, showlegend=False,
            customdata=counted, hovertemplate="%{x:.1%} of %{customdata:,.0f} occurrences<extra></extra>",
        ),
    ]  # fmt: skip
