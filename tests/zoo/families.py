"""The registry: every MoE family of transformers that can be built, by model type, and variants of some."""

from __future__ import annotations

from . import families_composite, families_sigmoid, families_softmax, families_undispatched, old_style, variants
from .family import Family

FAMILIES: dict[str, Family] = {
    row.name: row
    for module in (families_softmax, families_sigmoid, families_composite, families_undispatched)
    for row in module.ROWS
}
VARIANTS: dict[str, Family] = {row.name: row for row in variants.ROWS}
OLD_STYLE: dict[str, Family] = {row.name: row for row in old_style.ROWS}
ZOO: dict[str, Family] = FAMILIES | VARIANTS | OLD_STYLE
#: Families that capture refuses, and the reason it gives; the reference does not compute them either.
REFUSED: dict[str, str] = {"inkling2_loop": "ran twice in one forward pass"}
CAPTURED: list[str] = [name for name in ZOO if name not in REFUSED]
