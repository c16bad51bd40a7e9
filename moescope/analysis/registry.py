"""Every analysis by name: each module declares its own question, this lists them in the order a person would ask."""

from __future__ import annotations

from moescope.analysis.affinities import AFFINITY_QUESTION
from moescope.analysis.coactive import COACTIVATION_QUESTION
from moescope.analysis.domains import DOMAINS_QUESTION
from moescope.analysis.importance_table import IMPORTANCE_QUESTION
from moescope.analysis.loads import LOAD_QUESTION
from moescope.analysis.outliers import SUPER_EXPERTS_QUESTION
from moescope.analysis.pathways import PATHS_QUESTION
from moescope.analysis.question import Analysis
from moescope.analysis.risk import RISK_BETWEEN_QUESTION, RISK_QUESTION
from moescope.analysis.specialisation import NPMI_QUESTION

ANALYSES: dict[str, Analysis] = {
    question.name: question
    for question in (
        LOAD_QUESTION,
        NPMI_QUESTION,
        DOMAINS_QUESTION,
        RISK_QUESTION,
        RISK_BETWEEN_QUESTION,
        SUPER_EXPERTS_QUESTION,
        IMPORTANCE_QUESTION,
        AFFINITY_QUESTION,
        COACTIVATION_QUESTION,
        PATHS_QUESTION,
    )
}
