"""How narrowly and how heavily each expert is chosen: mean margin, weight and entropy of the tokens that select it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import xarray as xr

from moescope.analysis.counts import Phase, row_groups, sites_of
from moescope.analysis.kernels import kernel
from moescope.analysis.labelled import PADDING, LayerAxis, provenance
from moescope.analysis.question import LAYERS, PHASE, SEED, Analysis, Parameter
from moescope.analysis.resampling import drawn_documents
from moescope.analysis.spreading import over_shards
from moescope.analysis.transition_kernels import stirred
from moescope.errors import StoreError

if TYPE_CHECKING:
    from jaxtyping import Float

    from moescope.store import Store

GROUPS = 100
"""Documents are summed in at most so many groups of whole documents, drawn by a hash of their numbers."""
SUMS = ("count", "weight", "margins", "margin", "entropies", "entropy")
"""Over the filled slots of an expert: how many; w; how many tokens have a margin; it; and likewise the entropy."""
MEANS = {"mean_weight": ("weight", "count"), "margin": ("margin", "margins"), "token_entropy": ("entropy", "entropies")}
NULL = (
    "an expert chosen whatever the margin, weight or entropy of a token would have its layer's mean over all "
    "selections (layer_NAME); intervals are over documents drawn again, in up to 100 groups of whole documents"
)


def margins(
    store: Store,
    layers: Sequence[int] | None = None,
    phase: Phase | None = None,
    resamples: int = 500,
    seed: int = 0,
) -> xr.Dataset:
    """How narrowly each expert is chosen: the mean margin of the tokens that select it, with weight and entropy.

    How to read it: a token's margin is how far its last chosen expert was above the first left out, in the router's
    selection scores. An expert whose mean is low serves tokens whose choice hangs by a thread; hold it against
    `layer_margin`, the mean over all selections of its layer, and against its interval. Routers of different layers
    have different scales: compare inside a layer.

    Args:
        store: an open store with the routing tier.
        layers: model layer indices; all MoE layers if None.
        phase: "prefill" or "decode"; both if None.
        resamples: draws of documents behind the intervals; 0 for none.
        seed: of the draws.

    Returns:
        Dataset with dims (layer, expert): count (selections); margin, mean_weight, token_entropy (nats), each the mean
        over the tokens that select the expert, NaN where it is never selected or the router defines none; NAME_low,
        NAME_high: 95 % intervals; margin_groups, the groups of documents that its margin is over. With dim (layer):
        layer_NAME, the means over all selections of the layer.

    Raises:
        MoescopeError: no routing tier or no such layer.
    """
    sites = sites_of(store, layers)
    axis = LayerAxis.of_sites(sites)
    rng = np.random.default_rng(seed)
    found: dict[str, list[np.ndarray]] = {}
    for site in sites:
        for name, values in _means(margin_sums(store, site, phase), resamples, rng).items():
            found.setdefault(name, []).append(values)
    variables: dict[str, Any] = {
        name: ("layer", np.array(rows)) if name.startswith("layer_") else (("layer", "expert"), axis.pad(rows))
        for name, rows in found.items()
    }
    variables["exists"] = (("layer", "expert"), axis.exists)
    attrs = provenance(store, analysis="margins", phase=phase, resamples=resamples, seed=seed)
    attrs |= {"null": NULL, "padding": PADDING, "table": "layer, expert", "table_order": "count"}
    return xr.Dataset(variables, coords=axis.coordinates(), attrs=attrs)


def _means(sums: Float[np.ndarray, "group expert sum"], resamples: int, rng: np.random.Generator) -> dict[str, Any]:
    total: dict[str, Any] = dict(zip(SUMS, np.moveaxis(sums.sum(axis=0), -1, 0), strict=True))
    out: dict[str, Any] = {"count": total["count"]}
    drawn = _drawn(sums, resamples, rng)
    for name, (above, below) in MEANS.items():
        out[name] = _ratio(total[above], total[below])
        out[f"layer_{name}"] = float(_ratio(total[above].sum(), total[below].sum()))
        low = high = np.full(out[name].shape, np.nan)
        if drawn is not None:
            ratio = _ratio(drawn[above], drawn[below])
            several = (sums[:, :, SUMS.index(below)] > 0).sum(axis=0) > 1
            whole = several & ~np.isnan(ratio).any(axis=0)
            bounds = np.full((2, several.size), np.nan)
            bounds[:, whole] = np.quantile(ratio[:, whole], [0.025, 0.975], axis=0)
            # Where a draw may miss all of an expert's documents: slower, and of few.
            for expert in np.flatnonzero(several & ~whole & ~np.isnan(ratio).all(axis=0)):
                bounds[:, expert] = np.nanquantile(ratio[:, expert], [0.025, 0.975])
            low, high = bounds
        out[f"{name}_low"], out[f"{name}_high"] = low, high
    out["margin_groups"] = (sums[:, :, SUMS.index("margins")] > 0).sum(axis=0).astype(np.float64)
    return out


def _drawn(sums: np.ndarray, resamples: int, rng: np.random.Generator) -> dict[str, np.ndarray] | None:
    """Each sum, [draw, expert], with the groups of documents drawn again; None for no draws or no two groups."""
    if resamples < 1 or len(sums) < 2:
        return None
    flat = sums.reshape(len(sums), -1)
    drawn = np.concatenate([draws @ flat for draws in drawn_documents(len(sums), resamples, rng)])
    return dict(zip(SUMS, np.moveaxis(drawn.reshape(resamples, *sums.shape[1:]), -1, 0), strict=True))


def _ratio(above: Any, below: Any) -> np.ndarray:
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(np.asarray(below) > 0, np.asarray(above) / np.asarray(below), np.nan)


def margin_sums(store: Store, site: Any, phase: Phase | None = None) -> Float[np.ndarray, "group expert sum"]:
    """`SUMS` of one layer by group of documents and expert, kept in the aggregates; empty groups are left out."""

    def compute() -> pa.Table:
        total = np.zeros((GROUPS, site.n_experts, len(SUMS)))
        for part in over_shards(store, _of_shard, site, phase):
            total += part
        group, expert = np.nonzero(total[:, :, 0])
        return pa.table({"group": group, "expert": expert} | dict(zip(SUMS, total[group, expert].T, strict=True)))

    kept = store.cached(f"margins-{site.key}", compute, {"site": site.key, "phase": phase or "all"})
    group, row = np.unique(kept["group"].to_numpy(), return_inverse=True)
    sums = np.zeros((group.size, site.n_experts, len(SUMS)))
    sums[row, kept["expert"].to_numpy()] = np.stack([kept[name].to_numpy() for name in SUMS], axis=-1)
    return sums


def _of_shard(shard: Any, site: Any, phase: Phase | None) -> Float[np.ndarray, "group expert sum"]:
    document = row_groups(shard, "document", phase)
    numbers, index = np.unique(document, return_inverse=True)
    hashed = np.array([-1 if n < 0 else int(stirred(0, int(n))) % GROUPS for n in numbers.tolist()], dtype=np.int64)
    routing = shard.routing(site.key, ["expert", "weight", "valid", "margin", "entropy"])
    total = np.zeros((GROUPS, site.n_experts, len(SUMS)))
    chosen = (routing.expert, routing.valid, routing.weight, routing.margin, routing.entropy)
    beyond = sum_selections(hashed[index], *chosen, total)
    if beyond:
        raise StoreError(
            f"{beyond} slots of layer {site.layer} name an expert beyond the {site.n_experts} it has: "
            "the store is damaged; run `moescope check` on it."
        )
    return total


@kernel
def sum_selections(group, expert, valid, weight, margin, entropy, total):
    """Adds every filled slot to `total[group, expert]`, in the order of `SUMS`.

    Args:
        group: [row] int; the row's group, negative to leave the row out.
        expert: [row, rank] unsigned; selected ids.
        valid: [row, rank] bool, or None when no slot can be missing.
        weight: [row, rank] float32.
        margin, entropy: [row] float32, NaN where the router defines none.
        total: [group, expert, 6] float64, added to in place.

    Returns:
        How many filled slots named an expert that does not exist (they are not counted).
    """
    beyond = 0
    for row in range(expert.shape[0]):
        g = group[row]
        if g < 0:
            continue
        m, h = float(margin[row]), float(entropy[row])
        for rank in range(expert.shape[1]):
            if valid is not None and not valid[row, rank]:
                continue
            e = int(expert[row, rank])
            if e >= total.shape[1]:
                beyond += 1
                continue
            total[g, e, 0] += 1
            total[g, e, 1] += float(weight[row, rank])
            if m == m:
                total[g, e, 2] += 1
                total[g, e, 3] += m
            if h == h:
                total[g, e, 4] += 1
                total[g, e, 5] += h
    return beyond


MARGINS_QUESTION = Analysis(
    name="margins",
    run=margins,
    figure="margins",
    help="How narrowly, and with how much weight, is each expert chosen?",
    parameters=(
        LAYERS,
        PHASE,
        Parameter("resamples", int, 500, "documents drawn again for the intervals; 0 for none"),
        SEED,
    ),
    tier="routing",
)
