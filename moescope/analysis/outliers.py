"""Super experts: the few experts whose outputs are so large that they form the model's massive activations (METHODS 4).

Source: "Unveiling Super Experts in Mixture-of-Experts Large Language Models" (arXiv 2507.23279, ICLR 2026). The
paper's text and its released code define them differently; both are here. Either names at least the largest expert of
*any* model, so that a ratio to the layer's median and a robust z, with its null, stand beside the verdict.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import xarray as xr

from moescope.analysis.labelled import NONE_IS_MINUS_ONE, PADDING, LayerAxis, provenance
from moescope.analysis.question import SEED, Analysis, Parameter
from moescope.errors import MoescopeError

if TYPE_CHECKING:
    from jaxtyping import Float

    from moescope.store import Store

Definition = Literal["paper", "code"]

PERCENTILE = 99.5
"""Both definitions: a super expert is above this percentile of the pooled maxima."""
FRACTION = 10
"""Both definitions: and above the largest of them divided by this."""
FORMED = 0.9
"""Massive activations have formed where the residual reaches this share of its plateau; see `formed_depth`."""
GREW = 10
"""A residual whose largest value never grows tenfold has formed no massive activations: there is no depth to find."""
CODE_DEPTH = 0.75
"""The released code pools the layers below this share of the depth."""
NULL = (
    "z_null_p99: the largest robust z of a layer whose log maxima are all drawn from one normal distribution, "
    "in 1 of 100 such layers (simulated with the same median and deviation)"
)


def super_experts(
    store: Store,
    definition: Definition = "paper",
    ratio: float = 10.0,
    depth: int | None = None,
    seed: int = 0,
) -> xr.Dataset:
    """Which experts' outputs are outliers, by the published rule and by two that also work for small models.

    How to read it: `absmax` is the largest number an expert ever wrote before its routing weight. `super` is the
    published rule. It can name at most `cap` experts, and always names at least the largest, so an expert is worth
    believing only when `by_ratio` agrees (it is `ratio` times its layer's median) and `robust_z` is beyond
    `z_null_p99`.

    Args:
        store: an open store with the outliers tier.
        definition: "paper" pools every maximum in the layers up to where massive activations have formed; "code"
            pools, in the layers below 0.75 depth, the maxima over the first routed row of each batch, and divides
            without remainder.
        ratio: how many times its layer's median an expert must reach for `by_ratio`.
        depth: the last model layer to pool, in place of the depth found from the store's hidden outliers.
        seed: of the null's draws.

    Returns:
        As `super_experts_from_maxima`, and where each maximum occurred: `document`, `position`, `token_id` (layer,
        expert), -1 where nothing was seen.

    Raises:
        MoescopeError: no outliers tier, or a definition that does not exist.
    """
    sites = list(store.sites)
    axis = LayerAxis.of_sites(sites)
    columns = store.outliers().to_pandas()
    wanted = "absmax_out" if definition == "paper" else "first_row_max"
    row_of = {key: row for row, key in enumerate(axis.sites)}
    shape = axis.exists.shape
    maxima, tokens = np.full(shape, np.nan), np.full(shape, np.nan)
    where = {name: np.full(shape, -1, dtype=np.int64) for name in ("document", "position", "token_id")}
    for record in columns.to_dict("records"):
        cell = row_of[record["site"]], int(record["expert"])
        maxima[cell] = _number(record[wanted])
        tokens[cell] = _number(record.get("tokens"))
        for name, held in where.items():
            held[cell] = -1 if math.isnan(_number(record[name])) else int(record[name])
    hidden = _hidden(store)
    result = super_experts_from_maxima(
        maxima,
        layers=[int(layer) for layer in axis.layers],
        n_layers=store.manifest.model.n_layers,
        hidden=hidden,
        definition=definition,
        ratio=ratio,
        depth=depth,
        seed=seed,
        n_experts=[int(n) for n in axis.n_experts],
    )
    extra: dict[str, Any] = {name: (("layer", "expert"), values, NONE_IS_MINUS_ONE) for name, values in where.items()}
    extra["tokens"] = (("layer", "expert"), tokens)
    result = result.assign(extra).assign_coords(axis.coordinates())
    result.attrs = provenance(store) | {k: v for k, v in result.attrs.items() if k != "store_id"}
    return result


def super_experts_from_maxima(
    maxima: Float[np.ndarray, "layer expert"],
    layers: Sequence[int] | None = None,
    n_layers: int | None = None,
    hidden: Float[np.ndarray, " model_layer"] | None = None,
    definition: Definition = "paper",
    ratio: float = 10.0,
    depth: int | None = None,
    seed: int = 0,
    n_experts: Sequence[int] | None = None,
) -> xr.Dataset:
    """The same from plain maxima.

    Args:
        maxima: [layer, expert] largest |output| of each expert before its routing weight; NaN where it was never
            selected.
        layers: model layer index of each row; 0, 1, 2, ... if None.
        n_layers: layers of the whole model, dense ones counted; the last of `layers` + 1 if None.
        hidden: [model layer] largest |residual| after each layer, from which the pooled depth is found. Without it (and
            without `depth`) the layers below 0.75 depth are pooled, as the released code does.
        definition, ratio, depth, seed: as in `super_experts`.
        n_experts: width of each layer; needed when a layer's last experts were never selected.

    Returns:
        Dataset with dims (layer, expert): absmax; super (bool, the published rule); by_ratio (bool); pooled (bool, in
        A); ratio_to_median (to its layer's median); robust_z = 0.6745 (log a - median) / MAD within the layer; rank (1
        the largest of all); exists. (layer): layer_median, z_null_p99, massive = largest |residual| after the layer.
        (): percentile = P99.5(A), tenth = max(A)/10, n_pooled, cap = ceil(0.005 (n-1)): at most so many of n distinct
        values lie above P99.5.

    Raises:
        MoescopeError: maxima that are negative or infinite, none at all in the pooled layers, or an unknown definition.
    """
    table = np.asarray(maxima, dtype=np.float64)
    if table.ndim != 2:
        raise MoescopeError(f"Maxima need the axes layer and expert; got {table.ndim} axes.")
    if (table < 0).any() or np.isinf(table).any():
        raise MoescopeError("Maxima must be finite and not negative, NaN for an expert that was never selected.")
    if definition not in ("paper", "code"):
        raise MoescopeError('`definition` is "paper" or "code".')
    if ratio <= 0:
        raise MoescopeError("`ratio` must be above 0.")
    axis = LayerAxis.of_array(table, layers, n_experts=n_experts or [table.shape[1]] * table.shape[0])
    n_model = int(axis.layers.max() + 1) if n_layers is None else n_layers
    last, how = _pooled_depth(definition, n_model, hidden, depth)
    if depth is None and last < axis.layers.min():
        last, how = int(axis.layers.min()), f"first MoE layer: {how} came before it"
    pooled = (axis.layers <= last)[:, None] & ~np.isnan(table)
    if not pooled.any():
        raise MoescopeError(f"No expert was selected in the MoE layers up to layer {last}: give a larger `depth`.")
    pool = table[pooled]
    percentile = float(np.percentile(pool, PERCENTILE))
    tenth = float(pool.max() // FRACTION if definition == "code" else pool.max() / FRACTION)
    median = np.array([np.nan if np.isnan(row).all() else np.nanmedian(row) for row in table])
    with np.errstate(divide="ignore", invalid="ignore"):
        to_median = table / median[:, None]
        logs = np.where(table > 0, np.log(table), np.nan)
    z = np.array([_robust_z(row) for row in logs])
    rng = np.random.default_rng(seed)
    drawn: dict[int, float] = {}
    for n in (~np.isnan(logs)).sum(axis=1).tolist():
        if n not in drawn:
            drawn[n] = _largest_z_by_chance(n, rng)
    order = np.full(table.size, np.nan)
    seen = np.flatnonzero(~np.isnan(table.ravel()))
    order[seen[np.argsort(-table.ravel()[seen], kind="stable")]] = np.arange(1, seen.size + 1)
    cell = ("layer", "expert")
    massive = np.full(axis.layers.size, np.nan)
    if hidden is not None:
        inside = axis.layers < len(hidden)
        massive[inside] = np.asarray(hidden, dtype=np.float64)[axis.layers[inside]]
    variables = {
        "absmax": (cell, table),
        "super": (cell, pooled & (table > percentile) & (table > tenth)),
        "by_ratio": (cell, to_median >= ratio),
        "ratio_to_median": (cell, to_median),
        "robust_z": (cell, z),
        "pooled": (cell, pooled),
        "rank": (cell, order.reshape(table.shape)),
        "exists": (cell, axis.exists),
        "layer_median": ("layer", median),
        "z_null_p99": ("layer", np.array([drawn[int(n)] for n in (~np.isnan(logs)).sum(axis=1)])),
        "massive": ("layer", massive),
        "percentile": ((), percentile),
        "tenth": ((), tenth),
        "n_pooled": ((), int(pooled.sum())),
        "cap": ((), structural_cap(int(pooled.sum()))),
    }
    attrs = provenance(
        None,
        analysis="super_experts",
        definition=definition,
        ratio=ratio,
        depth=last,
        depth_from=how,
        n_layers=n_model,
        seed=seed,
        null=NULL,
        never_selected=int((axis.exists & np.isnan(table)).sum()),
        undefined="NaN: the expert was never selected, so it has no output to measure",
        padding=PADDING,
        table="layer, expert",
        table_order="absmax",
    )
    return xr.Dataset(variables, coords=axis.coordinates(), attrs=attrs)


def structural_cap(n: int) -> int:
    """At most so many of n distinct pooled maxima can lie above their 99.5th percentile: ceil(0.005 (n - 1)).

    The percentile interpolates at place 0.995 (n - 1), so only the values beyond it pass; 1 for 2 <= n <= 201.
    """
    # In integers: 0.005 * 400 is 2.0000000000000004 to the ceiling.
    return -(-(n - 1) * 5 // 1000)


def formed_depth(hidden: Float[np.ndarray, " model_layer"]) -> int | None:
    """The layer up to which massive activations form: the first whose residual maximum reaches 0.9 of the plateau.

    The paper says "up to where massive activations have formed" without a number. Massive activations jump up within a
    few early layers and then stay (Sun et al., arXiv 2402.17762). The plateau is the largest |residual| over the first
    three quarters of the layers, since the last ones rewrite it for the head; 0.9 of it, because what forms afterwards
    adds less than the tenth that either definition asks of a super expert.

    Args:
        hidden: [model layer] largest |residual| after each layer; NaN where unknown.

    Returns:
        The layer, or None where the residual does not grow tenfold over those layers: nothing massive has formed.
    """
    values = np.asarray(hidden, dtype=np.float64)
    early = values[: max(1, math.ceil(len(values) * CODE_DEPTH))]
    if not len(early) or np.isnan(early).all() or np.nanmax(early) < GREW * np.nanmin(early):
        return None
    return int(np.flatnonzero(early >= FORMED * np.nanmax(early))[0])


def _pooled_depth(
    definition: str, n_layers: int, hidden: Float[np.ndarray, " model_layer"] | None, depth: int | None
) -> tuple[int, str]:
    """The last model layer in A, and how it was found."""
    if depth is not None:
        return depth, "given"
    below = max(0, math.ceil(CODE_DEPTH * n_layers) - 1)
    if definition == "code":
        return below, "layers below 0.75 depth, as the released code"
    if hidden is None or np.isnan(np.asarray(hidden, dtype=np.float64)).all():
        return below, "layers below 0.75 depth: no hidden outliers to find where massive activations form"
    formed = formed_depth(hidden)
    if formed is None:
        return below, "layers below 0.75 depth: no massive activations form, the residual does not grow tenfold"
    return formed, f"first layer whose residual maximum reaches {FORMED} of its plateau"


def _robust_z(values: Float[np.ndarray, " expert"]) -> Float[np.ndarray, " expert"]:
    """0.6745 (x - median) / MAD; NaN where fewer than three values or no spread allow no judgement."""
    if (~np.isnan(values)).sum() < 3:
        return np.full(values.shape, np.nan)
    centred = values - np.nanmedian(values)
    spread = np.nanmedian(np.abs(centred))
    return 0.6745 * centred / spread if spread > 0 else np.full(values.shape, np.nan)


def _largest_z_by_chance(n: int, rng: np.random.Generator, draws: int = 2000) -> float:
    if n < 3:
        return np.nan
    sample = rng.standard_normal((draws, n))
    centred = sample - np.median(sample, axis=1, keepdims=True)
    spread = np.median(np.abs(centred), axis=1)
    return float(np.quantile(0.6745 * centred.max(axis=1) / spread, 0.99))


def _hidden(store: Store) -> Float[np.ndarray, " model_layer"] | None:
    """[model layer] largest |residual|, NaN for layers that were not captured; None if the store has none."""
    found = store.hidden_outliers()
    if found is None or not found.num_rows:
        return None
    out = np.full(store.manifest.model.n_layers, np.nan)
    out[found["layer"].to_numpy()] = found["absmax"].to_numpy(zero_copy_only=False)
    return out


def _number(value: Any) -> float:
    return math.nan if value is None else float(value)


SUPER_EXPERTS_QUESTION = Analysis(
    name="super_experts",
    run=super_experts,
    figure="super_experts",
    help="Which experts' outputs are outliers that form the massive activations?",
    parameters=(
        Parameter("definition", str, "paper", "the published text's rule or its code's", ("paper", "code")),
        Parameter("ratio", float, 10.0, "times its layer's median an outlier must reach"),
        Parameter("depth", int, None, "last model layer to pool (default: found from the store)"),
        SEED,
    ),
    tier="outliers",
)
