"""The routing of a stretch of text as it builds up: what each expert has had so far, and where the last token went."""

from __future__ import annotations

from typing import Any

import numpy as np
import plotly.graph_objects as go
import xarray as xr

from moescope.figures.axes import expert_axis, layer_axis, layer_names
from moescope.figures.grids import absent
from moescope.figures.sheets import Sheet
from moescope.figures.theme import ORANGE, colour_bar, row_height

READ = (
    "The darker a cell, the more of the tokens shown so far went to that expert; the orange squares are the experts of "
    "the current token. Under equal load all experts of a layer would be alike; a short text is always uneven, so this "
    "describes it and tests nothing. Hatched: no such expert."
)
"""How to read the figure."""


def replay(result: xr.Dataset, steps: int | None = None) -> go.Figure:
    """Draws how often each expert of each layer was selected in the first `steps` tokens, and by the last of them.

    How to read it: see `READ`. The first trace's `meta` holds every token's experts, by layer and rank, -1 where there
    is none, in words with spaces between them, from which a page steps on without asking again.

    Args:
        result: from `analysis.passage_routes`.
        steps: how many tokens have been read; all of them, and no token the current one, if None.
    """
    expert = result["expert"].values
    tokens, layers, _ = expert.shape
    read = tokens if steps is None else min(max(steps, 0), tokens)
    width = int(result["n_experts"].values.max())
    counts = np.where(np.arange(width) < result["n_experts"].values[:, None], 0.0, np.nan)
    for layer in range(layers):
        ids = expert[:read, layer]
        counts[layer] += np.bincount(ids[ids >= 0], minlength=width)
    names = layer_names(result)
    height = row_height(layers) * layers
    cells = go.Heatmap(
        z=counts,
        x=np.arange(width),
        y=names,
        coloraxis="coloraxis",
        hoverongaps=False,
        xgap=1,
        ygap=1,
        name="selections",
        meta={
            "experts": " ".join(map(str, expert.ravel().tolist())),
            "ranks": expert.shape[2],
            "first": int(result["token"].values[0]) if tokens else 0,
            "n_experts": result["n_experts"].values.tolist(),
            "document": result.attrs["document"],
        },
        hovertemplate="layer %{y}, <b>expert %{x}</b><br>%{z} of the tokens so far<extra></extra>",
    )
    current = np.full(expert.shape[1:], -1) if steps is None or not read else expert[read - 1]
    rows, ranks = np.nonzero(current >= 0)
    last: Any = go.Scatter(
        x=current[rows, ranks],
        y=[names[row] for row in rows],
        mode="markers",
        marker={
            "symbol": "square-open",
            "size": min(row_height(layers) - 3, 14),
            "color": ORANGE,
            "line": {"width": 2},
        },
        hoverinfo="skip",
        name="current token",
        showlegend=False,
    )
    exists = ~np.isnan(counts)
    sheet = Sheet()
    for trace in (cells, last) if exists.all() else (cells, last, absent(exists, names)):
        sheet.add_trace(trace)
    sheet.update_xaxes(expert_axis(result.assign_coords(expert=np.arange(width))))
    sheet.update_yaxes(layer_axis(result))
    sheet.update_layout(
        height=96 + height,
        margin={"t": 16},
        showlegend=False,
        coloraxis={
            "cmin": 0,
            "cmax": max(float(np.nanmax(counts)), 1),
            "colorbar": {"title": {"text": "tokens"}} | colour_bar(height),
        },
    )
    return sheet.figure()
