"""Slow routing arithmetic in float64, one token at a time, from raw router weights. Nothing here calls model code."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .family import Family, Routing
from .reference_experts import rms_norm


@dataclass
class Site:
    """One MoE layer, and what was recorded from it during one forward pass.

    Attributes:
        path: module path of the block.
        layer: layer number within its stack.
        router_input: `[T, D]` float64, rows batch-major.
        expert_input: `[T, D']` float64; D' differs from D where the block projects first.
        experts_output: `[T, D']` float64, what the experts module (or, lacking one, the block) returned.
        shape: of the router's input without its last dimension; (batch, length) or (T,).
        router_extras: the router's other positional arguments.
    """

    path: str
    layer: int
    family: Family
    block: Any
    router: Any
    experts: Any
    config: Any
    router_input: Tensor
    expert_input: Tensor
    experts_output: Tensor
    shape: tuple[int, ...]
    router_extras: tuple[Any, ...]


@dataclass
class Run:
    """What a router may need besides its own input.

    Attributes:
        inputs: the model's inputs.
        carried: state handed from one layer's router to the next (zaya).
    """

    inputs: dict[str, Tensor]
    carried: dict[str, Tensor] = field(default_factory=dict)


@dataclass
class Choice:
    """One token's routing.

    Attributes:
        ids: experts in descending order of `selection`; -1 where a slot is empty.
        weights: as given to the experts, one per slot; 0 where the slot is empty.
        logits: `[E]`, what the score function is applied to.
        selection: `[E]`, what the k largest are taken of: the biased, group-masked score.
        intended: ids the router meant, where the experts run others (nllb_moe).
    """

    ids: list[int]
    weights: list[float]
    logits: Tensor
    selection: Tensor
    intended: list[int] | None = None


def parameter(owner: Any, path: str) -> Tensor:
    """A weight by dotted path, as float64."""
    return functools.reduce(getattr, path.split("."), owner).double()


def setting(config: Any, path: str) -> Any:
    """A configuration value by dotted path."""
    return functools.reduce(getattr, path.split("."), config)


def router_logits(site: Site, x: Tensor) -> Tensor:
    """Weight times x, plus the linear's bias where it has one."""
    routing = site.family.routing
    logits = parameter(site.router, routing.weight) @ x
    return logits if routing.logit_bias is None else logits + parameter(site.router, routing.logit_bias)


def score(name: str, logits: Tensor) -> Tensor:
    """The score function over one token's logits."""
    match name:
        case "softmax":
            shifted = torch.exp(logits - logits.max())
            return shifted / shifted.sum()
        case "sigmoid":
            return 1 / (1 + torch.exp(-logits))
        case "sqrtsoftplus":
            return torch.sqrt(torch.log1p(torch.exp(logits)))
        case _:
            raise ValueError(f"No score function {name}")


def best(values: Tensor, k: int) -> list[int]:
    """Positions of the k largest values, largest first."""
    return sorted(range(len(values)), key=lambda i: -float(values[i]))[:k]


def choose(routing: Routing, logits: Tensor, bias: Tensor | None, config: Any) -> Choice:
    """The standard decision for one token: score, bias, groups, top-k, normalise, scale."""
    k = setting(config, routing.top_k)
    if routing.over == "selected":
        ids = best(logits, k)
        return Choice(ids, finish(routing, score(routing.score, logits[ids]), config), logits, logits)
    scores = score(routing.score, logits)
    selection = logits if routing.bias_on == "logit" else scores
    selection = selection if bias is None else selection + bias.reshape(-1)
    if routing.groups is not None and config.n_group is not None and _grouped(routing, config):
        selection = _mask_groups(routing, selection, config.n_group, config.topk_group)
    ids = best(selection, k)
    return Choice(ids, finish(routing, scores[ids], config), logits, selection)


def _grouped(routing: Routing, config: Any) -> bool:
    return routing.groups != "max" or config.topk_method == "group_limited_greedy"


def _mask_groups(routing: Routing, selection: Tensor, groups: int, kept: int) -> Tensor:
    """Replaces the selection score outside the best groups."""
    size = len(selection) // groups
    members = [list(range(g * size, (g + 1) * size)) for g in range(groups)]
    counted = 2 if routing.groups == "top2" else 1
    totals = torch.stack([selection[m][best(selection[m], counted)].sum() for m in members])
    masked = torch.full_like(selection, routing.group_fill)
    for group in best(totals, kept):
        masked[members[group]] = selection[members[group]]
    return masked


def finish(routing: Routing, chosen: Tensor, config: Any) -> list[float]:
    normalise = getattr(config, routing.normalise) if isinstance(routing.normalise, str) else routing.normalise
    if normalise:
        chosen = chosen / (chosen.sum() + routing.epsilon)
    if routing.scale is not None:
        chosen = chosen * getattr(config, routing.scale)
    return chosen.tolist()


def _selection_bias(site: Site) -> Tensor | None:
    """The bias added for selection, where the family and this layer have one."""
    path = site.family.routing.bias
    return None if path is None else parameter(site.block, path)


def standard(site: Site, run: Run, prepare: Callable[[Site, Tensor], Tensor] = router_logits) -> list[Choice]:
    bias = _selection_bias(site)
    return [choose(site.family.routing, prepare(site, x), bias, site.config) for x in site.router_input]


def _gemma_logits(site: Site, x: Tensor) -> Tensor:
    """gemma4: the router norms the raw residual, scales it by a vector and by D^-0.5."""
    normed = rms_norm(x, None, site.config.rms_norm_eps) * parameter(site.router, "scale") * len(x) ** -0.5
    return router_logits(site, normed)


def _gemma(site: Site, run: Run) -> list[Choice]:
    """gemma4: softmax, normalised over the selected, times a learned scale per expert."""
    choices = standard(site, run, _gemma_logits)
    scales = parameter(site.router, "per_expert_scale")
    for choice in choices:
        choice.weights = [w * float(scales[e]) for w, e in zip(choice.weights, choice.ids, strict=True)]
    return choices


def _softcapped(site: Site, run: Run) -> list[Choice]:
    """laguna: tanh-capped logits."""
    cap = site.config.moe_router_logit_softcapping
    return standard(site, run, lambda site, x: cap * torch.tanh(router_logits(site, x) / cap))


def _multiplied(site: Site, run: Run) -> list[Choice]:
    """muse_spark: logits times config.output_multiplier."""
    return standard(site, run, lambda site, x: site.config.output_multiplier * router_logits(site, x))


def _divided_by_k(site: Site, run: Run) -> list[Choice]:
    """openai_privacy_filter: the router divides by k; the block multiplies the sum by k again."""
    choices = standard(site, run)
    for choice in choices:
        choice.weights = [w / len(choice.ids) for w in choice.weights]
    return choices


def _p_norm(site: Site, run: Run) -> list[Choice]:
    """dbrx: the selected softmax scores are divided by their p-norm, if config names a p."""
    choices, p = standard(site, run), site.config.ffn_config.moe_normalize_expert_weights
    if p is None:
        return choices
    for choice in choices:
        total = sum(abs(w) ** p for w in choice.weights) ** (1 / p)
        choice.weights = [w / total for w in choice.weights]
    return choices


ROUTES: dict[str, Callable[[Site, Run], list[Choice]]] = {
    "standard": standard,
    "gemma": _gemma,
    "softcapped": _softcapped,
    "multiplied": _multiplied,
    "divided_by_k": _divided_by_k,
    "p_norm": _p_norm,
}
