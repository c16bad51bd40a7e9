"""Attention sinks and massive activations: what layers hang on their first token and on few numbers (METHODS 4).

Source: "Unveiling Super Experts in MoE LLMs" (arXiv 2507.23279): super experts form massive activations, and these form
the attention sink on the first token. Whether one causes the other `moescope.effects.super_expert_effects` asks.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import xarray as xr

from moescope.analysis.labelled import NONE_IS_MINUS_ONE, provenance
from moescope.analysis.question import Analysis
from moescope.errors import MoescopeError, StoreError

if TYPE_CHECKING:
    from moescope.store import Store

UNIFORM = (
    "uniform: the share of a head that attends to all tokens before it alike, the mean of 1 / (position + 1) over the "
    "queries of all sequences of the store; `sinks` are read on some of them"
)


def attention_sinks(store: Store) -> xr.Dataset:
    """How much attention each head puts on a sequence's first token, and how large each layer's residual stream grows.

    How to read it: `share` is a head's mean attention on the first token. Hold it against `uniform`, what attending to
    everything alike would put there: a head far above it uses the first token as a sink. `absmax` is the largest
    magnitude that a layer writes into the residual stream, with its token and channel: where it jumps by orders of
    magnitude and stays, massive activations have formed, and `jump` (times the layer before) says where.

    Args:
        store: an open store, captured with sinks or with the outliers tier.

    Returns:
        Dataset with dims (layer, head): share (NaN where it could not be read); (layer): mean_share, queries, absmax,
        jump, token_id, position, channel (-1 where unknown); (): uniform. Layers are all those that were looked at, MoE
        or not.

    Raises:
        MoescopeError: captured with neither.
    """
    shares, queries = _shares(store)
    hidden = store.hidden_outliers().to_pylist() if "outliers" in store.tiers else []
    if not shares and not hidden:
        raise MoescopeError(
            "This store has neither attention sinks nor the outliers tier: capture again with one of them."
        )
    peaks = {int(row["layer"]): row for row in hidden}
    layers = sorted({*shares, *peaks})
    heads = max((len(values) for values in shares.values()), default=0)
    share = np.full((len(layers), heads), np.nan)
    for row, layer in enumerate(layers):
        values = shares.get(layer, np.empty(0))
        share[row, : len(values)] = values
    counted = (~np.isnan(share)).sum(axis=1)
    mean = np.where(counted > 0, np.nansum(share, axis=1) / np.maximum(counted, 1), np.nan)
    absmax = np.array([peaks[layer]["absmax"] if layer in peaks else np.nan for layer in layers], dtype=np.float64)
    jump = np.full(len(layers), np.nan)
    if len(layers) > 1:
        with np.errstate(divide="ignore", invalid="ignore"):
            jump[1:] = absmax[1:] / absmax[:-1]
    places = {
        name: ("layer", np.array([peaks[layer][name] if layer in peaks else -1 for layer in layers]), NONE_IS_MINUS_ONE)
        for name in ("token_id", "position", "channel")
    }
    return xr.Dataset(
        {
            "share": (("layer", "head"), share),
            "mean_share": ("layer", mean),
            "queries": ("layer", np.array([queries.get(layer, 0) for layer in layers])),
            "absmax": ("layer", absmax),
            "jump": ("layer", jump),
            **places,
            "uniform": ((), _uniform(store)),
        },
        coords={"layer": layers, "head": np.arange(heads)},
        attrs=provenance(store, analysis="attention_sinks")
        | {"null": UNIFORM, "sinks": "read" if shares else "none: captured without sinks", "table": "layer"}
        | {"outliers": "read" if peaks else "none: captured without the outliers tier"},
    )


def _shares(store: Store) -> tuple[dict[int, np.ndarray], dict[int, int]]:
    """Shares [head] and queries by layer; nothing where the store was captured without sinks."""
    try:
        table = store.attention_sinks()
    except StoreError:
        return {}, {}
    layer, share = table["layer"].to_numpy(), table["share"].to_numpy(zero_copy_only=False).astype(np.float64)
    queries = table["queries"].to_numpy()
    each = [int(number) for number in np.unique(layer)]
    return {n: share[layer == n] for n in each}, {n: int(queries[layer == n][0]) for n in each}


def _uniform(store: Store) -> float:
    total, n = 0.0, 0
    for shard in store.shards:
        position = shard.tokens(["position"])["position"].to_numpy()
        position = position[position > 0]
        total += float((1 / (position + 1)).sum())
        n += position.size
    return total / n if n else float("nan")


ATTENTION_SINKS_QUESTION = Analysis(
    name="attention_sinks",
    run=attention_sinks,
    figure="attention_sinks",
    help="Which heads sink their attention into the first token, and where do massive activations form?",
    parameters=(),
    tier="outliers",
)
