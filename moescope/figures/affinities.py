"""How experts follow one another from layer to layer, and what one layer tells of another."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import plotly.graph_objects as go
import xarray as xr

from moescope.analysis.labelled import layer_name
from moescope.errors import MoescopeError
from moescope.figures.lift_maps import SIDE, chosen_maps, lift_maps, lift_reach, say, square
from moescope.figures.marks import chance_ticks
from moescope.figures.menus import menu
from moescope.figures.pale import details, untested
from moescope.figures.sheets import Sheet
from moescope.figures.theme import BLUE, colour_bar, template

READ = (
    "Left: orange, the target expert gets more of the source expert's tokens than its usual share, blue less; full "
    "colour stands at q ≤ 0.05 against rotations within sequences, pale is within what they give; the menu "
    "chooses the pair of layers. Right: what knowing the source expert tells of the target expert, beyond chance; an "
    "orange tick is what chance reaches once in 100. Unless other ranks were asked for, a token counts for its "
    "first-ranked expert of each layer alone."
)
"""How to read the figure."""


READ_MAP = (
    "Of each token's first expert in either layer. Rows are experts of the first layer, columns of the second. Orange: "
    "the second gets more of the first one's tokens than its usual share, blue less; full colour stands at q ≤ 0.05 "
    "against the second layer rotated within sequences, pale is within what that gives."
)
"""How to read the map of one pair of layers."""
READ_INFORMATION = (
    "What knowing a token's first expert in one layer tells of its first expert in the other, beyond what loads, "
    "topics and runs give; the orange tick is what chance reaches once in 100. Each layer with the next; 0 is nothing."
)
"""How to read the information of a chain of layers."""
_DETAILS = ("lift", "conditional", "count", "expected", "p", "q")
_HOVER = (
    "%{meta}<br>expert %{y} → expert %{x}<br><b>%{customdata[0]:.2f} × its usual share</b><br>"
    "%{customdata[1]:.1%} of OF<br>%{customdata[2]:,.0f} counted, "
    "%{customdata[3]:,.1f} under the null<br>p = %{customdata[4]:.2g}, q = %{customdata[5]:.2g}<extra></extra>"
)


def affinity(result: xr.Dataset, level: float = 0.05, pairs: Sequence[str] | None = None) -> go.Figure:
    """Draws the lift of every transition, one map per pair of layers, beside the information of each pair.

    How to read it: see `READ`.

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
    chosen = chosen_maps(known, pairs, result["mi_corrected"].values, result["lift"][0].size, "pair of layers")
    sheet = Sheet(
        ["lift of each transition", "information beyond chance (nats)"],
        cols=2,
        column_widths=[0.62, 0.38],
        horizontal_spacing=0.16,
    )
    groups, reach = [], lift_reach(result["lift"].values)
    for place, index in enumerate(chosen):
        part = result.isel(pair=index)
        traces = lift_maps(part, _DETAILS, _between(part), _hover(result), level, reach)
        groups.append(len(traces))
        for trace in traces:
            trace.visible = place == 0
            sheet.add_trace(trace, row=1, col=1)
    fixed = _information(result)
    for trace in fixed:
        sheet.add_trace(trace, row=1, col=2)
    square(sheet, result.sizes["target_expert"], result.sizes["source_expert"], "target expert", "source expert", reach)
    _information_axes(sheet, result, 2)
    labels = [_pair_names(result)[index] for index in chosen]
    if len(chosen) > 1:
        sheet.update_layout(updatemenus=[menu(labels, groups, len(fixed))], margin={"t": 92})
    if remark := _remark(result):
        say(sheet, remark)
    if len(chosen) < len(known) and pairs is None:
        say(sheet, f"maps of {len(chosen)} of {len(known)} pairs; name others with pairs=")
    return sheet.figure()


def affinity_map(result: xr.Dataset, pair: str | None = None, level: float = 0.05) -> go.Figure:
    """Draws the lift of every transition of one pair of layers.

    How to read it: see `READ_MAP`.

    Args:
        result: from `analysis.affinity`, with its cells.
        pair: its name, e.g. "3-4"; the first if None.
        level: the false discovery rate below which a cell stands in full colour.

    Raises:
        MoescopeError: a pair that the result does not have, or a result of scores alone.
    """
    if "lift" not in result:
        raise MoescopeError("This result holds the scores of each pair of layers alone; ask for its cells.")
    known = [str(name) for name in result["pair"].values]
    index = chosen_maps(known, None if pair is None else [pair], np.zeros(len(known)), result["lift"].size, "pair")[0]
    part = result.isel(pair=index)
    sizes = [int(part["exists"].any(dim).sum()) for dim in ("source_expert", "target_expert")]
    part = part.isel(source_expert=slice(sizes[1]), target_expert=slice(sizes[0]))
    sheet, reach = Sheet(), lift_reach(part["lift"].values)
    for trace in lift_maps(part, _DETAILS, _between(part), _hover(result), level, reach):
        sheet.add_trace(trace)
    source, target = _ends(part)[0]
    square(sheet, sizes[0], sizes[1], f"other expert, of layer {target}", f"expert of layer {source}", reach)
    sheet.update_xaxes(title={"text": f"expert of layer {target}"})
    sheet.update_layout(margin={"t": 24})
    if remark := _remark(result):
        say(sheet, remark)
        sheet.update_layout(margin={"t": 56})
    return sheet.figure()


