"""Structural pruning: a smaller checkpoint without some experts of every MoE layer, which plain transformers loads.

transformers holds one number of experts for all layers, so that every layer must lose as many. Each tensor with a place
for every expert loses the places of those that go; tensors named by expert are renamed to the new numbers.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from moescope.edits.edit import Merge, Prune
from moescope.edits.files import INDEX, Stored, tensors_of
from moescope.errors import MoescopeError, RefusedError

if TYPE_CHECKING:
    from torch import nn

    from moescope.edits.recipe import Recipe
    from moescope.hooks.sites import Site

COUNTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
GROUPS = ("n_group", "num_expert_group", "n_groups", "num_expert_groups")


def pruned_experts(recipe: Recipe, sites: list[Site]) -> dict[str, list[int]]:
    """Which experts go, by site key, merged into others or not; empty where a recipe takes none away.

    Raises:
        RefusedError: pruning mixed with edits other than merging, or layers that would not all lose as many.
        MoescopeError: an unknown layer or expert.
    """
    some = [(edit, leaving) for edit in recipe.edits if (leaving := _leaving(edit))]
    if not some:
        return {}
    if not all(isinstance(edit, Prune | Merge) for edit in recipe.edits):
        raise RefusedError("Pruning is written on its own: apply the other edits first, then prune what comes out.")
    gone: dict[str, set[int]] = {site.key: set() for site in sites}
    for edit, leaving in some:
        found = [site for site in sites if edit.layer in (site.layer, site.key)]
        if len(found) != 1:
            raise MoescopeError(f"The checkpoint has no single MoE layer {edit.layer!r}; it has {', '.join(gone)}.")
        wrong = [expert for expert in leaving if expert >= found[0].n_experts]
        if wrong:
            raise MoescopeError(f"{found[0].key} has experts 0 to {found[0].n_experts - 1}, no expert {wrong[0]}.")
        gone[found[0].key] |= set(leaving)
    if len({(site.n_experts, len(gone[site.key])) for site in sites}) > 1:
        counts = ", ".join(f"{key}: {len(experts)}" for key, experts in gone.items())
        raise RefusedError(
            f"Every MoE layer must lose as many experts; a configuration holds one number ({counts}). Merged experts "
            'can stay as copies instead: keep="all".'
        )
    return {key: sorted(experts) for key, experts in gone.items()}


def _leaving(edit: Any) -> tuple[int, ...]:
    """Experts that an edit takes out of the checkpoint."""
    if isinstance(edit, Merge):
        return edit.gone
    return edit.expert if isinstance(edit, Prune) else ()


def require_prunable(config: Any, sites: list[Site], gone: dict[str, list[int]]) -> None:
    """Raises RefusedError for families whose checkpoints cannot lose experts so."""
    text = config.get_text_config()
    grouped = [name for name in GROUPS if isinstance(getattr(text, name, None), int) and getattr(text, name) > 1]
    if grouped:
        raise RefusedError(f"This family selects its experts in groups ({grouped[0]}); pruning would break them up.")
    if any(site.zero_experts for site in sites):
        raise RefusedError("Some of this family's experts have no tensors; which would go is not said by its numbers.")
    left = sites[0].n_experts - len(gone[sites[0].key])
    most = max((site.top_k or 1) for site in sites)
    if left < most:
        raise RefusedError(f"{left} experts would be left where {most} are selected for each token.")


def write_pruned(hf: nn.Module, sites: list[Site], gone: dict[str, list[int]], source: Path, out: Path) -> list[str]:
    """Write the smaller checkpoint's tensors, index and configuration; gives the names of changed tensors.

    One shard is in memory at a time.
    """
    known = tensors_of(source)
    keep, rename = _places(hf, sites, gone, known)
    files = sorted({stored.file for stored in known.values()})
    weight_map: dict[str, str] = {}
    size = 0
    for file in files:
        tensors = {}
        with safe_open(source / file, "pt") as handle:
            metadata = handle.metadata()
            for name in handle.keys():  # noqa: SIM118 - it is no mapping
                if rename.get(name, name) is None:
                    continue
                tensor = handle.get_tensor(name)
                if name in keep:
                    axis, rows = keep[name]
                    tensor = tensor.index_select(axis, torch.tensor(rows)).contiguous()
                target = str(rename.get(name, name))
                tensors[target] = tensor
                weight_map[target] = file
                size += tensor.numel() * tensor.element_size()
        save_file(tensors, out / file, metadata=metadata)
    if (source / INDEX).is_file():
        index = json.loads((source / INDEX).read_text(encoding="utf-8"))
        index["weight_map"] = dict(sorted(weight_map.items()))
        index.setdefault("metadata", {})["total_size"] = size
        (out / INDEX).write_text(json.dumps(index, indent=2), encoding="utf-8")
    _write_config(source, out, sites[0].n_experts, sites[0].n_experts - len(gone[sites[0].key]))
    return [*keep, *rename]


def leaving_tensors(hf: nn.Module, sites: list[Site], gone: dict[str, list[int]], source: Path) -> list[str]:
    """What happens to each stored tensor, a line each: places cut out, a new name, or gone. Reads headers only."""
    keep, rename = _places(hf, sites, gone, tensors_of(source))
    lines = [f"{name}: {len(stay)} places of its axis {axis} stay" for name, (axis, stay) in keep.items()]
    return lines + [f"{name}: " + ("goes" if new is None else f"becomes {new}") for name, new in rename.items()
                    if new != name]  # fmt: skip


def _places(
    hf: nn.Module, sites: list[Site], gone: dict[str, list[int]], known: dict[str, Stored]
) -> tuple[dict[str, tuple[int, list[int]]], dict[str, str | None]]:
    """Stored tensors to cut: name -> (axis, rows that stay); to rename: name -> new name, None for those that go."""
    from moescope.hooks.names import checkpoint_names

    keep: dict[str, tuple[int, list[int]]] = {}
    rename: dict[str, str | None] = {}
    for site in sites:
        n, leave = site.n_experts, gone[site.key]
        stay = [expert for expert in range(n) if expert not in leave]
        for name in _of_experts(hf, site):
            stored = checkpoint_names(hf, name, known)
            numbered = [key for key in stored if re.search(r"\.\d+\.", key.rpartition("experts")[2])]
            if len(stored) >= n and len(numbered) == len(stored):
                for key in stored:
                    head, mark, tail = key.rpartition("experts.")
                    number, dot, rest = tail.partition(".")
                    new = stay.index(int(number)) if int(number) in stay else None
                    rename[key] = None if new is None else f"{head}{mark}{new}{dot}{rest}"
                continue
            for key in stored:
                axes = [axis for axis, length in enumerate(known[key].shape) if length == n]
                if not axes or (len(known[key].shape) > 1 and len(axes) > 1 and axes[0] != 0):
                    raise RefusedError(f"{key} {known[key].shape} has no one place for each of {n} experts.")
                keep[key] = axes[0], stay
    return keep, rename


def _of_experts(hf: nn.Module, site: Site) -> Iterator[str]:
    """Parameters and buffers with a place for each expert: the experts', the router's, and vectors beside them."""
    shared = tuple(f"{path}." for path in site.shared)
    for kind in (hf.named_parameters(remove_duplicate=False), hf.named_buffers()):
        for name, tensor in kind:
            if not name.startswith(f"{site.block}.") or name.startswith(shared):
                continue
            inside = name.startswith((f"{site.experts}.", f"{site.router}.")) and tensor.ndim > 0
            if (inside and (len(tensor) == site.n_experts or ".experts." in name)) or tensor.numel() == site.n_experts:
                yield name


def _write_config(source: Path, out: Path, before: int, after: int) -> None:
    config = json.loads((source / "config.json").read_text(encoding="utf-8"))
    changed = 0
    for part in (config, *(value for value in config.values() if isinstance(value, dict))):
        for name in COUNTS:
            if part.get(name) == before:
                part[name] = after
                changed += 1
    if not changed:
        raise RefusedError(f"The configuration does not say {before} experts under any name known here.")
    (out / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
