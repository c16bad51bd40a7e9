"""Do criteria rank the experts of a layer alike? Rank correlations, beside what independence gives and what halves of
the documents give."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import xarray as xr
from scipy.stats import false_discovery_control, kendalltau, rankdata

from moescope.analysis.permutation import TIE
from moescope.analysis.resampling import mean_present
from moescope.analysis.watching import counted

if TYPE_CHECKING:
    from jaxtyping import Float

FEWEST = 4
"""Experts that both criteria must rank: three cannot reach p <= 0.05 in any order."""
NULL = (
    "independence: each criterion's ranking of a layer's experts dealt at random, in every layer; p is two-sided for "
    "the mean over layers. Criteria that share a factor agree by construction: what is left to ask of them is whether "
    "they agree less than a criterion with itself on other documents (split_half)"
)
PAIR = ("criterion", "against")


def agreement(
    values: Sequence[Float[np.ndarray, "layer expert"]], names: Sequence[str], permutations: int, seed: int
) -> xr.Dataset:
    """Rank correlations between criteria, over the experts of each layer.

    Args:
        values: one [layer, expert] table for each criterion; NaN where it says nothing.
        names: of the criteria.
        permutations: rankings dealt at random behind p; 0 for none.
        seed: of them.

    Returns:
        Dataset with dims (layer, criterion, against): spearman, kendall (tau-b), NaN with fewer than 4 experts that
        both rank, or where one puts all on one place; (criterion, against): spearman_within and kendall_within (means
        over the layers), spearman_pooled (over the experts of all layers, so that layers that differ in scale count
        too), null_p99 (99th percentile of |spearman_within| under the null), p, q (Benjamini-Hochberg over the pairs).
    """
    stacked = np.stack(values)
    n, layers = len(names), stacked.shape[1]
    rho, tau = np.full((layers, n, n), np.nan), np.full((layers, n, n), np.nan)
    pooled, p, p99 = (np.full((n, n), np.nan) for _ in range(3))
    rng = np.random.default_rng(seed)
    dealt: dict[int, np.ndarray] = {}
    # Layers of one width share the deals, each in an order of its own.
    order = [rng.permutation(permutations) for _ in range(layers)]
    for a in range(n):
        for b in range(a, n):
            drawn = []
            for layer in range(layers):
                x, y = _both(stacked[a, layer], stacked[b, layer])
                if x.size < FEWEST or np.ptp(x) == 0 or np.ptp(y) == 0:
                    continue
                ranks = _standard(x), _standard(y)
                rho[layer, a, b] = rho[layer, b, a] = ranks[0] @ ranks[1]
                tau[layer, a, b] = tau[layer, b, a] = _tau(x, y)
                if permutations and a != b:
                    if x.size not in dealt:
                        dealt[x.size] = rng.permuted(np.tile(np.arange(x.size), (permutations, 1)), axis=1)
                    drawn.append((ranks[0][dealt[x.size]] @ ranks[1])[order[layer]])
            x, y = _both(stacked[a].ravel(), stacked[b].ravel())
            if x.size >= FEWEST and np.ptp(x) > 0 and np.ptp(y) > 0:
                pooled[a, b] = pooled[b, a] = _standard(x) @ _standard(y)
            if drawn:
                null = np.abs(np.mean(drawn, axis=0))
                reached = (null >= abs(np.nanmean(rho[:, a, b])) - TIE).sum()
                p[a, b] = p[b, a] = (1 + reached) / (1 + permutations)
                p99[a, b] = p99[b, a] = np.quantile(null, 0.99)
    by_layer = ("layer", *PAIR)
    return xr.Dataset(
        {
            "spearman": (by_layer, rho),
            "kendall": (by_layer, tau),
            "spearman_within": (PAIR, mean_present(np.moveaxis(rho, 0, -1))),
            "kendall_within": (PAIR, mean_present(np.moveaxis(tau, 0, -1))),
            "spearman_pooled": (PAIR, pooled),
            "null_p99": (PAIR, p99),
            "p": (PAIR, p),
            "q": (PAIR, _adjusted(p)),
        },
        coords={"criterion": list(names), "against": list(names)},
    )


def across_halves(
    first: Float[np.ndarray, "criterion split layer expert"], second: Float[np.ndarray, "criterion split layer expert"]
) -> Float[np.ndarray, "layer criterion criterion"]:
    """Mean Spearman correlation of criteria on one half of the documents with criteria on the other.

    Args:
        first, second: the criteria on either half; NaN where they say nothing.

    Returns:
        [layer, criterion, criterion], symmetric; its diagonal is each criterion's split-half reliability. An expert
        counts in a split where every criterion ranks it in both halves.
    """
    n, splits, layers = first.shape[:3]
    found = np.full((splits, layers, n, n), np.nan)
    for split in counted("halves", range(splits)):
        for layer in range(layers):
            a, b = first[:, split, layer], second[:, split, layer]
            kept = ~(np.isnan(a) | np.isnan(b)).any(axis=0)
            if kept.sum() < FEWEST:
                continue
            one, other = (np.stack([_standard(row[kept]) for row in half]) for half in (a, b))
            cross = one @ other.T
            found[split, layer] = (cross + cross.T) / 2
    return mean_present(np.moveaxis(found, 0, -1))


def _both(a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    there = ~(np.isnan(a) | np.isnan(b))
    return a[there], b[there]


def _standard(values: np.ndarray) -> np.ndarray:
    """Average ranks with mean 0 and length 1, whose products are rank correlations; NaN where all are equal."""
    ranks = rankdata(values)
    centred = ranks - ranks.mean()
    length = np.linalg.norm(centred)
    return centred / length if length > 0 else np.full(values.shape, np.nan)


def _tau(a: np.ndarray, b: np.ndarray) -> float:
    found = kendalltau(a, b)
    return float(found[0])  # pyright: ignore[reportArgumentType]


def _adjusted(p: np.ndarray) -> np.ndarray:
    """Benjamini-Hochberg over the pairs, each counted once."""
    q = np.full(p.shape, np.nan)
    row, column = np.nonzero(np.triu(~np.isnan(p), 1))
    if row.size:
        q[row, column] = q[column, row] = false_discovery_control(p[row, column])
    return q
