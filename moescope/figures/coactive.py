"""Which experts of one layer meet at the same tokens."""

from __future__ import annotations

from collections.abc import Sequence

import plotly.graph_objects as go
import xarray as xr

from moescope.figures.axes import layer_names
from moescope.figures.lift_maps import chosen_maps, lift_maps, lift_reach, say, square
from moescope.figures.menus import menu
from moescope.figures.pale import untested
from moescope.figures.sheets import Sheet

READ = (
    "Orange: the two experts are active at the same token more often than their loads alone would have it, blue: less "
    "often. Full colour stands at q ≤ {level:g}, by the spread between groups of documents. The menu chooses the layer."
)
"""How to read the figure."""


def coactivation(result: xr.Dataset, level: float = 0.05, layers: Sequence[int] | None = None) -> go.Figure:
    """Draws how often experts of one layer are active together, against their loads alone.

    How to read it: see `READ`.

    Args:
        result: from `analysis.coactivation`.
        level: the false discovery rate below which a cell stands in full colour.
        layers: which layers; by default as many as a browser can hold, those with the most standing pairs first.

    Raises:
        MoescopeError: a layer that the result does not have.
    """
    known = layer_names(result)
    stands = (result["q"].values <= level).sum(axis=(1, 2))
    wanted = None if layers is None else [str(layer) for layer in layers]
    chosen = chosen_maps(known, wanted, stands, result["lift"][0].size, "layer")
    sheet = Sheet()
    groups, reach = [], lift_reach(result["lift"].values)
    for place, index in enumerate(chosen):
        part = result.isel(layer=index)
        names = ("lift", "conditional", "count", "expected", "lift_low", "lift_high", "p", "q")
        hover = (
            "%{meta}<br>experts %{y} and %{x}<br><b>%{customdata[0]:.2f} × as often as their loads give</b> "
            "(%{customdata[4]:.2f} to %{customdata[5]:.2f})<br>at %{customdata[1]:.1%} of expert %{y}'s tokens, "
            "expected %{customdata[3]:.1%}<br>%{customdata[2]:,.0f} tokens; p = %{customdata[6]:.2g}, "
            "q = %{customdata[7]:.2g}<extra></extra>"
        )
        traces = lift_maps(part, names, f"layer {known[index]}", hover, level, reach)
        groups.append(len(traces))
        for trace in traces:
            trace.visible = place == 0
            sheet.add_trace(trace)
    n = int(result["exists"].values[chosen].sum(axis=1).max(initial=1))  # as wide as the widest layer drawn
    square(sheet, n, n, "other expert", "expert", reach)
    if len(chosen) > 1:
        sheet.update_layout(
            updatemenus=[menu([f"layer {known[index]}" for index in chosen], groups, 0)], margin={"t": 72}
        )
    if untested(result["q"].values):
        say(sheet, f"not tested, so all is pale: {result.attrs['interval'].removeprefix('none: ')}")
        sheet.update_layout(margin={"t": 72})
    elif len(chosen) < len(known) and layers is None:
        say(sheet, f"{len(chosen)} of {len(known)} layers are drawn; name others with layers=")
    return sheet.figure()