def mutual_information(result: xr.Dataset) -> go.Figure:
    """Draws the information between layers: bars for a chain of layers, a map of layers by layers otherwise.

    Args:
        result: from `analysis.affinity`.
    """
    sheet = Sheet()
    for trace in _information(result):
        sheet.add_trace(trace)
    sheet.update_layout(showlegend=False, height=SIDE + 110)
    _information_axes(sheet, result, 1)
    return sheet.figure()


def _hover(result: xr.Dataset) -> str:
    first = str(result.attrs.get("ranks", "top1")) in ("top1", "top 1")
    return _HOVER.replace("OF", "the tokens for which the source expert comes first" if first else "its pairs")


def _remark(result: xr.Dataset) -> str:
    """Why all is pale, where nothing could have stood."""
    if untested(result["q"].values):
        return "not tested, so all is pale"
    few = f"{result.attrs['permutations']} draws are too few for any link to stand; raise permutations"
    return few if "floor" in result.attrs else ""


def _between(part: xr.Dataset) -> str:
    source, target = _ends(part)[0]
    return f"layer {source} → layer {target}"


def _ends(result: xr.Dataset) -> list[tuple[str, str]]:
    """The two layers of each pair, as people write them."""
    sides = [
        [layer_name(layer, str(site)) for layer, site in zip(*map(np.atleast_1d, values), strict=True)]
        for values in ((result[f"{end}_layer"].values, result[f"{end}_site"].values) for end in ("source", "target"))
    ]
    return list(zip(*sides, strict=True))


def _pair_names(result: xr.Dataset) -> list[str]:
    return [" → ".join(ends) for ends in _ends(result)]


def _information(result: xr.Dataset) -> list[Any]:
    names = _pair_names(result)
    fields = ("mi_corrected", "mi", "mi_null", "normalised", "p_mi", "q_mi", "entropy_target", "total")
    facts = details(result, fields)
    shown = np.where(np.isnan(result["mi_corrected"].values), result["mi"].values, result["mi_corrected"].values)
    about = (
        "<b>%{customdata[0]:.3f} nats beyond chance</b> (of %{customdata[1]:.3f}; the null's mean is "
        "%{customdata[2]:.3f})<br>the target layer's entropy is %{customdata[6]:.2f}; normalised "
        "%{customdata[3]:.3f}<br>p = %{customdata[4]:.2g}, q = %{customdata[5]:.2g}; %{customdata[7]:,.0f} counted"
        "<extra></extra>"
    )
    if not _is_chain(result):
        return [_matrix(result, shown, facts, about)]
    bar = go.Bar(
        x=shown,
        y=names,
        orientation="h",
        marker={"color": BLUE, "opacity": 0.6, "line": {"width": 0}},
        customdata=facts,
        name="information",
        hovertemplate="layers %{y}<br>" + about,
    )
    chance = result["mi_null_p99"].values - result["mi_null"].values
    return [bar, chance_ticks(chance, names, "layers %{y}<br>the null: below %{x:.4f} nats in 99 of 100")]


def _matrix(result: xr.Dataset, shown: np.ndarray, facts: np.ndarray, about: str) -> go.Heatmap:
    ends = _ends(result)
    rows, columns = (list(dict.fromkeys(names)) for names in zip(*ends, strict=True))
    z, held = np.full((len(rows), len(columns)), np.nan), np.full((len(rows), len(columns), facts.shape[1]), np.nan)
    for index, (a, b) in enumerate(ends):
        z[rows.index(a), columns.index(b)] = shown[index]
        held[rows.index(a), columns.index(b)] = facts[index]
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


def _information_axes(sheet: Sheet, result: xr.Dataset, column: int) -> None:
    names = _pair_names(result)
    if not _is_chain(result):
        layers = {"type": "category", "showgrid": False}
        sheet.update_xaxes(layers, title={"text": "target layer"}, col=column)
        sheet.update_yaxes(layers, title={"text": "source layer"}, autorange="reversed", col=column)
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
    sheet.update_xaxes(title={"text": "nats"}, rangemode="tozero", col=column)
    sheet.update_yaxes(places, col=column)
    sheet.update_layout(bargap=0.35)


def _is_chain(result: xr.Dataset) -> bool:
    """Does each layer stand at most once as a source and once as a target?"""
    ends = (result[name].values.tolist() for name in ("source_site", "target_site"))
    return all(len(set(sites)) == len(sites) for sites in ends)
