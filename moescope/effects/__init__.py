"""What an edit does: the loss of a corpus with and without it, by label, beside random experts of the same layers.

>>> result = effect(model, corpus, recipe, by="domain")      # one recipe, with controls
>>> effects = expert_effects(model, corpus, by="domain")     # every expert masked alone
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from moescope.effects.finding import between
    from moescope.effects.losses import Losses, document_losses
    from moescope.effects.recipes import effect, matched, sweep
    from moescope.effects.tracing import expert_effects

_HOME = {
    "Losses": "losses",
    "between": "finding",
    "document_losses": "losses",
    "effect": "recipes",
    "expert_effects": "tracing",
    "matched": "recipes",
    "sweep": "recipes",
}

__all__ = ["Losses", "between", "document_losses", "effect", "expert_effects", "matched", "sweep"]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return __all__
