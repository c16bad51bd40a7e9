"""What if fewer experts did the work: top-p routing, fewer ranks, zero-computation experts, off the store (METHODS 7).

Source: top-p routing as in "Harder Tasks Need More Experts" (arXiv 2403.07652); null and zero-computation experts as in
AdaMoE (arXiv 2406.13233), MoE++ (arXiv 2410.07348) and LongCat-Flash (arXiv 2509.01322). The model is not run again:
what later layers would have made of the change is not in these numbers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pyarrow as pa
import xarray as xr
from scipy.special import softmax

from moescope.analysis.counts import Phase, labelling, sites_of
from moescope.analysis.labelled import LayerAxis, provenance
from moescope.analysis.question import LAYERS, PHASE, SEED, Analysis, Parameter
from moescope.analysis.resampling import INTERVAL, ratio_interval
from moescope.analysis.routed_rows import kept_rows
from moescope.analysis.spreading import over_shards
from moescope.errors import MoescopeError
from moescope.store.selection import SCORES

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int

    from moescope.store import Store

Scores = Literal["logits", "weights"]

ROWS = 16_384
"""Tokens whose scores over all experts are held at once."""
SOURCES = {
    "logits": (
        "p is the router's score over all experts (softmax or the family's own, divided by its sum), from the logits "
        "tier; experts are taken by p, biases and groups left aside"
    ),
    "weights": (
        "p is the share of the weight of the selected experts, from the routing tier: what could be dropped of what "
        "was selected; top-p can need no more than k of them. Capture with the logits tier for p over all experts"
    ),
}
NOTES = (
    "experts: smallest n whose cumulative p reaches the threshold; slots without a weight, or with one below 0, "
    "are left out, tokens with none are not counted; NaN where no token counts"
)

NULL = "*_uniform and overlap_chance: a router that scores all experts alike, and n of E experts drawn at random"


def what_if(
    store: Store,
    thresholds: Sequence[float] = (0.3, 0.5, 0.7, 0.8, 0.9, 0.95),
    scores: Scores | None = None,
    by: str | None = None,
    layers: Sequence[int] | None = None,
    where: dict[str, str | Sequence[str]] | None = None,
    phase: Phase | None = None,
    resamples: int = 1000,
    seed: int = 0,
) -> xr.Dataset:
    """How many experts a token would need for a share p of the router's score, and what fewer of them would keep.

    How to read it: `experts` is how many experts a token would get on average if as many were taken as reach the
    threshold of p; where it is below k, fixed k spends more than the router asks for, and labels with more are harder
    to it. `experts_uniform` is what a router would need that scores all alike. `kept_mass` at rank n is the share of
    the selected experts' weight that stays when only the first n are used. `top_overlap` says whether the n experts
    with the largest p are those that were selected (by chance n / E: `overlap_chance`). `zero_share` is the share of
    selections that compute nothing.

    Args:
        store: an open store with the routing tier.
        thresholds: of p, each above 0 and below 1.
        scores: "logits" for p over all experts, "weights" for p within the selected ones; logits where they are stored
            if None.
        by: a document label; None for all documents as the one label "all".
        layers, where, phase: filters, as in `analysis.load`.
        resamples: bootstrap draws of documents behind the intervals; 0 for none.
        seed: of the draws.

    Returns:
        Dataset with dims (layer, threshold, label): experts, experts_low, experts_high; (layer, rank, label), rank
        counting from 1: kept_mass, kept_mass_low, kept_mass_high and, with logits, top_mass (share of all score in the
        n largest) and top_overlap (|n largest p, first n selected| / n); NaN beyond a layer's k (top_mass beyond its
        E; ranks go as far as k). (layer, label): zero_share and missing_share (of all slots), computed (experts that
        compute, per token), zero_share_low, zero_share_high, tokens; and the same of a router that cannot tell
        experts apart: (layer, threshold): experts_uniform; (layer, rank): kept_uniform = n / k and, with logits,
        overlap_chance = n / E, which is also its top_mass. `top_k` stands along layer.

    Raises:
        MoescopeError: a threshold outside (0, 1), no logits tier where it was asked for, or nothing left to count.
    """
    levels = np.asarray(list(thresholds), dtype=np.float64)
    if not levels.size or (levels <= 0).any() or (levels >= 1).any() or np.unique(levels).size != levels.size:
        raise MoescopeError("`thresholds` are different numbers above 0 and below 1.")
    sites = sites_of(store, layers)
    scores = scores or ("logits" if "logits" in store.tiers else "weights")
    if scores not in SOURCES:
        raise MoescopeError('`scores` is "logits" or "weights".')
    chosen = labelling(store, by, where, phase)
    rows = [np.flatnonzero(chosen.code == code) for code in range(len(chosen.labels))]
    sums = [_document_sums(store, site, chosen.documents, levels, scores, phase) for site in sites]
    axis = LayerAxis.of_sites(sites)
    rng = np.random.default_rng(seed)
    deepest = max(site.top_k for site in sites)
    variables = _variables(sums, rows, deepest, scores, resamples, rng) | _uniform(sites, levels, deepest, scores)
    attrs = provenance(
        store,
        analysis="what_if",
        scores=scores,
        thresholds=[float(level) for level in levels],
        by=by,
        where=where,
        phase=phase,
        resamples=resamples,
        seed=seed,
        source=SOURCES[scores],
        null=NULL,
        interval=INTERVAL,
        undefined=NOTES,
        scope="the model is not run again: each layer's router is read as it was, with every layer before it unchanged",
        documents_unlabelled=chosen.unlabelled,
        documents_filtered=chosen.filtered,
        table="layer, threshold, label",
    )
    coordinates: dict[str, Any] = {name: value for name, value in axis.coordinates().items() if name != "expert"}
    coordinates |= {"threshold": levels, "rank": np.arange(1, deepest + 1), "label": list(chosen.labels)}
    return xr.Dataset(variables, coords=coordinates, attrs=attrs)


def experts_for(
    p: Float[np.ndarray, "token expert"], thresholds: Sequence[float] | np.ndarray
) -> Float[np.ndarray, "token threshold"]:
    """Smallest number of experts whose cumulative p, largest first, reaches each threshold.

    Args:
        p: [token, expert] scores that sum to 1, or to 0 for a token without any.
        thresholds: above 0, below 1.

    Returns:
        [token, threshold], at least 1; NaN for a token whose scores sum to 0 or are NaN.
    """
    values = np.asarray(p, dtype=np.float64)
    cumulative = np.cumsum(-np.sort(-values, axis=1), axis=1)
    total = cumulative[:, -1:]
    # Rounding in the stored scores must not push the last expert's cumulative sum below the threshold.
    reached = cumulative[:, None, :] >= np.asarray(thresholds)[None, :, None] * total[:, None, :] - 1e-9
    found = 1.0 + reached.argmax(axis=2)
    return np.where((total > 0) & reached.any(axis=2), found, np.nan)


def router_shares(site: Any, logits: Float[np.ndarray, "token expert"]) -> Float[np.ndarray, "token expert"]:
    """The router's score over all experts, divided by its sum, float64.

    Raises:
        MoescopeError: how this router scores was not proven at capture.
    """
    if site.score_function not in SCORES:
        raise MoescopeError(f"{site.key}: how this router scores is not known; ask for scores='weights'.")
    if site.skip_classes:
        raise MoescopeError(f"{site.key}: its router also scores skipping an expert, and those logits are not stored.")
    wide = logits.astype(np.float64)
    found = softmax(wide, axis=1) if site.score_function == "softmax" else SCORES[site.score_function](wide)
    return found / found.sum(axis=1, keepdims=True)


def slot_shares(
    weight: Float[np.ndarray, "token rank"], valid: Bool[np.ndarray, "token rank"] | None
) -> Float[np.ndarray, "token rank"]:
    """Share of each slot in its token's summed weight, float64, rank order; 0 for a slot without a weight of 0 or more.

    A token without any weight has zeros.
    """
    held = np.nan_to_num(weight.astype(np.float64), nan=0.0, posinf=0.0, neginf=0.0)
    held = np.maximum(held if valid is None else np.where(valid, held, 0.0), 0.0)
    total = held.sum(axis=1, keepdims=True)
    return np.divide(held, total, out=np.zeros_like(held), where=total > 0)


def _columns(thresholds: int, top_k: int) -> list[str]:
    """Names of the sums kept for each document: thresholds, then ranks, then single ones."""
    ranked = [f"{name}{rank}" for name in ("kept", "top", "same") for rank in range(top_k)]
    return [*(f"p{place}" for place in range(thresholds)), *ranked, "scored", "weighted", "zero", "missing", "tokens"]


def _document_sums(
    store: Store,
    site: Any,
    documents: Int[np.ndarray, " document"],
    levels: np.ndarray,
    scores: Scores,
    phase: Phase | None,
) -> dict[str, Float[np.ndarray, " document"]]:
    """Sums over the tokens of every document, by `_columns`; kept in the store's aggregates."""
    names = _columns(levels.size, site.top_k)

    def compute() -> pa.Table:
        parts = list(over_shards(store, _shard_sums, site, levels, scores, phase))
        every = np.unique(np.concatenate([found for found, _ in parts])) if parts else np.empty(0, np.int64)
        total = np.zeros((every.size, len(names)))
        for found, table in parts:
            total[np.searchsorted(every, found)] += table
        return pa.table({"document": every} | {name: total[:, place] for place, name in enumerate(names)})

    params = {"site": site.key, "thresholds": levels.tolist(), "scores": scores, "phase": phase or "all"}
    table = store.cached("what-if", compute, params)
    place = np.searchsorted(table["document"].to_numpy(), documents)
    return {name: table[name].to_numpy()[place] for name in names}


