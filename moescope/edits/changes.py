"""What an edit changes in a checkpoint's tensors, exactly or nearly: which bytes, and by what."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from moescope.edits.edit import Replace, Scale
from moescope.edits.files import Stored, fill, is_float, multiply, numbers
from moescope.errors import RefusedError

if TYPE_CHECKING:
    from torch import nn

    from moescope.edits.recipe import Recipe
    from moescope.edits.replacing import Content
    from moescope.hooks.sites import Site

LAST = ("down_proj", "down_proj_bias", "w2", "fc2", "wo", "output_linear")
SCORES = 1.0
"""How far a selection bias must stand above the others to decide: scores are shares or sigmoids, between 0 and 1. Not
farther, because families that choose groups of experts add scores up."""
SELECTION_BIASES = ("e_score_correction_bias", "expert_bias")


@dataclass(frozen=True)
class Change:
    """One tensor, or one entry of its first dimension, that a recipe changes.

    Attributes:
        tensor, file: which, and where it is.
        entry: of the first dimension; None for the whole tensor.
        factor: it is multiplied by this; None where ``value`` replaces it.
        value: what replaces it.
        exact: whether the written model computes what the live edit does.
        content: new numbers for all or some of the tensor, in place of a factor or a value.
    """

    tensor: Stored
    entry: int | None
    factor: float | None = None
    value: float | None = None
    exact: bool = True
    content: Content | None = None

    def __str__(self) -> str:
        part = "" if self.entry is None else f"[{self.entry}]"
        if self.content is not None:
            n = len(self.content.values)
            return f"{self.tensor.file}: {self.tensor.name} {n:,} numbers{'' if self.exact else ' (rounded)'}"
        what = f"= {self.value:g}" if self.factor is None else f"× {self.factor:g}"
        return f"{self.tensor.file}: {self.tensor.name}{part} {what}{'' if self.exact else ' (approximate)'}"


def expert_changes(
    hf: nn.Module, site: Site, known: dict[str, Stored], folder: Path, edit: Any, expert: int, approximate: bool
) -> list[Change]:
    """What an edit of one expert changes.

    Args:
        hf: the model's skeleton.
        site: its layer.
        known: the checkpoint's tensors.
        folder: of the checkpoint, read only where a bias is held against the others.
        edit: the edit.
        expert: one of its experts.
        approximate: allow what comes near an edit that cannot be held.

    Raises:
        RefusedError: a checkpoint cannot hold it; the reason is named.
    """
    if expert >= site.n_experts - site.zero_experts and edit.kind in ("zero", "scale"):
        raise RefusedError(f"Layer {edit.layer}, expert {expert} computes nothing; there is no tensor of it to change.")
    if edit.kind == "zero" or (edit.kind == "scale" and edit.stage == "weight"):
        return _last_matrix(hf, site, known, expert, 0.0 if edit.kind == "zero" else edit.factor)
    if isinstance(edit, Scale) and edit.stage == "logit":
        return _router_row(hf, site, known, expert, edit.factor)
    bias = _selection_bias(hf, site)
    if edit.kind == "mask" and bias is not None:
        return _entries(hf, known, bias, expert, site.n_experts, value=float("-inf"))
    near = _near(hf, site, known, folder, edit, expert, bias) if approximate else None
    if near is not None:
        return [replace(change, exact=False) for change in near]
    score = "a checkpoint's bias changes the selection but not the score that becomes the weight"
    why = {
        "mask": "this family has no selection bias to mask it with; prune it from every layer alike, or zero it",
        "promote": score if bias is not None else "this family has no selection bias",
        "demote": score if bias is not None else "this family has no selection bias",
        "scale": f"scaling at the stage {getattr(edit, 'stage', '')!r} depends on the other scores of each token",
    }
    hint = {
        "mask": " (--approximate zeroes it)",
        "scale": " (--approximate scales its weight)",
        "promote": " (--approximate sets that bias)" * (bias is not None),
        "demote": "",
    }
    raise RefusedError(
        f"Layer {edit.layer}, expert {expert}: a checkpoint cannot hold {edit.kind}: {why[edit.kind]}"
        f"{'' if approximate else hint[edit.kind]}."
    )


def _near(
    hf: nn.Module, site: Site, known: dict[str, Stored], folder: Path, edit: Any, expert: int, bias: str | None
) -> list[Change] | None:
    """What comes nearest to an edit that a checkpoint cannot hold; None where nothing does."""
    if edit.kind == "mask":
        return _last_matrix(hf, site, known, expert, 0.0)
    if edit.kind == "scale":
        return _last_matrix(hf, site, known, expert, edit.factor)
    if bias is None or edit.kind != "promote":
        return None  # a demoted expert keeps its own bias, so that no bias says how often it is still selected
    (change,) = _entries(hf, known, bias, expert, site.n_experts, value=0.0)
    others = numbers(folder / change.tensor.file, change.tensor)
    others = others[np.isfinite(others)]
    return [replace(change, value=float(others.max() + SCORES))]


def tensor_changes(
    hf: nn.Module, known: dict[str, Stored], recipe: Recipe, edit: Replace, approximate: bool
) -> list[Change]:
    """What a `Replace` edit changes; numbers that would be rounded are refused unless `approximate`."""
    from moescope.edits.replacing import contents

    found = [
        Change(stored, None, exact=not content.rounded, content=content)
        for stored, content in contents(hf, known, recipe.tensors(edit))
    ]
    rounded = next((change.tensor for change in found if not change.exact), None)
    if rounded is not None and not approximate:
        raise RefusedError(
            f"{rounded.name} is stored as {rounded.dtype}, which would round the recipe's tensors (--approximate "
            "allows that)."
        )
    return found


def _last_matrix(hf: nn.Module, site: Site, known: dict[str, Stored], expert: int, factor: float) -> list[Change]:
    """Everything after an expert's last non-linearity: its last matrix and that one's bias."""
    module = hf.get_submodule(site.experts)
    after = [name for name, part in module.named_modules() if "norm" in name.lower() or "Norm" in type(part).__name__]
    after += [name for name, _ in module.named_parameters() if "norm" in name.lower()]
    if after:
        raise RefusedError(
            f"{site.experts} has a norm after its last matrix ({after[0]}), which undoes any scaling of it."
        )
    names = [name for name, _ in module.named_parameters()]
    last = [name for name in names if any(part in LAST for part in name.split("."))]
    modules = _of_module(last, expert)
    if modules is not None:
        last = modules
    if not last:
        raise RefusedError(f"{site.experts} ({type(module).__name__}) has no last matrix that is known here.")
    found: list[Change] = []
    for name in last:
        path = f"{site.experts}.{name}"
        entries = site.n_experts - site.zero_experts if modules is None else None
        found += _entries(hf, known, path, expert, entries, factor=factor)
    return found


def _of_module(names: list[str], expert: int) -> list[str] | None:
    """Parameters of one expert where experts are modules of their own ("3.w2.weight", "expert_3.wo.weight")."""
    numbered = [name for name in names if name.split(".")[0].removeprefix("expert_").isdigit()]
    if not numbered:
        return None
    return [name for name in numbered if int(name.split(".")[0].removeprefix("expert_")) == expert]


def _router_row(hf: nn.Module, site: Site, known: dict[str, Stored], expert: int, factor: float) -> list[Change]:
    module = hf.get_submodule(site.router)
    rows = [name for name, p in module.named_parameters() if p.ndim == 2 and len(p) == site.n_experts]
    if len(rows) != 1:
        raise RefusedError(
            f"{site.router} has {len(rows)} matrices with a row for each expert; its logit cannot be scaled."
        )
    biases = [rows[0].replace("weight", "bias")] if "weight" in rows[0] else []
    named = dict(module.named_parameters())
    return [
        change
        for name in [*rows, *(name for name in biases if name in named)]
        for change in _entries(hf, known, f"{site.router}.{name}", expert, site.n_experts, factor=factor)
    ]


def _selection_bias(hf: nn.Module, site: Site) -> str | None:
    block = hf.get_submodule(site.block)
    named = [*block.named_parameters(), *block.named_buffers()]
    found = [n for n, t in named if n.split(".")[-1] in SELECTION_BIASES and t.numel() == site.n_experts]
    return f"{site.block}.{found[0]}" if len(found) == 1 else None


def _entries(
    hf: nn.Module,
    known: dict[str, Stored],
    name: str,
    expert: int,
    n_experts: int | None,
    *,
    factor: float | None = None,
    value: float | None = None,
) -> list[Change]:
    """The stored tensor of one expert, or its entry in the one of all."""
    from moescope.hooks.names import checkpoint_names

    names = checkpoint_names(hf, name, known)
    if n_experts is None:
        return [Change(known[stored], None, factor, value) for stored in names]
    if len(names) == n_experts > 1:
        stored = known[names[expert]]
        if f".{expert}." not in stored.name:
            raise RefusedError(
                f"{stored.name} does not name expert {expert}; how this checkpoint is stored is not known."
            )
        return [Change(stored, None, factor, value)]
    stored = known[names[0]]
    if len(names) != 1 or _leading(stored) % n_experts or (value is None and not (factor == 0 or is_float(stored))):
        raise RefusedError(f"{stored.name} ({stored.dtype}, {stored.shape}) does not hold one entry for each expert.")
    if _leading(stored) != n_experts:  # dbrx: the rows of all experts in one matrix
        rows = _leading(stored) // n_experts
        return [Change(stored, row, factor, value) for row in range(expert * rows, (expert + 1) * rows)]
    return [Change(stored, expert, factor, value)]


def _leading(stored: Stored) -> int:
    """Entries along the first dimension; leading ones of length 1 are passed over."""
    return next((size for size in stored.shape if size != 1), 1)


def apply_change(folder: Path, change: Change) -> None:
    """Make a change in a folder's files."""
    stored, entry = change.tensor, change.entry
    shape = tuple(stored.shape)
    while len(shape) > 1 and shape[0] == 1:
        shape = shape[1:]
    stored = Stored(stored.name, stored.file, stored.dtype, shape, stored.start, stored.end)
    file = folder / stored.file
    if change.content is not None:
        from moescope.edits.replacing import overwrite

        overwrite(file, stored, change.content)
    elif change.factor is not None:
        multiply(file, stored, entry, change.factor)
    else:
        assert change.value is not None
        assert entry is not None
        fill(file, stored, entry, change.value)
