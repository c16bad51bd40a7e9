"""Outliers in expert weights: QuantMoE's score of how much a matrix stands to lose by quantisation (METHODS 7).

Source: QuantMoE-Bench (arXiv 2406.08155), its outlier-aware linear layer scorer: the largest, over the columns of a
matrix, of max |w| / mean |w|.
"""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
import xarray as xr

from moescope.analysis.labelled import PADDING, provenance
from moescope.analysis.question import SEED, Analysis, Parameter
from moescope.analysis.similarities import Layers, axis_of, layers_of, matrices_of
from moescope.analysis.watching import counted
from moescope.errors import MoescopeError

Columns = Literal["output", "input"]

NULL = (
    "gaussian: matrices of the same shapes with independent normal entries, mean and largest of the draws; a score "
    "beyond gaussian_max holds weights that no such matrix had"
)
UNDEFINED = "NaN for experts that compute nothing, and where a column is all zeros in every matrix"


def weight_outliers(weights: Layers, columns: Columns = "output", draws: int = 19, seed: int = 0) -> xr.Dataset:
    """How far the largest weight of an expert stands out of its column, matrix by matrix.

    How to read it: a score of 20 means that in some column one weight is 20 times the column's mean magnitude; a
    uniform quantiser that must reach it leaves few steps for the rest, so that such an expert wants more bits (give
    `score` as the importance to `bits_from_importance`). Normal weights alone reach `gaussian`: read a score against
    `gaussian_max`.

    Args:
        weights: by layer, what `expert_weights` gives, or a mapping of names to arrays [E, neuron, channel], neuron i
            being row i everywhere. An iterator of (layer, weights) keeps one layer in memory.
        columns: "output" takes the weights into one output unit as a column (what a per-row scale of the stored
            matrix covers), "input" the weights from one input unit.
        draws: Gaussian experts behind the null; 0 for none.
        seed: of the draws.

    Returns:
        Dataset with dims (layer, expert): score = the largest of its matrices', score_NAME of each matrix, exists;
        (layer): gaussian, gaussian_max.

    Raises:
        MoescopeError: arrays that do not fit, no layer, or an unknown `columns`.
    """
    if columns not in ("output", "input"):
        raise MoescopeError('`columns` is "output" or "input".')
    if draws < 0:
        raise MoescopeError("`draws` must be 0 (no null) or more.")
    held: list[tuple[int, dict[str, np.ndarray]]] = []
    null: list[np.ndarray] = []
    known: dict[tuple, np.ndarray] = {}
    for layer, part in layers_of(weights):
        parts = matrices_of(layer, part)
        held.append((int(layer), {name: outlier_score(matrix, _axis(name, columns)) for name, matrix in parts.items()}))
        shapes = tuple((name, matrix.shape[1:]) for name, matrix in parts.items())
        if shapes not in known:
            known[shapes] = _gaussian(shapes, columns, draws, np.random.default_rng([seed, len(known)]))
        null.append(known[shapes])
    scores = [np.stack(list(parts.values())) for _, parts in held]
    axis = axis_of([layer for layer, _ in held], [table.shape[1] for table in scores])
    cell = ("layer", "expert")
    variables: dict[str, Any] = {"score": (cell, axis.pad([_largest(table) for table in scores]))}
    for name in dict.fromkeys(name for _, parts in held for name in parts):
        blank = [np.full(table.shape[1], np.nan) for table in scores]
        found = [parts.get(name, empty) for (_, parts), empty in zip(held, blank, strict=True)]
        variables[f"score_{name}"] = (cell, axis.pad(found))
    variables["exists"] = (cell, axis.exists)
    variables["gaussian"] = ("layer", [drawn.mean() if draws else np.nan for drawn in null])
    variables["gaussian_max"] = ("layer", [drawn.max() if draws else np.nan for drawn in null])
    attrs = provenance(None, analysis="weight_outliers", columns=columns, draws=draws, seed=seed)
    attrs |= {"null": NULL if draws else "none: no draws were asked for", "undefined": UNDEFINED, "padding": PADDING}
    attrs |= {"table": "layer, expert", "table_order": "score"}
    return xr.Dataset(variables, coords=axis.coordinates(), attrs=attrs)


def outlier_score(matrices: np.ndarray, axis: int) -> np.ndarray:
    """[expert]: the largest over columns of max |w| / mean |w|, columns running along `axis` of [expert, row, column].

    Columns of zeros are left out; NaN where nothing is left.
    """
    size = np.abs(matrices)
    mean = size.mean(axis=axis, dtype=np.float64)
    ratio = np.divide(size.max(axis=axis), mean, out=np.full(mean.shape, np.nan), where=mean > 0)
    return _largest(ratio.T)


def _axis(name: str, columns: Columns) -> int:
    """Where a column runs: `gate` and `up` go from channels to neurons, `down` from neurons to channels."""
    into_neurons = name != "down"
    return 2 if into_neurons == (columns == "output") else 1


def _gaussian(shapes: tuple, columns: Columns, draws: int, rng: np.random.Generator) -> np.ndarray:
    """[draw] scores of experts with normal weights, of these (name, shape) matrices."""
    found = np.zeros(draws)
    for draw in counted("draws of the null", range(draws)):
        parts = (
            outlier_score(rng.standard_normal((1, *shape), dtype=np.float32), _axis(name, columns))
            for name, shape in shapes
        )
        found[draw] = max(float(score[0]) for score in parts)
    return found


def _largest(table: np.ndarray) -> np.ndarray:
    """Maxima over the first axis of what is not NaN; NaN where all is."""
    found = np.where(np.isnan(table), -np.inf, table).max(axis=0, initial=-np.inf)
    return np.where(np.isfinite(found), found, np.nan)


WEIGHT_OUTLIERS_QUESTION = Analysis(
    name="weight_outliers",
    run=weight_outliers,
    figure="weight_outliers",
    help="Which experts have weights that stand out of their columns, and want more bits?",
    parameters=(
        Parameter(
            "columns", str, "output", "a column is what goes into an output, or out of an input", ("output", "input")
        ),
        Parameter("draws", int, 19, "Gaussian experts behind the null; 0 for none"),
        SEED,
    ),
    tier="none",
    inputs=("weights",),
)
