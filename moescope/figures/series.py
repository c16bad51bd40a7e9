"""A series of checkpoints: when tokens find their final expert, and how far routing agrees with the final one."""

from __future__ import annotations

import numpy as np
import plotly.graph_objects as go
import xarray as xr

from moescope.figures.axes import depth_colours, layer_names
from moescope.figures.menus import menu
from moescope.figures.sheets import Sheet
from moescope.figures.theme import GREY

READ = (
    "A line for each layer, blue for the first to orange for the last. Left: the share of tokens whose first expert "
    "is, from this checkpoint on, the final one for good. Middle and right: the share of tokens whose first expert is "
    "the final one at this checkpoint, and of their experts in common with the final ones; dotted grey: the same with "
    "tokens mixed up within their sequence, which is what a router gets by knowing the sequence alone."
)
"""How to read the figure."""
PANELS = (
    ("settled", None, "settled for good"),
    ("top1", "control_top1", "same first expert as at the end"),
    ("overlap", "control_overlap", "experts in common with the end"),
)


def fluctuation(result: xr.Dataset) -> go.Figure:
    """Draws how tokens settle over checkpoints, and how far each checkpoint agrees with the final one.

    How to read it: see `READ`.

    Args:
        result: from `analysis.fluctuation`; with several labels, a menu chooses among them.
    """
    labels = [str(name) for name in result["label"].values]
    sheet = Sheet([title for *_, title in PANELS], cols=len(PANELS), shared_yaxes=True, horizontal_spacing=0.03)
    groups = []
    for index in range(len(labels)):
        part, drawn = result.isel(label=index), 0
        for column, (name, control, _) in enumerate(PANELS, 1):
            for trace in _lines(part, name, control):
                trace.visible = index == 0
                sheet.add_trace(trace, row=1, col=column)
                drawn += 1
        groups.append(drawn)
    sheet.update_xaxes(title={"text": "training step"}, nticks=7)
    sheet.update_yaxes(tickformat=".0%", range=[0, 1.03])
    sheet.update_yaxes(title={"text": "share of tokens"}, row=1, col=1)
    sheet.update_layout(height=430, showlegend=False)
    if len(labels) > 1:
        sheet.update_layout(updatemenus=[menu(labels, groups, 0)], margin={"t": 92})
    return sheet.figure()


def _lines(part: xr.Dataset, name: str, control: str | None) -> list[go.Scatter]:
    steps, names = part["step"].values, layer_names(part)
    lines = []
    if control is not None:
        lines = [
            go.Scatter(
                x=steps,
                y=part[control].values[:, row],
                mode="lines",
                line={"color": GREY, "width": 1.2, "dash": "dot"},
                name=f"control, layer {names[row]}",
                hovertemplate=f"layer {names[row]}, tokens mixed up within their sequence: %{{y:.1%}}<extra></extra>",
            )
            for row in range(len(names))
        ]
    for row, colour in enumerate(depth_colours(len(names))):
        details = [part[f"{name}_{end}"].values[:, row] for end in ("low", "high")]
        lines.append(
            go.Scatter(
                x=steps,
                y=part[name].values[:, row],
                mode="lines+markers",
                line={"color": colour, "width": 1.8},
                marker={"size": 6},
                customdata=np.stack(details, axis=-1),
                name=f"layer {names[row]}",
                hovertemplate=(
                    f"layer {names[row]}, step %{{x:,}}<br><b>%{{y:.1%}}</b> (%{{customdata[0]:.1%}} to "
                    "%{customdata[1]:.1%})<extra></extra>"
                ),
            )
        )
    return lines
