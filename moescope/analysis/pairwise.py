"""Results about pairs of experts of one layer: padded, held against their null, and the closest pairs listed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import xarray as xr

from moescope.analysis.labelled import PADDING, LayerAxis
from moescope.errors import MoescopeError

if TYPE_CHECKING:
    from jaxtyping import Float

LISTED = 50
"""Closest pairs that a result lists by itself; `redundant_pairs` lists every one beyond the null."""
DIAGONAL = "the diagonal is NaN: an expert and itself are not a pair"
TIE = 1e-9
"""Similarities closer than this are equal: rounding must not put a pair above its null."""


@dataclass(frozen=True)
class PairNull:
    """What chance gives for the pairs of one layer.

    Attributes:
        mean, p99: of all null values, every pair in every draw.
        centre, spread: their mean and standard deviation after `stretched`.
        largest: [draw] the largest null value of any pair in each draw.
    """

    mean: float
    p99: float
    centre: float
    spread: float
    largest: Float[np.ndarray, " draw"]

    @classmethod
    def of_draws(cls, draws: Sequence[np.ndarray]) -> PairNull:
        """The null of a list of [E, E] draws (symmetric; the diagonal is ignored, NaN pairs too)."""
        values = [upper(draw) for draw in draws]
        pooled = np.concatenate(values) if values else np.empty(0)
        pooled = pooled[~np.isnan(pooled)]
        if not pooled.size:
            return cls(np.nan, np.nan, np.nan, np.nan, np.empty(0))
        largest = np.array([value[~np.isnan(value)].max(initial=-np.inf) for value in values])
        p99 = float(np.quantile(pooled, 0.99, method="higher"))
        wide = stretched(pooled)
        return cls(float(pooled.mean()), p99, float(wide.mean()), float(wide.std()), largest)

    def steps(self) -> Float[np.ndarray, " draw"]:
        """How many spreads above the centre the closest pair of each draw stands; 0 where the null does not vary."""
        wide = stretched(self.largest)
        return (wide - self.centre) / self.spread if self.spread > TIE else np.zeros(wide.size)

    def at(self, steps: Float[np.ndarray, " draw"]) -> Float[np.ndarray, " draw"]:
        """The similarity so many spreads above the centre."""
        return np.tanh(self.centre + self.spread * steps)


def stretched(similarity: np.ndarray) -> np.ndarray:
    """Fisher's z of similarities up to 1: without it a threshold in spreads could lie above what a copy reaches."""
    return np.arctanh(np.clip(similarity, -1 + TIE, 1 - TIE))


def upper(matrix: Float[np.ndarray, "expert other"]) -> Float[np.ndarray, " pair"]:
    """Values of the pairs (i < j), row by row."""
    return matrix[np.triu_indices(matrix.shape[0], 1)]


def pair_result(
    axis: LayerAxis,
    similarity: Sequence[Float[np.ndarray, "expert other"]],
    nulls: Sequence[PairNull],
    extra: Mapping[str, Sequence[Float[np.ndarray, "expert other"]]],
    attrs: dict[str, Any],
) -> xr.Dataset:
    """A labelled result over pairs of experts.

    Args:
        axis: its layers.
        similarity: one [E, E] matrix per layer; NaN where undefined.
        nulls: one per layer.
        extra: further matrices by name, one per layer each.
        attrs: provenance and notes.

    Returns:
        Dataset with dims (layer, expert, other): similarity, the extras, p_max (1 + draws in which any pair of any
        layer comes this close) / (1 + draws), z = robust z among the layer's own pairs, redundant (bool: above
        null_extreme); with dims (layer): null_mean, null_p99, null_extreme (what no pair of any layer reached in any
        draw, in the units of this layer); and the closest pairs of all layers, dims (pair): pair_layer, pair_expert,
        pair_other, pair_similarity, pair_p_max, pair_z, pair_redundant. Where nothing is alike, the chance that any
        pair of the whole result is `redundant` is 1 / (1 + draws), however many layers it has.
    """
    cell = ("layer", "expert", "other")
    matrices = [_without_diagonal(matrix) for matrix in similarity]
    reach = _reach(nulls)
    p_max = [_p_max(matrix, null, reach) for matrix, null in zip(matrices, nulls, strict=True)]
    z = [robust_z(matrix) for matrix in matrices]
    extreme = np.array([null.at(reach).max() if null.largest.size else np.nan for null in nulls])
    square = _square(axis, matrices)
    with np.errstate(invalid="ignore"):
        redundant = square > extreme[:, None, None] + TIE
    variables: dict[str, Any] = {"similarity": (cell, square)}
    for name, values in extra.items():
        variables[name] = (cell, _square(axis, [_without_diagonal(matrix) for matrix in values]))
    variables |= {
        "p_max": (cell, _square(axis, p_max)),
        "z": (cell, _square(axis, z)),
        "redundant": (cell, redundant),
        "null_mean": ("layer", np.array([null.mean for null in nulls])),
        "null_p99": ("layer", np.array([null.p99 for null in nulls])),
        "null_extreme": ("layer", extreme),
        "exists": (("layer", "expert"), axis.exists),
    }
    result = xr.Dataset(
        variables,
        coords=axis.coordinates() | {"other": np.arange(axis.exists.shape[1])},
        attrs=attrs
        | {"diagonal": DIAGONAL, "padding": PADDING, "table": "pair", "table_order": "pair_similarity"}
        | {"listed": LISTED},
    )
    return result.assign(_listed(result, LISTED))


