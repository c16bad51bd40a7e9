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

from moescope.edits.changes import Change, apply_change, expert_changes, tensor_changes
from moescope.edits.edit import Merge, Replace
from moescope.edits.files import INDEX, copy_checkpoint, tensors_of
from moescope.edits.narrowing import HINT, narrowed, write_top_k
from moescope.edits.pruning import leaving_tensors, pruned_experts, require_prunable, write_pruned
from moescope.edits.recipe import Recipe
from moescope.errors import MoescopeError, RefusedError

if TYPE_CHECKING:
    from moescope.edits.proof import Proof
    from moescope.hooks.sites import Site

STAGE = ".merged"


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

    @property
    def difference(self) -> str:
        """What is not as in the source, in words."""
        if self.settings:
            return f"its configuration says {', '.join(f'{name} = {value}' for name, value in self.settings.items())}"
        if self.pruned:
            gone = len(next(iter(self.pruned.values())))
            return f"every MoE layer has {gone} expert{'s' * (gone > 1)} fewer than in the source"
        count = len(self.changes)
        return f"{count} tensor part{'s differ' if count > 1 else ' differs'} from the source"


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
        raise MoescopeError("Pruning changes the names and shapes of tensors; see `moescope.edits.plan_leaving`.")
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
            found = tensor_changes(hf, known, recipe, edit, approximate or own)
            changes += [replace(change, exact=True) for change in found] if own else found
            continue
        for expert in getattr(edit, "expert", ()):
            changes += expert_changes(hf, site, known, folder, edit, expert, approximate)
    return changes


def plan_leaving(recipe: Recipe, source: str | Path) -> list[str]:
    """What pruning, or merging with `keep="first"`, does to each stored tensor, a line each; reads headers only.

    Raises:
        MoescopeError, RefusedError: as `write` would.
    """
    folder = _folder(source)
    hf, sites = _skeleton(folder)
    recipe.require_consistent()
    gone = pruned_experts(recipe, sites)
    if not gone:
        return []
    require_prunable(hf.config, sites, gone)
    return leaving_tensors(hf, sites, gone, folder)


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
                apply_change(edited, change)
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
