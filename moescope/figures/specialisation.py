"""Who specialises in what: one map per label, where what chance explains is pale."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import plotly.graph_objects as go
import xarray as xr
from plotly.subplots import make_subplots

from moescope.errors import MoescopeError
from moescope.figures.axes import align_titles, expert_axis, layer_axis, layer_names
from moescope.figures.theme import colour_bar, plain, row_height, template

READ = (
    "One map per label. Orange: the expert fires on this label's tokens more than on others, blue: less. Full colour "
    "stands at q ≤ {level:g} against labels dealt anew over documents; pale cells are within what chance explains. "
    "Colour saturates at nPMI ±{reach:.2f}; a gap is an expert that was never selected."
)
"""How to read the figure; filled in by `read`."""
TITLE = 62
"""Pixels between rows of panels: two lines of title and the axis."""
PALE = 0.22
"""Opacity of cells that chance explains."""


def read(result: xr.Dataset, level: float = 0.05) -> str:
    """How to read the figure of this result."""
    return READ.format(level=level, reach=_reach(result))


def npmi(
    result: xr.Dataset,
    level: float = 0.05,
    labels: Sequence[str] | None = None,
    most: int = 12,
    columns: int | None = None,
) -> go.Figure:
    """Draws nPMI of every (layer, expert), one panel per label, with significance drawn in.

    How to read it: see `READ`.

    Args:
        result: from `analysis.npmi` or one of its forms on counts (without p-values every cell is drawn in full).
        level: the false discovery rate below which a cell stands in full colour.
        labels: which labels, in this order; all by default.
        most: with more labels than this, only those with the most specialised experts are drawn, and the figure says
            so.
        columns: panels per row; by default as many as the number of experts allows.

    Raises:
        MoescopeError: a label that the result does not have.
    """
    known = [str(name) for name in result["label"].values]
    unknown = [name for name in labels or [] if name not in known]
    if unknown:
        raise MoescopeError(f"The result has no label {unknown[0]!r}; it has {', '.join(known)}.")
    stands = standing(result, level)
    chosen = [known.index(name) for name in labels] if labels is not None else list(range(len(known)))
    if labels is None and len(chosen) > most:
        ranked = np.argsort(-stands.sum(axis=(0, 1)), kind="stable")[:most]
        chosen = sorted(int(index) for index in ranked)
    wide = columns or min(len(chosen), 4 if result.sizes["expert"] <= 32 else 2 if result.sizes["expert"] <= 128 else 1)
    rows = -(-len(chosen) // wide)
    layers = result.sizes["layer"]
    panel = row_height(layers) * 0.62 * layers + 18
    figure = make_subplots(
        rows=rows,
        cols=wide,
        shared_xaxes=True,
        shared_yaxes=True,
        horizontal_spacing=0.03 if wide > 2 else 0.05,
        vertical_spacing=min(0.9 / max(rows - 1, 1), TITLE / (rows * (panel + TITLE))),
        subplot_titles=[_title(result, index, stands) for index in chosen],
    )
    for place, index in enumerate(chosen):
        row, column = divmod(place, wide)
        for trace in _panel(result, index, stands[..., index]):
            figure.add_trace(trace, row=row + 1, col=column + 1)
    reach = _reach(result)
    figure.update_xaxes(expert_axis(result, most=8, title={"text": ""}, tickangle=0))
    figure.update_yaxes(layer_axis(result, title={"text": ""}))
    for column in range(1, wide + 1):
        lowest = rows if (rows - 1) * wide + column <= len(chosen) else rows - 1
        figure.update_xaxes(title_text="expert", showticklabels=True, row=lowest, col=column)
    for row in range(1, rows + 1):
        figure.update_yaxes(title_text="layer", row=row, col=1)
    figure.update_layout(
        template=template("light"),
        height=int(rows * (panel + TITLE) + 90),
        showlegend=False,
        coloraxis={
            "cmin": -reach,
            "cmax": reach,
            "colorbar": {"title": {"text": "nPMI", "side": "right"}, "nticks": 7} | colour_bar(rows * (panel + TITLE)),
        },
    )
    align_titles(figure, len(chosen))
    if labels is None and len(chosen) < len(known):
        figure.add_annotation(
            text=f"{len(chosen)} of {len(known)} labels are drawn; name others with labels=",
            xref="paper",
            yref="paper",
            x=1,
            y=1,
            xanchor="right",
            yanchor="bottom",
            yshift=22,
            showarrow=False,
        )
    return figure


def standing(result: xr.Dataset, level: float = 0.05) -> np.ndarray:
    """[layer, expert, label] bool: q <= level; everything where the result has no null at all."""
    q = result["q"].values
    return np.isfinite(result["npmi"].values) if np.isnan(q).all() else q <= level


def _title(result: xr.Dataset, index: int, stands: np.ndarray) -> str:
    name = plain(result["label"].values[index])
    preferred = int((stands[..., index] & (result["npmi"].values[..., index] > 0)).sum())
    documents = result["documents"].values[index]
    about = f"{preferred} experts" if not np.isnan(result["q"].values).all() else "no null"
    counted = "" if np.isnan(documents) else f" · {documents:,.0f} documents"
    return f"<b>{name}</b><br><span style='font-size:11px'>{about}{counted}</span>"


def _panel(result: xr.Dataset, index: int, stands: np.ndarray) -> list[go.Heatmap]:
    part = result.isel(label=index)
    value = part["npmi"].values
    names = ("lift", "p_active", "null_p99", "p", "q", "p_max", "count")
    # Single precision: it is for reading, twice in the page, and the bulk of a large model's figure.
    details = np.stack([part[name].values for name in names], axis=-1).astype(np.float32)
    label = plain(result["label"].values[index])
    traces = []
    for kept, opacity in ((~stands, PALE), (stands, 1.0)):
        traces.append(
            go.Heatmap(
                z=np.where(kept, value, np.nan),
                x=part["expert"].values,
                y=layer_names(result),
                coloraxis="coloraxis",
                opacity=opacity,
                customdata=details,
                # A label's name is data: in meta it is printed, in the template it would be parsed.
                meta=label,
                hoverongaps=False,
                xgap=1,
                ygap=1,
                hovertemplate=(
                    "%{meta}<br>layer %{y}, expert %{x}<br><b>nPMI %{z:.3f}</b> (null's 99th percentile "
                    "%{customdata[2]:.3f})<br>active at %{customdata[1]:.1%} of this label's tokens, "
                    "%{customdata[0]:.2f} × its share of all<br>p = %{customdata[3]:.2g}, q = %{customdata[4]:.2g}, "
                    "family-wise p = %{customdata[5]:.2g}<br>%{customdata[6]:,.0f} selections<extra></extra>"
                ),
            )
        )
    return traces


def _reach(result: xr.Dataset) -> float:
    """Colour saturates at the largest preference: the -1 of pairs that never meet must not wash everything else out."""
    values = result["npmi"].values
    return float(max(0.1, np.nanmax(values, initial=0.0)))
