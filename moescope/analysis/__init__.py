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
    from moescope.analysis.coactive import coactivation, coactivation_from_counts
    from moescope.analysis.contexts import Example, examples, top_tokens
    from moescope.analysis.counts import document_counts, document_tokens, token_counts, token_totals
    from moescope.analysis.domains import domain_specialisation, domain_specialisation_from_documents
    from moescope.analysis.importance_table import importance
    from moescope.analysis.labelled import table
    from moescope.analysis.loads import balance, load, load_from_counts
    from moescope.analysis.outliers import super_experts, super_experts_from_maxima
    from moescope.analysis.pairs import PairCounts
    from moescope.analysis.pathways import paths
    from moescope.analysis.question import Analysis, Parameter
    from moescope.analysis.registry import ANALYSES
    from moescope.analysis.risk import risk_difference, risk_difference_between, risk_difference_from_documents
    from moescope.analysis.specialisation import npmi, npmi_from_counts, npmi_from_documents
    from moescope.analysis.spreading import RayCluster, spread
    from moescope.analysis.summary import Finding, findings
    from moescope.analysis.transitions import transition_counts

_HOME = {
    "PairCounts": "pairs",
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
    "npmi_from_counts": "specialisation",
    "npmi_from_documents": "specialisation",
    "domain_specialisation": "domains",
    "domain_specialisation_from_documents": "domains",
    "risk_difference": "risk",
    "risk_difference_between": "risk",
    "risk_difference_from_documents": "risk",
    "ANALYSES": "registry",
    "Analysis": "question",
    "Parameter": "question",
    "super_experts": "outliers",
    "super_experts_from_maxima": "outliers",
    "coactivation": "coactive",
    "coactivation_from_counts": "coactive",
    "paths": "pathways",
    "affinity": "affinities",
    "affinity_from_counts": "affinities",
    "transition_counts": "transitions",
}

__all__ = [
    "ANALYSES",
    "Analysis",
    "Example",
    "Finding",
    "PairCounts",
    "Parameter",
    "RayCluster",
    "affinity",
    "affinity_from_counts",
    "balance",
    "coactivation",
    "coactivation_from_counts",
    "document_counts",
    "document_tokens",
    "domain_specialisation",
    "domain_specialisation_from_documents",
    "examples",
    "findings",
    "importance",
    "load",
    "load_from_counts",
    "npmi",
    "npmi_from_counts",
    "npmi_from_documents",
    "paths",
    "risk_difference",
    "risk_difference_between",
    "risk_difference_from_documents",
    "spread",
    "super_experts",
    "super_experts_from_maxima",
    "table",
    "token_counts",
    "token_totals",
    "top_tokens",
    "transition_counts",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return __all__
