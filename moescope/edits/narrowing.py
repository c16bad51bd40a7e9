"""Fewer experts for each token, written into a configuration, which has a number for that one rule of routing.

Whether a family divides the weights that are left by their sum is its own affair and stands in its code or its
configuration: a recipe whose `renormalise` says otherwise computes something else, which the proof finds. So such a
recipe is never written without one.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moescope.edits.edit import Route
from moescope.errors import MoescopeError, RefusedError
from moescope.hooks.sites import TOP_K_NAMES

if TYPE_CHECKING:
    from moescope.edits.recipe import Recipe
    from moescope.hooks.sites import Site

NAMES = (*TOP_K_NAMES, "moe_top_k")  # the last one: dbrx, in its ffn_config
HINT = (
    "Whether the weights left are divided by their sum is for the family to say, and the recipe's `renormalise` says "
    "otherwise, or its selection depends on how many are selected"
)


def narrowed(recipe: Recipe, sites: list[Site]) -> int | None:
    """How many experts a recipe leaves each token; None where it has no `Route` edit.

    Raises:
        RefusedError: routing that no configuration has a number for; the reason is named.
    """
    some = [edit for edit in recipe.edits if isinstance(edit, Route)]
    if not some:
        return None
    counts = {_first_ranks(edit) for edit in some}
    wanted = counts.pop()
    if wanted is None or counts:
        raise RefusedError(
            f"Layer {some[0].layer}: routing by rank or share is no property of a checkpoint's tensors, and its "
            "configuration has one number for all layers: give every layer the same top_k."
        )
    if len(some) < len(recipe.edits):
        raise RefusedError("top_k is written on its own: apply the other edits first, then this to what comes out.")
    if not all(edit.rows.everywhere for edit in some):
        raise RefusedError(
            f"Layer {some[0].layer}: a checkpoint has no rows, positions or phases to restrict an edit to."
        )
    named = {edit.layer for edit in some}
    left = [site.key for site in sites if not {site.layer, site.key} & named]
    unknown = named - {name for site in sites for name in (site.layer, site.key)}
    if unknown:
        raise MoescopeError(f"The checkpoint has no single MoE layer {unknown.pop()!r}.")
    if left:
        raise RefusedError(f"A configuration has one number of experts for all layers; {left[0]} is left as it was.")
    if any(site.top_k is not None and wanted > site.top_k for site in sites):
        raise MoescopeError(f"{sites[0].top_k} experts are selected for each token; the first {wanted} are not there.")
    return wanted


def write_top_k(config: Any, sites: list[Site], folder: Path, wanted: int) -> str:
    """Put the number into a folder's configuration; gives the setting's name.

    Args:
        config: the model's configuration, which knows defaults that the file leaves out.
        sites: its MoE layers.
        folder: whose `config.json` is changed.
        wanted: experts for each token.

    Raises:
        RefusedError: the configuration has no such number, or one for each layer.
    """
    file = folder / "config.json"
    data = json.loads(file.read_text(encoding="utf-8"))
    before = {site.top_k for site in sites}
    parts = [data, *(value for value in data.values() if isinstance(value, dict))]
    found = [(part, name) for part in parts for name in NAMES if name in part]
    if not found:
        text = config.get_text_config()
        own = next((value for key, value in data.items() if key in ("text_config",) and isinstance(value, dict)), data)
        found = [(own, name) for name in NAMES if getattr(text, name, None) in before - {None}][:1]
    fitting = [(part, name) for part, name in found if part.get(name) is None or part[name] in before]
    if not fitting or len(before) > 1:
        says = ", ".join(f"{name} = {part[name]}" for part, name in found if name in part) or "none"
        raise RefusedError(f"The configuration has no one number of experts for each token (it says: {says}).")
    for part, name in fitting:
        part[name] = wanted
    file.write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")
    return fitting[0][1]


def _first_ranks(edit: Route) -> int | None:
    if edit.ranks is not None and edit.ranks == tuple(range(len(edit.ranks))):
        return len(edit.ranks)
    return edit.top_k
