"""Merge experts: the weighted mean of their matrices after their neurons are aligned (MC-SMoE, arXiv 2310.01334).

Neuron i of one expert is none of another's until they are matched: members are permuted, by the assignment with the
largest summed cosine of their neurons (gate row, up row and down column side by side), to the order of the first. Which
rows and columns a neuron has is proven on the running model, so that merging into a checkpoint loads the model once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch

from moescope.analysis.matching import match_neurons
from moescope.edits.edit import Merge, Prune
from moescope.hooks.parts import Part, expert_parts, parameter_of
from moescope.hooks.weights import expert_layout

if TYPE_CHECKING:
    from moescope.edits.recipe import Recipe
    from moescope.hooks import Model
    from moescope.hooks.layouts import Layout
    from moescope.hooks.sites import Site


def merged_tensors(model: Model, site: Site, merges: Sequence[Merge]) -> dict[str, torch.Tensor]:
    """What merging puts in the place of the experts' tensors, by part of a parameter (`hooks.parts.Part`).

    Means are taken in float64 and rounded to the parameter's dtype. The model is read, and left as it was to the bit.

    Args:
        model: a loaded or wrapped model.
        site: the layer.
        merges: groups of its experts, none of them in two.

    Raises:
        MoescopeError: no such expert.
        RefusedError: an expert without tensors of its own, or a layout that cannot be proven (where neurons are
            aligned).
    """
    layout = expert_layout(model, site.key) if any(merge.align for merge in merges) else None
    found: dict[str, torch.Tensor] = {}
    for merge in merges:
        parts = {expert: expert_parts(model.hf, site, expert) for expert in merge.expert}
        mean = _mean(model, parts, merge, layout if merge.align else None)
        for expert in merge.expert if merge.keep == "all" else merge.expert[:1]:
            found |= {str(part): tensor for part, tensor in zip(parts[expert], mean, strict=True)}
    return found


def worked_out(recipe: Recipe, model: Model) -> Recipe:
    """A recipe's merges as `Replace` edits that hold the tensors, in the model's own dtype, before its other edits.

    Experts that leave are not in it: that is pruning's part.
    """
    from moescope.edits.recipe import Recipe
    from moescope.edits.replacing import replacement

    merges: dict[str, list[Merge]] = {}
    for edit in recipe.edits:
        if isinstance(edit, Merge):
            site = next(site for site in model.sites if edit.layer in (site.layer, site.key))
            merges.setdefault(site.key, []).append(edit)
    edits, held = [], {}
    for key, some in merges.items():
        site = next(site for site in model.sites if site.key == key)
        file = f"merged-{key}.safetensors"
        members = tuple(expert for merge in some for expert in merge.expert)
        # Each its own: a file of tensors may not hold one under the names of all members of a group.
        apart = {name: tensor.clone() for name, tensor in merged_tensors(model, site, some).items()}
        replace, held[file] = replacement(key, members, apart, file)
        edits.append(replace)
    edits += [edit for edit in recipe.edits if not isinstance(edit, Merge | Prune)]
    return Recipe(edits, config_hash=recipe.config_hash).holding(held)


def _mean(model: Model, parts: dict[int, list[Part]], merge: Merge, layout: Layout | None) -> list[torch.Tensor]:
    """The members' tensors, part by part, in the order of `expert_parts`."""
    shares = np.array(merge.weights or [1.0] * len(merge.expert), dtype=np.float64)
    first = merge.expert[0]
    places = {e: [part.of(parameter_of(model.hf, part.path)) for part in some] for e, some in parts.items()}
    reference = None if layout is None else _neurons(layout, first)
    total = [torch.zeros_like(place, dtype=torch.float64) for place in places[first]]
    for expert, share in zip(merge.expert, shares / shares.sum(), strict=True):
        read = lambda: [place.detach().clone() for place in places[expert]]  # noqa: B023, E731 - called at once
        if layout is None or reference is None or expert == first:
            tensors = read()
        else:
            order = match_neurons(reference, _neurons(layout, expert)).order
            tensors = _permuted(layout, expert, torch.as_tensor(order), read)
        for place, tensor in zip(total, tensors, strict=True):
            place += share * tensor.double()
    return [mean.to(place.dtype) for mean, place in zip(total, places[first], strict=True)]


def _neurons(layout: Layout, expert: int) -> np.ndarray:
    """[neuron, feature]: gate row, up row and down column of each neuron side by side."""
    first, down = layout.first(expert)[0].double(), layout.down(expert)[0].double()
    rows = [layout.rows_up] if layout.rows_gate is None else [layout.rows_gate, layout.rows_up]
    return torch.cat([*(first[index] for index in rows), down.T], dim=1).cpu().numpy()


def _permuted(
    layout: Layout, expert: int, order: torch.Tensor, read: Callable[[], list[torch.Tensor]]
) -> list[torch.Tensor]:
    """An expert's tensors as they are with its neurons in another order.

    The expert is rearranged where it lies, read, and put back: how it is stored (split, transposed, interleaved) then
    need not be known a second time.
    """
    parts, (down, _) = layout.parts(expert), layout.down(expert)
    maps = [tensor for part in parts for tensor in part if tensor is not None]
    before = [(tensor, tensor.clone()) for tensor in [*maps, down]]
    order = order.to(down.device)
    rows = torch.arange(sum(len(weight) for weight, _ in parts), device=down.device)
    for index in (layout.rows_gate, layout.rows_up):
        if index is not None:
            rows[index] = index[order]
    weight, bias = layout.first(expert)
    sizes = [len(part) for part, _ in parts]
    try:
        with torch.no_grad():
            for (place, _), new in zip(parts, weight[rows].split(sizes), strict=True):
                place.copy_(new)
            if bias is not None:
                for (_, place), new in zip(parts, bias[rows].split(sizes), strict=True):
                    if place is not None:
                        place.copy_(new)
            down.copy_(down[:, order])
            return read()
    finally:
        with torch.no_grad():
            for place, bits in before:
                place.copy_(bits)
