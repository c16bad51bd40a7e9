"""Domain specialisation: how far each expert's share of a domain's tokens is from uniform choice, one map a domain."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import plotly.graph_objects as go
import xarray as xr

from moescope.figures.label_maps import Maps, counted, label_maps
from moescope.figures.specialisation import standing

READ = (
    "One map per domain. Colour is the expert's share of the domain's tokens against uniform choice, k/E, in "
    "doublings: orange twice and more, blue half and less. Full colour stands at q ≤ 0.05 against labels dealt anew "
    "over documents, that is, against the expert's share of all texts; an expert that is busy everywhere is orange and "
    "pale."
)
"""How to read the figure."""


def domain_specialisation(
    result: xr.Dataset,
    level: float = 0.05,
    labels: Sequence[str] | None = None,
    most: int = 12,
    columns: int | None = None,
) -> go.Figure:
    """Draws the result of `analysis.domain_specialisation`.

    How to read it: see `READ`.

    Args:
        result: from `analysis.domain_specialisation` or its form on counts.
        level, labels, most, columns: as in `figures.npmi`.
    """
    stands = standing(result, level)
    with np.errstate(divide="ignore"):
        value = np.log2(result["excess"].values)
    # Colours end where the largest excess does; an expert never chosen is not further down than that.
    reach = float(max(1.0, np.nanmax(value[np.isfinite(value)], initial=0.0)))
    ends = [f"{2.0**mark:g} ×" for mark in range(-int(reach), int(reach) + 1)]
    maps = Maps(
        value=np.where(np.isneginf(value), -99.0, value),
        stands=stands,
        about=[_about(result, index, stands) for index in range(result.sizes["label"])],
        details=("share", "excess", "share_low", "share_high", "null_p99", "q"),
        hover=(
            "<b>%{customdata[0]:.1%}</b> of this domain's tokens (95 % interval %{customdata[2]:.1%} to "
            "%{customdata[3]:.1%})<br>%{customdata[1]:.2f} × uniform choice<br>null's 99th percentile "
            "%{customdata[4]:.1%}, q = %{customdata[5]:.2g}"
        ),
        bar={
            "title": {"text": "× uniform", "side": "top"},
            "tickvals": list(range(-int(reach), int(reach) + 1)),
            "ticktext": ends,
        },
        reach=reach,
    )
    return label_maps(result, maps, labels, most, columns)


def _about(result: xr.Dataset, index: int, stands: np.ndarray) -> str:
    above = stands[..., index] & (result["share"].values > result["null_mean"].values)[..., index]
    return "no null" if np.isnan(result["q"].values).all() else counted(above.sum(), "above chance")
