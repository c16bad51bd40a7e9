"""Edits as data: a `Recipe` of them is live inside ``with model.edited(recipe):``, or written into a checkpoint.

>>> recipe = Recipe([Scale(layer=3, expert=7, factor=64.0), Mask(layer=5, expert=[1, 2])])
>>> with model.edited(recipe): ...
>>> recipe.save("recipe.yaml"); Recipe.load("recipe.yaml")
>>> recipe.write(source="ckpt", out="ckpt-edited")
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from moescope.edits.changes import Change
    from moescope.edits.checkpoint import Written, plan, plan_leaving, write
    from moescope.edits.edit import Demote, Edit, Mask, Merge, Promote, Prune, Replace, Route, Rows, Scale, Zero
    from moescope.edits.pruning import pruned_experts
    from moescope.edits.recipe import Recipe

_HOME = {
    "Change": "changes",
    "Demote": "edit",
    "Edit": "edit",
    "Mask": "edit",
    "Merge": "edit",
    "Promote": "edit",
    "Prune": "edit",
    "Recipe": "recipe",
    "Replace": "edit",
    "Route": "edit",
    "Rows": "edit",
    "Scale": "edit",
    "Written": "checkpoint",
    "Zero": "edit",
    "plan": "checkpoint",
    "plan_leaving": "checkpoint",
    "pruned_experts": "pruning",
    "write": "checkpoint",
}

__all__ = [
    "Change", "Demote", "Edit", "Mask", "Merge", "Promote", "Prune", "Recipe", "Replace", "Route", "Rows", "Scale",
    "Written", "Zero", "plan", "plan_leaving", "pruned_experts", "write",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return __all__
