"""The slow reference: what every MoE layer of a model did with every token, recomputed in float64 from raw weights.

Hooks record only inputs (of the router, of the experts) and, to be compared with, the experts' output. Ids, weights,
logits and each selected expert's own output are derived here, token by token. Nothing comes from moescope.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from .families import ZOO
from .family import Family
from .reference_experts import affine, expert, gated_mlp
from .reference_routing import ROUTES, Run, Site
from .reference_special import ROUTES as SPECIAL_ROUTES


@dataclass(frozen=True)
class LayerReference:
    """One MoE layer's truth for T tokens, k slots, E experts, expert width D; everything float64 on the CPU.

    Slots are in descending order of `selection`; implementations may order them otherwise: compare by `by_expert`.

    Attributes:
        path: module path of the block.
        layer: layer number within its stack, from the path.
        ids: `[T, k]` int64; -1 where the slot is empty (dropped or skipped).
        weights: `[T, k]`, as the experts receive them; 0 in empty slots.
        coefficients: `[T, k]`, what multiplies `outputs` in the sum; the weights, except in llama4 (1: the weight
            multiplies the expert's input) and nllb_moe (weights times 1 - token dropout).
        logits: `[T, E]` (zaya: E + 1), what the score function is applied to.
        selection: `[T, E]`, what the k largest are taken of.
        outputs: `[T, k, D]`, each selected expert's own output before the coefficient; 0 in empty slots.
        hidden: `[T, D]`, the experts' input.
        experts_output: `[T, D]`, what the model's experts module really returned (recorded, not derived).
        intended: `[T, k]` the router's ids where the experts run others (nllb_moe), else None.
    """

    path: str
    layer: int
    ids: Tensor
    weights: Tensor
    coefficients: Tensor
    logits: Tensor
    selection: Tensor
    outputs: Tensor
    hidden: Tensor
    experts_output: Tensor
    intended: Tensor | None = None

    @property
    def norm(self) -> Tensor:
        """`[T, k]` L2 norm of each selected expert's output."""
        return (self.outputs**2).sum(-1).sqrt()

    @property
    def absmax(self) -> Tensor:
        """`[T, k]` largest absolute value in each selected expert's output."""
        return self.outputs.abs().amax(-1)

    @property
    def recomposed(self) -> Tensor:
        """`[T, D]` the sum over slots of coefficient times output."""
        return (self.coefficients[..., None] * self.outputs).sum(1)

    def by_expert(self, token: int) -> dict[int, float]:
        """Expert id to weight for one token, empty slots left out."""
        return {int(e): float(w) for e, w in zip(self.ids[token], self.weights[token], strict=True) if e >= 0}


def reference(
    model: PreTrainedModel, name: str, inputs: dict[str, Tensor], shift: int = 0
) -> dict[str, LayerReference]:
    """Runs a zoo model once and recomputes every MoE layer.

    Args:
        model: from `build(name)`, any dtype.
        name: its key in `ZOO`.
        inputs: keyword arguments of its forward.
        shift: added to every expert id (modulo E) before the outputs are computed: the negative control.

    Returns:
        By module path of the block, in order of execution.
    """
    run = Run(inputs)
    return {site.path: _layer(site, run, shift) for site in record(model, ZOO[name], inputs)}


def record(model: PreTrainedModel, family: Family, inputs: dict[str, Tensor]) -> list[Site]:
    """Runs the model with hooks on every MoE block and returns one `Site` per block that ran, in order."""
    sites: dict[str, dict[str, Any]] = {}
    handles = []
    for path, block in find_blocks(model, family):
        router = submodule(block, family.router)
        experts = submodule(block, family.experts_attribute) if family.experts_attribute else block
        found = sites.setdefault(path, {"block": block, "router": router, "experts": experts})

        def on_router(module: nn.Module, args: tuple[Any, ...], found: dict[str, Any] = found) -> None:
            assert "router_input" not in found, "a block ran twice in one forward"
            found["shape"] = tuple(args[0].shape[:-1])
            found["router_extras"] = args[1:]
            found["router_input"] = args[0].detach().reshape(-1, args[0].shape[-1]).double()

        def on_experts(module: nn.Module, args: tuple[Any, ...], found: dict[str, Any] = found) -> None:
            found["expert_input"] = args[0].detach().reshape(-1, args[0].shape[-1]).double()

        def on_output(module: nn.Module, args: Any, output: Any, found: dict[str, Any] = found) -> None:
            first = output[0] if isinstance(output, tuple) else output
            found["experts_output"] = first.detach().reshape(-1, first.shape[-1]).double()

        handles += [
            router.register_forward_pre_hook(on_router),
            experts.register_forward_pre_hook(on_experts),
            experts.register_forward_hook(on_output),
        ]
    try:
        with torch.no_grad():
            model(**inputs)
    finally:
        for handle in handles:
            handle.remove()
    config = model.config.get_text_config()
    ran = [(path, found) for path, found in sites.items() if "experts_output" in found]
    return [
        _routed_alone(Site(path=path, layer=layer_number(path), family=family, config=config, **found))
        for path, found in ran
    ]


def _old_shared(block: Any, x: Tensor) -> Tensor:
    """The shared expert of an old-style block: gated in Qwen2-MoE, plain in DeepSeek, none in Mixtral."""
    if hasattr(block, "shared_expert"):
        return torch.sigmoid(affine(block.shared_expert_gate, x)) * gated_mlp(block.shared_expert, x)
    return gated_mlp(block.shared_experts, x) if hasattr(block, "shared_experts") else torch.zeros_like(x)


def _routed_alone(site: Site) -> Site:
    """Takes what is not the routed experts' own out of what was recorded, where the hooks could not stand closer."""
    match site.family.experts.kind:
        case "rank_one":  # doge: the block adds its own dense MLP
            site.experts_output = site.experts_output - torch.stack(
                [gated_mlp(site.block, x) for x in site.expert_input]
            )
        case "module_list":
            site.experts_output = site.experts_output - torch.stack(
                [_old_shared(site.block, x) for x in site.expert_input]
            )
        case "packed":  # jetmoe: the block adds a bias
            site.experts_output = site.experts_output - site.block.bias.double()
    if site.family.experts.weight_on == "input":
        # llama4: every expert gets every token, scaled; the rows are [E * T].
        site.expert_input = site.router_input
        site.experts_output = site.experts_output.reshape(-1, *site.router_input.shape).sum(0)
    return site


def find_blocks(model: nn.Module, family: Family) -> Iterator[tuple[str, nn.Module]]:
    """Every module that has the family's router and experts under their attribute names."""
    for path, module in model.named_modules():
        if family.block is not None and type(module).__name__ != family.block:
            continue
        wanted = [family.router, *([family.experts_attribute] if family.experts_attribute else [])]
        if all(isinstance(submodule(module, name), nn.Module) for name in wanted):
            yield path, module


def submodule(owner: Any, path: str) -> Any:
    """A nested attribute, or None."""
    return functools.reduce(lambda found, name: getattr(found, name, None), path.split("."), owner)


def layer_number(path: str) -> int:
    """The first number in a module path."""
    match = re.search(r"\.(\d+)(\.|$)", path)
    assert match is not None, path
    return int(match[1])


def _layer(site: Site, run: Run, shift: int) -> LayerReference:
    """Derives one layer: the choices, then each chosen expert's output for each token."""
    family = site.family
    choices = (ROUTES | SPECIAL_ROUTES)[family.routing.kind](site, run)
    on_input = family.experts.weight_on == "input"
    n_experts = len(choices[0].logits) - (family.routing.kind == "skip_class")
    outputs = torch.zeros(len(choices), len(choices[0].ids), site.expert_input.shape[-1], dtype=torch.float64)
    for token, choice in enumerate(choices):
        for slot, index in enumerate(choice.ids):
            if index >= 0:
                compute = expert(family.experts, site.experts, (index + shift) % n_experts, site.config)
                x = site.expert_input[token]
                outputs[token, slot] = compute(x * choice.weights[slot] if on_input else x)
    weights = torch.tensor([choice.weights for choice in choices], dtype=torch.float64)
    coefficients = torch.ones_like(weights) if on_input else weights
    if family.routing.kind == "capacity_top2":
        coefficients = coefficients * (1 - site.config.moe_token_dropout)
    intended = [choice.intended for choice in choices]
    return LayerReference(
        path=site.path,
        layer=site.layer,
        ids=torch.tensor([choice.ids for choice in choices]),
        weights=weights,
        coefficients=coefficients,
        logits=torch.stack([choice.logits for choice in choices]),
        selection=torch.stack([choice.selection for choice in choices]),
        outputs=outputs,
        hidden=site.expert_input,
        experts_output=site.experts_output,
        intended=torch.tensor(intended) if intended[0] is not None else None,
    )
