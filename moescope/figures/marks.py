"""Marks that figures share: whiskers of an interval, and the tick that chance reaches once in 100."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import plotly.graph_objects as go
import xarray as xr

from moescope.figures.theme import GREY, ORANGE


def limits(part: xr.Dataset, name: str) -> tuple[np.ndarray, np.ndarray]:
    """`name_low` and `name_high`, the value itself where there is no interval."""
    value = part[name].values
    low, high = (part[f"{name}_{end}"].values for end in ("low", "high"))
    return np.where(np.isnan(low), value, low), np.where(np.isnan(high), value, high)


def whiskers(value: np.ndarray, low: np.ndarray, high: np.ndarray) -> dict[str, Any]:
    """An `error_x` that spans low to high."""
    spans = {"type": "data", "array": high - value, "arrayminus": value - low}
    return spans | {"thickness": 1.4, "width": 4, "color": GREY}


def chance_ticks(values: Any, names: Sequence[str], said: str) -> go.Scatter:
    """Orange ticks, one a row; `said` is their hover text."""
    return go.Scatter(
        x=values,
        y=names,
        mode="markers",
        marker={"symbol": "line-ns", "size": 14, "line": {"width": 2.5, "color": ORANGE}},
        name="chance",
        hovertemplate=f"{said}<extra></extra>",
    )
