"""Analyses of what was captured: on stores and on plain counts, labelled results, a null beside every score.

>>> from moescope import analysis
>>> analysis.load(store); analysis.npmi(store, by="domain"); analysis.super_experts(store)
>>> analysis.table(result)                      # a tidy pandas table of any of them
>>> analysis.ANALYSES                           # every analysis by name, as the command line sees them
>>> analysis.findings(store)                    # the first things a person would want to know, in words

Names are loaded on first use, so that importing this package costs nothing. No module is named as one of its functions:
importing a submodule would put the module where the function should be.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from moescope.analysis.affinities import affinity, affinity_from_counts
    from moescope.analysis.alignment import linear_cka, output_similarity, output_similarity_from_arrays
    from moescope.analysis.atlas_table import atlas
    from moescope.analysis.attributing import attribution, attribution_from_documents
    from moescope.analysis.bit_budget import bits, bits_from_importance
    from moescope.analysis.caching import Replayed, caches, replay_ids
    from moescope.analysis.cards import Card, card, cards_of_layer
    from moescope.analysis.coactive import coactivation, coactivation_from_counts
    from moescope.analysis.column_outliers import weight_outliers
    from moescope.analysis.comparing import compare, divergence, overlap_of
    from moescope.analysis.contexts import Example, examples, top_tokens
    from moescope.analysis.counts import document_counts, document_tokens, token_counts, token_totals
    from moescope.analysis.domains import domain_specialisation, domain_specialisation_from_documents
    from moescope.analysis.finding import find_documents, token_occurrences, tokens_matching
    from moescope.analysis.first_token import attention_sinks
    from moescope.analysis.grouping import expert_groups, expert_groups_from_usage
    from moescope.analysis.importance_table import importance
    from moescope.analysis.labelled import table
    from moescope.analysis.loads import balance, load, load_from_counts
    from moescope.analysis.local_routing import consistency, segment_routing, window_counts
    from moescope.analysis.maps import expert_map, expert_map_from_features, gate_map, token_map
    from moescope.analysis.markers import cognitive_experts, npmi_markers
    from moescope.analysis.matching import neuron_matching
    from moescope.analysis.nearest import map_groups, nearest_experts, preferred_labels
    from moescope.analysis.offloading import offload
    from moescope.analysis.outliers import super_experts, super_experts_from_maxima
    from moescope.analysis.output_norms import norm_against_score
    from moescope.analysis.pairs import PairCounts
    from moescope.analysis.pairwise import redundant_pairs
    from moescope.analysis.passages import passage, passage_routes, token_routing
    from moescope.analysis.pathways import paths
    from moescope.analysis.placements import placement, placement_from_counts
    from moescope.analysis.preparing import prepare
    from moescope.analysis.property_tests import npmi_from_properties
    from moescope.analysis.question import Analysis, Parameter
    from moescope.analysis.registry import ANALYSES
    from moescope.analysis.risk import (
        risk_difference,
        risk_difference_between,
        risk_difference_from_documents,
        risk_difference_of,
    )
    from moescope.analysis.router_columns import logit_similarity
    from moescope.analysis.selection_margins import margins
    from moescope.analysis.series import fluctuation
    from moescope.analysis.similarities import gate_similarity, weight_similarity
    from moescope.analysis.specialisation import npmi, npmi_from_counts, npmi_from_documents
    from moescope.analysis.spreading import RayCluster, spread
    from moescope.analysis.summary import Finding, findings
    from moescope.analysis.tcess_scores import tcess, tcess_from_documents, token_scores
    from moescope.analysis.token_classes import CLASSES, npmi_classes
    from moescope.analysis.token_ids import npmi_tokens
    from moescope.analysis.token_places import documents_of_tokens, first_places
    from moescope.analysis.transitions import transition_counts
    from moescope.analysis.vocabulary import vocabulary_from_counts, vocabulary_specialisation
    from moescope.analysis.watching import watched
    from moescope.analysis.whatif import experts_for, what_if

_HOME = {
    "prepare": "preparing",
    "watched": "watching",
    "margins": "selection_margins",
    "find_documents": "finding",
    "passage": "passages",
    "passage_routes": "passages",
    "token_occurrences": "finding",
    "token_routing": "passages",
    "tokens_matching": "finding",
    "attention_sinks": "first_token",
    "weight_outliers": "column_outliers",
    "placement_from_counts": "placements",
    "placement": "placements",
    "what_if": "whatif",
    "experts_for": "whatif",
    "fluctuation": "series",
    "overlap_of": "comparing",
    "divergence": "comparing",
    "compare": "comparing",
    "bits_from_importance": "bit_budget",
    "bits": "bit_budget",
    "Replayed": "caching",
    "caches": "caching",
    "replay_ids": "caching",
    "consistency": "local_routing",
    "segment_routing": "local_routing",
    "window_counts": "local_routing",
    "offload": "offloading",
    "expert_groups": "grouping",
    "expert_groups_from_usage": "grouping",
    "Card": "cards",
    "atlas": "atlas_table",
    "card": "cards",
    "cards_of_layer": "cards",
    "PairCounts": "pairs",
    "expert_map": "maps",
    "expert_map_from_features": "maps",
    "gate_map": "maps",
    "token_map": "maps",
    "map_groups": "nearest",
    "nearest_experts": "nearest",
    "preferred_labels": "nearest",
    "documents_of_tokens": "token_places",
    "first_places": "token_places",
    "neuron_matching": "matching",
    "gate_similarity": "similarities",
    "weight_similarity": "similarities",
    "linear_cka": "alignment",
    "output_similarity": "alignment",
    "output_similarity_from_arrays": "alignment",
    "logit_similarity": "router_columns",
    "norm_against_score": "output_norms",
    "redundant_pairs": "pairwise",
    "document_counts": "counts",
    "document_tokens": "counts",
    "token_counts": "counts",
    "token_totals": "counts",
    "Example": "contexts",
    "examples": "contexts",
    "top_tokens": "contexts",
    "RayCluster": "spreading",
    "spread": "spreading",
    "Finding": "summary",
    "findings": "summary",
    "importance": "importance_table",
    "table": "labelled",
    "balance": "loads",
    "load": "loads",
    "load_from_counts": "loads",
    "npmi": "specialisation",
    "CLASSES": "token_classes",
    "tcess": "tcess_scores",
    "tcess_from_documents": "tcess_scores",
    "token_scores": "tcess_scores",
    "vocabulary_from_counts": "vocabulary",
    "vocabulary_specialisation": "vocabulary",
    "cognitive_experts": "markers",
    "npmi_markers": "markers",
    "npmi_classes": "token_classes",
    "npmi_from_properties": "property_tests",
    "npmi_tokens": "token_ids",
    "npmi_from_counts": "specialisation",
    "npmi_from_documents": "specialisation",
    "domain_specialisation": "domains",
    "domain_specialisation_from_documents": "domains",
    "risk_difference": "risk",
    "risk_difference_between": "risk",
    "risk_difference_from_documents": "risk",
    "risk_difference_of": "risk",
    "ANALYSES": "registry",
    "Analysis": "question",
    "Parameter": "question",
    "super_experts": "outliers",
    "super_experts_from_maxima": "outliers",
    "coactivation": "coactive",
    "coactivation_from_counts": "coactive",
    "paths": "pathways",
    "attribution": "attributing",
    "attribution_from_documents": "attributing",
    "affinity": "affinities",
    "affinity_from_counts": "affinities",
    "transition_counts": "transitions",
}

__all__ = [
    "ANALYSES",
    "CLASSES",
    "Analysis",
    "Card",
    "Example",
    "Finding",
    "PairCounts",
    "Parameter",
    "RayCluster",
    "Replayed",
    "affinity",
    "affinity_from_counts",
    "atlas",
    "attention_sinks",
    "attribution",
    "attribution_from_documents",
    "balance",
    "bits",
    "bits_from_importance",
    "caches",
    "card",
    "cards_of_layer",
    "coactivation",
    "coactivation_from_counts",
    "cognitive_experts",
    "compare",
    "consistency",
    "divergence",
    "document_counts",
    "document_tokens",
    "documents_of_tokens",
    "domain_specialisation",
    "domain_specialisation_from_documents",
    "examples",
    "expert_groups",
    "expert_groups_from_usage",
    "expert_map",
    "expert_map_from_features",
    "experts_for",
    "find_documents",
    "findings",
    "first_places",
    "fluctuation",
    "gate_map",
    "gate_similarity",
    "importance",
    "linear_cka",
    "load",
    "load_from_counts",
    "logit_similarity",
    "map_groups",
    "margins",
    "nearest_experts",
    "neuron_matching",
    "norm_against_score",
    "npmi",
    "npmi_classes",
    "npmi_from_counts",
    "npmi_from_documents",
    "npmi_from_properties",
    "npmi_markers",
    "npmi_tokens",
    "offload",
    "output_similarity",
    "output_similarity_from_arrays",
    "overlap_of",
    "passage",
    "passage_routes",
    "paths",
    "placement",
    "placement_from_counts",
    "preferred_labels",
    "prepare",
    "redundant_pairs",
    "replay_ids",
    "risk_difference",
    "risk_difference_between",
    "risk_difference_from_documents",
    "risk_difference_of",
    "segment_routing",
    "spread",
    "super_experts",
    "super_experts_from_maxima",
    "table",
    "tcess",
    "tcess_from_documents",
    "token_counts",
    "token_map",
    "token_occurrences",
    "token_routing",
    "token_scores",
    "token_totals",
    "tokens_matching",
    "top_tokens",
    "transition_counts",
    "vocabulary_from_counts",
    "vocabulary_specialisation",
    "watched",
    "weight_outliers",
    "weight_similarity",
    "what_if",
    "window_counts",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return __all__