def _shard_sums(
    shard: Any, site: Any, levels: np.ndarray, scores: Scores, phase: Phase | None
) -> tuple[Int[np.ndarray, " document"], Float[np.ndarray, "document column"]]:
    """(documents of the shard, sums over the tokens of each, by `_columns`)."""
    kept = kept_rows(shard, None, phase)
    found, index = np.unique(shard.tokens(["document"])["document"].to_numpy(), return_inverse=True)
    table = np.zeros((found.size, len(_columns(levels.size, site.top_k))))
    routing = shard.routing(site.key, fields=["expert", "weight", "valid"])
    for first in range(0, shard.n_tokens, ROWS):
        rows = slice(first, min(first + ROWS, shard.n_tokens))
        valid = None if routing.valid is None else routing.valid[rows]
        logits = shard.logits(site.key, rows) if scores == "logits" else None
        values = _token_values(site, routing.expert[rows], routing.weight[rows], valid, logits, levels)
        group = index[rows]
        if kept is not None:
            group, values = group[kept[rows]], values[kept[rows]]
        for place in range(table.shape[1]):
            table[:, place] += np.bincount(group, values[:, place], minlength=found.size)
    return found, table


def _token_values(
    site: Any,
    expert: np.ndarray,
    weight: np.ndarray,
    valid: np.ndarray | None,
    logits: np.ndarray | None,
    levels: np.ndarray,
) -> Float[np.ndarray, "token column"]:
    """What each token adds to the sums of its document, by `_columns`."""
    n, k = expert.shape
    there = np.ones((n, k), dtype=bool) if valid is None else valid
    share = slot_shares(weight, valid)
    weighted = share.sum(axis=1) > 0
    top, same = np.zeros((n, k)), np.zeros((n, k))
    if logits is None:
        scored, needed = weighted, experts_for(share, levels)
    else:
        p = router_shares(site, logits)
        scored, needed = np.isfinite(p.sum(axis=1)), experts_for(p, levels)
        order = np.argsort(-p, axis=1, kind="stable")[:, :k]
        top = np.cumsum(np.take_along_axis(p, order, axis=1), axis=1)
        ids = np.where(there, expert.astype(np.int64), -1)
        for rank in range(k):
            shared = np.any(order[:, : rank + 1, None] == ids[:, None, : rank + 1], axis=2)
            same[:, rank] = shared.mean(axis=1)
        top, same = np.where(scored[:, None], top, 0), np.where(scored[:, None], same, 0)
    zero = np.zeros((n, k), dtype=bool)
    if site.zero_experts:
        zero = there & (expert >= site.n_experts - site.zero_experts)
    single = [scored, weighted, zero.sum(axis=1), (~there).sum(axis=1), np.ones(n)]
    return np.concatenate(
        [np.nan_to_num(needed), np.cumsum(share, axis=1), top, same, np.stack(single, axis=1)], axis=1
    )


