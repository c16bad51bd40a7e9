"""Recipes as one short text that an address can hold: `L3E7*64,L2E1*0.5@logit,L4E2.5!mask,L5!top_k:1`.

Each part names a layer, its experts (several with dots between) and what is done to them: `*` and a factor (after `@`
where it acts, if not on the routing weight), or `!` and a kind. `L3E2.7!merge:3:1` weights the experts that it merges;
`@first` keeps the first alone, `@unaligned` takes neurons as they stand. `!top_k:1`, `!top_p:0.9` and `!ranks:0.2` are
of a whole layer; `@raw` leaves the weights that still count as they are. The text is read into the same
`moescope.edits.Recipe` that the command line applies.
"""

from __future__ import annotations

import re
from typing import Any

from moescope.app.place import longest
from moescope.edits import Demote, Mask, Merge, Promote, Prune, Recipe, Route, Scale, Zero
from moescope.errors import MoescopeError

KINDS = {
    "scale": "scale by",
    "mask": "mask",
    "zero": "zero",
    "promote": "promote",
    "demote": "demote",
    "prune": "prune",
    "merge": "merge with",
    "copy": "replace by",
    "top_k": "keep only top",
}
"""What a click can do to an expert, or to its layer, and how the app calls it."""

_DECISIONS: dict[str, Any] = {"mask": Mask, "zero": Zero, "promote": Promote, "demote": Demote, "prune": Prune}
_NUMBER = r"\d+(?:\.\d+)?(?:e[+-]?\d+)?"
_PART = re.compile(
    r"L(?P<layer>\d{1,5}|\d{3,}+[A-Za-z0-9_-]*?)E(?P<experts>\d{1,6}(?:\.\d{1,6})*)"
    rf"(?:\*(?P<factor>{_NUMBER})(?:@(?P<stage>[a-z_]+))?"
    rf"|!merge(?P<merge>(?P<weights>(?::{_NUMBER})*)(?P<keep>@first)?(?P<unaligned>@unaligned)?)|!(?P<kind>[a-z]+))",
    re.ASCII,
)
_LAYER_PART = re.compile(
    r"L(?P<layer>\d{1,5}|\d{3,}+[A-Za-z0-9_-]*)"
    rf"!(?:top_k:(?P<top_k>\d{{1,6}})|top_p:(?P<top_p>{_NUMBER})|ranks:(?P<ranks>\d{{1,6}}(?:\.\d{{1,6}})*))(?P<raw>@raw)?",
    re.ASCII,
)
_HOW = (
    "write L3E7*64 or L3E7*0.5@logit to scale, L3E7!mask, !zero, !promote, !demote or !prune, L3E2.7!merge, or "
    "L3!top_k:1, with commas between edits"
)


def read(text: str | None) -> Recipe | None:
    """The recipe that a text says; None for no text.

    Raises:
        MoescopeError: a part that is no edit, or edits that contradict each other, in one sentence.
    """
    parts = [part.strip() for part in (text or "").split(",") if part.strip()]
    if not parts:
        return None
    recipe = Recipe([_edit(part) for part in parts])
    recipe.require_consistent()
    return recipe


def written(recipe: Recipe) -> str:
    """A recipe as text; `read` gives the same edits back.

    Raises:
        MoescopeError: an edit that the text has no words for, or too many of them.
    """
    text = ",".join(_part(edit, number) for number, edit in enumerate(recipe.edits, 1))
    if len(text) > longest():
        raise MoescopeError(
            f"This recipe has {len(recipe.edits)} edits, too many for an address; use `moescope generate --recipe`."
        )
    return text


