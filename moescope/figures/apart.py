"""Where a recipe routes the tokens of an answer otherwise: selections that are gone by layer, load that moved."""

from __future__ import annotations

import numpy as np
import plotly.graph_objects as go
import xarray as xr

from moescope.figures.axes import expert_axis, layer_axis, layer_names
from moescope.figures.marks import chance_ticks
from moescope.figures.menus import menu
from moescope.figures.sheets import Sheet
from moescope.figures.theme import BLUE, colour_bar, plain, row_height, signed_shares

READ = (
    "Left: orange, the expert has more of its layer's selections under the edits, blue less, over the prompt and one "
    "answer. Right: of the experts that the plain model selects for these tokens, the share that the edited model no "
    "longer selects at the same token, or gives no weight. The orange tick is where that would be if routing did not "
    "depend on the token: the same share between different tokens."
)
"""How to read the figure."""


def answers_apart(result: xr.Dataset) -> go.Figure:
    """Draws how far the routing of each answer moved.

    How to read it: see `READ`.

    Args:
        result: from `decoding.answers_apart`; with several answers, a menu chooses among them.

    Returns:
        A plotly Figure whose height fits the number of layers.
    """
    names = [str(name) for name in result["answer"].values]
    rows = max(row_height(result.sizes["layer"]) * result.sizes["layer"], 90)
    sheet = Sheet(
        ["change of load", "selections changed"],
        cols=2,
        column_widths=[0.72, 0.28],
        horizontal_spacing=0.06,
        shared_yaxes=True,
    )
    reach = max(float(np.nanmax(np.abs(result["share_change"].values), initial=0.0)), 0.005)
    groups = []
    for index in range(len(names)):
        traces = _traces(result.isel(answer=index))
        groups.append(len(traces))
        for trace, column in traces:
            trace.visible = index == 0
            sheet.add_trace(trace, row=1, col=column)
    sheet.update_xaxes(tickformat=".0%", rangemode="tozero", nticks=5, row=1, col=2)
    sheet.update_xaxes(expert_axis(result, most=32), row=1, col=1)
    sheet.update_yaxes(layer_axis(result, title={"text": ""}))
    sheet.update_yaxes(title={"text": "layer"}, row=1, col=1)
    sheet.update_yaxes(ticks="", row=1, col=2)
    sheet.update_layout(
        height=rows + 150,
        showlegend=False,
        bargap=0.35,
        coloraxis={
            "cmin": -reach,
            "cmax": reach,
            "colorbar": {"title": {"text": "points of share", "side": "right"}}
            | signed_shares(reach)
            | colour_bar(rows),
        },
    )
    if len(names) > 1:
        shown = [f"text: {plain(name)}" for name in names]
        sheet.update_layout(updatemenus=[menu(shown, groups, 0)], margin={"t": 92})
    return sheet.figure()


def _traces(part: xr.Dataset) -> list[tuple[go.Bar | go.Scatter | go.Heatmap, int]]:
    names = layer_names(part)
    bar = go.Bar(
        x=part["changed"].values,
        y=names,
        orientation="h",
        marker={"color": BLUE, "opacity": 0.6, "line": {"width": 0}},
        name="selections changed",
        hovertemplate="layer %{y}<br><b>%{x:.1%}</b> of the plain model's selections are gone<extra></extra>",
    )
    said = "layer %{y}<br>between different tokens: %{x:.1%}"
    loads = go.Heatmap(
        z=part["share_change"].values,
        x=part["expert"].values,
        y=names,
        coloraxis="coloraxis",
        customdata=np.stack([part[name].values for name in ("plain_share", "edited_share")], axis=-1),
        hoverongaps=False,
        xgap=1,
        ygap=1,
        name="change of load",
        hovertemplate=(
            "layer %{y}, expert %{x}<br><b>%{customdata[0]:.1%} → %{customdata[1]:.1%}</b> of the layer's selections"
            "<extra></extra>"
        ),
    )
    return [(loads, 1), (bar, 2), (chance_ticks(part["control_changed"].values, names, said), 2)]
