"""Figures: plotly, drawn from labelled results alone, with the null drawn in; they read no files and compute nothing
new.

>>> from moescope import analysis, figures
>>> figures.npmi(analysis.npmi(store)).show()
>>> figures.draw(result)                       # whichever figure fits the result
>>> figures.dark(figure)                       # the same figure for a dark page
>>> figures.save(figure, "npmi.html")          # one file, which opens without a network

Names are loaded on first use, so that importing this package costs nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

# At once: nnsight gives every object a `save`, this module too, which a name that is loaded on first use comes after.
from moescope.figures.pages import page, save

if TYPE_CHECKING:
    import plotly.graph_objects as go
    import xarray as xr

    from moescope.figures.affinities import affinity, affinity_map, mutual_information
    from moescope.figures.apart import answers_apart
    from moescope.figures.atlases import atlas
    from moescope.figures.attributing import attribution
    from moescope.figures.balances import balance
    from moescope.figures.beside import experts_beside
    from moescope.figures.bit_budget import bits
    from moescope.figures.caching import caches, offload
    from moescope.figures.coactive import coactivation
    from moescope.figures.column_outliers import weight_outliers
    from moescope.figures.comparing import compare
    from moescope.figures.criteria import criteria_effects, super_expert_effects
    from moescope.figures.domains import domain_specialisation
    from moescope.figures.effects import causal_effect, effect, expert_effects
    from moescope.figures.first_token import attention_sinks
    from moescope.figures.forgetting import relearning, unlearning, unlearning_progress
    from moescope.figures.grids import layer_expert_grid, margins
    from moescope.figures.groups import expert_groups
    from moescope.figures.importance_table import importance
    from moescope.figures.loads import load
    from moescope.figures.maps import expert_map, gate_map, token_map
    from moescope.figures.matching import neuron_matching
    from moescope.figures.outliers import super_experts
    from moescope.figures.pathways import paths
    from moescope.figures.placements import placement
    from moescope.figures.preferences import expert_labels
    from moescope.figures.replays import replay
    from moescope.figures.risk import risk_difference, risk_difference_between
    from moescope.figures.segments import consistency
    from moescope.figures.series import fluctuation
    from moescope.figures.similarities import (
        gate_similarity,
        logit_similarity,
        norm_against_score,
        output_similarity,
        weight_similarity,
    )
    from moescope.figures.specialisation import npmi, npmi_classes, npmi_markers, npmi_tokens
    from moescope.figures.sweeps import solving, sweep
    from moescope.figures.tcess_scores import tcess
    from moescope.figures.theme import dark, template
    from moescope.figures.token_maps import token_routing
    from moescope.figures.traces import trace_experts, trace_layers, trace_paths, trace_positions
    from moescope.figures.vocabulary import vocabulary_specialisation
    from moescope.figures.whatif import what_if

_HOME = {
    "expert_labels": "preferences",
    "experts_beside": "beside",
    "answers_apart": "apart",
    "balance": "balances",
    "layer_expert_grid": "grids",
    "margins": "grids",
    "replay": "replays",
    "token_routing": "token_maps",
    "attention_sinks": "first_token",
    "relearning": "forgetting",
    "unlearning": "forgetting",
    "unlearning_progress": "forgetting",
    "weight_outliers": "column_outliers",
    "tcess": "tcess_scores",
    "vocabulary_specialisation": "vocabulary",
    "fluctuation": "series",
    "compare": "comparing",
    "bits": "bit_budget",
    "what_if": "whatif",
    "placement": "placements",
    "caches": "caching",
    "consistency": "segments",
    "offload": "caching",
    "expert_groups": "groups",
    "atlas": "atlases",
    "attribution": "attributing",
    "affinity": "affinities",
    "affinity_map": "affinities",
    "mutual_information": "affinities",
    "coactivation": "coactive",
    "domain_specialisation": "domains",
    "expert_map": "maps",
    "gate_map": "maps",
    "token_map": "maps",
    "neuron_matching": "matching",
    "gate_similarity": "similarities",
    "logit_similarity": "similarities",
    "norm_against_score": "similarities",
    "output_similarity": "similarities",
    "weight_similarity": "similarities",
    "criteria_effects": "criteria",
    "super_expert_effects": "criteria",
    "causal_effect": "effects",
    "effect": "effects",
    "expert_effects": "effects",
    "importance": "importance_table",
    "load": "loads",
    "npmi": "specialisation",
    "npmi_classes": "specialisation",
    "npmi_markers": "specialisation",
    "npmi_tokens": "specialisation",
    "paths": "pathways",
    "risk_difference": "risk",
    "risk_difference_between": "risk",
    "solving": "sweeps",
    "super_experts": "outliers",
    "sweep": "sweeps",
    "trace_experts": "traces",
    "trace_layers": "traces",
    "trace_paths": "traces",
    "trace_positions": "traces",
    "dark": "theme",
    "template": "theme",
}

__all__ = [
    "affinity",
    "affinity_map",
    "answers_apart",
    "atlas",
    "attention_sinks",
    "attribution",
    "balance",
    "bits",
    "caches",
    "causal_effect",
    "coactivation",
    "compare",
    "consistency",
    "criteria_effects",
    "dark",
    "domain_specialisation",
    "draw",
    "effect",
    "expert_effects",
    "expert_groups",
    "expert_labels",
    "expert_map",
    "experts_beside",
    "fluctuation",
    "gate_map",
    "gate_similarity",
    "importance",
    "layer_expert_grid",
    "load",
    "logit_similarity",
    "margins",
    "mutual_information",
    "neuron_matching",
    "norm_against_score",
    "npmi",
    "npmi_classes",
    "npmi_markers",
    "npmi_tokens",
    "offload",
    "output_similarity",
    "page",
    "paths",
    "placement",
    "relearning",
    "replay",
    "risk_difference",
    "risk_difference_between",
    "save",
    "solving",
    "super_expert_effects",
    "super_experts",
    "sweep",
    "tcess",
    "template",
    "token_map",
    "token_routing",
    "trace_experts",
    "trace_layers",
    "trace_paths",
    "trace_positions",
    "unlearning",
    "unlearning_progress",
    "vocabulary_specialisation",
    "weight_outliers",
    "weight_similarity",
    "what_if",
]


def draw(result: xr.Dataset) -> go.Figure:
    """The figure of any result, found by its `analysis` attribute.

    Raises:
        MoescopeError: there is no figure for this result.
    """
    from moescope.errors import MoescopeError

    name = str(result.attrs.get("analysis"))
    known = [figure for figure, home in _HOME.items() if home != "theme"]
    if name not in known:
        raise MoescopeError(f"There is no figure for the result of {name!r}; figures: {', '.join(known)}.")
    return __getattr__(name)(result)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return __all__
