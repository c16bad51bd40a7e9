"""How experts follow one another from layer to layer, meet inside a layer, and which paths tokens take."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import plotly.graph_objects as go
import xarray as xr
from plotly.subplots import make_subplots

from moescope.errors import MoescopeError
from moescope.figures.axes import align_titles
from moescope.figures.theme import BLUE, GREY, ORANGE, colour_bar, plain, template

READ_AFFINITY = (
    "Left: orange, the target expert gets more of the source expert's tokens than its usual share, blue less; full "
    "colour stands at q ≤ {level:g} against rotations within sequences, pale is within what they give; the menu "
    "chooses the pair of layers. Right: what knowing the source expert tells of the target expert, beyond chance; an "
    "orange tick is what chance reaches once in 100."
)
READ_COACTIVATION = (
    "Orange: the two experts are active at the same token more often than their loads alone would have it, blue: less "
    "often. Full colour stands at q ≤ {level:g}, by the spread between groups of documents. The menu chooses the layer."
)
READ_PATHS = (
    "Each band is a path through the window's layers, as wide as its tokens are many: orange where more tokens take it "
    "than in any control, grey otherwise. The menu shows the most used transitions instead."
)
"""How to read the figures."""
PALE = 0.22
"""Opacity of cells that chance explains."""
CELLS = 400_000
"""Cells that one figure holds: beyond them the page would be too heavy for a browser."""
SIDE = 430
"""Pixels of a square map."""
PAD = 8
"""Pixels between the experts of one layer in a Sankey diagram."""
_ORANGE_BAND, _BLUE_BAND, _GREY_BAND = "rgba(221,122,44,0.5)", "rgba(63,132,201,0.4)", "rgba(139,145,154,0.3)"


def read_affinity(result: xr.Dataset, level: float = 0.05) -> str:
    """How to read the figure of this result."""
    return READ_AFFINITY.format(level=level)


def affinity(result: xr.Dataset, level: float = 0.05, pairs: Sequence[str] | None = None) -> go.Figure:
    """Draws the lift of every transition, one map per pair of layers, beside the information of each pair.

    How to read it: see `READ_AFFINITY`.

    Args:
        result: from `analysis.affinity` or `affinity_from_counts`; without cells only the information is drawn.
        level: the false discovery rate below which a cell stands in full colour.
        pairs: names of the pairs to draw, e.g. "3-4"; by default as many of the most informative ones as a browser
            can hold, and the figure says so.

    Raises:
        MoescopeError: a pair that the result does not have.
    """
    if "lift" not in result:
        return mutual_information(result)
    known = [str(name) for name in result["pair"].values]
    chosen = _chosen(known, pairs, result["mi_corrected"].values, result["lift"][0].size, "pair of layers")
    figure = make_subplots(
        rows=1,
        cols=2,
        column_widths=[0.62, 0.38],
        horizontal_spacing=0.16,
        subplot_titles=["lift of each transition", "information beyond chance (nats)"],
    )
    groups, reach = [], _reach(result["lift"].values)
    for place, index in enumerate(chosen):
        part = result.isel(pair=index)
        names = ("lift", "conditional", "count", "expected", "p", "q")
        title = f"layer {part['source_layer'].item()} → layer {part['target_layer'].item()}"
        hover = (
            "%{meta}<br>expert %{y} → expert %{x}<br><b>%{customdata[0]:.2f} × its usual share</b><br>"
            "%{customdata[1]:.1%} of the source expert's tokens<br>%{customdata[2]:,.0f} counted, "
            "%{customdata[3]:,.1f} under the null<br>p = %{customdata[4]:.2g}, q = %{customdata[5]:.2g}<extra></extra>"
        )
        traces = _lift_maps(part, names, title, hover, level, reach)
        groups.append(len(traces))
        for trace in traces:
            trace.visible = place == 0
            figure.add_trace(trace, row=1, col=1)
    fixed = _information(result)
    for trace in fixed:
        figure.add_trace(trace, row=1, col=2)
    _square(
        figure, result.sizes["target_expert"], result.sizes["source_expert"], "target expert", "source expert", reach
    )
    _information_axes(figure, result, "2")
    labels = [known[index].replace("-", " → ") for index in chosen]
    if len(chosen) > 1:
        figure.update_layout(updatemenus=[_menu(labels, groups, len(fixed))], margin_t=92)
    align_titles(figure, 2)
    if len(chosen) < len(known) and pairs is None:
        _say(figure, f"maps of {len(chosen)} of {len(known)} pairs; name others with pairs=")
    return figure


def mutual_information(result: xr.Dataset) -> go.Figure:
    """Draws the information between layers: bars for a chain of layers, a map of layers by layers otherwise.

    Args:
        result: from `analysis.affinity`.
    """
    figure = make_subplots(rows=1, cols=1)
    for trace in _information(result):
        figure.add_trace(trace)
    figure.update_layout(template=template("light"), showlegend=False, height=SIDE + 110)
    _information_axes(figure, result, "")
    return figure


def coactivation(result: xr.Dataset, level: float = 0.05, layers: Sequence[int] | None = None) -> go.Figure:
    """Draws how often experts of one layer are active together, against their loads alone.

    How to read it: see `READ_COACTIVATION`.

    Args:
        result: from `analysis.coactivation`.
        level: the false discovery rate below which a cell stands in full colour.
        layers: which layers; by default as many as a browser can hold, those with the most standing pairs first.

    Raises:
        MoescopeError: a layer that the result does not have.
    """
    unique = np.unique(result["layer"].values).size == result.sizes["layer"]
    known = [str(name) for name in result["layer" if unique else "site"].values]
    stands = (result["q"].values <= level).sum(axis=(1, 2))
    wanted = None if layers is None else [str(layer) for layer in layers]
    chosen = _chosen(known, wanted, stands, result["lift"][0].size, "layer")
    figure = make_subplots(rows=1, cols=1)
    groups, reach = [], _reach(result["lift"].values)
    for place, index in enumerate(chosen):
        part = result.isel(layer=index)
        names = ("lift", "conditional", "count", "expected", "lift_low", "lift_high", "p", "q")
        hover = (
            "%{meta}<br>experts %{y} and %{x}<br><b>%{customdata[0]:.2f} × as often as their loads give</b> "
            "(%{customdata[4]:.2f} to %{customdata[5]:.2f})<br>at %{customdata[1]:.1%} of expert %{y}'s tokens, "
            "expected %{customdata[3]:.1%}<br>%{customdata[2]:,.0f} tokens; p = %{customdata[6]:.2g}, "
            "q = %{customdata[7]:.2g}<extra></extra>"
        )
        traces = _lift_maps(part, names, f"layer {known[index]}", hover, level, reach)
        groups.append(len(traces))
        for trace in traces:
            trace.visible = place == 0
            figure.add_trace(trace)
    n = result.sizes["expert"]
    _square(figure, n, n, "other expert", "expert", reach)
    if len(chosen) > 1:
        figure.update_layout(updatemenus=[_menu([f"layer {known[index]}" for index in chosen], groups, 0)], margin_t=72)
    if len(chosen) < len(known) and layers is None:
        _say(figure, f"{len(chosen)} of {len(known)} layers are drawn; name others with layers=")
    return figure


def paths(result: xr.Dataset, level: float = 0.05, most: int = 40) -> go.Figure:
    """Draws the strongest paths through a window of layers as a Sankey diagram; a menu shows transitions instead.

    How to read it: see `READ_PATHS`.

    Args:
        result: from `analysis.paths`.
        level: paths with p at most this stand in colour (all of them where there was no control).
        most: paths to draw, the most used first.
    """
    sankeys: list[Any] = [
        _sankey(result, *bands) for bands in (_path_bands(result, level, most), _transition_bands(result))
    ]
    figure = go.Figure()
    for place, sankey in enumerate(sankeys):
        sankey.visible = place == 0
        figure.add_trace(sankey)
    steps = result.sizes["step"]
    fullest = max(max(np.unique(sankey.node.x, return_counts=True)[1]) for sankey in sankeys)
    for step in range(steps):
        figure.add_annotation(
            text=f"layer {int(result['layer'].values[step])}",
            x=step / (steps - 1),
            y=1.0,
            xref="paper",
            yref="paper",
            yanchor="bottom",
            yshift=6,
            showarrow=False,
        )
    entropy, control = float(result["path_entropy"]), float(result["control_entropy"])
    said = f"path entropy {entropy:.2f} nats" if math.isfinite(entropy) else "path entropy not known"
    if math.isfinite(control) and math.isfinite(entropy):
        said += f", {control:.2f} in the controls (p = {float(result['p_entropy']):.2g})"
    shown = min(most, result.sizes["path"])
    said += f" · the {shown} paths drawn carry {float(result['share'].values[:shown].sum()):.1%} of the tokens"
    figure.add_annotation(text=said, x=0, y=0, xref="paper", yref="paper", xanchor="left", yanchor="top", yshift=-16)
    figure.update_layout(
        template=template("light"),
        height=_sankey_height([range(int(fullest))]) + 160,
        margin={"t": 96, "b": 64, "l": 24, "r": 40},
        updatemenus=[_menu(["strongest paths", "strongest transitions"], [1, 1], 0)],
    )
    return figure


def _chosen(known: list[str], wanted: Sequence[str] | None, worth: np.ndarray, cells: int, what: str) -> list[int]:
    """Which maps to draw: the ones asked for, or the most worthy that fit, in the result's order."""
    unknown = [name for name in wanted or [] if name not in known]
    if unknown:
        raise MoescopeError(f"The result has no {what} {plain(unknown[0])}; it has {', '.join(known)}.")
    if wanted is not None:
        return [known.index(name) for name in wanted]
    fits = max(1, CELLS // max(cells, 1))
    best = np.argsort(-np.nan_to_num(worth.astype(float), nan=-np.inf), kind="stable")[:fits]
    return sorted(best.tolist())


def _lift_maps(
    part: xr.Dataset, names: Sequence[str], title: str, hover: str, level: float, reach: int
) -> list[go.Heatmap]:
    """Two maps, what chance explains below and what stands above it; where nothing was tested everything stands."""
    lift = part["lift"].values
    q = part["q"].values
    stands = np.isfinite(lift) if np.isnan(q).all() else q <= level
    with np.errstate(divide="ignore", invalid="ignore"):
        shown = np.where(np.isnan(lift), np.nan, np.maximum(np.log2(lift), -reach))
    details = np.stack([part[name].values for name in names], axis=-1).astype(np.float32)
    return [
        go.Heatmap(
            z=np.where(kept, shown, np.nan),
            x=np.arange(lift.shape[1]),
            y=np.arange(lift.shape[0]),
            coloraxis="coloraxis",
            opacity=opacity,
            customdata=details,
            meta=plain(title),
            hoverongaps=False,
            xgap=1 if lift.shape[1] <= 64 else 0,
            ygap=1 if lift.shape[1] <= 64 else 0,
            hovertemplate=hover,
        )
        for kept, opacity in ((~stands, PALE), (stands, 1.0))
    ]


def _reach(lift: np.ndarray) -> int:
    """Colour saturates at 2 ** reach times the usual share, either way: enough for the largest lift, 32 at most."""
    largest = float(np.nanmax(lift, initial=1.0))
    return int(min(5, max(1, math.ceil(math.log2(max(largest, 2.0))))))


def _square(figure: go.Figure, width: int, height: int, across: str, down: str, reach: int) -> None:
    ticks = list(range(-reach, reach + 1))
    axis = {"showgrid": False, "zeroline": False, "nticks": 10}
    figure.update_xaxes(axis | {"title": {"text": across}, "range": [-0.5, width - 0.5]}, row=1, col=1)
    figure.update_yaxes(axis | {"title": {"text": down}, "range": [height - 0.5, -0.5]}, row=1, col=1)
    figure.update_layout(
        template=template("light"),
        height=SIDE + 130,
        showlegend=False,
        coloraxis={
            "cmin": -reach,
            "cmax": reach,
            "colorbar": {
                "title": {"text": "lift", "side": "right"},
                "tickvals": ticks,
                "ticktext": [f"{2**tick}×" if tick >= 0 else f"1/{2**-tick}×" for tick in ticks],
                "x": 1.0 if across.startswith("other") else 0.535,
            }
            | colour_bar(SIDE),
        },
    )


def _information(result: xr.Dataset) -> list[Any]:
    names = [str(name).replace("-", " → ") for name in result["pair"].values]
    fields = ("mi_corrected", "mi", "mi_null", "normalised", "p_mi", "q_mi", "entropy_target", "total")
    details = np.stack([result[name].values for name in fields], axis=-1)
    shown = np.where(np.isnan(result["mi_corrected"].values), result["mi"].values, result["mi_corrected"].values)
    about = (
        "<b>%{customdata[0]:.3f} nats beyond chance</b> (of %{customdata[1]:.3f}; the null's mean is "
        "%{customdata[2]:.3f})<br>the target layer's entropy is %{customdata[6]:.2f}; normalised "
        "%{customdata[3]:.3f}<br>p = %{customdata[4]:.2g}, q = %{customdata[5]:.2g}; %{customdata[7]:,.0f} counted"
        "<extra></extra>"
    )
    if not _is_chain(result):
        return [_matrix(result, shown, details, about)]
    bar = go.Bar(
        x=shown,
        y=names,
        orientation="h",
        marker={"color": BLUE, "opacity": 0.6, "line": {"width": 0}},
        customdata=details,
        name="information",
        hovertemplate="layers %{y}<br>" + about,
    )
    chance = result["mi_null_p99"].values - result["mi_null"].values
    tick = go.Scatter(
        x=chance,
        y=names,
        mode="markers",
        marker={"symbol": "line-ns", "size": 14, "line": {"width": 2.5, "color": ORANGE}},
        name="chance",
        hovertemplate="layers %{y}<br>the null: below %{x:.4f} nats in 99 of 100<extra></extra>",
    )
    return [bar, tick]


def _matrix(result: xr.Dataset, shown: np.ndarray, details: np.ndarray, about: str) -> go.Heatmap:
    what = "layer" if _numbers_are_unique(result) else "site"
    source, target = (result[f"{end}_{what}"].values.astype(str) for end in ("source", "target"))
    rows, columns = list(dict.fromkeys(source.tolist())), list(dict.fromkeys(target.tolist()))
    z, held = np.full((len(rows), len(columns)), np.nan), np.full((len(rows), len(columns), details.shape[1]), np.nan)
    for index, (a, b) in enumerate(zip(source.tolist(), target.tolist(), strict=True)):
        z[rows.index(a), columns.index(b)] = shown[index]
        held[rows.index(a), columns.index(b)] = details[index]
    scale: Any = template("light").layout
    return go.Heatmap(
        z=z,
        x=columns,
        y=rows,
        customdata=held,
        colorscale=scale.colorscale.sequential,
        zmin=0,
        zmax=float(np.nanmax(shown, initial=1e-3)),
        colorbar={"title": {"text": "nats", "side": "right"}, "outlinewidth": 0, "thickness": 10} | colour_bar(SIDE),
        hoverongaps=False,
        xgap=1,
        ygap=1,
        name="information",
        hovertemplate="layers %{y} → %{x}<br>" + about,
    )


def _information_axes(figure: go.Figure, result: xr.Dataset, number: str) -> None:
    names = [str(name).replace("-", " → ") for name in result["pair"].values]
    x, y = f"xaxis{number}", f"yaxis{number}"
    if not _is_chain(result):
        figure.update_layout(
            {x: {"title": {"text": "target layer"}, "type": "category", "showgrid": False}}
            | {y: {"title": {"text": "source layer"}, "type": "category", "autorange": "reversed", "showgrid": False}}
        )
        return
    step = max(1, -(-len(names) // 26))
    places = {
        "type": "category",
        "categoryorder": "array",
        "categoryarray": names[::-1],
        "range": [-0.5, len(names) - 0.5],
        "tickvals": names[::step],
        "showgrid": False,
        "title": {"text": "layers"},
    }
    figure.update_layout({x: {"title": {"text": "nats"}, "rangemode": "tozero"}, y: places, "bargap": 0.35})


def _is_chain(result: xr.Dataset) -> bool:
    """Does each layer stand at most once as a source and once as a target?"""
    ends = (result[name].values.tolist() for name in ("source_site", "target_site"))
    return all(len(set(sites)) == len(sites) for sites in ends)


def _numbers_are_unique(result: xr.Dataset) -> bool:
    """Is there one router to each layer number?"""
    found: dict[int, set[str]] = {}
    for end in ("source", "target"):
        for layer, site in zip(result[f"{end}_layer"].values, result[f"{end}_site"].values, strict=True):
            found.setdefault(int(layer), set()).add(str(site))
    return all(len(sites) == 1 for sites in found.values())


Band = tuple[int, int, int, float, str, str]
"""(step, source expert, target expert, tokens, colour, text)."""


def _path_bands(result: xr.Dataset, level: float, most: int) -> tuple[list[Band], str]:
    bands: list[Band] = []
    tested = not np.isnan(result["p"].values).all()
    for index in range(min(most, result.sizes["path"])):
        part = result.isel(path=index)
        route = part["expert"].values.tolist()
        count, control, p = (float(part[name]) for name in ("count", "control", "p"))
        beyond = not tested or (p <= level and count > control)
        text = f"path {' → '.join(map(str, route))}<br>{count:,.0f} tokens, {float(part['share']):.2%}"
        if tested:
            text += f"<br>controls: {control:,.1f} on average, p = {p:.2g}"
        text += f"<br>from each step alone: {float(part['markov']):,.1f}"
        colour = _ORANGE_BAND if beyond else _GREY_BAND
        bands += [(step, route[step], route[step + 1], count, colour, text) for step in range(len(route) - 1)]
    return bands, "strongest paths"


def _transition_bands(result: xr.Dataset) -> tuple[list[Band], str]:
    bands: list[Band] = []
    counts = result["link_count"].values
    for step, place in zip(*np.nonzero(counts > 0), strict=True):
        part = result.isel(link=step, transition=place)
        a, b = int(part["source"]), int(part["target"])
        lift = float(part["link_lift"])
        text = (
            f"expert {a} → expert {b}<br>{int(counts[step, place]):,} tokens, {float(part['link_conditional']):.1%} of "
            f"the source expert's<br>{lift:.2f} × the target's usual share"
        )
        bands.append((int(step), a, b, float(counts[step, place]), _BLUE_BAND if lift > 1 else _GREY_BAND, text))
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
    layers = result["layer"].values
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
            "customdata": [f"layer {int(layers[step])}, expert {expert}" for step, expert in nodes],
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


def _menu(labels: list[str], groups: list[int], fixed: int) -> dict:
    """A menu that shows one group of traces at a time, and always the `fixed` ones after them."""
    buttons = [
        {
            "label": plain(name),
            "method": "restyle",
            "args": [
                {"visible": [which == index for which, size in enumerate(groups) for _ in range(size)] + [True] * fixed}
            ],
        }
        for index, name in enumerate(labels)
    ]
    return {"buttons": buttons, "x": 0, "xanchor": "left", "y": 1, "yanchor": "bottom", "pad": {"b": 30}}


def _say(figure: go.Figure, text: str) -> None:
    figure.add_annotation(
        text=text, xref="paper", yref="paper", x=1, y=1, xanchor="right", yanchor="bottom", yshift=22, showarrow=False
    )
