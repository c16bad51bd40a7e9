"""Which experts could be merged: dominant experts by usage, each other expert with the dominant it is scored like.

Source: MC-SMoE (arXiv 2310.01334): usage divided by the layer's largest, the dominant experts of all layers above one
threshold, every other expert in the group of the dominant whose router logits are most similar, `(cos + 1) / 2`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

import numpy as np
import xarray as xr

from moescope.analysis.counts import document_counts, sites_of
from moescope.analysis.labelled import PADDING, LayerAxis, provenance
from moescope.analysis.question import LAYERS, SEED, Analysis, Parameter
from moescope.analysis.router_columns import logit_similarity
from moescope.errors import MoescopeError

if TYPE_CHECKING:
    from jaxtyping import Float

    from moescope.store import Store

Scope = Literal["model", "layer"]

NULL = (
    "the similarity of router logits when each expert's column is rotated by its own offset within every sequence: "
    "null_mean what any two columns reach, null_extreme what no pair of any layer reached in any draw"
)
CHOICE = (
    "similarity is the largest among a layer's dominant experts, so that it exceeds similarity_others, the mean over "
    "the other dominants, by being chosen alone; whether a group can be merged is told by beyond, and by merging it"
)


def expert_groups(
    store: Store,
    keep: float | None = None,
    scope: Scope = "model",
    layers: Sequence[int] | None = None,
    draws: int | None = None,
    seed: int = 0,
) -> xr.Dataset:
    """Groups the experts of each layer round its most used ones.

    How to read it: experts with one `group` number are scored alike by the router and would be merged into the expert
    of that number, the dominant one. A member whose similarity is not `beyond` the null has no more in common with its
    dominant than chance gives: it was put there because every expert must go somewhere.

    Args:
        store: an open store with the routing and logits tiers.
        keep: dominant experts of each layer, on average; half of the experts if None.
        scope: "model" ranks normalised usage over all layers together (the paper: layers differ in how many they keep);
            "layer" keeps as many in each, which is what a smaller checkpoint can hold.
        layers: model layer indices; all MoE layers if None.
        draws, seed: of the null, as in `logit_similarity`.

    Returns:
        As `expert_groups_from_usage`, and with dims (layer, expert): selections, beyond (member closer to its dominant
        than null_extreme; False for dominants); with dims (layer): null_mean, null_extreme.

    Raises:
        MoescopeError: no logits tier, no such layer, or a `keep` that leaves a layer without experts.
    """
    sites = sites_of(store, layers)
    axis = LayerAxis.of_sites(sites)
    counts = []
    for site in sites:
        pairs = document_counts(store, site)
        counts.append(np.bincount(pairs.expert, weights=pairs.count, minlength=site.n_experts).astype(np.float64))
    alike = logit_similarity(store, layers, draws, seed)
    similarity = [alike["similarity"].values[row, : len(c), : len(c)] for row, c in enumerate(counts)]
    attrs = provenance(
        store, analysis="expert_groups", keep=keep, scope=scope, draws=alike.attrs["draws"], seed=seed, null=NULL
    )
    result = _grouped(axis, counts, similarity, keep, scope, attrs)
    extreme = alike["null_extreme"].values
    with np.errstate(invalid="ignore"):
        beyond = result["similarity"].values > extreme[:, None]
    return result.assign(
        selections=(("layer", "expert"), axis.pad(counts)),
        beyond=(("layer", "expert"), beyond),
        null_mean=("layer", alike["null_mean"].values),
        null_extreme=("layer", extreme),
    )


def expert_groups_from_usage(
    usage: Sequence[Float[np.ndarray, " expert"]],
    similarity: Sequence[Float[np.ndarray, "expert other"]],
    layers: Sequence[int] | None = None,
    keep: float | None = None,
    scope: Scope = "model",
) -> xr.Dataset:
    """Groups experts by plain numbers, one array per layer each.

    Args:
        usage: selections of each expert, or any measure of how much it is used; none below 0.
        similarity: of every two experts of the layer; the diagonal is not looked at, NaN is least similar.
        layers: model layer indices; 0, 1, 2, … if None.
        keep, scope: as in `expert_groups`.

    Returns:
        Dataset with dims (layer, expert): group (number of its dominant expert), dominant, usage (divided by the
        layer's largest), share (of its group's usage: its weight in the merge), similarity (to its dominant; NaN for
        dominants), similarity_others (mean over the layer's other dominants); with dims (layer): groups.

    Raises:
        MoescopeError: arrays that do not fit, or a `keep` that leaves a layer without experts.
    """
    counts = [np.asarray(values, dtype=np.float64) for values in usage]
    if len(counts) != len(similarity) or any(
        np.shape(matrix) != (len(c), len(c)) for c, matrix in zip(counts, similarity, strict=True)
    ):
        raise MoescopeError("Groups need, for each layer, usage [E] and similarity [E, E].")
    numbers = list(range(len(counts))) if layers is None else [int(layer) for layer in layers]
    axis = LayerAxis(
        layers=np.array(numbers, dtype=np.int64),
        sites=tuple(f"L{layer:03d}" for layer in numbers),
        n_experts=np.array([len(c) for c in counts], dtype=np.int64),
        top_k=np.full(len(counts), np.nan),
    )
    attrs = provenance(None, analysis="expert_groups", keep=keep, scope=scope)
    return _grouped(axis, counts, [np.asarray(s, dtype=np.float64) for s in similarity], keep, scope, attrs)


def dominant_experts(
    usage: Sequence[Float[np.ndarray, " expert"]], keep: float, scope: Scope
) -> list[Float[np.ndarray, " expert"]]:
    """[E] bool for each layer; the most used one of a layer is always among them, the first of equals wins.

    Args:
        usage: normalised, one array per layer.
        keep: how many of each layer, on average.
        scope: "model" or "layer".
    """
    found = [np.zeros(len(values), dtype=bool) for values in usage]
    for dominant, values in zip(found, usage, strict=True):
        most = round(keep) if scope == "layer" else 1
        dominant[np.argsort(-values, kind="stable")[: max(1, most)]] = True
    if scope == "layer":
        return found
    cells = [(-value, row, e) for row, values in enumerate(usage) for e, value in enumerate(values)]
    left = round(keep * len(usage)) - sum(int(dominant.sum()) for dominant in found)
    for _, row, e in sorted(cells):
        if left > 0 and not found[row][e]:
            found[row][e] = True
            left -= 1
    return found


def _grouped(
    axis: LayerAxis,
    counts: list[np.ndarray],
    similarity: list[np.ndarray],
    keep: float | None,
    scope: Scope,
    attrs: dict,
) -> xr.Dataset:
    if scope not in ("model", "layer"):
        raise MoescopeError('`scope` is "model" or "layer".')
    if not counts or any((c < 0).any() or np.isnan(c).any() for c in counts):
        raise MoescopeError("Groups need the usage of at least one layer, and none below 0.")
    widest, narrowest = max(map(len, counts)), min(map(len, counts))
    wanted = narrowest / 2 if keep is None else float(keep)
    if not 1 <= wanted <= (narrowest if scope == "layer" else widest):
        raise MoescopeError(f"`keep` is how many experts a layer keeps, from 1 to {narrowest}; got {wanted:g}.")
    usage = [c / max(c.max(initial=0), 1e-300) for c in counts]
    columns: dict[str, list[np.ndarray]] = {
        name: [] for name in ("group", "dominant", "share", "similarity", "similarity_others")
    }
    for c, matrix, dominant in zip(counts, similarity, dominant_experts(usage, wanted, scope), strict=True):
        for name, values in _layer(c, matrix, dominant).items():
            columns[name].append(values)
    cell = ("layer", "expert")
    padded = {name: axis.pad(values) for name, values in columns.items()}
    return xr.Dataset(
        {
            "group": (cell, padded["group"]),
            "dominant": (cell, padded["dominant"] == 1),
            "usage": (cell, axis.pad(usage)),
            "share": (cell, padded["share"]),
            "similarity": (cell, padded["similarity"]),
            "similarity_others": (cell, padded["similarity_others"]),
            "groups": ("layer", np.array([int(d.sum()) for d in columns["dominant"]])),
            "exists": (cell, axis.exists),
        },
        coords=axis.coordinates(),
        attrs=attrs | {"choice": CHOICE, "padding": PADDING, "table": "layer, expert", "table_order": "none"},
    )


def _layer(counts: np.ndarray, matrix: np.ndarray, dominant: np.ndarray) -> dict[str, np.ndarray]:
    n = len(counts)
    heads = np.flatnonzero(dominant)
    group = np.arange(n)
    close, others = np.full(n, np.nan), np.full(n, np.nan)
    for e in np.flatnonzero(~dominant):
        values = matrix[e, heads]
        best = int(np.argmax(np.where(np.isnan(values), -np.inf, values)))
        group[e], close[e] = heads[best], values[best]
        rest = np.delete(values, best)
        others[e] = np.nanmean(rest) if (~np.isnan(rest)).any() else np.nan
    total = np.bincount(group, weights=counts, minlength=n)[group]
    size = np.bincount(group, minlength=n)[group]
    share = np.where(total > 0, counts / np.where(total > 0, total, 1), 1 / size)  # unused: all alike
    return {
        "group": group.astype(float), "dominant": dominant.astype(float), "share": share, "similarity": close,
        "similarity_others": others,
    }  # fmt: skip


EXPERT_GROUPS_QUESTION = Analysis(
    name="expert_groups",
    run=expert_groups,
    figure="expert_groups",
    help="Which experts could be merged, by usage and by how alike the router scores them?",
    parameters=(
        Parameter("keep", float, None, "experts that each layer keeps on average (default: half)"),
        Parameter("scope", str, "model", "one threshold for all layers, or as many in each", ("model", "layer")),
        LAYERS,
        Parameter("draws", int, None, "rotations behind the null; 0 for none (default: up to 19)"),
        SEED,
    ),
    tier="logits",
)
