"""Two experts and every label: the nPMI of both, each with its interval and with what chance reaches."""

from __future__ import annotations

import numpy as np
import plotly.graph_objects as go
import xarray as xr

from moescope.analysis.labelled import expert_name, layer_name, row_of_expert
from moescope.errors import MoescopeError
from moescope.figures.marks import limits, whiskers
from moescope.figures.preferences import LEVEL
from moescope.figures.sheets import Sheet
from moescope.figures.specialisation import standing
from moescope.figures.theme import BLUE, GREY, ORANGE, plain, shortened

READ = (
    "Each row is one label: above, as a blue circle, the first expert's nPMI with it, below, as an orange diamond, the "
    "second one's, with 95 % intervals over documents; the grey bars are what dealing labels anew gives each, from its "
    "mean to its 99th percentile. Filled marks stand against that at q ≤ 0.05. The labels that the first prefers more "
    "than the second are at the top. Whether two marks differ is not tested: where their intervals overlap, they may "
    "be the same."
)
"""How to read the figure."""
MOST = 16
"""Labels drawn: those with the largest nPMI of either expert, either way."""
_APART = 0.19  # of a row


def experts_beside(result: xr.Dataset, first: tuple[str, int], second: tuple[str, int]) -> go.Figure:
    """Draws the nPMI of two experts with every label, one under the other.

    How to read it: see `READ`.

    Args:
        result: from `analysis.npmi`.
        first, second: (site key, expert).

    Raises:
        MoescopeError: the result has no such expert, or neither was ever selected.
    """
    rows = [row_of_expert(result, *one) for one in (first, second)]
    parts = [result.isel(layer=row, expert=expert) for row, (_, expert) in zip(rows, (first, second), strict=True)]
    values = np.stack([part["npmi"].values for part in parts])
    known = np.flatnonzero(np.isfinite(values).any(axis=0))
    if not known.size:
        raise MoescopeError("Neither expert was ever selected: there is no label to hold them against.")
    furthest = np.nanmax(np.abs(values[:, known]), axis=0)
    order = known[np.argsort(-furthest, kind="stable")[:MOST]]
    filled = np.nan_to_num(values[:, order])
    order = order[np.argsort(filled[0] - filled[1], kind="stable")]  # the first one's at the top
    places, labels = np.arange(order.size), [str(name) for name in result["label"].values[order]]
    sheet = Sheet()
    sides = ((BLUE, "circle", _APART, first, rows[0]), (ORANGE, "diamond", -_APART, second, rows[1]))
    for part, (colour, symbol, shift, (site, expert), row) in zip(parts, sides, strict=True):
        name = expert_name(layer_name(int(part["layer"]), site), expert)
        stands = standing(result, LEVEL)[row, expert][order]
        sheet.add_trace(_chance(part, order, places + shift))
        sheet.add_trace(_marks(part, order, places + shift, labels, stands, name, colour, symbol))
    sheet.add_vline(x=0, line={"color": GREY, "width": 1})
    sheet.update_xaxes(title={"text": "nPMI"}, nticks=7)
    ticks = {"tickvals": places, "ticktext": [plain(shortened(name, 28)) for name in labels]}
    sheet.update_yaxes(ticks, range=[-0.6, order.size - 0.4], showgrid=False, zeroline=False)
    sheet.update_layout(
        height=max(120 + 36 * order.size, 220),
        margin={"t": 44},
        legend={"orientation": "h", "x": 0, "xanchor": "left", "y": 1, "yanchor": "bottom", "itemclick": False},
    )
    if known.size > order.size:
        place = {"xref": "paper", "yref": "paper", "x": 1, "y": 1, "xanchor": "right", "yanchor": "bottom"}
        sheet.add_annotation(text=f"the {order.size} furthest from 0, of {known.size} labels", **place)
    return sheet.figure()


def _chance(part: xr.Dataset, order: np.ndarray, places: np.ndarray) -> go.Bar:
    low, high = part["null_mean"].values[order], part["null_p99"].values[order]
    return go.Bar(
        x=high - low,
        base=low,
        y=places,
        orientation="h",
        width=0.3,
        marker={"color": GREY, "opacity": 0.28, "line": {"width": 0}},
        showlegend=False,
        hoverinfo="skip",
        name="chance",
    )


def _marks(
    part: xr.Dataset,
    order: np.ndarray,
    places: np.ndarray,
    labels: list[str],
    stands: np.ndarray,
    name: str,
    colour: str,
    symbol: str,
) -> go.Scatter:
    value = part["npmi"].values
    low, high = limits(part, "npmi")
    details = np.stack([part[field].values[order] for field in ("lift", "p_active", "q", "null_p99")], axis=-1)
    return go.Scatter(
        x=value[order],
        y=places,
        text=[plain(label) for label in labels],
        mode="markers",
        marker={
            "symbol": symbol,
            "size": 10,
            # In the legend as well, where a mark takes the first one's colour.
            "color": [colour if stand else "rgba(139,145,154,0.35)" for stand in stands],
            "line": {"width": 1.6, "color": colour},
        },
        error_x=whiskers(value[order], low[order], high[order]),
        customdata=details,
        name=name,
        hovertemplate=f"<b>{plain(name)}</b>, %{{text}}<br><b>nPMI %{{x:.3f}}</b> (chance: below "
        "%{customdata[3]:.3f} in 99 of 100)<br>active at %{customdata[1]:.1%} of these tokens, %{customdata[0]:.2f} × "
        "its share of all<br>q = %{customdata[2]:.2g}<extra></extra>",
    )
