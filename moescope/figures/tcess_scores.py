"""TCESS by task: how far each expert's expected score in a task is from its score in all texts, one map a task."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import plotly.graph_objects as go
import xarray as xr

from moescope.figures.label_maps import Maps, counted, label_maps
from moescope.figures.specialisation import standing

READ = (
    "One map per task. Colour is the expert's expected selection score in this task less its score in all texts: "
    "orange more, blue less. Full colour stands at q ≤ 0.05 against tasks dealt anew over documents; the score itself, "
    "by which PreMoe keeps experts, stands in the hover text."
)
"""How to read the figure."""


def tcess(
    result: xr.Dataset,
    level: float = 0.05,
    labels: Sequence[str] | None = None,
    most: int = 12,
    columns: int | None = None,
) -> go.Figure:
    """Draws the result of `analysis.tcess`.

    How to read it: see `READ`.

    Args:
        result: from `analysis.tcess` or its form on sums by document.
        level, labels, most, columns: as in `figures.npmi`.
    """
    stands = standing(result, level)
    value = result["tcess"].values - result["overall"].values[..., None]
    above = stands & (result["tcess"].values > result["null_mean"].values)
    counts = [int(above[..., index].sum()) for index in range(result.sizes["label"])]
    no_null = np.isnan(result["q"].values).all()
    maps = Maps(
        value=value,
        stands=stands,
        about=["no null" if no_null else counted(count, "above chance") for count in counts],
        details=("tcess", "tcess_low", "tcess_high", "null_p99", "p", "q"),
        hover=(
            "<b>TCESS %{customdata[0]:.3f}</b> (95 % interval %{customdata[1]:.3f} to %{customdata[2]:.3f})<br>"
            "%{z:+.3f} against all texts<br>null's 99th percentile %{customdata[3]:.3f}, p = %{customdata[4]:.2g}, "
            "q = %{customdata[5]:.2g}"
        ),
        bar={"title": {"text": "against all texts", "side": "right"}, "tickformat": "+.2f", "nticks": 7},
        reach=float(max(1e-3, np.nanmax(np.abs(value), initial=0.0))),
    )
    return label_maps(result, maps, labels, most, columns)
