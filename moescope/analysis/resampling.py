"""Intervals over documents: ratios of sums with the documents drawn again, because tokens of one document are alike."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from jaxtyping import Float

INTERVAL = "95 % percentile intervals over documents drawn again with replacement; NaN with fewer than two documents"
CELLS = 4_000_000
"""Cells (draws x documents) that are held at once."""


def ratio_interval(
    numerator: Float[np.ndarray, "document column"],
    denominator: Float[np.ndarray, "document column"],
    resamples: int,
    rng: np.random.Generator,
    mean: bool = False,
) -> tuple[np.ndarray, np.ndarray]:
    """95 % bootstrap interval of sum(numerator) / sum(denominator) of each column, documents being the unit.

    Args:
        numerator, denominator: [document, column].
        resamples: draws; 0 gives NaN.
        rng: of the draws; every column sees the same documents drawn.
        mean: of the mean over the columns instead (columns without a denominator left out).

    Returns:
        (low, high), each [column], or of shape (1,) for the mean; NaN with fewer than two documents that count.
    """
    width = 1 if mean else numerator.shape[1]
    counted = (denominator > 0).sum(axis=0)
    if resamples < 1 or numerator.shape[0] < 2:
        return np.full(width, np.nan), np.full(width, np.nan)
    found = []
    for draws in drawn_documents(numerator.shape[0], resamples, rng):
        with np.errstate(invalid="ignore", divide="ignore"):
            ratio = (draws @ numerator) / (draws @ denominator)
        found.append(mean_present(ratio)[:, None] if mean else ratio)
    ratio = np.concatenate(found)
    low, high = np.full(width, np.nan), np.full(width, np.nan)
    for column in range(width):
        enough = counted.max(initial=0) if mean else counted[column]
        values = ratio[:, column][~np.isnan(ratio[:, column])]
        if enough > 1 and values.size:
            low[column], high[column] = np.quantile(values, [0.025, 0.975])
    return low, high


def drawn_documents(n: int, draws: int, rng: np.random.Generator) -> Iterator[Float[np.ndarray, "draw document"]]:
    """How often each of n documents is drawn, some draws at a time."""
    step = max(1, CELLS // n)
    for first in range(0, draws, step):
        yield rng.multinomial(n, np.full(n, 1 / n), size=min(step, draws - first)).astype(np.float64)


def mean_present(values: np.ndarray) -> np.ndarray:
    """Mean over the last axis of what is not NaN; NaN where all is."""
    n = (~np.isnan(values)).sum(axis=-1)
    return np.where(n > 0, np.nansum(values, axis=-1) / np.maximum(n, 1), np.nan)
