"""Write a recipe into a copy of a checkpoint, shard by shard, without loading the model; then prove that both agree.

Exact are: the routing weight scaled, or an expert zeroed (its last matrix and bias are multiplied; unless a norm
follows it), a logit scaled (the router's row), a mask through the family's own selection bias, tensors replaced or
merged, and fewer experts for each token in all layers. Anything else is refused with the reason, unless `approximate`
allows what comes near it; the proof then says how near.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from moescope.edits.edit import Merge, Replace, Scale
from moescope.edits.files import INDEX, Stored, copy_checkpoint, fill, is_float, multiply, numbers, tensors_of
from moescope.edits.narrowing import HINT, narrowed, write_top_k
from moescope.edits.pruning import pruned_experts, require_prunable, write_pruned
from moescope.edits.recipe import Recipe
from moescope.errors import MoescopeError, RefusedError

if TYPE_CHECKING:
    from torch import nn

    from moescope.edits.proof import Proof
    from moescope.edits.replacing import Content
    from moescope.hooks.sites import Site

LAST = ("down_proj", "down_proj_bias", "w2", "fc2", "wo", "output_linear")
SCORES = 1.0
"""How far a selection bias must stand above the others to decide: scores are shares or sigmoids, between 0 and 1. Not
farther, because families that choose groups of experts add scores up."""
STAGE = ".merged"
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


@dataclass(frozen=True)
class Written:
    """A checkpoint that was written.

    Attributes:
        path: its folder.
        changes: what differs from the source; empty where experts were pruned, which changes names and shapes.
        pruned: experts that went, by site key.
        settings: what the configuration now says, by name.
        proof: live against written on real prompts; None where it was not asked for.
    """

    path: Path
    changes: list[Change]
    proof: Proof | None
    pruned: dict[str, list[int]] = field(default_factory=dict)
    settings: dict[str, int] = field(default_factory=dict)

    @property
    def exact(self) -> bool:
        """Whether the checkpoint holds all edits exactly."""
        return all(change.exact for change in self.changes)


def plan(recipe: Recipe, source: str | Path, *, approximate: bool = False) -> list[Change]:
    """Which tensors a recipe changes in a checkpoint; reads its configuration and headers only.

    Merges are worked out on the model, which is loaded for them; of merges with `keep="first"` these are the changes
    before experts leave.

    Args:
        recipe: the recipe.
        source: a folder with `config.json` and safetensors files, in the hub's layout or transformers' own.
        approximate: allow what a checkpoint cannot hold exactly.

    Raises:
        MoescopeError: no such checkpoint, or an unknown layer or expert.
        RefusedError: an edit that a checkpoint cannot hold exactly; the reason is named.
    """
    folder = _folder(source)
    hf, sites = _skeleton(folder)
    known = tensors_of(folder)
    recipe.require_consistent()
    given = recipe.edits
    if any(isinstance(edit, Merge) for edit in given):
        recipe = _worked_out(recipe, sites, folder)
    elif pruned_experts(recipe, sites):
        raise MoescopeError("Pruning changes the names and shapes of tensors; see `moescope.edits.pruned_experts`.")
    if narrowed(recipe, sites) is not None:
        return []  # a number in the configuration, no tensor
    changes: list[Change] = []
    # Live, replaced tensors are in place before anything else acts on them, wherever they stand in the recipe.
    for edit in sorted(recipe.edits, key=lambda edit: not isinstance(edit, Replace)):
        site = _site(sites, edit)
        if not edit.rows.everywhere:
            raise RefusedError(
                f"Layer {edit.layer}: a checkpoint has no rows, positions or phases to restrict an edit to."
            )
        _require_experts(site, edit)
        if isinstance(edit, Replace):
            # Means that were worked out here are rounded to what the checkpoint can store, as scaled numbers are.
            own = edit not in given
            found = _replaced(hf, known, recipe, edit, approximate or own)
            changes += [replace(change, exact=True) for change in found] if own else found
            continue
        for expert in getattr(edit, "expert", ()):
            changes += _changes(hf, site, known, folder, edit, expert, approximate)
    return changes


def write(
    recipe: Recipe,
    source: str | Path,
    out: str | Path,
    *,
    approximate: bool = False,
    verify: bool = True,
    prompts: Sequence[str] | None = None,
) -> Written:
    """Write an edited copy of a checkpoint; the source is never touched, and half a checkpoint is never left.

    Args:
        recipe: the edits.
        source: folder of the checkpoint, in the hub's layout or transformers' own; sharded or not.
        out: folder of the new one; must not exist.
        approximate: allow what a checkpoint cannot hold exactly; the proof then says by how much it differs.
        verify: load both, one after the other, and compare the written model with the live edit; always done for fewer
            experts for each token, where nothing else tells that a family's weights are the recipe's.
        prompts: texts to compare on; a few plain ones by default.

    Raises:
        MoescopeError: `out` exists, the disk is full, a bad recipe or checkpoint.
        RefusedError: what cannot be held exactly, or a proof that failed; nothing is left under `out` then.
    """
    folder, target = _folder(source), Path(out)
    if target.exists():
        raise MoescopeError(f"{target} already exists; choose another folder for the edited checkpoint.")
    if target.resolve().is_relative_to(folder.resolve()):
        raise MoescopeError("The edited checkpoint cannot lie inside its source.")
    hf, sites = _skeleton(folder)
    gone = pruned_experts(recipe, sites)
    if gone:
        require_prunable(hf.config, sites, gone)
    wanted = narrowed(recipe, sites)
    merges = any(isinstance(edit, Merge) for edit in recipe.edits)
    changes = [] if gone and not merges else plan(recipe, folder, approximate=approximate)
    touched = {change.tensor.file for change in changes}
    partial = target.with_name(f".{target.name}.writing-{os.getpid()}")
    try:
        partial.mkdir(parents=True)
        edited = partial / STAGE if gone and changes else partial  # merged in full before some experts leave
        edited.mkdir(exist_ok=True)
        if changes or not gone:
            copy_checkpoint(folder, edited, touched)
            for change in changes:
                _apply(edited, change)
        if gone:
            every = {stored.file for stored in tensors_of(folder).values()}
            copy_checkpoint(folder, partial, every, skip=True)
            write_pruned(hf, sites, gone, edited if changes else folder, partial)
            shutil.rmtree(partial / STAGE, ignore_errors=True)
        settings = {} if wanted is None else {write_top_k(hf.config, sites, partial, wanted): wanted}
        proof = None
        if verify or settings:
            from moescope.edits.proof import compare

            proof = compare(recipe, folder, partial, prompts)
            proof.require(exact=all(change.exact for change in changes), hint=HINT if settings else "")
        recipe.save(partial / "recipe.yaml", tensors=False)
        _add_to_card(partial, recipe, Written(target, changes, proof, gone, settings))
        partial.rename(target)
    except OSError as error:
        raise MoescopeError(f"Cannot write {target}: {error.strerror or error}; nothing is left there.") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return Written(target, changes, proof, gone, settings)


def _worked_out(recipe: Recipe, sites: list[Site], folder: Path) -> Recipe:
    """The recipe with its merges as tensors. Means are worked out on the model, in the checkpoint's own dtype, because
    which rows and columns a neuron has is proven by running it."""
    from moescope.edits.merging import worked_out
    from moescope.hooks import load

    for edit in recipe.edits:
        _require_experts(_site(sites, edit), edit)
    return worked_out(recipe, load(str(folder), dtype="auto"))


def _skeleton(folder: Path) -> tuple[Any, list[Site]]:
    """The model without weights, and its MoE layers."""
    from moescope.hooks.loading import load_config, model_class, skeleton
    from moescope.hooks.sites import discover

    config = load_config(str(folder))
    hf = skeleton(model_class(config, trust_remote_code=False), config, str(folder))
    return hf, discover(hf)


def _folder(source: str | Path) -> Path:
    folder = Path(source)
    if not (folder / "config.json").is_file():
        from moescope.hooks.loading import resolve

        folder = Path(resolve(str(source)))
    if not (folder / "config.json").is_file():
        raise MoescopeError(f"{source} is no folder with a checkpoint; download it first.")
    return folder


def _site(sites: list[Site], edit: Any) -> Site:
    found = [site for site in sites if edit.layer in (site.layer, site.key)]
    if len(found) != 1:
        known = ", ".join(site.key for site in sites)
        raise MoescopeError(f"The checkpoint has no single MoE layer {edit.layer!r}; it has {known}.")
    return found[0]


def _require_experts(site: Site, edit: Any) -> None:
    wrong = [expert for expert in getattr(edit, "expert", ()) if expert >= site.n_experts]
    if wrong:
        raise MoescopeError(f"Layer {edit.layer} has experts 0 to {site.n_experts - 1}, no expert {wrong[0]}.")


def _changes(
    hf: nn.Module, site: Site, known: dict[str, Stored], folder: Path, edit: Any, expert: int, approximate: bool
) -> list[Change]:
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


def _replaced(
    hf: nn.Module, known: dict[str, Stored], recipe: Recipe, edit: Replace, approximate: bool
) -> list[Change]:
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


def _apply(folder: Path, change: Change) -> None:
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


def _add_to_card(folder: Path, recipe: Recipe, done: Written) -> None:
    """Say in the model card what was done, and how near it comes."""
    card = folder / "README.md"
    before = card.read_text(encoding="utf-8") if card.is_file() else ""
    lines = "\n".join(
        f"- layer {e.layer}: {e.kind} {', '.join(map(str, getattr(e, 'expert', ())))}" for e in recipe.edits
    )
    what = (
        f"{len(done.changes)} tensor parts differ"
        if done.changes
        else "Names and shapes of the experts' tensors differ"
    )
    if done.pruned and done.changes:
        what += ", and names and shapes of the experts' tensors"
    if done.settings:
        what = "The configuration says " + ", ".join(f"{name} = {value}" for name, value in done.settings.items())
    near = "" if done.exact else "\n\nThis is an approximation of these edits"
    if near and done.proof is not None:
        near += f": next-token distributions differ by {done.proof.divergence:.2g} nats from the live edits"
    text = f"\n\n## Edited with MoEscope\n\n{lines}\n\n{what}; `recipe.yaml` says how.{near + '.' if near else ''}\n"
    card.write_text(before + text, encoding="utf-8")


__all__ = ["INDEX", "Change", "Written", "plan", "write"]
