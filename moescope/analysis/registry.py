"""Every analysis by name: each module declares its own question, this lists them in the order a person would ask."""

from __future__ import annotations

from moescope.analysis.affinities import AFFINITY_QUESTION
from moescope.analysis.alignment import OUTPUT_SIMILARITY_QUESTION
from moescope.analysis.atlas_table import ATLAS_QUESTION
from moescope.analysis.attributing import ATTRIBUTION_QUESTION
from moescope.analysis.bit_budget import BITS_QUESTION
from moescope.analysis.caching import CACHES_QUESTION
from moescope.analysis.coactive import COACTIVATION_QUESTION
from moescope.analysis.column_outliers import WEIGHT_OUTLIERS_QUESTION
from moescope.analysis.comparing import COMPARE_QUESTION
from moescope.analysis.domains import DOMAINS_QUESTION
from moescope.analysis.first_token import ATTENTION_SINKS_QUESTION
from moescope.analysis.grouping import EXPERT_GROUPS_QUESTION
from moescope.analysis.importance_table import IMPORTANCE_QUESTION
from moescope.analysis.loads import LOAD_QUESTION
from moescope.analysis.local_routing import CONSISTENCY_QUESTION
from moescope.analysis.maps import EXPERT_MAP_QUESTION, GATE_MAP_QUESTION, TOKEN_MAP_QUESTION
from moescope.analysis.markers import MARKERS_QUESTION
from moescope.analysis.matching import NEURON_MATCHING_QUESTION
from moescope.analysis.offloading import OFFLOAD_QUESTION
from moescope.analysis.outliers import SUPER_EXPERTS_QUESTION
from moescope.analysis.output_norms import NORM_AGAINST_SCORE_QUESTION
from moescope.analysis.pathways import PATHS_QUESTION
from moescope.analysis.placements import PLACEMENT_QUESTION
from moescope.analysis.question import Analysis
from moescope.analysis.risk import RISK_BETWEEN_QUESTION, RISK_QUESTION
from moescope.analysis.router_columns import LOGIT_SIMILARITY_QUESTION
from moescope.analysis.selection_margins import MARGINS_QUESTION
from moescope.analysis.series import FLUCTUATION_QUESTION
from moescope.analysis.similarities import GATE_SIMILARITY_QUESTION, WEIGHT_SIMILARITY_QUESTION
from moescope.analysis.specialisation import NPMI_QUESTION
from moescope.analysis.tcess_scores import TCESS_QUESTION
from moescope.analysis.token_classes import CLASSES_QUESTION
from moescope.analysis.token_ids import TOKENS_QUESTION
from moescope.analysis.vocabulary import VOCABULARY_QUESTION
from moescope.analysis.whatif import WHAT_IF_QUESTION

ANALYSES: dict[str, Analysis] = {
    question.name: question
    for question in (
        LOAD_QUESTION,
        MARGINS_QUESTION,
        NPMI_QUESTION,
        CLASSES_QUESTION,
        TOKENS_QUESTION,
        MARKERS_QUESTION,
        DOMAINS_QUESTION,
        VOCABULARY_QUESTION,
        TCESS_QUESTION,
        RISK_QUESTION,
        RISK_BETWEEN_QUESTION,
        SUPER_EXPERTS_QUESTION,
        ATTENTION_SINKS_QUESTION,
        IMPORTANCE_QUESTION,
        AFFINITY_QUESTION,
        COACTIVATION_QUESTION,
        PATHS_QUESTION,
        CONSISTENCY_QUESTION,
        CACHES_QUESTION,
        OFFLOAD_QUESTION,
        GATE_SIMILARITY_QUESTION,
        LOGIT_SIMILARITY_QUESTION,
        OUTPUT_SIMILARITY_QUESTION,
        WEIGHT_SIMILARITY_QUESTION,
        NEURON_MATCHING_QUESTION,
        EXPERT_GROUPS_QUESTION,
        NORM_AGAINST_SCORE_QUESTION,
        EXPERT_MAP_QUESTION,
        GATE_MAP_QUESTION,
        TOKEN_MAP_QUESTION,
        PLACEMENT_QUESTION,
        WHAT_IF_QUESTION,
        BITS_QUESTION,
        WEIGHT_OUTLIERS_QUESTION,
        COMPARE_QUESTION,
        FLUCTUATION_QUESTION,
        ATLAS_QUESTION,
        ATTRIBUTION_QUESTION,
    )
}