def redundant_pairs(result: xr.Dataset) -> xr.Dataset:
    """Every pair of experts that is closer than any pair of any layer in any draw of the null, closest first.

    How to read it: a pair listed here is alike beyond what the null keeps; whether one of the two can go is another
    question, which only masking it answers. Where nearly all pairs of a layer are listed (experts copied from one
    dense layer, say), `z` tells which of them stand out among their own kind.

    Args:
        result: from any analysis of pairs of experts: `weight_similarity`, `gate_similarity`, `logit_similarity`,
            `output_similarity`, `neuron_matching`.

    Returns:
        Dataset with dims (pair): pair_layer, pair_expert, pair_other, pair_similarity, pair_p_max, pair_z,
        pair_redundant; empty if there is none.

    Raises:
        MoescopeError: not a result about pairs, or one without a null.
    """
    if "redundant" not in result:
        raise MoescopeError("This is not a result about pairs of experts: it has no `redundant`.")
    if np.isnan(result["null_extreme"].values).all():
        raise MoescopeError("This result has no null to exceed: compute it with draws above 0.")
    found = _listed(result, None)
    keep = found["pair_redundant"][1]
    attrs = {name: value for name, value in result.attrs.items() if not name.startswith("diagonal")}
    return xr.Dataset({name: (dims, values[keep]) for name, (dims, values) in found.items()}, attrs=attrs)


def robust_z(matrix: Float[np.ndarray, "expert other"]) -> Float[np.ndarray, "expert other"]:
    """0.6745 (s - median) / MAD over the layer's pairs; NaN where all pairs are alike."""
    values = upper(matrix)
    values = values[~np.isnan(values)]
    if values.size < 3:
        return np.full(matrix.shape, np.nan)
    median = np.median(values)
    spread = np.median(np.abs(values - median))
    return 0.6745 * (matrix - median) / spread if spread > TIE else np.full(matrix.shape, np.nan)


def _reach(nulls: Sequence[PairNull]) -> Float[np.ndarray, " draw"]:
    """[draw] how many spreads above its layer's null the closest pair of any layer stands.

    Layers have nulls of different width: in spreads they can be held against each other, so that one threshold serves
    for all layers together.
    """
    there = [null.steps() for null in nulls if null.largest.size]
    draws = min((steps.size for steps in there), default=0)
    return np.max([steps[:draws] for steps in there], axis=0) if draws else np.empty(0)


def _p_max(matrix: np.ndarray, null: PairNull, reach: np.ndarray) -> np.ndarray:
    if not null.largest.size:
        return np.full(matrix.shape, np.nan)
    reached = (null.at(reach)[:, None, None] >= matrix - TIE).sum(axis=0)
    return np.where(np.isnan(matrix), np.nan, (reached + 1) / (reach.size + 1))


def _without_diagonal(matrix: np.ndarray) -> np.ndarray:
    out = np.array(matrix, dtype=np.float64)
    np.fill_diagonal(out, np.nan)
    return out


def _square(axis: LayerAxis, matrices: Sequence[np.ndarray]) -> Float[np.ndarray, "layer expert other"]:
    widest = axis.exists.shape[1]
    out = np.full((len(matrices), widest, widest), np.nan)
    for row, matrix in enumerate(matrices):
        out[row, : matrix.shape[0], : matrix.shape[1]] = matrix
    return out


def _listed(result: xr.Dataset, most: int | None) -> dict[str, tuple[str, np.ndarray]]:
    """The closest pairs of all layers as columns."""
    values = result["similarity"].values
    layer, expert, other = np.nonzero(~np.isnan(values))
    keep = expert < other
    layer, expert, other = layer[keep], expert[keep], other[keep]
    order = np.argsort(-values[layer, expert, other], kind="stable")[:most]
    at = layer[order], expert[order], other[order]
    return {
        "pair_layer": ("pair", result["layer"].values[at[0]]),
        "pair_expert": ("pair", at[1]),
        "pair_other": ("pair", at[2]),
        "pair_similarity": ("pair", values[at]),
        "pair_p_max": ("pair", result["p_max"].values[at]),
        "pair_z": ("pair", result["z"].values[at]),
        "pair_redundant": ("pair", result["redundant"].values[at]),
    }
