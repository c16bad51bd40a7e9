"""What an edit does to the loss of a corpus, beside random experts; what an answer owes to experts, tokens and paths.

>>> result = effect(model, corpus, recipe, by="domain")      # one recipe, with controls
>>> effects = expert_effects(model, corpus, by="domain")     # every expert masked alone
>>> result = causal_effect(model, store, 3, 7, by="domain")  # one expert, on texts of the store that shows it
>>> traced = trace_positions(model, Case(prompt, answer, source=other))   # routing patched from another prompt
>>> heapr(model, corpus)["heapr"]; naee(model, corpus, drop=2)["naee"]   # importance that needs the model
>>> criteria_effects(model, corpus, analysis.importance(store), n=2)     # which criterion knows what masking will do
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from moescope.effects.answering import solving
    from moescope.effects.atoms import heapr
    from moescope.effects.cases import Case, read_cases
    from moescope.effects.causing import causal_effect
    from moescope.effects.criteria import criteria_effects
    from moescope.effects.finding import between
    from moescope.effects.losses import Losses, document_losses
    from moescope.effects.pathtraces import trace_paths
    from moescope.effects.recipes import effect, matched, sweep
    from moescope.effects.reconstruction import naee
    from moescope.effects.router_rows import router_change
    from moescope.effects.silencing import super_expert_effects
    from moescope.effects.traces import trace_experts, trace_layers, trace_positions
    from moescope.effects.tracing import expert_effects

_HOME = {
    "Case": "cases",
    "Losses": "losses",
    "causal_effect": "causing",
    "criteria_effects": "criteria",
    "between": "finding",
    "document_losses": "losses",
    "effect": "recipes",
    "expert_effects": "tracing",
    "heapr": "atoms",
    "matched": "recipes",
    "naee": "reconstruction",
    "read_cases": "cases",
    "router_change": "router_rows",
    "solving": "answering",
    "super_expert_effects": "silencing",
    "sweep": "recipes",
    "trace_experts": "traces",
    "trace_layers": "traces",
    "trace_paths": "pathtraces",
    "trace_positions": "traces",
}

__all__ = [
    "Case", "Losses", "between", "causal_effect", "criteria_effects", "document_losses", "effect", "expert_effects",
    "heapr", "matched", "naee", "read_cases", "router_change", "solving", "super_expert_effects", "sweep",
    "trace_experts", "trace_layers", "trace_paths", "trace_positions",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return __all__
