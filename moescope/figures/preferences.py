"""One expert and every label: its nPMI with each, the interval over documents, and what chance reaches."""

from __future__ import annotations

import numpy as np
import plotly.graph_objects as go
import xarray as xr

from moescope.analysis.labelled import row_of_expert
from moescope.errors import MoescopeError
from moescope.figures.marks import limits, whiskers
from moescope.figures.sheets import Sheet
from moescope.figures.specialisation import standing
from moescope.figures.theme import BLUE, GREY, ORANGE, plain, shortened

READ = (
    "Each row is one label. The dot is this expert's nPMI with it: 0 if it fires on the label's tokens as often as on "
    "any, 1 if the two always meet; the line is a 95 % interval over documents. The grey bar is what dealing labels "
    "anew over documents gives, from its mean to its 99th percentile. Filled dots stand against that at q ≤ 0.05, over "
    "all experts and labels tested."
)
"""How to read the figure."""
LEVEL = 0.05
"""False discovery rate at which a dot is filled, as in the atlas."""
MOST = 24
"""Labels drawn: those with the largest nPMI, either way."""


def expert_labels(result: xr.Dataset, site: str, expert: int) -> go.Figure:
    """Draws one expert's nPMI with every label, with the null drawn in.

    How to read it: see `READ`.

    Args:
        result: from `analysis.npmi`.
        site: key of the expert's site.
        expert: its number.

    Raises:
        MoescopeError: the result has no such expert, or it was never selected.
    """
    row = row_of_expert(result, site, expert)
    part = result.isel(layer=row, expert=expert)
    value = part["npmi"].values
    known = np.flatnonzero(np.isfinite(value))
    if not known.size:
        raise MoescopeError("This expert was never selected: there is no label to hold it against.")
    order = known[np.argsort(-np.abs(value[known]), kind="stable")[:MOST]]
    order = order[np.argsort(value[order], kind="stable")]  # the largest at the top
    places = np.arange(order.size)  # not the names: two labels may look alike
    names = [plain(name) for name in result["label"].values[order]]
    stands = standing(result, LEVEL)[row, expert]
    sheet = Sheet()
    low, high = part["null_mean"].values[order], part["null_p99"].values[order]
    sheet.add_trace(
        go.Bar(
            x=high - low,
            base=low,
            y=places,
            orientation="h",
            width=0.52,
            text=names,
            textposition="none",
            marker={"color": GREY, "opacity": 0.28, "line": {"width": 0}},
            customdata=np.stack([low, high], axis=-1),
            name="chance",
            hovertemplate="%{text}<br>labels dealt anew: mean %{customdata[0]:.3f}, 99th percentile "
            "%{customdata[1]:.3f}<extra></extra>",
        )
    )
    sheet.add_trace(_dots(part, order, places, names, stands))
    sheet.add_vline(x=0, line={"color": GREY, "width": 1})
    sheet.update_xaxes(title={"text": "nPMI"}, nticks=7)
    ticks = {"tickvals": places, "ticktext": [plain(shortened(name, 28)) for name in result["label"].values[order]]}
    sheet.update_yaxes(ticks, range=[-0.6, order.size - 0.4], showgrid=False, zeroline=False)
    sheet.update_layout(height=84 + 30 * len(names), showlegend=False, margin={"t": 16})
    if known.size > order.size:
        place = {"xref": "paper", "yref": "paper", "x": 1, "y": 1, "xanchor": "right", "yanchor": "bottom"}
        sheet.add_annotation(text=f"the {order.size} furthest from 0, of {known.size} labels", **place)
        sheet.update_layout(margin={"t": 30}, height=98 + 30 * len(names))
    return sheet.figure()


def _dots(part: xr.Dataset, order: np.ndarray, places: np.ndarray, names: list[str], stands: np.ndarray) -> go.Scatter:
    value = part["npmi"].values
    low, high = limits(part, "npmi")
    edges = [ORANGE if value[i] > 0 else BLUE for i in order.tolist()]
    colours = [edge if stands[i] else "rgba(139,145,154,0.35)" for edge, i in zip(edges, order.tolist(), strict=True)]
    details = np.stack([part[name].values[order] for name in ("lift", "p_active", "p", "q", "count")], axis=-1)
    return go.Scatter(
        x=value[order],
        y=places,
        text=names,
        mode="markers",
        marker={"size": 11, "color": colours, "line": {"width": 1.4, "color": edges}},
        error_x=whiskers(value[order], low[order], high[order]),
        customdata=details,
        name="nPMI",
        hovertemplate="%{text}<br><b>nPMI %{x:.3f}</b><br>active at %{customdata[1]:.1%} of these tokens, "
        "%{customdata[0]:.2f} × its share of all<br>p = %{customdata[2]:.2g}, q = %{customdata[3]:.2g}<br>"
        "%{customdata[4]:,.0f} selections<extra></extra>",
    )
