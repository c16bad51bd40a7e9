"""Outliers in words: super experts by either definition, massive activations, attention sinks; with their yardstick."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import xarray as xr

from moescope.analysis.labelled import layer_names
from moescope.analysis.outliers import CODE_DEPTH, GREW, formed_depth
from moescope.analysis.summary import Finding

SINK = 0.3
"""Share of a head's attention on the first token from which it is called a sink: Gu et al., arXiv 2410.10781."""


@dataclass(frozen=True)
class Rule:
    """What one published definition of super experts says of a store.

    Attributes:
        definition: "paper" or "code".
        depth: last model layer whose maxima are pooled; why: how it was found.
        pooled: experts pooled; cap: how many of them the rule can name at most.
        percentile, tenth: what an expert's largest output must exceed, both.
        named: (layer by its name, expert) that the rule names, largest first.
        believed: those of them that are outliers of their layer too, by the ratio and beyond the null of the robust z.
    """

    definition: str
    depth: int
    why: str
    pooled: int
    cap: int
    percentile: float
    tenth: float
    named: tuple[tuple[str, int], ...]
    believed: tuple[tuple[str, int], ...]


def rule_of(result: xr.Dataset) -> Rule:
    """What a definition says, from `analysis.super_experts`."""
    named = result["super"].values.astype(bool)
    solid = named & result["by_ratio"].values & (result["robust_z"].values > result["z_null_p99"].values[:, None])
    order = np.argsort(-np.nan_to_num(result["absmax"].values, nan=-1).ravel(), kind="stable")
    layers = layer_names(result)

    def listed(kept: np.ndarray) -> tuple[tuple[str, int], ...]:
        places = [np.unravel_index(flat, kept.shape) for flat in order.tolist() if kept.ravel()[flat]]
        return tuple((layers[row], int(expert)) for row, expert in places)

    return Rule(
        definition=str(result.attrs["definition"]),
        depth=int(result.attrs["depth"]),
        why=str(result.attrs["depth_from"]),
        pooled=int(result["n_pooled"]),
        cap=int(result["cap"]),
        percentile=float(result["percentile"]),
        tenth=float(result["tenth"]),
        named=listed(named),
        believed=listed(solid),
    )


def massive_finding(result: xr.Dataset) -> Finding:
    """Whether massive activations form in the residual stream, and where (from `analysis.attention_sinks`)."""
    absmax, layers = result["absmax"].values, result["layer"].values
    if not np.isfinite(absmax).any():
        why = "Capture with the outliers tier to have the largest value of the residual stream after each layer."
        return Finding("attention_sinks", "Massive activations cannot be told from this store.", why, None)
    hidden = np.full(int(layers.max()) + 1, np.nan)
    hidden[layers] = absmax
    formed = formed_depth(hidden)
    early = hidden[: max(1, int(np.ceil(hidden.size * CODE_DEPTH)))]
    low, high = float(np.nanmin(early)), float(np.nanmax(early))
    grew = f"over the first three quarters of the layers it goes from {low:.3g} to {high:.3g}"
    if formed is None:
        return Finding(
            "attention_sinks",
            "No massive activations form.",
            f"The largest value of the residual stream never grows {GREW}-fold: {grew}. Tenfold is a "
            "convention; chance has no model here.",
            False,
            {"low": low, "high": high},
        )
    at = result.sel(layer=formed)
    channel, position = int(at["channel"]), int(at["position"])
    where = f", in channel {channel} at position {position}" if min(channel, position) >= 0 else ""
    return Finding(
        "attention_sinks",
        f"Massive activations form by layer {formed}.",
        f"The largest value of the residual stream reaches {float(at['absmax']):.3g} there{where}; {grew}. Formed "
        f"means {GREW}-fold growth, a convention.",
        True,
        {"formed": formed, "low": low, "high": high},
    )


def sink_finding(result: xr.Dataset) -> Finding:
    """Which head hangs most on the first token, and how many are sinks (from `analysis.attention_sinks`)."""
    share, uniform = result["share"].values, float(result["uniform"])
    if not share.size or not np.isfinite(share).any():
        why = "The store was captured without attention sinks: capture again with --sinks."
        return Finding("attention_sinks", "Attention sinks cannot be told from this store.", why, None)
    row, head = np.unravel_index(int(np.nanargmax(share)), share.shape)
    heads, sinks = int(np.isfinite(share).sum()), int((share >= SINK).sum())
    detail = (
        f"Head {head} of layer {int(result['layer'].values[row])} puts {share[row, head]:.1%} of its attention there, "
        f"the median head {float(np.nanmedian(share)):.1%}; attending to all tokens alike would put {uniform:.1%}. "
        f"{sinks} of {heads} heads reach {SINK:.0%}, where Gu et al. begin to speak of a sink."
    )
    values = {"heads": heads, "sinks": sinks, "largest": float(share[row, head]), "uniform": uniform}
    if sinks:
        noun = "head sinks" if sinks == 1 else "heads sink"
        return Finding("attention_sinks", f"{sinks} {noun} attention into the first token.", detail, True, values)
    return Finding("attention_sinks", "No head sinks its attention into the first token.", detail, False, values)
