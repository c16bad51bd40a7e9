"""Points in a plane, near each other where their features are alike; with how far the layout can be trusted.

Source: UMAP (arXiv 1802.03426), by umap-learn; trustworthiness as Venna & Kaski (2001) define it, by scikit-learn.
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from moescope.analysis.watching import look
from moescope.errors import MoescopeError

if TYPE_CHECKING:
    from jaxtyping import Float

_ALONE = threading.Lock()
FEWEST = 6
"""Points below which there is nothing to lay out."""
QUALITY = (
    "trustworthiness: the share, less a penalty, of a point's neighbours on the map that are its neighbours in the "
    "features too; 1 all of them. Beside it that of the same points dealt anew over the map (chance) and of the first "
    "two principal components. Distances between far groups, and their sizes, mean nothing on a UMAP"
)


@dataclass(frozen=True)
class Layout:
    """Points in a plane and how true they are to what they stand for.

    Attributes:
        points: [n, 2].
        trustworthiness: of the map; chance: of its points dealt anew; pca: of the first two principal components.
        neighbours: how many neighbours both the map and its trustworthiness look at.
    """

    points: Float[np.ndarray, "point 2"]
    trustworthiness: float
    chance: float
    pca: float
    neighbours: int


def lay_out(
    features: Float[np.ndarray, "point feature"], neighbours: int = 15, min_dist: float = 0.1, seed: int = 0
) -> Layout:
    """UMAP of the rows, Euclidean, begun from their first two principal components; the same for the same seed.

    Args:
        features: one finite row per point.
        neighbours: of each point that the map tries to keep; fewer where there are few points.
        min_dist: how tightly points may be packed.
        seed: of the optimisation.

    Raises:
        MoescopeError: too few points, values that are not finite, all points alike, or umap-learn is not installed.
    """
    rows = np.asarray(features, dtype=np.float64)
    if rows.ndim != 2 or len(rows) < FEWEST:
        raise MoescopeError(f"A map needs at least {FEWEST} points with features; got {len(rows)}.")
    if not np.isfinite(rows).all():
        raise MoescopeError("A map needs finite features: leave points without them out.")
    centred = rows - rows.mean(axis=0)
    if np.abs(centred).max(initial=0) <= 1e-12 * max(np.abs(rows).max(initial=0), 1e-300):
        raise MoescopeError("All points have the same features: there is nothing to lay out.")
    umap, trust = _libraries()
    near = int(min(neighbours, (len(rows) - 1) // 2))
    start = _components(centred)
    rng = np.random.default_rng(seed)
    # UMAP scales its start to the range of each axis: features of one dimension need something to scale on the other.
    begin = np.where(np.ptp(start, axis=0) > 1e-9, start, rng.normal(size=start.shape))
    with _alone(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of its own choices of threads and of small graphs
        model = umap.UMAP(
            n_neighbors=max(2, near), min_dist=min_dist, random_state=seed, n_jobs=1, init=begin.astype(np.float32),
        )  # fmt: skip
        points = np.asarray(model.fit_transform(rows), dtype=np.float64)
    dealt = rng.permutation(len(points))
    true, chance, pca = (float(trust(rows, where, n_neighbors=near)) for where in (points, points[dealt], start))
    return Layout(points, true, chance, pca, near)


@contextmanager
def _alone() -> Iterator[None]:
    """One at a time: numba's own threads end the process where two Python threads start them at once."""
    while not _ALONE.acquire(timeout=0.2):
        look()  # who waits can be stopped
    try:
        yield
    finally:
        _ALONE.release()


def _components(centred: np.ndarray) -> np.ndarray:
    """The first two principal components, signs fixed, scaled as UMAP's own starts are."""
    u, s, _ = np.linalg.svd(centred, full_matrices=False)
    points = np.zeros((len(centred), 2))
    points[:, : min(2, s.size)] = (u * s)[:, :2]
    largest = points[np.abs(points).argmax(axis=0), [0, 1]]
    points *= np.where(largest < 0, -1.0, 1.0)
    return points * (10 / np.abs(points).max())


def _libraries() -> tuple[Any, Any]:
    try:
        import umap  # pyright: ignore[reportMissingImports]
        from sklearn.manifold import trustworthiness  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise MoescopeError('Maps need umap-learn: pip install "moescope[maps]".') from error
    return umap, trustworthiness
