"""Maps: experts, or tokens, as points in a plane, near each other where what they are routed, or give out, is alike."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import xarray as xr

from moescope.analysis.counts import document_tables, labelling, sites_of, token_counts, token_tables, token_totals
from moescope.analysis.labelled import PADDING, LayerAxis, provenance
from moescope.analysis.layouts import FEWEST, QUALITY, Layout, lay_out
from moescope.analysis.question import LAYERS, SEED, Analysis, Parameter
from moescope.analysis.similarities import Layers, axis_of, layers_of
from moescope.analysis.token_places import first_places
from moescope.errors import MoescopeError

if TYPE_CHECKING:
    from jaxtyping import Float

    from moescope.store import Store

By = Literal["profile", "tokens", "outputs"]

FEATURES = {
    "profile": "square roots of the shares of an expert's selections by label, as if all labels had as many tokens",
    "tokens": "square roots of the shares of an expert's selections that each of the most frequent token ids makes",
    "outputs": "an expert's mean output, less the mean of its layer, at length one",
    "gate": "an expert's router row, less the mean of its layer, at length one",
    "token": "square roots of the shares of a token id's selections that go to each expert, all layers side by side",
}


def expert_map(
    store: Store,
    by: By = "profile",
    label: str | None = None,
    layers: Sequence[int] | None = None,
    vocabulary: int = 500,
    neighbours: int = 15,
    min_dist: float = 0.1,
    seed: int = 0,
) -> xr.Dataset:
    """A map of the experts of a store.

    How to read it: experts that stand together are alike in what the map is of (`attrs["features"]`), across layers
    too. Look at `trustworthiness` first: a map near `trustworthiness_chance` shows nothing, and a plain projection is
    better where `trustworthiness_pca` is higher.

    Args:
        store: an open store.
        by: "profile" (for which labels it is selected), "tokens" (for which token ids) or "outputs" (what it gives out
            on average; needs the activations tier with outputs). For router rows see `gate_map`.
        label: for "profile", the document label; the store's first if None.
        layers: model layer indices; all that have these features if None.
        vocabulary: for "tokens", how many of the most frequent token ids.
        neighbours, min_dist, seed: as in `lay_out`.

    Returns:
        As `expert_map_from_features`.

    Raises:
        MoescopeError: what the map needs is not there, or too few experts have it.
    """
    axis, tables, attrs = expert_features(store, by, label, layers, vocabulary)
    found = dict(enumerate(tables))
    return _expert_map(found, axis, attrs | {"analysis": "expert_map"}, neighbours, min_dist, seed)


def expert_features(
    store: Store, by: By, label: str | None, layers: Sequence[int] | None, vocabulary: int
) -> tuple[LayerAxis, list[np.ndarray], dict[str, Any]]:
    """What `expert_map` lays out: (layers, [expert, feature] of each with NaN rows without features, attributes).

    Raises:
        MoescopeError: what the map needs is not there.
    """
    if by not in ("profile", "tokens", "outputs"):
        raise MoescopeError('`by` is "profile", "tokens" or "outputs"; for router rows use `gate_map`.')
    sites = sites_of(store, layers)
    if by == "outputs":
        record = store.manifest.activations
        if record is None or "outputs" not in record.kinds:
            raise MoescopeError(
                'This store keeps no expert outputs: capture it with activations=ms.Activations(["outputs"], ...).'
            )
        sites = [site for site in sites if site.key in record.sites]
    label = label or (store.labels[0] if store.labels else None)
    tables = _features(store, sites, by, label, vocabulary)
    attrs = provenance(store, by=by, label=label if by == "profile" else None, vocabulary=vocabulary)
    return LayerAxis.of_sites(sites), tables, attrs | {"features": FEATURES[by]}


def gate_map(rows: Layers, neighbours: int = 15, min_dist: float = 0.1, seed: int = 0) -> xr.Dataset:
    """A map of the experts of a model by their router rows.

    How to read it: experts that stand together are called by the same hidden states. Rows of different layers read
    different hidden states, so that what stands together across layers does so as far as the layers share a space.
    Look at `trustworthiness` first, as for `expert_map`.

    Args:
        rows: by layer, arrays [E, R] or what `expert_weights` gives (its `router`).
        neighbours, min_dist, seed: as in `lay_out`.

    Returns:
        As `expert_map_from_features`.

    Raises:
        MoescopeError: a layer without router rows, or too few experts.
    """
    found = {}
    for layer, given in layers_of(rows):
        table = np.asarray(getattr(given, "router", given), dtype=np.float64)
        if table.ndim != 2:
            raise MoescopeError(f"Layer {layer} needs one router row per expert, [E, R]; got {table.ndim} axes.")
        found[int(layer)] = _centred_unit(table)
    attrs = provenance(None, by="gate") | {"analysis": "gate_map", "features": FEATURES["gate"]}
    return _expert_map(found, None, attrs, neighbours, min_dist, seed)


def expert_map_from_features(
    features: Mapping[int, Float[np.ndarray, "expert feature"]],
    neighbours: int = 15,
    min_dist: float = 0.1,
    seed: int = 0,
) -> xr.Dataset:
    """A map of experts from any features of them, as they are.

    Args:
        features: by model layer index, [E, F]; NaN rows for experts that have none.
        neighbours, min_dist, seed: as in `lay_out`.

    Returns:
        Dataset with dims (layer, expert): x, y (NaN where an expert has no features), exists; and ():
        trustworthiness, trustworthiness_chance, trustworthiness_pca, points.

    Raises:
        MoescopeError: layers with different numbers of features, or what `lay_out` raises.
    """
    attrs = provenance(None, by="features") | {"analysis": "expert_map", "features": "as given"}
    return _expert_map(dict(features), None, attrs, neighbours, min_dist, seed)


def token_map(
    store: Store,
    layers: Sequence[int] | None = None,
    min_count: int = 20,
    most: int = 2000,
    neighbours: int = 15,
    min_dist: float = 0.1,
    seed: int = 0,
) -> xr.Dataset:
    """A map of token ids by the experts they are sent to.

    How to read it: ids that stand together are routed alike, in all the layers asked for. A rare id's shares are noise:
    raise `min_count` if the rare ones (`count`) form a cloud of their own.

    Args:
        store: an open store with the routing tier.
        layers: model layer indices; all MoE layers if None.
        min_count: occurrences below which an id is left out.
        most: at most so many ids, the most frequent ones.
        neighbours, min_dist, seed: as in `lay_out`.

    Returns:
        Dataset with dims (token): x, y, count, and document and place, where it occurs first; (token, layer):
        top_expert, to which it goes most, top_share, at which share of its occurrences that expert is active, and
        top_usual, at which share of all tokens; coordinates token (id) and text; and (): ids, how many token ids the
        store has; covered, the share of its tokens that the map's ids make; trustworthiness, trustworthiness_chance,
        trustworthiness_pca, points.

    Raises:
        MoescopeError: too few token ids occur so often.
    """
    sites = sites_of(store, layers)
    name, size = token_totals(store)
    order = np.argsort(-size, kind="stable")
    chosen = np.sort(name[order[size[order] >= min_count][:most]])
    if chosen.size < FEWEST:
        raise MoescopeError(f"Only {chosen.size} token ids occur {min_count} times: lower `min_count`.")
    count, blocks, best = size[np.searchsorted(name, chosen)], [], []
    for site in sites:
        pairs = token_counts(store, site)
        place = np.searchsorted(chosen, pairs.group).clip(max=chosen.size - 1)
        here = chosen[place] == pairs.group
        table = np.zeros((chosen.size, site.n_experts))
        table[place[here], pairs.expert[here]] = pairs.count[here]
        share, top = table / np.maximum(table.sum(axis=1, keepdims=True), 1), table.argmax(axis=1)
        usual = np.bincount(pairs.expert, weights=pairs.count, minlength=site.n_experts) / size.sum()
        best.append((top, table.max(axis=1) / count, usual[top]))
        blocks.append(np.sqrt(share))
    layout = lay_out(np.concatenate(blocks, axis=1) / np.sqrt(len(blocks)), neighbours, min_dist, seed)
    texts = store.vocabulary()
    document, place = first_places(store, chosen)
    attrs = provenance(store, layers=None if layers is None else list(layers), min_count=min_count, most=most) | {
        "analysis": "token_map",
        "features": FEATURES["token"],
        "table": "token",
        "table_order": "count",
    }
    return xr.Dataset(
        {
            "x": ("token", layout.points[:, 0]),
            "y": ("token", layout.points[:, 1]),
            "count": ("token", count),
            "document": ("token", document),
            "place": ("token", place),
        }
        | {
            held: (("token", "layer"), np.stack(values, axis=1))
            for held, values in zip(("top_expert", "top_share", "top_usual"), zip(*best, strict=True), strict=True)
        }
        | {
            "ids": ((), int((size > 0).sum())),
            "covered": ((), float(count.sum() / size.sum())),
        }
        | _quality(layout),
        coords={
            "layer": [site.layer for site in sites],
            "site": ("layer", np.array([site.key for site in sites], dtype=object)),
            "token": chosen,
            "text": ("token", np.array([texts.get(int(token), "") for token in chosen], dtype=object)),
        },
        attrs=attrs | _attributes(layout, min_dist, seed),
    )


def _features(store: Store, sites: Sequence[Any], by: str, label: str | None, vocabulary: int) -> list[np.ndarray]:
    if by == "outputs":
        return [_mean_outputs(store, site) for site in sites]
    if by == "profile":
        if label is None:
            raise MoescopeError('This store has no labels: make the map by="tokens".')
        chosen = labelling(store, label)
        if len(chosen.labels) < 3:
            raise MoescopeError(
                f'The label {label!r} has {len(chosen.labels)} values, which are no map: it needs 3, or by="tokens".'
            )
        code, tokens = chosen.spread(chosen.code), chosen.tokens_per_label
        counts = [pairs.by_label(code, len(chosen.labels)) / tokens for pairs in document_tables(store, sites)]
    else:
        name, size = token_totals(store)
        kept = name[np.argsort(-size, kind="stable")[:vocabulary]]
        column = np.full(int(name.max(initial=-1)) + 1, -1, dtype=np.int64)
        column[kept] = np.arange(kept.size)
        counts = [pairs.by_label(column, kept.size) for pairs in token_tables(store, sites)]
    with np.errstate(invalid="ignore"):
        return [np.sqrt(count / count.sum(axis=1, keepdims=True)) for count in counts]


def _mean_outputs(store: Store, site: Any) -> np.ndarray:
    total, count = None, np.zeros(site.n_experts)
    for shard in store.shards:
        found = shard.activations("outputs", site.key)
        if total is None:
            total = np.zeros((site.n_experts, found.values.shape[1]))
        np.add.at(total, found.expert, found.values.astype(np.float64))
        count += np.bincount(found.expert, minlength=site.n_experts)
    if total is None:
        raise MoescopeError("The store holds no tokens yet.")
    return _centred_unit(total / np.where(count > 0, count, np.nan)[:, None])


def _expert_map(
    features: dict[int, np.ndarray],
    axis: LayerAxis | None,
    attrs: dict[str, Any],
    neighbours: int,
    min_dist: float,
    seed: int,
) -> xr.Dataset:
    tables = [np.asarray(table, dtype=np.float64) for table in features.values()]
    if axis is None:
        axis = axis_of([int(layer) for layer in features], [len(table) for table in tables])
    if any(table.ndim != 2 for table in tables) or len({table.shape[1] for table in tables}) != 1:
        raise MoescopeError("Experts of different layers need the same features, [expert, feature] for each layer.")
    there = [np.isfinite(table).all(axis=1) for table in tables]
    layout = lay_out(
        np.concatenate([t[keep] for t, keep in zip(tables, there, strict=True)]), neighbours, min_dist, seed
    )
    edges = np.cumsum([0, *(int(keep.sum()) for keep in there)])
    places = []
    for row, keep in enumerate(there):
        place = np.full((len(tables[row]), 2), np.nan)
        place[keep] = layout.points[edges[row] : edges[row + 1]]
        places.append(place)
    whole = axis.pad(places)
    cell = ("layer", "expert")
    return xr.Dataset(
        {"x": (cell, whole[..., 0]), "y": (cell, whole[..., 1]), "exists": (cell, axis.exists)} | _quality(layout),
        coords=axis.coordinates(),
        attrs=attrs
        | _attributes(layout, min_dist, seed)
        | {"padding": PADDING, "table": "layer, expert", "table_order": "none"},
    )


def _quality(layout: Layout) -> dict[str, Any]:
    return {
        "trustworthiness": ((), layout.trustworthiness),
        "trustworthiness_chance": ((), layout.chance),
        "trustworthiness_pca": ((), layout.pca),
        "points": ((), len(layout.points)),
    }


def _attributes(layout: Layout, min_dist: float, seed: int) -> dict[str, Any]:
    return {
        "neighbours": layout.neighbours, "min_dist": min_dist, "seed": seed, "quality": QUALITY,
    }  # fmt: skip


def _centred_unit(table: np.ndarray) -> np.ndarray:
    rows = np.asarray(table, dtype=np.float64)
    rows = rows - np.nanmean(rows, axis=0, keepdims=True)
    size = np.linalg.norm(rows, axis=1, keepdims=True)
    return rows / np.where(size > 0, size, np.nan)


_LAYOUT = (
    Parameter("neighbours", int, 15, "neighbours of each point that the map tries to keep"),
    Parameter("min_dist", float, 0.1, "how tightly points may be packed"),
    SEED,
)
EXPERT_MAP_QUESTION = Analysis(
    name="expert_map",
    run=expert_map,
    figure="expert_map",
    help="Which experts are alike across layers, by what is routed to them or what they give out?",
    parameters=(
        Parameter("by", str, "profile", "labels, token ids, or mean outputs", ("profile", "tokens", "outputs")),
        Parameter("label", str, None, "the document label of a profile (default: the first)"),
        LAYERS,
        Parameter("vocabulary", int, 500, "the most frequent token ids that by=tokens looks at"),
        *_LAYOUT,
    ),
    tier="routing",
)
GATE_MAP_QUESTION = Analysis(
    name="gate_map",
    run=gate_map,
    figure="gate_map",
    help="Which experts are called alike across layers, by their router rows?",
    parameters=_LAYOUT,
    tier="none",
    inputs=("weights",),
)
TOKEN_MAP_QUESTION = Analysis(
    name="token_map",
    run=token_map,
    figure="token_map",
    help="Which tokens are sent to the same experts?",
    parameters=(
        LAYERS,
        Parameter("min_count", int, 20, "occurrences below which a token id is left out"),
        Parameter("most", int, 2000, "token ids at most, the most frequent ones"),
        *_LAYOUT,
    ),
    tier="routing",
)
