"""Maps of experts and of tokens: points in a plane, with how far the map can be trusted written on it."""

from __future__ import annotations

from typing import Any

import numpy as np
import plotly.graph_objects as go
import xarray as xr

from moescope.analysis.contexts import visible
from moescope.errors import MoescopeError
from moescope.figures.axes import DEPTH, layer_names
from moescope.figures.sheets import Sheet
from moescope.figures.theme import BLUE, GREY, ORANGE, colour_bar, plain, shortened

READ_TRUST = (
    "Trustworthiness {numbers} says how many of a point's neighbours here are its neighbours there; distances between "
    "far groups, and the size of a group, mean nothing."
)
"""How far to trust the figure."""
READ = f"Points that stand together are alike in {{features}}. {READ_TRUST}"
"""How to read the figure; filled in by `read`."""
NAME = 20
"""Characters of a token that are written beside its point; all of them show under the pointer."""


def read(result: xr.Dataset) -> str:
    """How to read the figure of this result."""
    quality = _quality(result)
    beside = f"(dealt at random {quality['chance']:.2f}, first two principal components {quality['pca']:.2f})"
    return READ.format(features=result.attrs["features"], numbers=f"{quality['true']:.2f} {beside}")


def expert_map(
    result: xr.Dataset,
    values: xr.DataArray | None = None,
    name: str = "layer",
    only: xr.DataArray | None = None,
    note: str = "",
) -> go.Figure:
    """Draws experts as points, coloured by layer or by anything that is known of each.

    How to read it: see `READ`.

    Args:
        result: from `analysis.expert_map` or `expert_map_from_features`.
        values: (layer, expert) numbers, drawn on a scale, or texts, drawn as kinds with a legend ("" for none); the
            layer if None. Layers are matched by their site; what has no value is grey.
        name: of the values.
        only: (layer, expert) bool: all other experts are faint and answer to no click.
        note: words on the values, over the map: their null.

    Raises:
        MoescopeError: `only` leaves nothing.
    """
    x, y = result["x"].values, result["y"].values
    names = np.array(layer_names(result), dtype=object)
    layers = np.broadcast_to(result["layer"].values.astype(float)[:, None], x.shape)
    held = layers if values is None else _fitted(values, result)
    shown = ~np.isnan(x) & (True if only is None else _fitted(only, result).astype(bool))
    if not shown.any():
        raise MoescopeError("No expert of the map is in this group.")
    row, expert = np.nonzero(shown)
    ids = np.stack([np.broadcast_to(names[:, None], x.shape), np.indices(x.shape)[1].astype(object)], axis=-1)
    about = np.stack([names[row], expert.astype(object), held[row, expert]], axis=-1)
    size = 10 if row.size < 300 else 7 if row.size < 2000 else 5
    common: dict[str, Any] = {"mode": "markers"}
    bar: dict[str, Any] = {}
    traces = []
    faint = ~np.isnan(x) & ~shown
    if faint.any():
        traces.append(
            go.Scatter(
                x=x[faint], y=y[faint], customdata=ids[faint], hoverinfo="skip", showlegend=False, name="others",
                marker={"color": GREY, "size": size - 2, "opacity": 0.18}, **common,
            )
        )  # fmt: skip
    template = "<b>layer %{customdata[0]}, expert %{customdata[1]}</b>"
    if held.dtype == object:
        # Of all experts, so that a kind keeps its colour when the others turn faint.
        kinds = sorted({str(kind) for kind in held[~np.isnan(x)]} - {""}, key=lambda kind: (len(kind), kind))
        kinds = kinds if all(kind.isdigit() for kind in kinds) else sorted(kinds)
        for place, kind in enumerate([*kinds, ""]):
            mine = np.array([str(value) == kind for value in about[:, 2]], dtype=bool)
            if not mine.any():
                continue
            shown_name = plain(kind) if kind else "none beyond chance" if name != "group" else "linked with none"
            marker = _kind(place) if kind else {"color": GREY, "symbol": "circle", "opacity": 0.5}
            traces.append(
                go.Scatter(
                    x=x[row[mine], expert[mine]], y=y[row[mine], expert[mine]], customdata=about[mine],
                    marker={"opacity": 0.9, "line": {"width": 0.6, "color": GREY}} | marker | {"size": size},
                    name=shown_name, hovertemplate=f"{template}<br>{name}: {shown_name}<extra></extra>", **common,
                )
            )  # fmt: skip
    else:
        told = "" if values is None else f"<br>{name}: %{{customdata[2]:.4~g}}"
        colour, bar = _scaled(held[row, expert].astype(float)) if values is not None else _depths(result, row)
        unknown = np.isnan(colour)
        for mine, marker in (
            (unknown, {"color": GREY, "opacity": 0.4}),
            (~unknown, {"color": colour[~unknown], "coloraxis": "coloraxis", "opacity": 0.9}),
        ):
            if not mine.any():
                continue
            traces.append(
                go.Scatter(
                    x=x[row[mine], expert[mine]], y=y[row[mine], expert[mine]],
                    customdata=about[mine, : 2 if values is None else 3],
                    marker=marker | {"size": size, "line": {"width": 0.6, "color": GREY}}, name="experts",
                    hovertemplate=f"{template}{told}<extra></extra>", showlegend=False, **common,
                )
            )  # fmt: skip
    without = int(result["exists"].values.sum() - (~np.isnan(x)).sum()) if "exists" in result else 0
    said = [f"{without:,} expert{'s have' if without != 1 else ' has'} no features and no place" if without else ""]
    if only is not None:
        said.insert(0, f"{row.size} of {int((~np.isnan(x)).sum())} experts in colour")
    sheet = _sheet(result, traces, name, bar, "; ".join(part for part in [*said, note] if part))
    if values is None:  # as depth is coloured elsewhere, whichever layers are shown; one layer has no depth
        ends = {"cmin": layers.min(), "cmax": layers.max(), "showscale": result.sizes["layer"] > 1}
        sheet.update_layout(coloraxis={"colorscale": DEPTH} | ends)
    sheet.update_layout(
        meta={"points": [str(layer) for layer in names]},
        showlegend=held.dtype == object,
        legend={"title": {"text": name}, "itemsizing": "constant"},
    )
    return sheet.figure()


