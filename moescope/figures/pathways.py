"""Which paths tokens take through consecutive layers, as a Sankey diagram."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import plotly.graph_objects as go
import xarray as xr

from moescope.figures.axes import layer_names
from moescope.figures.menus import menu
from moescope.figures.sheets import Sheet
from moescope.figures.theme import GREY

READ = (
    "Each band is a path through the window's layers, as wide as its tokens are many: orange where controls, whose "
    "layers are rotated within sequences, give so many tokens neither to it nor to the path of its rank (p ≤ 0.05), "
    "grey otherwise. The menu shows the most used transitions instead."
)
"""How to read the figure."""
READ_BANDS = (
    "Paths: each band is a path of first experts through the layers, as wide as its tokens are many, orange where "
    "controls, whose layers are rotated within sequences, give so many neither to it nor to the path of its rank "
    "(p ≤ 0.05). Transitions: the most used ones, blue above the target's usual share, which is not tested here. Path "
    "entropy says how open a token's path is, beside the controls' entropy."
)
"""How to read either of the two."""

PAD = 8
"""Pixels between the experts of one layer in a Sankey diagram."""

_ORANGE_BAND, _BLUE_BAND, _GREY_BAND = "rgba(221,122,44,0.5)", "rgba(63,132,201,0.4)", "rgba(139,145,154,0.3)"


def paths(result: xr.Dataset, level: float = 0.05, most: int = 40, bands: str | None = None) -> go.Figure:
    """Draws the strongest paths through a window of layers as a Sankey diagram; a menu shows transitions instead.

    How to read it: see `READ`.

    Args:
        result: from `analysis.paths`.
        level: paths with p at most this stand in colour; none where there was no control.
        most: paths to draw, the most used first.
        bands: "paths" or "transitions" draws these alone; by default a menu chooses.
    """
    sankeys: list[Any] = [
        _sankey(result, *drawn)
        for kind, drawn in (("paths", _path_bands(result, level, most)), ("transitions", _transition_bands(result)))
        if bands in (None, kind)
    ]
    sheet = Sheet()
    for place, sankey in enumerate(sankeys):
        sankey.visible = place == 0
        sheet.add_trace(sankey)
    steps, layers = result.sizes["step"], layer_names(result)
    fullest = max(max(np.unique(sankey.node.x, return_counts=True)[1]) for sankey in sankeys)
    for step in range(steps):
        sheet.add_annotation(
            text=f"layer {layers[step]}",
            x=step / (steps - 1),
            y=1.0,
            xref="paper",
            yref="paper",
            xanchor="left" if step == 0 else "right" if step == steps - 1 else "center",
            yanchor="bottom",
            yshift=6,
            showarrow=False,
        )
    entropy, control = float(result["path_entropy"]), float(result["control_entropy"])
    said = f"path entropy {entropy:.2f} nats" if math.isfinite(entropy) else "path entropy not known"
    if math.isfinite(control) and math.isfinite(entropy):
        said += f", {control:.2f} in the controls (p = {float(result['p_entropy']):.2g})"
    if bands != "transitions":
        shown = min(most, result.sizes["path"])
        said += f" · the {shown} paths drawn carry {float(result['share'].values[:shown].sum()):.1%} of the tokens"
        said += " · not tested, so all are grey" * bool(np.isnan(result["p"].values).all())
    sheet.add_annotation(text=said, x=0, y=0, xref="paper", yref="paper", xanchor="left", yanchor="top", yshift=-16)
    sheet.update_layout(
        height=_sankey_height([range(int(fullest))]) + 160,
        margin={"t": 96 if bands is None else 40, "b": 64, "l": 24, "r": 40},
    )
    if bands is None:
        sheet.update_layout(updatemenus=[menu(["strongest paths", "strongest transitions"], [1, 1], 0)])
    return sheet.figure()


Band = tuple[int, int, int, float, str, str]
"""(step, source expert, target expert, tokens, colour, text)."""


def _path_bands(result: xr.Dataset, level: float, most: int) -> tuple[list[Band], str]:
    bands: list[Band] = []
    tested, draws = not np.isnan(result["p"].values).all(), int(result.attrs["draws"])
    drawn = result.isel(path=slice(most)).transpose("path", ...)
    names = ("count", "share", "control", "control_rank", "p", "q", "markov")
    columns = [drawn[name].values.tolist() for name in names]
    for route, count, share, control, of_rank, p, q, markov in zip(
        drawn["expert"].values.tolist(), *columns, strict=True
    ):
        beyond = tested and p <= level
        text = f"path {' → '.join(map(str, route))}<br>{count:,.0f} tokens, {share:.2%}"
        if tested:
            text += f"<br>controls: {control:,.1f} on average, {of_rank:,.1f} for the path of its rank"
            text += f"<br>p = {p:.2g}, q = {q:.2g}; {draws} controls cannot give less than p = {1 / (draws + 1):.2g}"
        text += f"<br>from each step alone: {markov:,.1f}"
        colour = _ORANGE_BAND if beyond else _GREY_BAND
        bands += [(step, route[step], route[step + 1], count, colour, text) for step in range(len(route) - 1)]
    return bands, "strongest paths"


def _transition_bands(result: xr.Dataset) -> tuple[list[Band], str]:
    bands: list[Band] = []
    counts = result["link_count"].transpose("link", "transition").values
    steps, places = np.nonzero(counts > 0)
    names = ("source", "target", "link_conditional", "link_lift")
    columns = [result[name].transpose("link", "transition").values[steps, places].tolist() for name in names]
    for step, count, a, b, share, lift in zip(steps.tolist(), counts[steps, places].tolist(), *columns, strict=True):
        text = (
            f"expert {a:.0f} → expert {b:.0f}<br>{count:,.0f} tokens, {share:.1%} of the source expert's<br>"
            f"{lift:.2f} × the target's usual share"
        )
        bands.append((step, int(a), int(b), float(count), _BLUE_BAND if lift > 1 else _GREY_BAND, text))
    return bands, "strongest transitions"


def _sankey_height(columns: Sequence[Sequence[Any]]) -> int:
    """Pixels of a Sankey diagram: room for a label at each expert of the fullest layer."""
    return max(400, 18 * max(len(column) for column in columns))


def _sankey(result: xr.Dataset, bands: list[Band], name: str) -> go.Sankey:
    """One node for each expert of each step, placed in its layer's column, the busiest at the top."""
    worth: dict[tuple[int, int], list[float]] = {}
    for step, a, b, count, _, _ in bands:
        worth.setdefault((step, a), [0.0, 0.0])[1] += count
        worth.setdefault((step + 1, b), [0.0, 0.0])[0] += count
    nodes = sorted(worth, key=lambda node: (node[0], -max(worth[node]), node[1]))
    steps = result.sizes["step"]
    columns = [[node for node in nodes if node[0] == step] for step in range(steps)]
    room = _sankey_height(columns)
    # As plotly scales bands: the fullest column fills the height, with PAD pixels between its nodes.
    scale = min((room - PAD * (len(c) - 1)) / sum(max(worth[node]) for node in c) for c in columns if c)
    y = []
    for column in columns:
        top = (room - PAD * (len(column) - 1) - scale * sum(max(worth[node]) for node in column)) / 2
        for node in column:
            size = scale * max(worth[node])
            # plotly moves nodes that stand exactly at 0 or 1.
            y.append(min(max((top + size / 2) / room, 0.001), 0.999))
            top += size + PAD
    place = {node: index for index, node in enumerate(nodes)}
    layers = layer_names(result)
    return go.Sankey(
        name=name,
        arrangement="snap",
        node={
            "label": [f"{expert}" for _, expert in nodes],
            "x": [min(max(step / (steps - 1), 0.001), 0.999) for step, _ in nodes],
            "y": y,
            "color": GREY,
            "pad": PAD,
            "thickness": 10,
            "line": {"width": 0},
            "customdata": [f"layer {layers[step]}, expert {expert}" for step, expert in nodes],
            "hovertemplate": "%{customdata}<br>%{value:,.0f} tokens of those drawn<extra></extra>",
        },
        link={
            "source": [place[step, a] for step, a, *_ in bands],
            "target": [place[step + 1, b] for step, _, b, *_ in bands],
            "value": [count for *_, count, _, _ in bands],
            "color": [colour for *_, colour, _ in bands],
            "customdata": [text for *_, text in bands],
            "hovertemplate": "%{customdata}<extra></extra>",
        },
    )
