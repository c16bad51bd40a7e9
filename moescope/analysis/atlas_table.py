"""The atlas: all that a store says of every expert, in one table.

It computes nothing of its own: load, specialisation, affinity, importance and similarity, each with its null, brought
together by expert. What needs the model (a causal effect, the similarity of weights) is handed in.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import xarray as xr

from moescope.analysis.affinities import affinity
from moescope.analysis.counts import sites_of
from moescope.analysis.importance_table import importance
from moescope.analysis.labelled import PADDING, LayerAxis, provenance
from moescope.analysis.loads import load
from moescope.analysis.outliers import super_experts
from moescope.analysis.question import SEED, Analysis, Parameter
from moescope.analysis.router_columns import logit_similarity
from moescope.analysis.specialisation import npmi
from moescope.errors import MoescopeError

if TYPE_CHECKING:
    from moescope.store import Store

LEVEL = 0.05
"""False discovery rate at which a preference or a link is shown as one."""
NEIGHBOURS = 3
"""Predecessors, successors and similar experts kept for each expert."""
LEFT_OUT = (
    "a label, predecessor or successor is named only where q <= 0.05 against its null; similar experts only where they "
    "are closer than any pair of their layer in any draw of the null; nothing else is said of them than that"
)


def atlas(
    store: Store,
    by: str | None = None,
    permutations: int | None = None,
    seed: int = 0,
    effects: xr.DataArray | None = None,
    similar: xr.Dataset | None = None,
) -> xr.Dataset:
    """Everything a store says of every expert: work, words, neighbours, importance, outliers, look-alikes.

    How to read it: one row is one expert. `prefers` is the label it prefers most, and it is empty unless that stands
    against dealing the labels anew over documents (q <= 0.05); likewise `predecessor` and `successor`, the experts of
    the MoE layers before and after whose tokens it shares beyond chance, strongest lift first. Compare experts inside a
    layer.

    Args:
        store: an open store with the routing tier. The tiers experts, logits and outliers each add their part.
        by: the document label; the store's first if None. A store without labels has no `prefers`.
        permutations: random dealings behind the preference; see `analysis.npmi`.
        seed: of all nulls.
        effects: (layer, expert), what masking each expert alone does to the loss (`moescope.effects.expert_effects`).
        similar: a result of pairs of experts (`weight_similarity`, `output_similarity`, ...) to name similar experts
            by; by default the similarity of router logits where the store has them.

    Returns:
        Dataset with dims (layer, expert): relative_load (1 is a fair share), count; prefers (a label, or "" if none
        stands), npmi, npmi_null (99th percentile of its null), label_q (all three of that label); with the experts
        tier: reap, ean; with the outliers tier: absmax, super (published rule); effect, if given.
        With dims (layer, expert, neighbour): predecessor, successor, similar (expert numbers, NaN where there is none
        that stands), predecessor_lift, successor_lift, similarity. `attrs["absent"]` says which parts this store
        does not allow, or its null was too coarse for, and why.

    Raises:
        MoescopeError: no routing tier, no such label, or nothing to count.
    """
    sites = sites_of(store, None)
    axis = LayerAxis.of_sites(sites)
    absent: dict[str, str] = {}
    worked = load(store, weighted=False, draws=1, seed=seed)
    cell = ("layer", "expert")
    variables: dict[str, Any] = {name: (cell, worked[name].values) for name in ("relative_load", "count")}
    variables |= _labels(store, by, permutations, seed, absent)
    variables |= _links(store, axis, seed, absent)
    variables |= _importance(store, seed, absent)
    variables |= _outliers(store, seed, absent)
    variables |= _similar(store, axis, similar, seed, absent)
    if effects is not None:
        variables["effect"] = (cell, _aligned(effects, axis))
    variables["exists"] = (cell, axis.exists)
    used = by if by is not None else (store.labels[0] if store.labels else None)
    attrs = provenance(store, analysis="atlas", by=used, seed=seed, level=LEVEL)
    attrs |= {
        "absent": "; ".join(f"{part}: {why}" for part, why in absent.items()) or "none",
        "null": LEFT_OUT,
        "padding": PADDING,
        "table": "layer, expert",
        "table_order": "relative_load",
    }
    return xr.Dataset(variables, coords=axis.coordinates() | {"neighbour": np.arange(NEIGHBOURS)}, attrs=attrs)


def _labels(
    store: Store, by: str | None, permutations: int | None, seed: int, absent: dict[str, str]
) -> dict[str, Any]:
    if by is None and not store.labels:
        absent["prefers"] = "the store was captured without labels"
        return {}
    found = npmi(store, by=by, permutations=permutations, seed=seed)
    if found.sizes["label"] < 2:
        absent["prefers"] = f"all documents carry one {found.attrs['by']}"
        return {}
    if np.isnan(found["q"].values).all():
        absent["prefers"] = "no permutations were asked for, so that no preference was tested"
        return {}
    if "floor" in found.attrs:
        absent["prefers"] = f"too few permutations: {found.attrs['floor']}"
    value, q = found["npmi"].values, found["q"].values
    stands = (q <= LEVEL) & (value > 0)
    best = np.where(stands, value, -np.inf).argmax(axis=2)[..., None]

    def of_best(name: str) -> np.ndarray:
        taken = np.take_along_axis(found[name].values, best, axis=2)[..., 0]
        return np.where(stands.any(axis=2), taken, np.nan)

    names = np.array([str(name) for name in found["label"].values], dtype=object)
    cell = ("layer", "expert")
    return {
        "prefers": (cell, np.where(stands.any(axis=2), names[best[..., 0]], "")),
        "npmi": (cell, of_best("npmi")),
        "npmi_null": (cell, of_best("null_p99")),
        "label_q": (cell, of_best("q")),
    }


def _links(store: Store, axis: LayerAxis, seed: int, absent: dict[str, str]) -> dict[str, Any]:
    if len(axis.layers) < 2:
        absent["predecessor, successor"] = "the store has one MoE layer"
        return {}
    found = affinity(store, seed=seed)
    if "floor" in found.attrs:
        absent["predecessor, successor"] = f"too few draws for single links: {found.attrs['floor']}"
    shape = (len(axis.layers), int(axis.n_experts.max()), NEIGHBOURS)
    out = {name: np.full(shape, np.nan) for name in _LINKS}
    for row, (source, target) in enumerate(zip(found["source_site"].values, found["target_site"].values, strict=True)):
        before, after = axis.sites.index(str(source)), axis.sites.index(str(target))
        part = found.isel(pair=row)
        lift = np.where((part["q"].values <= LEVEL) & (part["lift"].values > 1), part["lift"].values, -np.inf)
        _keep(lift, out["successor"][before], out["successor_lift"][before])
        _keep(lift.T, out["predecessor"][after], out["predecessor_lift"][after])
    return {name: (("layer", "expert", "neighbour"), values) for name, values in out.items()}


_LINKS = ("predecessor", "predecessor_lift", "successor", "successor_lift")


def _keep(value: np.ndarray, name: np.ndarray, kept: np.ndarray) -> None:
    """Fills rows of `name` and `kept` with the columns of the largest finite values of each row."""
    order = np.argsort(-value, axis=1, kind="stable")[:, : name.shape[1]]
    best = np.take_along_axis(value, order, axis=1)
    there = np.isfinite(best)
    rows, columns = np.nonzero(there)
    name[rows, columns] = order[there]
    kept[rows, columns] = best[there]


def _importance(store: Store, seed: int, absent: dict[str, str]) -> dict[str, Any]:
    if "experts" not in store.tiers:
        absent["reap, ean"] = "captured without the experts tier"
        return {}
    found = importance(store, resamples=0, splits=0, permutations=0, seed=seed)
    return {name: (("layer", "expert"), found[name].values) for name in ("reap", "ean")}


def _outliers(store: Store, seed: int, absent: dict[str, str]) -> dict[str, Any]:
    if "outliers" not in store.tiers:
        absent["absmax, super"] = "captured without the outliers tier"
        return {}
    found = super_experts(store, seed=seed)
    return {name: (("layer", "expert"), found[name].values) for name in ("absmax", "super")}


def _similar(
    store: Store, axis: LayerAxis, similar: xr.Dataset | None, seed: int, absent: dict[str, str]
) -> dict[str, Any]:
    if similar is None:
        if "logits" not in store.tiers:
            absent["similar"] = "captured without the logits tier, whose scores are compared"
            return {}
        similar = logit_similarity(store, seed=seed)
    shape = (len(axis.layers), int(axis.n_experts.max()), NEIGHBOURS)
    name, kept = np.full(shape, np.nan), np.full(shape, np.nan)
    for row, at in enumerate(_rows(similar["layer"], axis)):
        if at is None:
            continue
        value = similar["similarity"].values[row]
        width = min(value.shape[0], shape[1])
        beyond = np.where(similar["redundant"].values[row], value, -np.inf)[:width, :width]
        _keep(beyond, name[at, :width], kept[at, :width])
    dims = ("layer", "expert", "neighbour")
    return {"similar": (dims, name), "similarity": (dims, kept)}


def _aligned(values: xr.DataArray, axis: LayerAxis) -> np.ndarray:
    """[layer, expert] of an array with these coordinates, NaN where it has none."""
    if set(values.dims) != {"layer", "expert"}:
        raise MoescopeError(f"`effects` has the dimensions {', '.join(map(str, values.dims))}, not layer and expert.")
    table = values.transpose("layer", "expert").reindex(expert=np.arange(int(axis.n_experts.max()))).values
    out = np.full((len(axis.layers), table.shape[1]), np.nan)
    for row, at in enumerate(_rows(values["layer"], axis)):
        if at is not None:
            out[at] = table[row]
    return out


def _rows(layer: xr.DataArray, axis: LayerAxis) -> list[int | None]:
    """The row of the axis that each row of a result is about: by its site, since two may share a layer's number."""
    if "site" in layer.coords and set(layer["site"].values.tolist()) & set(axis.sites):
        own, known = [str(site) for site in layer["site"].values], list(axis.sites)
    else:
        own, known = layer.values.tolist(), axis.layers.tolist()
        if len(set(known)) < len(known):
            raise MoescopeError(
                "Some layers of this store have two routers: what is handed in needs the coordinate `site` along layer."
            )
    return [known.index(name) if name in known else None for name in own]


ATLAS_QUESTION = Analysis(
    name="atlas",
    run=atlas,
    figure="atlas",
    help="What does this store say of every expert, all in one table?",
    parameters=(
        Parameter("by", str, None, "the document label (default: the store's first)"),
        Parameter(
            "permutations", int, None, "random dealings of labels over documents (default: enough for the tests)"
        ),
        SEED,
    ),
    tier="routing",
)
