"""Unlearning: one expert's tensors and its router are trained to forget a set of texts; the result is a recipe.

>>> done = unlearn_expert(model, "forget.jsonl", "retain.jsonl", method="npo", out="recipe/")
>>> with model.edited(done.recipe): ...                  # or `moescope apply recipe/recipe.yaml --from … --to …`
>>> evaluate(model, {"forget": "forget.jsonl", "other facts": "others.jsonl"}, done)
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from moescope.unlearning.comparing import compared
    from moescope.unlearning.evaluation import Evaluation, evaluate, kept_selection
    from moescope.unlearning.examples import Example, read_examples
    from moescope.unlearning.relearning import relearn
    from moescope.unlearning.settings import Settings
    from moescope.unlearning.studying import Study, study
    from moescope.unlearning.targeting import attribute, best_targets, random_targets
    from moescope.unlearning.training import unlearn_expert
    from moescope.unlearning.unlearned import Unlearned

_HOME = {
    "Study": "studying",
    "compared": "comparing",
    "study": "studying",
    "Evaluation": "evaluation",
    "evaluate": "evaluation",
    "kept_selection": "evaluation",
    "relearn": "relearning",
    "Example": "examples",
    "Settings": "settings",
    "Unlearned": "unlearned",
    "attribute": "targeting",
    "best_targets": "targeting",
    "random_targets": "targeting",
    "read_examples": "examples",
    "unlearn_expert": "training",
}

__all__ = [
    "Evaluation",
    "Example",
    "Settings",
    "Study",
    "Unlearned",
    "attribute",
    "best_targets",
    "compared",
    "evaluate",
    "kept_selection",
    "random_targets",
    "read_examples",
    "relearn",
    "study",
    "unlearn_expert",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return __all__
