"""Cells that chance explains are drawn pale, those beyond it in full: the same way in every map."""

from __future__ import annotations

from typing import Any

import numpy as np
import plotly.graph_objects as go

PALE = 0.22
"""Opacity of cells that chance explains, and of those that were not tested."""


def beyond(q: np.ndarray, level: float) -> np.ndarray:
    """Where something stands; nowhere that it was not tested (q is NaN)."""
    with np.errstate(invalid="ignore"):
        return q <= level


def pale_and_full(z: np.ndarray, stands: np.ndarray, **drawn: Any) -> list[go.Heatmap]:
    """Two maps of the same cells: what chance explains below, and what stands above it."""
    return [
        go.Heatmap(z=np.where(kept, z, np.nan), opacity=opacity, hoverongaps=False, **drawn)
        for kept, opacity in ((~stands, PALE), (stands, 1.0))
    ]


def untested(q: np.ndarray) -> bool:
    """Was nothing tested at all?"""
    return bool(np.isnan(q).all())
