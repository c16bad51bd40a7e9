"""Cells that chance explains are drawn pale, those beyond it in full: the same way in every map."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import plotly.graph_objects as go
import xarray as xr

LEAST = 1e-30
"""A p or q below it is written as it: in single precision it would read 0, which no test can say."""
P_VALUES = ("p", "q", "p_max", "p_mi", "q_mi")
PALE = 0.22
"""Opacity of cells that chance explains, and of those that were not tested."""


def beyond(q: np.ndarray, level: float) -> np.ndarray:
    """Where something stands; nowhere that it was not tested (q is NaN)."""
    with np.errstate(invalid="ignore"):
        return q <= level


def details(part: xr.Dataset, names: Sequence[str]) -> np.ndarray:
    """Variables side by side, as a tooltip reads them: in single precision, since they are the bulk of a figure."""
    columns = [np.maximum(part[name].values, LEAST) if name in P_VALUES else part[name].values for name in names]
    return np.stack(columns, axis=-1).astype(np.float32)


def pale_and_full(z: np.ndarray, stands: np.ndarray, **drawn: Any) -> list[go.Heatmap]:
    """Two maps of the same cells: what chance explains below, and what stands above it."""
    return [
        go.Heatmap(z=np.where(kept, z, np.nan), opacity=opacity, hoverongaps=False, **drawn)
        for kept, opacity in ((~stands, PALE), (stands, 1.0))
    ]


def untested(q: np.ndarray) -> bool:
    """Was nothing tested at all?"""
    return bool(np.isnan(q).all())
