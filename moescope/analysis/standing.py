"""How many cells of an association stand beyond chance, and how many of them chance itself would bring."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import xarray as xr

LEVEL = 0.05
"""The false discovery rate at which a cell is called beyond chance."""


@dataclass(frozen=True)
class BeyondChance:
    """Counts of an association's (layer, expert, label) cells.

    Attributes:
        tested: cells with a p-value.
        standing: of these, with q at most `level`; preferred: of these, with a value above 0.
        false_alarms: of the standing ones, about so many are false alarms, at most: `level` times `standing`.
        experts: (layer, expert) pairs that prefer at least one label; of: those selected at all.
        by_label: label -> preferred cells, in the result's order.
        level: the false discovery rate.
    """

    tested: int
    standing: int
    preferred: int
    false_alarms: float
    experts: int
    of: int
    by_label: dict[str, int]
    level: float


def beyond_chance(result: xr.Dataset, level: float = LEVEL, value: str = "npmi") -> BeyondChance:
    """Counts the cells of a result with dims (layer, expert, label) that stand against its null.

    Args:
        result: from `analysis.npmi`, `npmi_classes`, `npmi_tokens`, `npmi_markers`.
        level: the false discovery rate.
        value: the variable that is above 0 where the expert prefers the label.
    """
    result = result.transpose("layer", "expert", "label", ...)
    q = result["q"].values
    with np.errstate(invalid="ignore"):
        stands = q <= level
        prefers = stands & (result[value].values > 0)
    standing = int(stands.sum())
    return BeyondChance(
        tested=int(np.isfinite(q).sum()),
        standing=standing,
        preferred=int(prefers.sum()),
        false_alarms=level * standing,
        experts=int(prefers.any(axis=2).sum()),
        of=int((np.nansum(result["count"].values, axis=2) > 0).sum()),
        by_label={str(name): int(prefers[..., i].sum()) for i, name in enumerate(result["label"].values)},
        level=level,
    )
