"""False discovery among many tests: q-values by Benjamini and Hochberg (1995)."""

from __future__ import annotations

import numpy as np
from scipy.stats import false_discovery_control


def adjusted(p: np.ndarray) -> np.ndarray:
    """q-values of all p-values that are defined, as one family; NaN where p is."""
    tested = ~np.isnan(p)
    q = np.full(p.shape, np.nan)
    q[tested] = false_discovery_control(p[tested]) if tested.any() else []
    return q