def edit(kind: str, layer: str, expert: int, number: float | None = None) -> Any:
    """The edit that a click asks for.

    Args:
        kind: one of `KINDS`.
        layer: as a place has it: "3", or a site key.
        expert: of that layer; "top_k" is of the layer alone.
        number: the factor of "scale", the other expert of "merge" and "copy", how many "top_k" keeps.

    Raises:
        MoescopeError: no such kind, or a number that is none.
    """
    where = f"L{layer}" if layer.isdigit() else layer
    if kind == "scale":
        return _edit(f"{where}E{expert}*{_number(float('nan') if number is None else number)}")
    if kind == "top_k":
        kept = _whole(number, "Give how many of a token's experts count")
        return _edit(f"{where}!top_k:{kept}")
    if kind in ("merge", "copy"):
        other = _whole(number, "Give the other expert of this layer")
        if other == expert:
            raise MoescopeError(f"{where}E{expert} is the selected expert itself; give another of its layer.")
        return _edit(
            f"{where}E{expert}.{other}!merge" if kind == "merge" else f"{where}E{other}.{expert}!merge:1:0@unaligned"
        )
    return _edit(f"{where}E{expert}!{kind}")


def added(text: str | None, new: Any) -> str:
    """A text with one more edit, which takes the place of what it said of the same experts.

    Raises:
        MoescopeError: the new edit contradicts another, or the text cannot be read.
    """
    recipe = read(text)
    kept = [] if recipe is None else [old for old in recipe.edits if not _same_experts(old, new)]
    grown = Recipe([*kept, new])
    grown.require_consistent()
    return written(grown)


def without(text: str | None, number: int) -> str | None:
    """A text without one of its edits, counted from 0; None if nothing is left."""
    recipe = read(text)
    kept = [] if recipe is None else [old for place, old in enumerate(recipe.edits) if place != number]
    return written(Recipe(kept)) if kept else None


def said(one: Any) -> str:
    """An edit in words: "× 64", "× 0.5 (logit)", "mask", "merge", "copies of E2", "only the top 1"."""
    if isinstance(one, Merge):
        return _merge_said(one)
    if isinstance(one, Route):
        return _route_said(one)
    if one.kind != "scale":
        return one.kind
    return f"× {one.factor:g}" + ("" if one.stage == "weight" else f" ({one.stage.replace('_', ' ')})")


def _merge_said(one: Merge) -> str:
    weights = one.weights or ()
    source = [expert for expert, weight in zip(one.expert, weights, strict=False) if weight]
    if len(source) == 1 and one.keep == "all":
        return f"copies of E{source[0]}"
    words = "merge" + (f" into E{one.expert[0]}" if one.keep == "first" else "")
    words += f", {' : '.join(f'{weight:g}' for weight in weights)}" if weights else ""
    return words + ("" if one.align else ", neurons as they stand")


def _route_said(one: Route) -> str:
    if one.top_k is not None:
        words = f"only the top {one.top_k}"
    elif one.top_p is not None:
        words = f"only the first to reach a share of {one.top_p:g}"
    else:
        words = f"only ranks {', '.join(map(str, one.ranks or ()))}"
    return words + ("" if one.renormalise else ", weights as they are")


def named(one: Any) -> str:
    """Whose edit it is: "L3E7", "L4E2, 5", and of a layer "L5"."""
    layer = f"L{one.layer}" if isinstance(one.layer, int) else one.layer
    experts = experts_of(one)
    return f"{layer}E{', '.join(map(str, experts))}" if experts else layer


def experts_of(one: Any) -> tuple[int, ...]:
    """Its experts; none where it is of a whole layer."""
    return () if isinstance(one, Route) else one.expert


def layer_of(one: Any) -> str:
    """Its layer as a place has it: layer 12 is "12", and so is the site key "L012", which only a sole router has."""
    return str(int(one.layer[1:])) if re.fullmatch(r"L\d{3,}", str(one.layer), re.ASCII) else str(one.layer)


