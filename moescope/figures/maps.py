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


def token_map(result: xr.Dataset, named: int = 40) -> go.Figure:
    """Draws token ids as points, coloured by how often they occur; the most frequent ones are named.

    How to read it: see `READ`.

    Args:
        result: from `analysis.token_map`.
        named: how many tokens are written out.
    """
    count = result["count"].values.astype(float)
    # Quotes come back as written: plotly shows their entities as they are, and in running text they do nothing.
    texts = [
        plain(repr(str(text))[1:-1]).replace("&quot;", '"').replace("&#x27;", "'") for text in result["text"].values
    ]
    frequent = set(np.argsort(-count, kind="stable")[:named].tolist())
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
    figure.update_xaxes(blank)
    figure.update_yaxes(blank | {"scaleanchor": "x"})
    quality = _quality(result)
    figure.update_layout(
        template=template("light"),
        height=560,
        showlegend=False,
        title={
            "text": f"trustworthiness {quality['true']:.2f}"
            f"<br><sup>dealt at random {quality['chance']:.2f}, first two principal components {quality['pca']:.2f}; "
            f"{int(result['points'])} points</sup>"
        },
        coloraxis={
            "colorbar": {"title": {"text": colour, "side": "right"}} | bar | colour_bar(480),
        },
        margin_t=70,
    )
    return figure


def _quality(result: xr.Dataset) -> dict[str, float]:
    return {
        "true": float(result["trustworthiness"]),
        "chance": float(result["trustworthiness_chance"]),
        "pca": float(result["trustworthiness_pca"]),
    }
