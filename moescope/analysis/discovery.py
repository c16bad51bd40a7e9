"""False discovery among many tests: q-values by Benjamini and Hochberg (1995) or Benjamini and Yekutieli (2001)."""

from __future__ import annotations

import math
from typing import Literal

import numpy as np
from scipy.stats import false_discovery_control

_LEVEL = 0.05


def adjusted(p: np.ndarray, method: Literal["bh", "by"] = "bh") -> np.ndarray:
    """q-values of all p-values that are defined, as one family; NaN where p is."""
    tested = ~np.isnan(p)
    q = np.full(p.shape, np.nan)
    q[tested] = false_discovery_control(p[tested], method=method) if tested.any() else []
    return q


def too_few(
    p: np.ndarray, q: np.ndarray, draws: int, tests: int, what: str, sides: int = 1, correction: str = "bh"
) -> str:
    """Why nothing could reach q <= 0.05 with that many draws of a null, though some p are the smallest there can be.

    Args:
        p, q: of all tests; NaN where there was none.
        draws: of the null, so that no p is below `sides` / (`draws` + 1).
        tests: how many different ones stand in `p`.
        what: plural, what was tested.
        sides: 2 where p is twice the smaller tail.
        correction: "bh", or "by", whose q are larger by 1 + 1/2 + ... + 1/`tests`.

    Returns:
        Words, or nothing where something stands, or where no p is as small as it can be: more draws would not help.
    """
    floor, tested = sides / (draws + 1), p[~np.isnan(p)]
    share = float((tested <= floor * (1 + 1e-9)).mean()) if tested.size else 0.0
    if not share or np.nanmin(q) <= _LEVEL:
        return ""
    strict = float((1 / np.arange(1, tests + 1)).sum()) if correction == "by" else 1.0
    needed = math.ceil(tests * floor * strict / _LEVEL)
    takes = f"takes at least {needed:,} discoveries" if needed <= tests else "cannot be reached"
    return (
        f"with {draws:,} permutations no p is below {floor:.2g}, so that q <= {_LEVEL:g} {takes} among the {tests:,} "
        f"{what}, and {round(share * tests):,} have that p: raise permutations, to "
        f"{math.ceil(sides * strict / (_LEVEL * share)) - 1:,} or more if all of these hold"
    )