def _edit(part: str) -> Any:
    found = _LAYER_PART.fullmatch(part) or _PART.fullmatch(part)
    if found is None:
        raise MoescopeError(f"{_short(part)!r} is not an edit: {_HOW}.")
    digits = found["layer"]
    # "L3" is a layer; what has leading zeros or more than digits is a site key.
    layer = int(digits) if digits.isdigit() and (digits[0] != "0" or digits == "0") else f"L{digits}"
    fields = _of_layer(found) if found.re is _LAYER_PART else _of_experts(found)
    if fields is None:
        raise MoescopeError(f"{_short(part)!r} is not an edit: {_HOW}.")
    try:
        return Recipe([{"layer": layer} | fields]).edits[0]
    except MoescopeError as error:
        raise MoescopeError(f"{_short(part)!r} is not an edit ({error}): {_HOW}.") from error


def _of_layer(found: re.Match[str]) -> dict[str, Any]:
    """The fields of a route."""
    ranks = None if found["ranks"] is None else [int(rank) for rank in found["ranks"].split(".")]
    return {
        "kind": "route",
        "top_k": None if found["top_k"] is None else int(found["top_k"]),
        "top_p": None if found["top_p"] is None else float(found["top_p"]),
        "ranks": ranks,
        "renormalise": found["raw"] is None,
    }


def _of_experts(found: re.Match[str]) -> dict[str, Any] | None:
    """The fields of an edit of experts; None for a kind that there is not."""
    fields: dict[str, Any] = {"expert": [int(expert) for expert in found["experts"].split(".")]}
    if found["factor"] is not None:
        return fields | {"kind": "scale", "factor": float(found["factor"]), "stage": found["stage"] or "weight"}
    if found["merge"] is not None:
        weights = [float(weight) for weight in found["weights"].split(":")[1:]] or None
        keep = "all" if found["keep"] is None else "first"
        return fields | {"kind": "merge", "weights": weights, "keep": keep, "align": found["unaligned"] is None}
    return fields | {"kind": found["kind"]} if found["kind"] in _DECISIONS else None


def _part(one: Any, number: int) -> str:
    if isinstance(one, Scale):
        what = f"*{_number(one.factor)}" + ("" if one.stage == "weight" else f"@{one.stage}")
    elif isinstance(one, Merge):
        what = f"!merge{''.join(f':{_number(weight)}' for weight in one.weights or ())}"
        what += ("@first" if one.keep == "first" else "") + ("" if one.align else "@unaligned")
    elif isinstance(one, Route):
        what = _route_part(one) + ("" if one.renormalise else "@raw")
    elif one.kind in _DECISIONS:
        what = f"!{one.kind}"
    else:
        raise MoescopeError(
            f"Edit {number} of this recipe is a {one.kind}, which the lab does not hold; use `moescope generate "
            "--recipe` or `moescope apply`."
        )
    if not one.rows.everywhere:
        raise MoescopeError(
            f"Edit {number} of this recipe acts on some rows only, which the lab does not hold; use `moescope generate "
            "--recipe`."
        )
    layer = f"L{one.layer}" if isinstance(one.layer, int) else str(one.layer)
    experts = experts_of(one)
    part = f"{layer}{'E' if experts else ''}{'.'.join(map(str, experts))}{what}"
    if (_PART if experts else _LAYER_PART).fullmatch(part) is None:
        raise MoescopeError(f"Edit {number} of this recipe names layer {_short(str(one.layer))!r}, which is none.")
    return part


def _route_part(one: Route) -> str:
    if one.top_k is not None:
        return f"!top_k:{one.top_k}"
    if one.top_p is not None:
        return f"!top_p:{_number(one.top_p)}"
    return f"!ranks:{'.'.join(map(str, one.ranks or ()))}"


def _same_experts(old: Any, new: Any) -> bool:
    return layer_of(old) == layer_of(new) and set(experts_of(old)) == set(experts_of(new))


def _number(value: float) -> str:
    """The shortest text that is this number again."""
    return repr(float(value)).removesuffix(".0")


def _whole(value: float | None, ask: str) -> int:
    if value is None or value < 0 or not float(value).is_integer():
        raise MoescopeError(f"{ask} as a whole number.")
    return int(value)


def _short(text: str) -> str:
    return text if len(text) <= 40 else text[:40] + "…"
