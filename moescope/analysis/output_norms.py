"""Do the experts that the router prefers give out more? Output norm against router score (METHODS 6).

Source: "A Closer Look into Mixture-of-Experts in Large Language Models" (arXiv 2406.18219), which ranks all experts of
a layer; a store holds the norms of the selected ones, so that ranks here are among the k selected of each token.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import xarray as xr
from scipy.stats import spearmanr

from moescope.analysis.counts import sites_of
from moescope.analysis.labelled import PADDING, LayerAxis, provenance
from moescope.analysis.question import LAYERS, SEED, Analysis, Parameter
from moescope.errors import MoescopeError

if TYPE_CHECKING:
    from jaxtyping import Float

    from moescope.store import Store

ROWS = 16_384
"""Tokens whose k x k comparisons are held at once."""
MEASURES = ("spearman", "kendall", "spearman_within", "kendall_within")
NULL = (
    "norms that do not depend on scores: each document's sum of coefficients is as likely to be turned round as not; p "
    "is two-sided over random signs of whole documents, NaN with fewer than 6 documents"
)
SELECTED = (
    "ranks are among the experts selected for a token, not among all of the layer: what a store holds. "
    "Tokens with fewer than two filled slots, or with one score or norm for all of them, have no coefficient"
)


def norm_against_score(
    store: Store, layers: Sequence[int] | None = None, draws: int = 999, seed: int = 0
) -> xr.Dataset:
    """Whether a higher routing weight goes with a larger output, token by token.

    How to read it: `spearman` is the mean over tokens of the rank correlation between the k weights and the k output
    norms: 1 the expert with the largest weight always gives out most, 0 no relation. `spearman_within` divides each
    norm by its expert's mean first: what is left when it is not just that some experts are loud and often preferred.
    `share[i, j]` is the share of rank-i experts (0 has the largest weight) whose output is the j-th largest; 1 / k
    everywhere without a relation.

    Args:
        store: an open store with the routing and experts tiers.
        layers: model layer indices; all MoE layers if None.
        draws: random signs behind p, and bootstrap samples behind the intervals.
        seed: of both.

    Returns:
        Dataset with dims (layer): spearman, kendall (tau-b), spearman_within, kendall_within; NAME_low, NAME_high (95 %
        bootstrap over documents); NAME_p; tokens, documents; spearman_experts (over the experts' mean weights and
        norms); with dims (layer, score_rank, norm_rank): count, share; with dims (layer, expert): mean_norm,
        mean_weight, selections.

    Raises:
        MoescopeError: no experts tier, no such layer, or no token with two selected experts.
    """
    sites = sites_of(store, layers)
    axis = LayerAxis.of_sites(sites)
    widest = int(np.nanmax(axis.top_k))
    count = np.full((len(sites), widest, widest), np.nan)
    by_layer: dict[str, np.ndarray] = {}
    names = [*MEASURES, *(f"{name}_{end}" for name in MEASURES for end in ("low", "high", "p"))]
    for name in [*names, "tokens", "documents", "spearman_experts"]:
        by_layer[name] = np.full(len(sites), np.nan)
    means: dict[str, list[np.ndarray]] = {"mean_norm": [], "mean_weight": [], "selections": []}
    for row, site in enumerate(sites):
        expert = _expert_means(store, site)
        for name, values in expert.items():
            means[name].append(values)
        documents, table = _sums(store, site)
        count[row, : site.top_k, : site.top_k] = table
        by_layer["tokens"][row] = documents[0].sum()
        by_layer["documents"][row] = (documents[0] > 0).sum()
        for name, values in zip(MEASURES, documents[1:], strict=True):
            for end, value in _measured(documents[0], values, draws, seed).items():
                by_layer[name + end][row] = value
        both = ~np.isnan(expert["mean_norm"])
        if both.sum() > 2:
            by_layer["spearman_experts"][row] = _spearman(expert["mean_norm"][both], expert["mean_weight"][both])
    if not np.nansum(by_layer["tokens"]):
        raise MoescopeError("No token with two selected experts whose weights and norms differ: nothing to rank.")
    attrs = provenance(store, analysis="norm_against_score", draws=draws, seed=seed)
    attrs |= {"null": NULL, "selected": SELECTED, "padding": PADDING, "table": "layer", "table_order": "spearman"}
    with np.errstate(invalid="ignore"):
        share = count / count.sum(axis=2, keepdims=True)
    cell = ("layer", "score_rank", "norm_rank")
    return xr.Dataset(
        {name: ("layer", values) for name, values in by_layer.items()}
        | {"count": (cell, count), "share": (cell, share), "exists": (("layer", "expert"), axis.exists)}
        | {name: (("layer", "expert"), axis.pad(values)) for name, values in means.items()},
        coords=axis.coordinates() | {"score_rank": np.arange(widest), "norm_rank": np.arange(widest)},
        attrs=attrs,
    )


def rank_correlations(
    score: Float[np.ndarray, "token slot"], norm: Float[np.ndarray, "token slot"]
) -> tuple[Float[np.ndarray, " token"], Float[np.ndarray, " token"]]:
    """Spearman's rho and Kendall's tau-b of each row, over the slots where both are there (not NaN).

    Returns:
        (rho [T], tau [T]); NaN for a row with fewer than two such slots, or all of one kind tied.
    """
    there = ~(np.isnan(score) | np.isnan(norm))
    pair = there[:, :, None] & there[:, None, :]
    signs = []
    for values in (score, norm):
        with np.errstate(invalid="ignore"):
            sign = np.sign(np.nan_to_num(values)[:, :, None] - np.nan_to_num(values)[:, None, :])
        signs.append(np.where(pair, sign, 0.0))
    with np.errstate(invalid="ignore", divide="ignore"):
        product = (signs[0] * signs[1]).sum(axis=(1, 2))
        tau = product / np.sqrt(np.square(signs[0]).sum(axis=(1, 2)) * np.square(signs[1]).sum(axis=(1, 2)))
        # A slot's average rank is half the sum of its signs, up to a constant of the row.
        ranks = [sign.sum(axis=2) for sign in signs]
        rho = (ranks[0] * ranks[1]).sum(axis=1) / np.sqrt(
            np.square(ranks[0]).sum(axis=1) * np.square(ranks[1]).sum(axis=1)
        )
    return rho, tau


def _expert_means(store: Store, site: Any) -> dict[str, np.ndarray]:
    def compute() -> pa.Table:
        total = np.zeros((3, site.n_experts))
        for _, expert, weight, norm in _slots(store, site):
            there = ~(np.isnan(weight) | np.isnan(norm))
            ids = expert[there].astype(np.int64)
            for place, values in enumerate((np.ones(ids.size), norm[there], weight[there])):
                total[place] += np.bincount(ids, weights=values, minlength=site.n_experts)
        return pa.table({"selections": total[0], "norm": total[1], "weight": total[2]})

    kept = store.cached("norm-by-expert", compute, {"site": site.key})
    selections = kept["selections"].to_numpy()
    size = np.where(selections > 0, selections, np.nan)
    return {
        "mean_norm": kept["norm"].to_numpy() / size,
        "mean_weight": kept["weight"].to_numpy() / size,
        "selections": selections,
    }


def _sums(store: Store, site: Any) -> tuple[np.ndarray, np.ndarray]:
    """[1 + measures, document]: tokens with coefficients and their sums; and the rank-rank counts [k, k]."""
    mean = _expert_means(store, site)["mean_norm"]

    def compute() -> pa.Table:
        table = np.zeros((site.top_k, site.top_k))
        parts: list[np.ndarray] = []
        names: list[np.ndarray] = []
        for document, expert, weight, norm in _slots(store, site):
            ids = np.minimum(expert.astype(np.int64), site.n_experts - 1)
            with np.errstate(invalid="ignore", divide="ignore"):
                quiet = norm / mean[ids]
            raw, within = rank_correlations(weight, norm), rank_correlations(weight, quiet)
            table += _rank_table(weight, norm)
            good = ~(np.isnan(raw[0]) | np.isnan(within[0]))
            name, code = np.unique(document[good], return_inverse=True)
            columns = [np.ones(int(good.sum())), *(values[good] for values in (*raw, *within))]
            names.append(name)
            parts.append(np.stack([np.bincount(code, weights=c, minlength=name.size) for c in columns]))
        whole, code = np.unique(np.concatenate(names or [np.empty(0, np.int64)]), return_inverse=True)
        values = np.concatenate(parts, axis=1) if parts else np.empty((5, 0))
        sums = np.stack([np.bincount(code, weights=row, minlength=whole.size) for row in values])
        flat = [*sums, table.ravel()]
        return pa.table({"name": ["tokens", *MEASURES, "table"], "values": pa.array(flat, pa.list_(pa.float64()))})

    kept = store.cached("norm-ranks", compute, {"site": site.key})
    rows = [np.array(values, dtype=np.float64) for values in kept["values"].to_pylist()]
    return np.stack(rows[:-1]), rows[-1].reshape(site.top_k, site.top_k)


def _slots(store: Store, site: Any) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]]:
    """(document [T], expert, weight, norm [T, k]) some rows at a time; NaN where a slot is missing."""
    for shard in store.shards:
        document = shard.tokens(["document"])["document"].to_numpy()
        routing, outputs = shard.routing(site.key, ["expert", "weight"]), shard.experts(site.key)
        for start in range(0, shard.n_tokens, ROWS):
            rows = slice(start, start + ROWS)
            norm = outputs.norm[rows].astype(np.float64)
            weight = routing.weight[rows].astype(np.float64)
            if routing.valid is not None:
                norm = np.where(routing.valid[rows], norm, np.nan)
            yield document[rows], routing.expert[rows], weight, norm


def _rank_table(weight: np.ndarray, norm: np.ndarray) -> np.ndarray:
    """Counts [score rank, norm rank] over tokens whose slots are all there; ties in slot order."""
    k = weight.shape[1]
    full = ~(np.isnan(weight) | np.isnan(norm)).any(axis=1)
    place = [np.argsort(np.argsort(-values[full], axis=1, kind="stable"), axis=1) for values in (weight, norm)]
    return np.bincount((place[0] * k + place[1]).ravel(), minlength=k * k).reshape(k, k).astype(np.float64)


def _measured(tokens: np.ndarray, sums: np.ndarray, draws: int, seed: int) -> dict[str, float]:
    """The mean over tokens, its interval over documents, and p under random signs of documents."""
    n = tokens.size
    if not n:
        return {}
    value = float(sums.sum() / tokens.sum())
    if n < 6 or draws < 1:
        return {"": value}
    rng = np.random.default_rng(seed)
    drawn, reached = np.empty(draws), 0
    for draw in range(draws):
        times = np.bincount(rng.integers(0, n, n), minlength=n)
        drawn[draw] = (times @ sums) / (times @ tokens)
        signs = rng.integers(0, 2, n) * 2 - 1
        reached += abs(float(signs @ sums)) >= abs(float(sums.sum())) - 1e-9
    low, high = np.percentile(drawn, [2.5, 97.5])
    return {"": value, "_low": float(low), "_high": float(high), "_p": (reached + 1) / (draws + 1)}


def _spearman(a: np.ndarray, b: np.ndarray) -> float:
    if np.ptp(a) == 0 or np.ptp(b) == 0:
        return float("nan")
    found: Any = spearmanr(a, b)  # scipy does not type what it gives
    return float(found[0])


NORM_AGAINST_SCORE_QUESTION = Analysis(
    name="norm_against_score",
    run=norm_against_score,
    figure="norm_against_score",
    help="Do the experts that the router prefers give out more?",
    parameters=(LAYERS, Parameter("draws", int, 999, "random signs and bootstrap samples of documents"), SEED),
    tier="experts",
)
