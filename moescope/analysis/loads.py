"""Load and balance: how often each expert is chosen, how evenly, and how evenly by chance alone (METHODS 1)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import xarray as xr
from scipy.stats import binom

from moescope.analysis.counts import Phase, document_tables, labelling, sites_of
from moescope.analysis.labelled import PADDING, LayerAxis, provenance
from moescope.analysis.question import LAYERS, PHASE, SEED, Analysis, Parameter
from moescope.errors import MoescopeError

if TYPE_CHECKING:
    from jaxtyping import Float

    from moescope.store import Store

BALANCE = ("entropy", "effective_experts", "gini", "cv", "max_vio", "dead")
"""The balance measures, one number per layer (and label): see `balance`."""

NULL = (
    "each token picks its top-k experts uniformly at random, independently of every other token; tokens of one "
    "document are alike in fact, so that small excesses over this null say little: read how large the imbalance is, "
    "not that it is significant"
)


def uniform_p(count: float, selections: float, width: int) -> float:
    """p, two-sided and over the experts of a layer, that one of them gets `count` of `selections` by uniform choice.

    Selections are taken as independent: those of one token, which differ, scatter less.
    """
    tails = binom.cdf(count, selections, 1 / width), binom.sf(count - 1, selections, 1 / width)
    return min(1.0, 2 * width * float(min(tails)))


def load(
    store: Store,
    by: str | None = None,
    layers: Sequence[int] | None = None,
    where: dict[str, str | Sequence[str]] | None = None,
    phase: Phase | None = None,
    weighted: bool = True,
    draws: int = 400,
    seed: int = 0,
) -> xr.Dataset:
    """Load of every expert and balance of every layer, overall or by a document label.

    How to read it: `relative_load` is the share times the number of experts, so 1 is a fair share, 2 twice as much, 0
    never chosen. `max_vio` is how far the busiest expert is above a fair share (0 is perfect balance),
    `effective_experts` how many equally loaded experts would be as mixed. Hold them against `null_*`: what uniform
    random choice gives for that many tokens.

    Args:
        store: an open store with the routing tier.
        by: a document label; adds the dimension `label`. Documents without it are left out and counted in the
            attributes.
        layers: model layer indices; all MoE layers if None.
        where: label -> value(s), documents to keep.
        phase: "prefill" or "decode"; both if None.
        weighted: also sum the routing weights (`weighted_share`).
        draws: random draws for the null of each layer.
        seed: of the draws.

    Returns:
        Dataset with dims (layer, expert) or (layer, expert, label):
            count: tokens that selected the expert; share: count / selections of the layer (sums to 1 over experts);
            relative_load: share x experts; weight: sum of routing weights; weighted_share: its share (sums to 1);
        and with dims (layer) or (layer, label): selections, entropy (nats), effective_experts = exp(entropy), gini,
            cv (standard deviation / mean), max_vio = max load / mean load - 1 (Wang et al., arXiv 2408.15664), dead
            (experts never selected), null_NAME and null_NAME_p99 for each measure (for entropy and effective experts
            the 1st percentile, `_p01`); and tokens, documents (label). Layers without a selection have NaN measures.

    Raises:
        MoescopeError: unknown label or layer, or nothing left to count.
    """
    sites = sites_of(store, layers)
    chosen = labelling(store, by, where, phase)
    code = chosen.spread(chosen.code)
    tables = document_tables(store, sites, weighted, phase)
    axis = LayerAxis.of_sites(sites)
    n_labels = len(chosen.labels)
    count = axis.pad([table.by_label(code, n_labels) for table in tables])
    weight = axis.pad([table.by_label(code, n_labels, "weight") for table in tables]) if weighted else None
    attrs = provenance(
        store,
        analysis="load",
        by=by,
        where=where,
        phase=phase,
        draws=draws,
        seed=seed,
        documents_unlabelled=chosen.unlabelled,
        documents_filtered=chosen.filtered,
    )
    result = _dataset(axis, count, weight, list(chosen.labels), draws, seed, attrs)
    result = result.assign(tokens=("label", chosen.tokens_per_label), documents=("label", chosen.documents_per_label))
    return result.isel(label=0, drop=True) if by is None else result


def load_from_counts(
    counts: Float[np.ndarray, "layer expert *label"],
    weights: Float[np.ndarray, "layer expert *label"] | None = None,
    labels: Sequence[str] | None = None,
    layers: Sequence[int] | None = None,
    top_k: int | None = None,
    draws: int = 400,
    seed: int = 0,
) -> xr.Dataset:
    """The same from a plain table of counts, for instance one published with a paper.

    Args:
        counts: [layer, expert] or [layer, expert, label] selections; NaN where a layer has no such expert.
        weights: the same shape; summed routing weights.
        labels: names of the last axis.
        layers: model layer index of each row; 0, 1, 2, ... if None.
        top_k: selections per token, which narrows the null (k distinct experts per token); 1 if None.
        draws, seed: of the null.

    Returns:
        As `load`, without tokens and documents.

    Raises:
        MoescopeError: negative counts, or names that do not fit the shape.
    """
    table = np.asarray(counts, dtype=np.float64)
    if table.ndim not in (2, 3):
        raise MoescopeError(f"Counts need the axes layer, expert and perhaps label; got {table.ndim} axes.")
    if (table < 0).any():
        raise MoescopeError("Counts must be 0 or more.")
    flat = table if table.ndim == 3 else table[:, :, None]
    names = [str(name) for name in (labels if labels is not None else range(flat.shape[2]))]
    if len(names) != flat.shape[2]:
        raise MoescopeError(f"{len(names)} labels were named for {flat.shape[2]} columns of counts.")
    heavy = None if weights is None else np.asarray(weights, dtype=np.float64).reshape(flat.shape)
    axis = LayerAxis.of_array(flat, layers, top_k)
    attrs = provenance(None, analysis="load", by="label" if table.ndim == 3 else None, draws=draws, seed=seed)
    result = _dataset(axis, flat, heavy, names, draws, seed, attrs)
    return result if table.ndim == 3 else result.isel(label=0, drop=True)


def balance(counts: Float[np.ndarray, "*rest expert"]) -> dict[str, Float[np.ndarray, " *rest"]]:
    """Balance of load over the last axis.

    Args:
        counts: selections per expert, each >= 0.

    Returns:
        entropy (nats) of the shares; effective_experts = exp(entropy); gini (0 even, (E-1)/E one expert takes all);
        cv = standard deviation / mean; max_vio = max / mean - 1; dead = experts with no selection.
        NaN (but `dead`) where nothing was selected.
    """
    n_experts = counts.shape[-1]
    total = counts.sum(axis=-1, keepdims=True)
    with np.errstate(invalid="ignore", divide="ignore"):
        share = counts / total
        entropy = -np.where(share > 0, share * np.log(share), 0.0 * share).sum(axis=-1)
        rank = np.arange(1, n_experts + 1)
        gini = ((2 * rank - n_experts - 1) * np.sort(share, axis=-1)).sum(axis=-1) / n_experts
        return {
            "entropy": entropy,
            "effective_experts": np.exp(entropy),
            "gini": gini,
            "cv": share.std(axis=-1) * n_experts,
            "max_vio": share.max(axis=-1) * n_experts - 1,
            "dead": (counts == 0).sum(axis=-1).astype(np.float64),
        }


def balance_null(
    selections: int, n_experts: int, top_k: float, draws: int, rng: np.random.Generator
) -> dict[str, tuple[float, float]]:
    """Balance under uniform random choice: (mean, 99th percentile) of each measure, the 1st for entropy and effective
    experts.

    Loads are drawn as a multinomial of `selections` over the experts; picking k *distinct* experts per token varies
    less, by the finite-population factor (E - k) / (E - 1), by which the deviations are shrunk (exact in mean and
    covariance).
    """
    if selections <= 0:
        return dict.fromkeys(BALANCE, (np.nan, np.nan))
    drawn = rng.multinomial(selections, np.full(n_experts, 1 / n_experts), size=draws).astype(np.float64)
    mean = selections / n_experts
    k = 1.0 if np.isnan(top_k) else top_k
    shrink = np.sqrt(max(n_experts - k, 0) / (n_experts - 1)) if n_experts > 1 else 0.0
    measured = balance(np.maximum(mean + (drawn - mean) * shrink, 0))
    return {
        name: (float(values.mean()), float(np.percentile(values, 1 if _more_is_even(name) else 99)))
        for name, values in measured.items()
    }


def _more_is_even(name: str) -> bool:
    return name in ("entropy", "effective_experts")


def _dataset(
    axis: LayerAxis,
    count: Float[np.ndarray, "layer expert label"],
    weight: Float[np.ndarray, "layer expert label"] | None,
    labels: list[str],
    draws: int,
    seed: int,
    attrs: dict,
) -> xr.Dataset:
    n_layers, _, n_labels = count.shape
    measured = {name: np.full((n_layers, n_labels), np.nan) for name in BALANCE}
    expected = {name: np.full((n_layers, n_labels, 2), np.nan) for name in BALANCE}
    rng = np.random.default_rng(seed)
    drawn: dict[tuple[int, int, float], dict[str, tuple[float, float]]] = {}
    for row in range(n_layers):
        width, k = int(axis.n_experts[row]), float(axis.top_k[row])
        values = count[row, :width].T
        for name, found in balance(values).items():
            measured[name][row] = found
        for column, total in enumerate(values.sum(axis=1).astype(np.int64)):
            # Layers of one width see the same tokens: their null is the same, and drawn once.
            key = (int(total), width, -1.0 if np.isnan(k) else k)
            if key not in drawn:
                drawn[key] = balance_null(int(total), width, k, draws, rng)
            for name, pair in drawn[key].items():
                expected[name][row, column] = pair
    variables: dict = {
        "count": (("layer", "expert", "label"), count),
        "share": (("layer", "expert", "label"), _share(count)),
    }
    variables["relative_load"] = (("layer", "expert", "label"), _share(count) * axis.n_experts[:, None, None])
    if weight is not None:
        variables["weight"] = (("layer", "expert", "label"), weight)
        variables["weighted_share"] = (("layer", "expert", "label"), _share(weight))
    variables["selections"] = (("layer", "label"), np.nansum(count, axis=1))
    for name in BALANCE:
        variables[name] = (("layer", "label"), measured[name])
        variables[f"null_{name}"] = (("layer", "label"), expected[name][..., 0])
        tail = "p01" if _more_is_even(name) else "p99"
        variables[f"null_{name}_{tail}"] = (("layer", "label"), expected[name][..., 1])
    variables["exists"] = (("layer", "expert"), axis.exists)
    table = "layer, expert" if attrs["by"] == "none" else "layer, expert, label"
    return xr.Dataset(
        variables,
        coords=axis.coordinates() | {"label": labels},
        attrs=attrs | {"null": NULL, "padding": PADDING, "table": table, "table_order": "relative_load"},
    )


def _share(values: Float[np.ndarray, "layer expert label"]) -> Float[np.ndarray, "layer expert label"]:
    with np.errstate(invalid="ignore", divide="ignore"):
        return values / np.nansum(values, axis=1, keepdims=True)


LOAD_QUESTION = Analysis(
    name="load",
    run=load,
    figure="load",
    help="How often is each expert chosen, and how evenly is the work shared?",
    parameters=(
        Parameter("by", str, None, "a document label: load and balance for each of its values"),
        LAYERS,
        PHASE,
        Parameter("draws", int, 400, "random draws behind the balance null"),
        SEED,
    ),
    tier="routing",
)
