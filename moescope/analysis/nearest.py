"""Experts near an expert in the space that a map was made from, not on the map: distances, and groups of them.

A map of two dimensions cannot keep all neighbours; these are the ones that are there.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import xarray as xr
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from moescope.analysis.labelled import PADDING
from moescope.analysis.maps import By, expert_features
from moescope.errors import MoescopeError

if TYPE_CHECKING:
    from jaxtyping import Float, Int

    from moescope.store import Store

MUTUAL = 3
"""Neighbours among which two experts must be each other's to be linked."""


def nearest_experts(
    store: Store, site: str, expert: int, by: By = "profile", label: str | None = None, vocabulary: int = 500
) -> xr.Dataset:
    """How far every expert is from one, in the features that `expert_map` lays out.

    How to read it: `ratio` 1 is the distance to the expert in the middle of all; near 0 is an expert with the same
    features. What is near in features but far on the map is what the map had to tear apart.

    Args:
        store: an open store.
        site: the expert's site key.
        expert: its number.
        by, label, vocabulary: as in `expert_map`.

    Returns:
        Dataset with dims (layer, expert): distance (Euclidean; NaN for itself and for experts without features) and
        ratio to the median distance.

    Raises:
        MoescopeError: no such expert, or it has no features (it was never selected).
    """
    axis, tables, attrs = expert_features(store, by, label, None, vocabulary)
    if site not in axis.sites:
        raise MoescopeError(f"This map has no layer {site}; it has {', '.join(axis.sites)}.")
    row = axis.sites.index(site)
    if not 0 <= expert < len(tables[row]):
        raise MoescopeError(f"Layer {site} has {len(tables[row])} experts; there is no {expert}.")
    mine = np.asarray(tables[row][expert], dtype=np.float64)
    if not np.isfinite(mine).all():
        raise MoescopeError("This expert was never selected: it has no features and no neighbours.")
    away = [np.linalg.norm(np.asarray(table, dtype=np.float64) - mine, axis=1) for table in tables]
    away[row][expert] = np.nan
    distance = axis.pad(away)
    middle = float(np.nanmedian(distance)) if np.isfinite(distance).any() else np.nan
    cell = ("layer", "expert")
    return xr.Dataset(
        {"distance": (cell, distance), "ratio": (cell, distance / (middle or np.nan)), "exists": (cell, axis.exists)},
        coords=axis.coordinates(),
        attrs=attrs
        | {
            "analysis": "nearest_experts",
            "of": f"{site} expert {expert}",
            "median": middle,
            "padding": PADDING,
            "table": "layer, expert",
            "table_order": "none",
        },
    )


def map_groups(
    store: Store, by: By = "profile", label: str | None = None, vocabulary: int = 500, mutual: int = MUTUAL
) -> xr.Dataset:
    """Groups of experts that are linked in the features that `expert_map` lays out, not on the map.

    How to read it: two experts are linked if each is among the other's `mutual` nearest; a group is what hangs
    together by links. Any features have some groups: hold `groups` and `largest` against the same for experts whose
    features were dealt anew one by one (`null_largest`).

    Args:
        store: an open store.
        by, label, vocabulary: as in `expert_map`.
        mutual: neighbours of each expert that count.

    Returns:
        Dataset with dims (layer, expert): group (1 the largest, 2, ...; 0 for an expert without a link; NaN without
        features), exists; and (): groups, largest, null_largest.

    Raises:
        MoescopeError: what the map needs is not there.
    """
    axis, tables, attrs = expert_features(store, by, label, None, vocabulary)
    there = [np.isfinite(table).all(axis=1) for table in tables]
    rows = np.concatenate([np.asarray(t, dtype=np.float64)[keep] for t, keep in zip(tables, there, strict=True)])
    if len(rows) <= mutual:
        raise MoescopeError(f"Groups need more than {mutual} experts with features; got {len(rows)}.")
    group = linked(rows, mutual)
    rng = np.random.default_rng(0)
    dealt = linked(np.stack([rng.permutation(column) for column in rows.T], axis=1), mutual)
    edges = np.cumsum([0, *(int(keep.sum()) for keep in there)])
    parts = []
    for place, keep in enumerate(there):
        part = np.full(keep.shape, np.nan)
        part[keep] = group[edges[place] : edges[place + 1]]
        parts.append(part)
    cell = ("layer", "expert")
    return xr.Dataset(
        {
            "group": (cell, axis.pad(parts)),
            "exists": (cell, axis.exists),
            "groups": ((), int(group.max(initial=0))),
            "largest": ((), int((group == 1).sum())),
            "null_largest": ((), int((dealt == 1).sum())),
        },
        coords=axis.coordinates(),
        attrs=attrs
        | {
            "analysis": "map_groups",
            "mutual": mutual,
            "padding": PADDING,
            "table": "layer, expert",
            "table_order": "none",
            "null": "the same for features dealt anew over the experts, one feature by one",
        },
    )


def linked(rows: Float[np.ndarray, "point feature"], mutual: int = MUTUAL) -> Int[np.ndarray, " point"]:
    """The group of each point: 1 the largest, 2, ...; 0 for a point that no other is linked with."""
    n = len(rows)
    near = np.empty((n, min(mutual, n - 1)), dtype=np.int64)
    square = np.einsum("ij,ij->i", rows, rows)
    for first in range(0, n, 512):  # a block of distances at a time: all of them would be gigabytes for 15,000 experts
        part = slice(first, min(first + 512, n))
        away = square[part, None] + square[None] - 2 * rows[part] @ rows.T
        away[np.arange(part.stop - first), np.arange(first, part.stop)] = np.inf
        near[part] = np.argsort(away, axis=1, kind="stable")[:, : near.shape[1]]
    pairs = coo_array(
        (np.ones(near.size), (np.repeat(np.arange(n), near.shape[1]), near.ravel())), shape=(n, n)
    ).tocsr()
    _, group = connected_components(pairs.multiply(pairs.T), directed=False)
    _, code, size = np.unique(group, return_inverse=True, return_counts=True)
    order = np.argsort(-size, kind="stable")
    rank = np.empty(size.size, dtype=np.int64)
    rank[order] = np.arange(1, size.size + 1)
    return np.where(size[code] > 1, rank[code], 0)


def preferred_labels(result: xr.Dataset, level: float = 0.05) -> xr.DataArray:
    """The label that each expert prefers most of those that stand against the null: (layer, expert) text, "" if none.

    Args:
        result: from `analysis.npmi`.
        level: the largest q that stands.
    """
    stands = (result["q"] <= level) & (result["npmi"] > 0)
    value = result["npmi"].where(stands).transpose("layer", "expert", "label").values
    none = np.isnan(value).all(axis=2)
    best = np.where(none, 0, np.nan_to_num(value, nan=-np.inf).argmax(axis=2))
    names = np.array([str(name) for name in result["label"].values], dtype=object)
    found = np.where(none, "", names[best] if names.size else "")
    return xr.DataArray(found, dims=("layer", "expert"), coords=result["npmi"].isel(label=0, drop=True).coords)