def _variables(
    sums: list[dict[str, np.ndarray]],
    rows: list[np.ndarray],
    deepest: int,
    scores: Scores,
    resamples: int,
    rng: np.random.Generator,
) -> dict[str, Any]:
    found: dict[str, list[Any]] = {}
    for of_site in sums:
        n_levels = sum(name[0] == "p" and name[1:].isdigit() for name in of_site)
        k = sum(name.startswith("kept") for name in of_site)
        slots = of_site["tokens"] * k
        asked = {
            "experts": ([of_site[f"p{at}"] for at in range(n_levels)], of_site["scored"], True, n_levels),
            "kept_mass": ([of_site[f"kept{at}"] for at in range(k)], of_site["weighted"], True, deepest),
            "top_mass": ([of_site[f"top{at}"] for at in range(k)], of_site["scored"], False, deepest),
            "top_overlap": ([of_site[f"same{at}"] for at in range(k)], of_site["scored"], False, deepest),
            "zero_share": ([of_site["zero"]], slots, True, 1),
            "missing_share": ([of_site["missing"]], slots, False, 1),
            "computed": ([slots - of_site["zero"] - of_site["missing"]], of_site["tokens"], False, 1),
        }
        for name, (columns, denominator, bounded, width) in asked.items():
            values = _by_label(columns, denominator, rows, width, resamples if bounded else 0, rng)
            for ending, table in zip(("", "_low", "_high") if bounded else ("",), values, strict=False):
                found.setdefault(name + ending, []).append(table)
        found.setdefault("tokens", []).append(np.array([[of_site["tokens"][of].sum() for of in rows]]))
    if scores == "weights":
        del found["top_mass"], found["top_overlap"]
    dims = {"experts": "threshold", "kept_mass": "rank", "top_mass": "rank", "top_overlap": "rank"}
    variables: dict[str, Any] = {}
    for name, tables in found.items():
        stacked = np.stack(tables)
        dim = dims.get(name.removesuffix("_low").removesuffix("_high"))
        variables[name] = (("layer", dim, "label"), stacked) if dim else (("layer", "label"), stacked[:, 0])
    return variables


