"""Who specialises in what: nPMI of experts with labels, token classes, tokens and markers, one map each."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import plotly.graph_objects as go
import xarray as xr

from moescope.figures.label_maps import Maps, counted, label_maps
from moescope.figures.pale import beyond

READ = (
    "One map per label. Orange: the expert fires on this label's tokens more than on others, blue: less. Full colour "
    "stands at q ≤ {level:g} against labels dealt anew over documents; pale cells are within what chance explains. "
    "Colour saturates at nPMI ±{reach:.2f}; a gap is an expert that was never selected."
)
"""How to read the figure; filled in by `read`."""
DETAILS = ("lift", "p_active", "null_p99", "p", "q", "p_max", "count")
HOVER = (
    "<b>nPMI %{z:.3f}</b> (null's 99th percentile %{customdata[2]:.3f})<br>active at %{customdata[1]:.1%} of these "
    "tokens, %{customdata[0]:.2f} × its share of all<br>p = %{customdata[3]:.2g}, q = %{customdata[4]:.2g}, "
    "family-wise p = %{customdata[5]:.2g}<br>%{customdata[6]:,.0f} selections"
)


READ_INSIDE = (
    "One map per {what}. Orange: the expert fires on it more than on other tokens, blue: less. Full colour stands at "
    "q ≤ {level:g} against {against}; pale cells are within what chance explains. Colour saturates at nPMI "
    "±{reach:.2f}; a gap is an expert that was never selected. A p below 1e-30 is written as that."
)
OF_TOKENS = {
    "npmi_classes": ("class of tokens", "the other tokens of the same documents"),
    "npmi_tokens": ("token", "the other tokens of the same documents"),
    "npmi_markers": ("marker", "other texts' tokens at the same places"),
}
"""What the maps of token properties are of, and what they are held against."""


def read(result: xr.Dataset, level: float = 0.05) -> str:
    """How to read the figure of this result."""
    what, against = OF_TOKENS.get(result.attrs["analysis"], ("label", ""))
    if result.attrs.get("matched") == "document":
        against = OF_TOKENS["npmi_tokens"][1]
    text = READ_INSIDE if against else READ
    return text.format(level=level, reach=_reach(result), what=what, against=against)


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
        result: from `analysis.npmi` or one of its forms on counts (without p-values every cell is pale).
        level: the false discovery rate below which a cell stands in full colour.
        labels: which labels, in this order; all by default.
        most: with more labels than this, only those with the most specialised experts are drawn, and the figure says
            so.
        columns: panels per row; by default as many as the number of experts allows.

    Raises:
        MoescopeError: a label that the result does not have.
    """
    stands, value = standing(result, level), result["npmi"].values
    maps = Maps(
        value=value,
        stands=stands,
        about=[_about(result, index, stands) for index in range(result.sizes["label"])],
        details=DETAILS,
        hover=HOVER,
        bar={"title": {"text": "nPMI", "side": "right"}, "nticks": 7},
        reach=_reach(result),
    )
    return label_maps(result, maps, labels, most, columns)


npmi_classes = npmi_tokens = npmi_markers = npmi


def standing(result: xr.Dataset, level: float = 0.05) -> np.ndarray:
    """[layer, expert, label] bool: q <= level; nothing where the result has no null at all."""
    return beyond(result["q"].values, level)


def _about(result: xr.Dataset, index: int, stands: np.ndarray) -> str:
    preferred = int((stands[..., index] & (result["npmi"].values[..., index] > 0)).sum())
    documents = result["documents"].values[index]
    about = counted(preferred) if not np.isnan(result["q"].values).all() else "no null"
    return about if np.isnan(documents) else f"{about} · {counted(documents, of='document')}"


def _reach(result: xr.Dataset) -> float:
    """Colour saturates at the largest preference: the -1 of pairs that never meet must not wash everything else out."""
    values = result["npmi"].values
    return float(max(0.1, np.nanmax(values, initial=0.0)))
