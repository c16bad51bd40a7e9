"""Intervals over documents: ratios of sums with the documents drawn again, because tokens of one document are alike."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np

from moescope.analysis.watching import counted

if TYPE_CHECKING:
    from jaxtyping import Float, Int

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
    for first in counted("resamples", range(0, draws, step)):
        yield rng.multinomial(n, np.full(n, 1 / n), size=min(step, draws - first)).astype(np.float64)


def mean_present(values: np.ndarray) -> np.ndarray:
    """Mean over the last axis of what is not NaN; NaN where all is."""
    n = (~np.isnan(values)).sum(axis=-1)
    return np.where(n > 0, np.nansum(values, axis=-1) / np.maximum(n, 1), np.nan)


def drawn_within(
    strata: Int[np.ndarray, " document"] | None, n: int, draws: int, rng: np.random.Generator
) -> Iterator[Float[np.ndarray, "draw document"]]:
    """The same with as many documents drawn from each stratum as it has; one stratum of all n where None."""
    if strata is None:
        yield from drawn_documents(n, draws, rng)
        return
    members = [np.flatnonzero(strata == stratum) for stratum in np.unique(strata)]
    step = max(1, CELLS // n)
    for first in counted("resamples", range(0, draws, step)):
        here = min(step, draws - first)
        drawn = np.zeros((here, n))
        for rows in members:
            drawn[:, rows] = rng.multinomial(rows.size, np.full(rows.size, 1 / rows.size), size=here)
        yield drawn


def association_interval(
    parts: Sequence[tuple[np.ndarray, np.ndarray]],
    selections: Float[np.ndarray, "document expert"],
    held: Float[np.ndarray, "document label"],
    tokens: Float[np.ndarray, " document"],
    score: Callable[..., np.ndarray],
    resamples: int,
    seed: int,
    strata: Int[np.ndarray, " document"] | None = None,
) -> tuple[Float[np.ndarray, "expert label"], Float[np.ndarray, "expert label"]]:
    """95 % bootstrap interval of an association of experts and labels, documents being the unit.

    Args:
        parts: for each label, the documents that hold it and, for each of these, tokens of the label at which each
            expert was active: (document [n], count [n, expert]).
        selections: tokens at which each expert was active.
        held: tokens of each label.
        tokens: all tokens.
        score: of (joint [draw, expert], label [draw, 1], expert [draw, expert], total [draw, 1]).
        resamples: draws.
        seed: of the draws; the same one draws the same documents, layer after layer.
        strata: documents are drawn within each of these.

    Returns:
        (low, high); NaN for a label that fewer than two documents hold, and where no draw defines the score.
    """
    rng = np.random.default_rng(seed)
    found: list[list[np.ndarray]] = [[] for _ in parts]
    for drawn in drawn_within(strata, tokens.size, resamples, rng):
        total, size, fired = drawn @ tokens, drawn @ held, drawn @ selections
        for label, (rows, count) in enumerate(parts):
            if rows.size > 1:
                joint = drawn[:, rows] @ count
                found[label].append(score(joint, size[:, label, None], fired, total[:, None]))
    bounds = np.full((2, selections.shape[1], len(parts)), np.nan)
    for label, values in enumerate(found):
        if values:
            bounds[..., label] = _bounds(np.concatenate(values))
    return bounds[0], bounds[1]


def _bounds(values: Float[np.ndarray, "draw column"]) -> Float[np.ndarray, "bound column"]:
    """The 2.5th and 97.5th percentile of each column's numbers; NaN for a column without any."""
    known = ~np.isnan(values)
    whole, some = known.all(axis=0), known.any(axis=0)
    bounds = np.full((2, values.shape[1]), np.nan)
    bounds[:, whole] = np.quantile(values[:, whole], [0.025, 0.975], axis=0)
    for column in np.flatnonzero(some & ~whole):
        bounds[:, column] = np.quantile(values[known[:, column], column], [0.025, 0.975])
    return bounds
