"""How alike the weights of experts are: their matrices, and the router's rows that call them (METHODS 6).

Source: cosine of flattened matrices and of gate rows as "A Closer Look into Mixture-of-Experts in Large Language
Models" (arXiv 2406.18219) measures them. Arrays come from `moescope.hooks.weights.expert_weights`, or from anywhere.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import xarray as xr

from moescope.analysis.labelled import LayerAxis, provenance
from moescope.analysis.pairwise import PairNull, pair_result
from moescope.analysis.question import SEED, Analysis, Parameter
from moescope.analysis.watching import counted
from moescope.errors import MoescopeError

if TYPE_CHECKING:
    from jaxtyping import Float

Layers = Mapping[int, Any] | Iterable[tuple[int, Any]]
"""Layers by model layer index, or (layer, arrays) one after another, so that only one need be in memory."""

WEIGHT_NULL = (
    "the same experts with the neurons of each in random order: keeps every neuron and whatever all neurons have in "
    "common, loses only which neuron of one stands where which of the other does"
)
GATE_NULL = {
    "covariance": (
        "as many rows drawn from a normal distribution with the rows' own mean and covariance: keeps the subspace they "
        "share; wide, because few rows span little, so that what exceeds it is nearly the same row"
    ),
    "shuffle": (
        "the values of each channel dealt anew over the experts: keeps every channel's values; right only where "
        "channels are independent, and too narrow for rows that share a subspace"
    ),
}
UNDEFINED = "NaN where an expert has no matrices (it computes nothing) or they are zero: no angle is defined"


def cosine(vectors: Float[np.ndarray, "expert feature"]) -> Float[np.ndarray, "expert other"]:
    """Cosine of every two rows; NaN for a row that is zero or holds NaN."""
    rows = np.asarray(vectors)
    if rows.dtype.kind != "f":
        rows = rows.astype(np.float64)
    with np.errstate(invalid="ignore", divide="ignore", over="ignore"):
        size = np.sqrt(np.einsum("ij,ij->i", rows, rows, dtype=np.float64))
        unit = rows / np.where(size > 0, size, np.nan)[:, None].astype(rows.dtype)
        return np.clip((unit @ unit.T).astype(np.float64), -1.0, 1.0)


def weight_similarity(weights: Layers, draws: int = 19, seed: int = 0) -> xr.Dataset:
    """How alike the flattened matrices of each two experts of a layer are.

    How to read it: cosine compares neuron 1 with neuron 1, so that 1 means the same matrices and 0 says little: two
    copies with their neurons in another order have about 0 (`neuron_matching` finds those). A pair above `null_extreme`
    has neurons in the same places, as experts copied from one dense layer do.

    Args:
        weights: by layer, what `expert_weights` gives, or a mapping of names ("gate", "up", "down") to arrays
            [E, neuron, channel] of one shape, neuron i of each expert being row i everywhere. An iterator of (layer,
            weights) keeps one layer in memory.
        draws: random orders of the neurons; each costs as much as the similarity itself. 0 for no null.
        seed: of the draws.

    Returns:
        As `pairwise.pair_result`: similarity = cosine of all matrices together, in [-1, 1], and cosine_NAME of each.

    Raises:
        MoescopeError: arrays that do not fit, or no layer.
    """
    held = [_weight_layer(layer, part, draws, seed) for layer, part in layers_of(weights)]
    axis = axis_of([layer for layer, *_ in held], [matrix.shape[0] for _, matrix, *_ in held])
    names = list(dict.fromkeys(name for *_, parts in held for name in parts))
    extra = {
        f"cosine_{name}": [parts.get(name, np.full(whole.shape, np.nan)) for _, whole, _, parts in held]
        for name in names
    }
    attrs = provenance(
        None, analysis="weight_similarity", draws=draws, seed=seed, metric="cosine of flattened matrices"
    )
    attrs |= {"null": WEIGHT_NULL, "undefined": UNDEFINED}
    return pair_result(axis, [whole for _, whole, *_ in held], [null for _, _, null, _ in held], extra, attrs)


def gate_similarity(
    rows: Layers,
    centred: bool = True,
    null: Literal["covariance", "shuffle"] = "covariance",
    draws: int = 199,
    seed: int = 0,
) -> xr.Dataset:
    """How alike the router's rows for each two experts of a layer are: who is called by the same hidden states.

    How to read it: 1 means two experts are always called alike, 0 that their calls have nothing to do with each other,
    below 0 that one is called where the other is not. `cosine` is the published measure; a direction that all rows
    share raises it everywhere, and changes nothing about who a softmax or a top-k picks, which is why `similarity`
    takes that mean row away first unless `centred` is False.

    Args:
        rows: by layer, arrays [E, R] or what `expert_weights` gives (its `router`).
        centred: subtract the mean row of the layer.
        null: "covariance" or "shuffle", see `attrs["null"]`.
        draws: of the null; 0 for none.
        seed: of the draws.

    Returns:
        As `pairwise.pair_result`: similarity in [-1, 1] and cosine (of the rows as they are).

    Raises:
        MoescopeError: arrays that are no [E, R], a layer without router rows, an unknown null, or no layer.
    """
    if null not in GATE_NULL:
        raise MoescopeError('`null` is "covariance" or "shuffle".')
    numbers, similarity, plain, nulls = [], [], [], []
    for layer, given in layers_of(rows):
        table = np.asarray(getattr(given, "router", given), dtype=np.float64)
        if table.ndim != 2:
            raise MoescopeError(f"Layer {layer} needs one router row per expert, [E, R]; got {table.ndim} axes.")
        rng = np.random.default_rng([seed, int(layer)])
        drawn = (_like(table, null, rng) for _ in range(draws))
        numbers.append(int(layer))
        similarity.append(cosine(_centred(table)) if centred else cosine(table))
        plain.append(cosine(table))
        nulls.append(PairNull.of_draws([cosine(_centred(draw) if centred else draw) for draw in drawn]))
    axis = axis_of(numbers, [matrix.shape[0] for matrix in similarity])
    attrs = provenance(
        None, analysis="gate_similarity", draws=draws, seed=seed, centred=str(centred), metric="cosine of router rows"
    )
    attrs |= {"null": GATE_NULL[null], "undefined": UNDEFINED}
    return pair_result(axis, similarity, nulls, {"cosine": plain}, attrs)


def layers_of(given: Layers) -> Iterator[tuple[int, Any]]:
    """(layer, arrays) of a mapping or of an iterable of such pairs."""
    pairs: Iterable[tuple[int, Any]] = given.items() if isinstance(given, Mapping) else given  # pyright: ignore[reportAssignmentType]
    yield from pairs


def axis_of(layers: list[int], n_experts: list[int]) -> LayerAxis:
    """The layer axis of arrays that came without a store.

    Raises:
        MoescopeError: there is no layer.
    """
    if not layers:
        raise MoescopeError("No layer to compare experts in: none was given.")
    return LayerAxis(
        layers=np.array(layers, dtype=np.int64),
        sites=tuple(f"L{layer:03d}" for layer in layers),
        n_experts=np.array(n_experts, dtype=np.int64),
        top_k=np.full(len(layers), np.nan),
    )


def matrices_of(layer: int, weights: Any) -> dict[str, Float[np.ndarray, "expert neuron channel"]]:
    """The matrices of one layer by name, checked to be [E, I, D] with one E and I.

    Raises:
        MoescopeError: they are not.
    """
    given = weights.matrices() if hasattr(weights, "matrices") else weights
    parts = {str(name): np.asarray(values) for name, values in given.items()}
    shapes = {values.shape[:2] for values in parts.values()}
    if not parts or any(values.ndim != 3 for values in parts.values()) or len(shapes) != 1:
        found = ", ".join(f"{name} {values.shape}" for name, values in parts.items()) or "nothing"
        raise MoescopeError(f"Layer {layer} needs matrices [E, neuron, channel] with one E and neuron; got {found}.")
    return parts


def _weight_layer(layer: int, weights: Any, draws: int, seed: int) -> tuple[int, np.ndarray, PairNull, dict]:
    parts = matrices_of(layer, weights)
    n_experts, n_neurons = next(iter(parts.values())).shape[:2]
    squares = {name: _products(values, None) for name, values in parts.items()}
    rng = np.random.default_rng([seed, int(layer)])
    drawn = []
    for _ in counted("draws of the null", range(draws)):
        order = np.array([rng.permutation(n_neurons) for _ in range(n_experts)])
        drawn.append(_angle(sum(_products(values, order) for values in parts.values())))
    separate = {name: _angle(values) for name, values in squares.items()}
    return int(layer), _angle(sum(squares.values())), PairNull.of_draws(drawn), separate


def _products(values: np.ndarray, order: np.ndarray | None) -> Float[np.ndarray, "expert other"]:
    """Scalar products of every two experts' matrices, each with its neurons in its own `order`; in blocks of neurons,
    so that no second copy of the layer is made."""
    n_experts, n_neurons, width = values.shape
    step = max(1, 16_000_000 // max(1, n_experts * width))
    total = np.zeros((n_experts, n_experts))
    everyone = np.arange(n_experts)[:, None]
    for start in range(0, n_neurons, step):
        part = slice(start, start + step)
        block = values[:, part] if order is None else values[everyone, order[:, part]]
        flat = np.ascontiguousarray(block, dtype=np.float32).reshape(n_experts, -1)
        total += flat @ flat.T
    return total


def _angle(products: Any) -> Float[np.ndarray, "expert other"]:
    """Cosines from scalar products."""
    with np.errstate(invalid="ignore", divide="ignore"):
        size = np.sqrt(np.diag(products))
        size = np.where(size > 0, size, np.nan)
        return np.clip(products / size[:, None] / size[None, :], -1.0, 1.0)


def _centred(table: np.ndarray) -> np.ndarray:
    return table - np.nanmean(table, axis=0, keepdims=True)


def _like(table: np.ndarray, null: str, rng: np.random.Generator) -> np.ndarray:
    """Rows that chance might have given in place of these."""
    if null == "shuffle":
        return rng.permuted(table, axis=0)
    there = table[~np.isnan(table).any(axis=1)]
    mean = there.mean(axis=0)
    mix = rng.normal(size=(table.shape[0], there.shape[0])) / np.sqrt(max(there.shape[0] - 1, 1))
    return mean + mix @ (there - mean)


WEIGHT_SIMILARITY_QUESTION = Analysis(
    name="weight_similarity",
    run=weight_similarity,
    figure="weight_similarity",
    help="Which experts of a layer have the same matrices, neuron by neuron in the same places?",
    parameters=(Parameter("draws", int, 19, "random orders of the neurons behind the null; 0 for none"), SEED),
    tier="none",
    inputs=("weights",),
)
GATE_SIMILARITY_QUESTION = Analysis(
    name="gate_similarity",
    run=gate_similarity,
    figure="gate_similarity",
    help="Which experts of a layer are called by the same hidden states, by their router rows?",
    parameters=(
        Parameter("centred", bool, True, "take the layer's mean row away first"),
        Parameter("null", str, "covariance", "what rows by chance share with these", ("covariance", "shuffle")),
        Parameter("draws", int, 199, "draws of the null; 0 for none"),
        SEED,
    ),
    tier="none",
    inputs=("weights",),
)
