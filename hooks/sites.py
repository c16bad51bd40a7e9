"""Find the MoE layers of a model from what transformers declares about itself, not from a list of model names.

Two declarations are enough. A class decorated with ``use_experts_implementation`` marks its instances with the flags of
its experts; and ``PreTrainedModel._can_record_outputs["router_logits"]`` names the router's class. A *site* is one such
pair inside one block.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

from torch import nn

from moescope.errors import RefusedError

ROUTER_NAMES = ("gate", "router")  # exact last name: `shared_expert_gate` and `gate_proj` exist too (72 of 72 families)
SHARED_NAMES = ("shared_experts", "shared_expert", "shared_mlp")
SHARED_COUNT_NAMES = ("n_shared_experts", "num_shared_experts", "moe_num_shared_experts")
TOP_K_NAMES = (
    "top_k", "topk", "num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_k", "top_k_experts",
    "n_activated_experts",
)  # fmt: skip


@dataclass(frozen=True)
class Site:
    """One MoE layer of a model: where its parts are and how many experts it has.

    Attributes:
        key: name of the site in a store, ``L003``; where a model has several stacks, ``L003-encoder``.
        layer: the model's own layer index (dense layers count).
        ordinal: position among the MoE layers.
        block, router, experts: module paths; ``layer_path`` is the decoder layer around them.
        shared: module paths of shared experts inside the block or beside it; one module may hold several.
        n_shared: shared experts, as the configuration counts them.
        n_experts: routed experts, E.
        top_k: experts for each token as declared, k; None where nothing declares it before a forward.
    """

    key: str
    layer: int
    ordinal: int
    layer_path: str
    block: str
    router: str
    experts: str
    shared: tuple[str, ...]
    n_shared: int
    n_experts: int
    top_k: int | None


def discover(model: nn.Module) -> list[Site]:
    """List the MoE layers of a transformers model, in the order of its modules.

    Raises:
        RefusedError: the model has no MoE layer, or has one of a shape that MoEscope cannot yet read faithfully.
    """
    modules = dict(model.named_modules())
    routers = _declared_routers(model)
    found = [
        _site(modules, routers, path, ordinal) for ordinal, path in enumerate(_dispatched_experts(modules, routers))
    ]
    if not found:
        raise RefusedError(_why_nothing(model, routers))
    return _with_unique_keys(found)


def active_parameters(hf: nn.Module, sites: list[Site], top_k: Mapping[str, int]) -> int:
    """Parameters that one token meets: all but those of the experts it is not sent to."""
    idle = 0
    for site in sites:
        experts = sum(parameter.numel() for parameter in hf.get_submodule(site.experts).parameters())
        idle += experts * (site.n_experts - top_k[site.key]) // site.n_experts
    return sum(parameter.numel() for parameter in hf.parameters()) - idle


def _dispatched_experts(modules: dict[str, nn.Module], routers: set[str]) -> Iterator[str]:
    for path, module in modules.items():
        if hasattr(module, "_is_expert_parallel") and hasattr(module, "is_concatenated"):
            yield path


def _declared_routers(model: nn.Module) -> set[str]:
    """Paths of modules of the classes that any (sub)model declares as recorders of router logits."""
    classes: set[type] = set()
    for module in model.modules():
        recorders = (getattr(module, "_can_record_outputs", None) or {}).get("router_logits", [])
        for recorder in recorders if isinstance(recorders, list | tuple) else [recorders]:
            target = getattr(recorder, "target_class", recorder)
            if isinstance(target, type):
                classes.add(target)
    return {path for path, module in model.named_modules() if isinstance(module, tuple(classes))}


def _site(modules: dict[str, nn.Module], routers: set[str], experts: str, ordinal: int) -> Site:
    block, router = _router_beside(modules, routers, experts)
    layer_path, layer = _layer_of(modules, experts)
    holders = (block, layer_path) if block != layer_path else (block,)
    shared = tuple(path for holder in holders for name in SHARED_NAMES if (path := _join(holder, name)) in modules)
    return Site(
        key=f"L{layer:03d}",
        layer=layer,
        ordinal=ordinal,
        layer_path=layer_path,
        block=block,
        router=router,
        experts=experts,
        shared=shared,
        n_shared=_count_shared(modules, block, shared),
        n_experts=_count_experts(modules[experts]),
        top_k=_declared_top_k(modules, block, router),
    )


def _router_beside(modules: dict[str, nn.Module], routers: set[str], experts: str) -> tuple[str, str]:
    """The nearest ancestor of the experts that also holds a router, and that router."""
    block = experts
    while block:
        block = block.rpartition(".")[0]
        inside = [path for path, _ in modules[block].named_modules(prefix=block) if path != block]
        declared = [path for path in inside if path in routers]
        # deepseek_v4's hash layers use a second router class that no recorder names; the attribute's name is the same.
        named = [path for path in inside if path.rpartition(".")[2] in ROUTER_NAMES]
        candidates = declared or named
        if candidates:
            return block, min(candidates, key=len)
    raise RefusedError(
        f"The experts at {experts} have no router beside them that transformers declares; cannot capture."
    )


def _layer_of(modules: dict[str, nn.Module], path: str) -> tuple[str, int]:
    """The innermost numbered ancestor (a decoder layer) and its number."""
    numbered = [m.end() for m in re.finditer(r"\.\d+(?=\.|$)", path)]
    for end in reversed(numbered):
        layer_path = path[:end]
        if isinstance(modules[layer_path.rpartition(".")[0]], nn.ModuleList):
            return layer_path, int(layer_path.rpartition(".")[2])
    raise RefusedError(f"The experts at {path} are not inside a numbered layer; cannot say which layer they belong to.")


def _count_experts(experts: nn.Module) -> int:
    down = getattr(experts, "down_proj", None)
    return int(down.shape[0]) if down is not None else int(experts.num_experts)  # type: ignore[arg-type]


def _count_shared(modules: dict[str, nn.Module], block: str, shared: tuple[str, ...]) -> int:
    configs = [getattr(module, "config", None) for module in (modules[block], *modules[block].modules())]
    declared = (getattr(config, name, None) for config in configs for name in SHARED_COUNT_NAMES)
    count = next((value for value in declared if isinstance(value, int) and value > 0), len(shared))
    return count if shared else 0


def _declared_top_k(modules: dict[str, nn.Module], block: str, router: str) -> int | None:
    holders = [modules[router], modules[block], getattr(modules[router], "config", None)]
    holders += [getattr(modules[block], "config", None)]
    for holder in holders:
        for name in TOP_K_NAMES:
            value = getattr(holder, name, None)
            if isinstance(value, int) and not isinstance(value, bool):
                return value
    return None


def _with_unique_keys(sites: list[Site]) -> list[Site]:
    """Where sites share a layer number (an encoder beside a decoder, a text pool beside a vision pool), add to the key
    the first name in which their paths differ."""
    unique = []
    for site in sites:
        names = site.experts.split(".")
        twins = [other.experts.split(".") for other in sites if other.key == site.key]
        own = next((names[i] for i, there in enumerate(zip(*twins, strict=False)) if len(set(there)) > 1), None)
        unique.append(site if own is None else replace(site, key=f"{site.key}-{own}"))
    return unique


def _why_nothing(model: nn.Module, routers: set[str]) -> str:
    name = type(model).__name__
    experts = [path for path, _ in model.named_modules() if path.rpartition(".")[2] == "experts"]
    found = sorted(routers) or experts
    if found:
        return (
            f"{name} has Mixture-of-Experts parts ({found[0]}, …) but its experts are not dispatched through "
            "transformers' experts interface; it is not captured yet, rather than captured wrongly."
        )
    return f"{name} is a dense model: it has no Mixture-of-Experts layer. `moescope models` lists models that do."


def _join(*names: str) -> str:
    return ".".join(name for name in names if name)
