"""Maps of experts and of tokens: points in a plane, with how far the map can be trusted written on it."""

from __future__ import annotations

from typing import Any

import numpy as np
import plotly.graph_objects as go
import xarray as xr

from moescope.figures.axes import layer_names
from moescope.figures.theme import GREY, colour_bar, plain, template

READ = (
    "Points that stand together are alike in {features}. Trustworthiness {true:.2f} (dealt at random {chance:.2f}, "
    "first two principal components {pca:.2f}) says how many of a point's neighbours here are its neighbours there; "
    "distances between far groups, and the size of a group, mean nothing."
)
"""How to read the figure; filled in by `read`."""


def read(result: xr.Dataset) -> str:
    """How to read the figure of this result."""
    return READ.format(features=result.attrs["features"], **_quality(result))


def expert_map(result: xr.Dataset) -> go.Figure:
    """Draws experts as points, coloured by layer.

    How to read it: see `READ`.

    Args:
        result: from `analysis.expert_map` or `expert_map_from_features`.
    """
    x, y = result["x"].values, result["y"].values
    row, expert = np.nonzero(~np.isnan(x))
    names = np.array(layer_names(result), dtype=object)
    layers = result["layer"].values.astype(float)
    trace = go.Scatter(
        x=x[row, expert],
        y=y[row, expert],
        customdata=np.stack([names[row], expert.astype(object)], axis=-1),
        mode="markers",
        marker={
            "color": layers[row],
            "coloraxis": "coloraxis",
            "size": 9 if row.size < 300 else 6,
            "opacity": 0.85,
            "line": {"width": 0.6, "color": GREY},
        },
        name="experts",
        hovertemplate="<b>layer %{customdata[0]}, expert %{customdata[1]}</b><extra></extra>",
    )
    return _figure(result, trace, "layer", {"nticks": 8})


gate_map = expert_map


def token_map(result: xr.Dataset, named: int = 40) -> go.Figure:
    """Draws token ids as points, coloured by how often they occur; the most frequent ones of each place are named.

    How to read it: see `READ`.

    Args:
        result: from `analysis.token_map`.
        named: how many tokens are written out at most; fewer where they would stand on one another.
    """
    count = result["count"].values.astype(float)
    # Quotes come back as written: plotly shows their entities as they are, and in running text they do nothing.
    texts = [
        plain(repr(str(text))[1:-1]).replace("&quot;", '"').replace("&#x27;", "'") for text in result["text"].values
    ]
    points = np.stack([result["x"].values, result["y"].values], axis=-1)
    frequent = _apart(points, np.argsort(-count, kind="stable"), named)
    trace = go.Scatter(
        x=result["x"].values,
        y=result["y"].values,
        text=[text if place in frequent else "" for place, text in enumerate(texts)],
        customdata=np.stack([np.array(texts, dtype=object), result["token"].values, count], axis=-1),
        mode="markers+text",
        textposition="top center",
        textfont={"size": 10},
        marker={
            "color": np.log10(count),
            "coloraxis": "coloraxis",
            "size": 7 if count.size < 500 else 4,
            "opacity": 0.8,
            "line": {"width": 0.6, "color": GREY},
        },
        name="tokens",
        hovertemplate=(
            "<b>%{customdata[0]}</b><br>token id %{customdata[1]}, %{customdata[2]:,.0f} times<extra></extra>"
        ),
    )
    ticks = np.arange(np.floor(np.log10(count.min())), np.ceil(np.log10(count.max())) + 1)
    return _figure(result, trace, "occurrences", {"tickvals": ticks, "ticktext": [f"{10**t:,.0f}" for t in ticks]})


def _figure(result: xr.Dataset, trace: go.Scatter, colour: str, bar: dict[str, Any]) -> go.Figure:
    figure = go.Figure(trace)
    blank = {"showgrid": False, "showticklabels": False, "zeroline": False, "title": {"text": ""}}
    points = np.stack([np.asarray(trace.x, dtype=float), np.asarray(trace.y, dtype=float)], axis=-1)
    low, high = _bulk(points)
    beyond = int(((points < low) | (points > high)).any(axis=1).sum())
    figure.update_xaxes(blank | {"range": [low[0], high[0]]})
    # Not at one scale: the axes of a map have no unit, and a page is wider than high.
    figure.update_yaxes(blank | {"range": [low[1], high[1]]})
    quality = _quality(result)
    far = f", {beyond} of them outside the frame (autoscale shows them)" if beyond else ""
    figure.update_layout(
        template=template("light"),
        height=560,
        showlegend=False,
        title={
            "text": f"trustworthiness {quality['true']:.2f}"
            f"<br><sup>dealt at random {quality['chance']:.2f}, first two principal components {quality['pca']:.2f}; "
            f"{int(result['points'])} points{far}</sup>"
        },
        coloraxis={
            "colorbar": {"title": {"text": colour, "side": "right"}} | bar | colour_bar(480),
        },
        margin_t=70,
    )
    return figure


def _bulk(points: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """A frame that a handful of far points cannot blow up: (low, high) corner, never wider than all points need."""
    if not len(points):
        return np.zeros(2), np.ones(2)
    low, high = np.quantile(points, [0.05, 0.95], axis=0)
    reach = 0.6 * (high - low)
    edge = 0.04 * np.maximum(np.ptp(points, axis=0), 1e-9)
    low = np.maximum(low - reach, points.min(axis=0))
    high = np.minimum(high + reach, points.max(axis=0))
    return low - np.minimum(edge, 0.1 * (high - low) + 1e-9), high + np.minimum(edge, 0.1 * (high - low) + 1e-9)


def _apart(points: np.ndarray, order: np.ndarray, most: int) -> set[int]:
    """The first of `order` whose names would not stand on one another: none in a box around another."""
    low, high = _bulk(points)
    box = np.maximum(high - low, 1e-9) * [0.05, 0.035]
    chosen: list[int] = []
    for place in order[: 12 * most].tolist():
        if len(chosen) == most:
            break
        if not chosen or (np.abs(points[chosen] - points[place]) > box).any(axis=1).all():
            chosen.append(place)
    return set(chosen)


def _quality(result: xr.Dataset) -> dict[str, float]:
    return {
        "true": float(result["trustworthiness"]),
        "chance": float(result["trustworthiness_chance"]),
        "pca": float(result["trustworthiness_pca"]),
    }