def _uniform(sites: list[Any], levels: np.ndarray, deepest: int, scores: Scores) -> dict[str, Any]:
    """What a router gives that scores every expert (with weights: every selected one) alike."""
    ranks = np.arange(1, deepest + 1)
    top_k, width = (np.array([getattr(site, name) for site in sites])[:, None] for name in ("top_k", "n_experts"))
    of = width if scores == "logits" else top_k
    needed = np.maximum(np.ceil(levels * of - 1e-9), 1.0)
    found = {"kept_uniform": np.where(ranks <= top_k, ranks / top_k, np.nan)}
    if scores == "logits":
        found["overlap_chance"] = np.where(ranks <= top_k, ranks / width, np.nan)
    return {"experts_uniform": (("layer", "threshold"), needed)} | {
        name: (("layer", "rank"), values) for name, values in found.items()
    }


def _by_label(
    columns: list[np.ndarray],
    denominator: np.ndarray,
    rows: list[np.ndarray],
    width: int,
    resamples: int,
    rng: np.random.Generator,
) -> list[Float[np.ndarray, "column label"]]:
    """(ratio, low, high), each [column, label] and padded with NaN to `width` columns."""
    tables = [np.full((width, len(rows)), np.nan) for _ in range(3)]
    top = np.stack(columns, axis=1).astype(np.float64)
    bottom = np.repeat(denominator[:, None], top.shape[1], axis=1).astype(np.float64)
    for label, of in enumerate(rows):
        with np.errstate(invalid="ignore"):
            value = top[of].sum(axis=0) / bottom[of].sum(axis=0)
        for table, values in zip(tables, (value, *ratio_interval(top[of], bottom[of], resamples, rng)), strict=True):
            table[: top.shape[1], label] = values
    return tables


WHAT_IF_QUESTION = Analysis(
    name="what_if",
    run=what_if,
    figure="what_if",
    help="How many experts would a token need, and what would fewer of them keep?",
    parameters=(
        Parameter("thresholds", float, (0.3, 0.5, 0.7, 0.8, 0.9, 0.95), "shares of the router's score", many=True),
        Parameter(
            "scores", str, None, "where p is taken: over all experts, or within the selected", ("logits", "weights")
        ),
        Parameter("by", str, None, "label of the documents (default: all together)"),
        LAYERS,
        PHASE,
        Parameter("resamples", int, 1000, "bootstrap draws of documents behind the intervals"),
        SEED,
    ),
    tier="routing",
)