gate_map = expert_map


def token_map(result: xr.Dataset, named: int = 40, layer: str | int | None = None) -> go.Figure:
    """Draws token ids as points; the most frequent ones of each place are named.

    How to read it: see `READ`. How many of the store's token ids are drawn, and by what rule, stands over the map.

    Args:
        result: from `analysis.token_map`.
        named: how many tokens are written out at most; fewer where they would stand on one another.
        layer: coloured by the share of a token's occurrences at which its most frequent expert of this layer is
            active; how often a token occurs if None.

    Raises:
        MoescopeError: the result has no such layer.
    """
    count = result["count"].values.astype(float)
    written = [repr(visible(str(text)))[1:-1] for text in result["text"].values]
    texts, short = [_printed(text) for text in written], [_printed(shortened(text, NAME)) for text in written]
    points = np.stack([result["x"].values, result["y"].values], axis=-1)
    frequent = _apart(points, np.argsort(-count, kind="stable"), named)
    if layer is None:
        name, extra = "occurrences", [np.zeros(count.size)] * 2
        colour, bar = _logged(count)
        told = ""
    else:
        names = layer_names(result)
        if str(layer) not in names:
            raise MoescopeError(f"The map of tokens has no layer {layer}; it has {', '.join(names)}.")
        row = names.index(str(layer))
        name, bar = f"share with its expert active, layer {names[row]}", {"nticks": 6, "tickformat": ".0%"}
        colour, *extra = (result[held].values[:, row] for held in ("top_share", "top_expert", "top_usual"))
        told = (
            f"<br>expert %{{customdata[5]}} of layer {names[row]} is active at %{{customdata[7]:.0%}} of them, at "
            "%{customdata[6]:.0%} of all tokens"
        )
    about = [np.array(texts, dtype=object), result["token"].values, count, result["document"].values]
    about += [result["place"].values, *extra, colour]
    trace = go.Scatter(
        x=result["x"].values,
        y=result["y"].values,
        text=[text if place in frequent else "" for place, text in enumerate(short)],
        customdata=np.stack(about, axis=-1),
        mode="markers+text",
        textposition="top center",
        textfont={"size": 11},
        cliponaxis=False,
        marker={
            "color": colour,
            "coloraxis": "coloraxis",
            "size": 7 if count.size < 500 else 5,
            "opacity": 0.8,
            "line": {"width": 0.6, "color": GREY},
        },
        # A lasso changes what is chosen, not how it looks: faint points would say "not here".
        selected={"marker": {"opacity": 1}},
        unselected={"marker": {"opacity": 0.35}},
        name="tokens",
        hovertemplate=(
            "<b>%{customdata[0]}</b><br>token id %{customdata[1]}, %{customdata[2]:,.0f} times, first in document "
            f"%{{customdata[3]}}{told}<extra></extra>"
        ),
    )
    said = (
        f"{count.size:,} of {int(result['ids']):,} token ids: the most frequent, each at least "
        f"{result.attrs['min_count']} times, {float(result['covered']):.0%} of all tokens"
    )
    sheet = _sheet(result, [trace], name, bar, said)
    low, high = sheet.axes()[0]["range"]
    room = 0.04 * (high - low)  # for names at the edges
    sheet.update_xaxes(range=[low - room, high + room])
    return sheet.figure()


