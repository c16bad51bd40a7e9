"""Recipes as one short text that an address can hold: `L3E7*64,L2E1*0.5@logit,L4E2.5!mask`.

Each part names a layer, its experts (several with dots between) and what is done to them: `*` and a factor (after `@`
where it acts, if not on the routing weight), or `!` and one of mask, zero, promote, demote. The text is read into the
same `moescope.edits.Recipe` that the command line applies.
"""

from __future__ import annotations

import re
from typing import Any

from moescope.edits import Demote, Mask, Promote, Recipe, Scale, Zero
from moescope.errors import MoescopeError

LONGEST = 8_000  # characters: what a field of an address may have
KINDS = {"scale": "scale by", "mask": "mask", "zero": "zero", "promote": "promote", "demote": "demote"}
"""What a click can do to an expert, and how the app calls it."""

_DECISIONS: dict[str, Any] = {"mask": Mask, "zero": Zero, "promote": Promote, "demote": Demote}
_PART = re.compile(
    r"L(?P<layer>\d{1,5}|\d{3,}[A-Za-z0-9_-]*?)E(?P<experts>\d{1,6}(?:\.\d{1,6})*)"
    r"(?:\*(?P<factor>\d+(?:\.\d+)?(?:e[+-]?\d+)?)(?:@(?P<stage>[a-z_]+))?|!(?P<kind>[a-z]+))",
    re.ASCII,
)
_HOW = "write L3E7*64 or L3E7*0.5@logit to scale, L3E7!mask, !zero, !promote or !demote, with commas between edits"


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
    if len(text) > LONGEST:
        raise MoescopeError(
            f"This recipe has {len(recipe.edits)} edits, too many for an address; use `moescope generate --recipe`."
        )
    return text


def edit(kind: str, layer: str, expert: int, factor: float | None = None) -> Any:
    """The edit that a click asks for.

    Args:
        kind: one of `KINDS`.
        layer: as a place has it: "3", or a site key.
        expert: of that layer.
        factor: of "scale".

    Raises:
        MoescopeError: no such kind, or a factor that is none.
    """
    where = f"L{layer}" if layer.isdigit() else layer
    if kind == "scale":
        return _edit(f"{where}E{expert}*{_number(float('nan') if factor is None else factor)}")
    return _edit(f"{where}E{expert}!{kind}")


def added(text: str | None, new: Any) -> str:
    """A text with one more edit, which takes the place of what it said of the same expert."""
    recipe = read(text)
    kept = [] if recipe is None else [old for old in recipe.edits if not _same_experts(old, new)]
    return written(Recipe([*kept, new]))


def without(text: str | None, number: int) -> str | None:
    """A text without one of its edits, counted from 0; None if nothing is left."""
    recipe = read(text)
    kept = [] if recipe is None else [old for place, old in enumerate(recipe.edits) if place != number]
    return written(Recipe(kept)) if kept else None


def said(one: Any) -> str:
    """An edit in words: "× 64", "× 0.5 (logit)", "mask"."""
    if one.kind != "scale":
        return one.kind
    return f"× {one.factor:g}" + ("" if one.stage == "weight" else f" ({one.stage.replace('_', ' ')})")


def named(one: Any) -> str:
    """Whose edit it is: "L3E7", "L4E2, 5"."""
    layer = f"L{one.layer}" if isinstance(one.layer, int) else one.layer
    return f"{layer}E{', '.join(map(str, one.expert))}"


def layer_of(one: Any) -> str:
    """Its layer as a place has it: layer 12 is "12", and so is the site key "L012", which only a sole router has."""
    return str(int(one.layer[1:])) if re.fullmatch(r"L\d{3,}", str(one.layer), re.ASCII) else str(one.layer)


def _edit(part: str) -> Any:
    found = _PART.fullmatch(part)
    if found is None:
        raise MoescopeError(f"{_short(part)!r} is not an edit: {_HOW}.")
    digits = found["layer"]
    # "L3" is a layer; what has leading zeros or more than digits is a site key.
    layer = int(digits) if digits.isdigit() and (digits[0] != "0" or digits == "0") else f"L{digits}"
    experts = [int(expert) for expert in found["experts"].split(".")]
    try:
        if found["factor"] is not None:
            stage = found["stage"] or "weight"
            return Recipe([{"kind": "scale", "layer": layer, "expert": experts, "stage": stage,
                            "factor": float(found["factor"])}]).edits[0]  # fmt: skip
        if found["kind"] in _DECISIONS:
            return _DECISIONS[found["kind"]](layer=layer, expert=experts)
    except MoescopeError as error:
        raise MoescopeError(f"{_short(part)!r} is not an edit ({error}): {_HOW}.") from error
    raise MoescopeError(f"{_short(part)!r} is not an edit: {_HOW}.")


def _part(one: Any, number: int) -> str:
    if isinstance(one, Scale):
        what = f"*{_number(one.factor)}" + ("" if one.stage == "weight" else f"@{one.stage}")
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
    part = f"{layer}E{'.'.join(map(str, one.expert))}{what}"
    if _PART.fullmatch(part) is None:
        raise MoescopeError(f"Edit {number} of this recipe names layer {_short(str(one.layer))!r}, which is none.")
    return part


def _same_experts(old: Any, new: Any) -> bool:
    return layer_of(old) == layer_of(new) and set(old.expert) == set(new.expert)


def _number(value: float) -> str:
    """The shortest text that is this number again."""
    return repr(float(value)).removesuffix(".0")


def _short(text: str) -> str:
    return text if len(text) <= 40 else text[:40] + "…"
