"""Neuron by neuron: which neuron of one expert is which of another, whatever order they stand in (METHODS 6).

Source: "A Closer Look into Mixture-of-Experts in Large Language Models" (arXiv 2406.18219): Hungarian assignment on the
cosine of neurons, and Kendall's tau between the order found and the order they had.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import xarray as xr
from scipy.optimize import linear_sum_assignment
from scipy.stats import kendalltau

from moescope.analysis.labelled import provenance
from moescope.analysis.pairwise import PairNull, pair_result
from moescope.analysis.question import SEED, Analysis, Parameter
from moescope.analysis.similarities import Layers, axis_of, cosine, layers_of, matrices_of
from moescope.analysis.watching import counted
from moescope.errors import MoescopeError

if TYPE_CHECKING:
    from jaxtyping import Float, Int

NULL = (
    "the neurons of one expert replaced by a random rotation of them among each other that keeps their mean and every "
    "channel's covariance: an expert of the same size and directions, without those neurons. An assignment finds a "
    "positive cosine in anything; this is how much"
)
SCREENED = (
    "only the pairs nearest by `screen` were matched: the cosine of sketches of each expert's down x up and down x "
    "gate products, which no order of neurons changes; NaN elsewhere"
)
SKETCH = 16
"""Random directions of a sketch: enough to tell copies (cosine 1) from experts that merely look alike."""


@dataclass(frozen=True)
class NeuronMatching:
    """Which neuron of the second expert stands for each of the first.

    Attributes:
        order: [I] neuron of the second expert matched to neuron i of the first; a permutation.
        cosine: [I] cosine of each matched pair.
        similarity: their mean.
        kendall_tau: between neuron numbers of the two: 1 the same order, about 0 none, -1 reversed; NaN for one neuron.
    """

    order: Int[np.ndarray, " neuron"]
    cosine: Float[np.ndarray, " neuron"]
    similarity: float
    kendall_tau: float


def match_neurons(
    first: Float[np.ndarray, "neuron feature"], second: Float[np.ndarray, "neuron feature"]
) -> NeuronMatching:
    """The assignment of neurons with the largest summed cosine; O(I^3) at worst.

    Args:
        first, second: [I, F] one row per neuron: its gate row, up row and down column side by side.

    Raises:
        MoescopeError: two shapes, or values that are not finite.
    """
    a, b = np.asarray(first, dtype=np.float64), np.asarray(second, dtype=np.float64)
    if a.shape != b.shape or a.ndim != 2 or not a.shape[0]:
        raise MoescopeError(f"Neurons are matched between arrays [neuron, feature] of one shape: {a.shape}, {b.shape}.")
    if not (np.isfinite(a).all() and np.isfinite(b).all()):
        raise MoescopeError("Neurons with values that are not finite cannot be matched.")
    table = _unit(a) @ _unit(b).T
    rows, order = linear_sum_assignment(table, maximize=True)
    found = table[rows, order]
    ranked: Any = kendalltau(rows, order) if order.size > 1 else (np.nan,)  # scipy does not type what it gives
    tau = float(ranked[0])
    return NeuronMatching(order, found, float(found.mean()), tau)


def neuron_matching(
    weights: Layers,
    pairs: Sequence[tuple[int, int]] | None = None,
    most: int = 10,
    draws: int = 19,
    seed: int = 0,
) -> xr.Dataset:
    """Which experts of a layer are the same up to the order of their neurons.

    How to read it: `similarity` is the mean cosine of matched neurons: 1 for a copy, however its neurons were shuffled.
    Any two experts reach `null_mean`, because the best of many chance matches is never bad: only what exceeds
    `null_extreme` is more. `kendall_tau` near 1 says that the neurons even kept their places (copied and trained
    apart), near 0 that they did not. A neuron and its twin with the signs of up and down turned, which a gated expert
    cannot tell from it, count as different.

    Args:
        weights: by layer, as for `weight_similarity`.
        pairs: expert pairs to match in every layer; by default the `most` pairs nearest by `screen` in each.
        most: how many.
        draws: of the null: each costs as much as matching all those pairs. 0 for none.
        seed: of the draws and of the sketches.

    Returns:
        As `pairwise.pair_result`: similarity, kendall_tau, in_place (mean cosine of neurons of the same number),
        screen (all pairs).

    Raises:
        MoescopeError: arrays that do not fit, no layer, or a pair that is not of two experts of the layer.
    """
    numbers, found = [], []
    for layer, given in layers_of(weights):
        numbers.append(int(layer))
        found.append(_layer(int(layer), matrices_of(layer, given), pairs, most, draws, seed))
    axis = axis_of(numbers, [len(part["similarity"]) for part, _ in found])
    attrs = provenance(
        None, analysis="neuron_matching", pairs=None if pairs is None else [f"{i}-{j}" for i, j in pairs], most=most,
        draws=draws, seed=seed, metric="mean cosine of matched neurons",
    )  # fmt: skip
    attrs |= {"null": NULL, "screened": SCREENED if pairs is None else "the pairs that were named; NaN elsewhere"}
    extra = {name: [part[name] for part, _ in found] for name in ("kendall_tau", "in_place", "screen")}
    return pair_result(axis, [part["similarity"] for part, _ in found], [null for _, null in found], extra, attrs)


def rotated_neurons(neurons: Float[np.ndarray, "neuron feature"], seed: int | Sequence[int]) -> np.ndarray:
    """Other neurons with the same mean and the same covariance of features: a random rotation among the neurons."""
    rng = np.random.default_rng(seed)
    n = len(neurons)
    if n < 2:
        return neurons.copy()
    mean = neurons.mean(axis=0)
    # Two random bases of all that is orthogonal to "the same for every neuron".
    one, other = (np.linalg.qr(draw - draw.mean(axis=0))[0] for draw in rng.normal(size=(2, n, n - 1)))
    return mean + one @ (other.T @ (neurons - mean))


def _layer(
    layer: int,
    parts: dict[str, np.ndarray],
    pairs: Sequence[tuple[int, int]] | None,
    most: int,
    draws: int,
    seed: int,
) -> tuple[dict[str, np.ndarray], PairNull]:
    n_experts = len(next(iter(parts.values())))
    screen = _screen(parts, np.random.default_rng([seed, layer]))
    chosen = _nearest(screen, most) if pairs is None else [_checked(pair, n_experts, layer) for pair in pairs]
    out = {name: np.full((n_experts, n_experts), np.nan) for name in ("similarity", "kendall_tau", "in_place")}
    null = np.full((draws, n_experts, n_experts), np.nan)
    for i, j in counted("pairs of experts", chosen):
        a, b = (np.concatenate([part[e] for part in parts.values()], axis=1).astype(np.float64) for e in (i, j))
        if not (np.isfinite(a).all() and np.isfinite(b).all()):
            continue
        matched = match_neurons(a, b)
        out["similarity"][[i, j], [j, i]] = matched.similarity
        out["kendall_tau"][[i, j], [j, i]] = matched.kendall_tau
        out["in_place"][[i, j], [j, i]] = float((_unit(a) * _unit(b)).sum(axis=1).mean())
        for draw in range(draws):
            value = match_neurons(a, rotated_neurons(b, [seed, layer, i, j, draw])).similarity
            null[draw, [i, j], [j, i]] = value
    return out | {"screen": screen}, PairNull.of_draws(list(null))


def _screen(parts: dict[str, np.ndarray], rng: np.random.Generator) -> np.ndarray:
    """Cosine of sketches of sum_i out_i x in_i over neurons i: the same for any order of them."""
    names = list(parts)
    out = parts[names[-1]]
    sketches = []
    for name in names[:-1] or names:
        directions = rng.normal(size=(parts[name].shape[2], SKETCH)).astype(np.float32)
        sketches.append(np.einsum("eid,eir->edr", out, parts[name] @ directions, optimize=True))
    return cosine(np.concatenate([sketch.reshape(len(out), -1) for sketch in sketches], axis=1))


def _nearest(screen: np.ndarray, most: int) -> list[tuple[int, int]]:
    first, second = np.triu_indices(len(screen), 1)
    value = screen[first, second]
    order = np.argsort(-np.where(np.isnan(value), -np.inf, value), kind="stable")[:most]
    return [(int(first[place]), int(second[place])) for place in order if not np.isnan(value[place])]


def _checked(pair: tuple[int, int], n_experts: int, layer: int) -> tuple[int, int]:
    i, j = int(pair[0]), int(pair[1])
    if i == j or not (0 <= i < n_experts and 0 <= j < n_experts):
        raise MoescopeError(f"Layer {layer} has the experts 0 to {n_experts - 1}; {i}-{j} is no pair of two of them.")
    return i, j


def _unit(rows: np.ndarray) -> np.ndarray:
    """Rows of length one; a row of zeros stays, so that a dead neuron is like nothing."""
    size = np.linalg.norm(rows, axis=1, keepdims=True)
    return rows / np.where(size > 0, size, 1.0)


NEURON_MATCHING_QUESTION = Analysis(
    name="neuron_matching",
    run=neuron_matching,
    figure="neuron_matching",
    help="Which experts of a layer are the same up to the order of their neurons?",
    parameters=(
        Parameter("most", int, 10, "pairs of each layer to match, those nearest by a sketch"),
        Parameter("draws", int, 19, "rotations behind the null, each as costly as the matching; 0 for none"),
        SEED,
    ),
    tier="none",
    inputs=("weights",),
)