def _printed(text: str) -> str:
    """Safe for plotly. Quotes come back as written: it shows their entities as they are, and they do nothing."""
    return plain(text).replace("&quot;", '"').replace("&#x27;", "'")


def _scaled(values: np.ndarray) -> tuple[np.ndarray, dict[str, Any]]:
    """(what colours stand for, their bar): logarithms where positive numbers reach over a decade and more."""
    known = values[np.isfinite(values)]
    wide = known.size and known.min() > 0 and known.max() >= 10 * known.min()
    return _logged(values) if wide else (values, {"nticks": 8})


def _logged(values: np.ndarray) -> tuple[np.ndarray, dict[str, Any]]:
    """The same on a logarithmic scale, with ticks at round numbers between the ends, or at the ends."""
    low, high = float(np.nanmin(values)), float(np.nanmax(values))
    decades = range(int(np.floor(np.log10(low))), int(np.ceil(np.log10(high))) + 1)
    ticks = np.unique([low, high])
    for steps in ((1, 2, 5), (1,)):
        found = np.array([step * 10.0**decade for decade in decades for step in steps])
        found = found[(found >= low) & (found <= high)]
        ticks = found if found.size > 1 else ticks
        if ticks.size <= 8:
            break
    # From 0 on: numbers of both signs would get the colours of what has a middle.
    return np.log10(values / low), {"tickvals": np.log10(ticks / low), "ticktext": [f"{tick:,.4g}" for tick in ticks]}


def _depths(result: xr.Dataset, row: np.ndarray) -> tuple[np.ndarray, dict[str, Any]]:
    """Layer numbers, at most a dozen of them written beside the scale."""
    numbers = np.unique(result["layer"].values)
    return result["layer"].values[row].astype(float), {"tickvals": numbers[:: max(1, -(-numbers.size // 12))]}


def _fitted(values: xr.DataArray, result: xr.Dataset) -> np.ndarray:
    """Values in the rows and columns of the map; NaN, "" or False where they have none."""
    sites = [str(site) for site in values["site"].values] if "site" in values.coords else None
    keys = [str(site) for site in result["site"].values]
    own = sites if sites is not None else [f"L{int(layer):03d}" for layer in values["layer"].values]
    given = values.transpose("layer", "expert").values
    empty: Any = "" if given.dtype == object else False if given.dtype == bool else np.nan
    found = np.full(result["x"].shape, empty, dtype=given.dtype if given.dtype in (object, bool) else float)
    wide = min(found.shape[1], given.shape[1])
    for row, key in enumerate(keys):
        if key in own:
            found[row, :wide] = given[own.index(key), :wide]
    return found


def _kind(place: int) -> dict[str, Any]:
    """Colour and shape of the n-th kind: the shape changes when the colours are used up."""
    colours = [BLUE, ORANGE, "#2a9d78", "#b65a92", "#c9a227", "#6f5fc4"]
    symbols = ["circle", "diamond", "square", "triangle-up", "cross", "star"]
    return {"color": colours[place % len(colours)], "symbol": symbols[place // len(colours) % len(symbols)]}


def _sheet(result: xr.Dataset, traces: list[go.Scatter], colour: str, bar: dict[str, Any], said: str = "") -> Sheet:
    sheet = Sheet()
    for trace in traces:
        sheet.add_trace(trace)
    blank = {"showgrid": False, "showticklabels": False, "zeroline": False, "title": {"text": ""}}
    points = np.concatenate(
        [np.stack([np.asarray(t.x, dtype=float), np.asarray(t.y, dtype=float)], axis=-1) for t in traces]
    )
    low, high = _bulk(points)
    beyond = int(((points < low) | (points > high)).any(axis=1).sum())
    sheet.update_xaxes(blank | {"range": [low[0], high[0]]})
    # Not at one scale: the axes of a map have no unit, and a page is wider than high.
    sheet.update_yaxes(blank | {"range": [low[1], high[1]]})
    quality = _quality(result)
    far = f", {beyond} of them outside the frame (autoscale shows them)" if beyond else ""
    sheet.update_layout(
        height=560,
        showlegend=False,
        title={
            "text": f"trustworthiness {quality['true']:.2f}<br><span style='font-size:12px'>dealt at random "
            f"{quality['chance']:.2f}, first two principal components {quality['pca']:.2f}; {int(result['points'])} "
            f"points{far}{'<br>' if said else ''}{said}; laid out with seed {result.attrs['seed']}</span>",
            "y": 1,
            "yref": "container",
            "yanchor": "top",
            "pad": {"t": 18},
        },
        coloraxis={
            "colorbar": {"title": {"text": colour, "side": "right"}} | bar | colour_bar(480),
        },
        margin={"t": 84 if said else 66, "b": 16, "l": 16},
    )
    return sheet


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
