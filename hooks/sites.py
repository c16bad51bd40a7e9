"""Find the MoE layers of a model from what transformers declares about itself, not from a list of model names.

A class decorated with ``use_experts_implementation`` marks its instances with the flags of its experts, and
``PreTrainedModel._can_record_outputs["router_logits"]`` names the router's class. Beside a router, `experts` that take
(hidden, ids, weights), and `experts` that are a list of modules (remote code, transformers 4), tell themselves by their
shape. Four blocks follow no contract but their own: `EXCEPTIONS`, each with its evidence. A *site* is one router with
its experts inside one block.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import torch
from torch import nn

from moescope.errors import RefusedError

ROUTER_NAMES = ("gate", "router")  # exact last name: `shared_expert_gate` and `gate_proj` exist too (72 of 72 families)
SHARED_NAMES = ("shared_experts", "shared_expert", "shared_mlp")
SHARED_COUNT_NAMES = ("n_shared_experts", "num_shared_experts", "moe_num_shared_experts")
WRAPPED = "._original_component"  # under this name a part of a TransformerLens bridge holds what it stands for
TOP_K_NAMES = (
    "top_k", "topk", "num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_k", "top_k_experts",
    "n_activated_experts",
)  # fmt: skip


@dataclass(frozen=True)
class Shape:
    """How a block that follows no contract is read: by which reader, where its router is, and why."""

    reader: str
    router: str
    experts: str
    evidence: str


EXCEPTIONS = {  # by class name of the block; read in transformers 5.23
    "Llama4TextMoe": Shape(
        "scaled input",
        "router",
        "experts",
        "experts take [E * T, D], every token for every expert, multiplied by the score before: f(w x), not w f(x)",
    ),
    "JetMoeMoE": Shape(
        "plan",
        "router",
        "",
        "no experts module; the router returns (sorted slots, token ids, gates, counts, logits)",
    ),
    "JetMoeMoA": Shape(
        "plan",
        "router",
        "",
        "attention is a second mixture, run by plain methods `map` and `reduce` on which module hooks never fire",
    ),
    "DogeCDMoE": Shape(
        "product keys",
        "router_gate",
        "",
        "experts are rows of two embeddings found by product keys; no module receives weights",
    ),
}


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
        n_experts: routed experts, E; those that compute nothing count.
        zero_experts: how many of them, the last ones, return their input (longcat_flash's zero-computation experts).
        top_k: experts for each token as declared, k; None where nothing declares it before a forward.
        reader: how the site is read, a key of `readers.READERS`.
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
    reader: str = "call"
    zero_experts: int = 0


def discover(model: nn.Module) -> list[Site]:
    """List the MoE layers of a transformers model, in the order of its modules.

    Raises:
        RefusedError: the model has no MoE layer, or has one of a shape that MoEscope cannot yet read faithfully.
    """
    modules = dict(model.named_modules())
    routers = _declared_routers(model)
    found = [_site(modules, routers, place, ordinal) for ordinal, place in enumerate(_places(modules, routers))]
    if not found:
        raise RefusedError(_why_nothing(model, routers))
    return _with_unique_keys(found)


def active_parameters(hf: nn.Module, sites: list[Site], top_k: Mapping[str, int]) -> int:
    """Parameters that one token meets: all but those of the experts it is not sent to."""
    idle = 0
    for site in sites:
        module, router = hf.get_submodule(site.experts), hf.get_submodule(site.router)
        ours = list(module.parameters())
        if site.experts == site.block:  # the block itself holds the experts, beside a router and perhaps a dense part
            parts = [part for part in module.children() if part is not router and not isinstance(part, nn.Linear)]
            ours = [parameter for part in parts for parameter in part.parameters()]
        experts = sum(parameter.numel() for parameter in ours)
        idle += experts * (site.n_experts - top_k[site.key]) // site.n_experts
    return sum(parameter.numel() for parameter in hf.parameters()) - idle


def expert_modules(experts: nn.Module) -> dict[int, nn.Module]:
    """The experts of a list or dictionary of modules by number; nllb_moe's dictionary also holds a dropout."""
    numbered = ((re.search(r"\d+$", name), expert) for name, expert in experts.named_children())
    return {int(match[0]): expert for match, expert in numbered if match is not None}


@dataclass(frozen=True)
class _Place:
    """Where experts stand, and how they are read."""

    experts: str
    reader: str
    block: str | None = None
    router: str | None = None


def _places(modules: dict[str, nn.Module], routers: set[str]) -> Iterator[_Place]:
    inside: tuple[str, ...] = ()
    for path, module in modules.items():
        if path.startswith(inside) or path + WRAPPED in modules:
            continue
        shape = EXCEPTIONS.get(type(module).__name__)
        if shape is not None:
            inside = (*inside, f"{path}.")
            yield _Place(_join(path, shape.experts), shape.reader, path, _join(path, shape.router))
        elif hasattr(module, "_is_expert_parallel") and hasattr(module, "is_concatenated"):
            yield _Place(path, "call")
        elif _own_name(path) == "experts":
            parent = path.removesuffix(WRAPPED).rpartition(".")[0]
            if isinstance(module, nn.ModuleList | nn.ModuleDict):
                if len(expert_modules(module)) > 1 and _routers_in(modules, routers, parent):
                    yield _Place(path, "modules")
            elif _takes_ids_and_weights(module) and _routers_in(modules, routers, parent):
                yield _Place(path, "call")


def _takes_ids_and_weights(experts: nn.Module) -> bool:
    """Whether a module is called as experts(hidden, ids, weights), as far as its signature tells."""
    # Of the class: wrappers such as nnsight put a forward on the instance that takes anything.
    parameters = inspect.signature(type(experts).forward).parameters.values()
    return len([p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]) == 4  # with self


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


def _site(modules: dict[str, nn.Module], routers: set[str], place: _Place, ordinal: int) -> Site:
    experts = place.experts
    if place.block is not None and place.router is not None:
        block, router = place.block, place.router
    else:
        block, router = _router_beside(modules, routers, experts)
    layer_path, layer = _layer_of(modules, experts)
    layer_itself = layer_path + WRAPPED if layer_path + WRAPPED in modules else layer_path
    holders = (block, layer_itself) if block != layer_itself else (block,)
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
        n_experts=_count_experts(modules[experts], modules[router]),
        top_k=_declared_top_k(modules, block, router),
        reader=place.reader,
        zero_experts=int(getattr(modules[experts], "zero_expert_num", 0)),
    )


def _router_beside(modules: dict[str, nn.Module], routers: set[str], experts: str) -> tuple[str, str]:
    """The nearest ancestor of the experts that also holds a router, and that router."""
    block = experts
    while block:
        block = block.rpartition(".")[0]
        candidates = _routers_in(modules, routers, block)
        if candidates:
            return block, min(candidates, key=len)
    raise RefusedError(
        f"The experts at {experts} have no router beside them that transformers declares; cannot capture."
    )


def _routers_in(modules: dict[str, nn.Module], routers: set[str], block: str) -> list[str]:
    paths = [path for path, _ in modules[block].named_modules(prefix=block) if path != block]
    inside = [path for path in paths if path + WRAPPED not in modules]
    declared = [path for path in inside if path in routers]
    # deepseek_v4's hash layers use a second router class that no recorder names; the attribute's name is the same.
    return declared or [path for path in inside if _own_name(path) in ROUTER_NAMES]


def _layer_of(modules: dict[str, nn.Module], path: str) -> tuple[str, int]:
    """The outermost numbered ancestor (a decoder layer, not a part of one) and its number."""
    for end in (m.end() for m in re.finditer(r"\.\d+(?=\.|$)", path)):
        layer_path = path[:end]
        if isinstance(modules[layer_path.rpartition(".")[0]], nn.ModuleList):
            return layer_path, int(layer_path.rpartition(".")[2])
    raise RefusedError(f"The experts at {path} are not inside a numbered layer; cannot say which layer they belong to.")


def _count_experts(experts: nn.Module, router: nn.Module) -> int:
    if isinstance(experts, nn.ModuleList | nn.ModuleDict):
        return len(expert_modules(experts))
    total = getattr(experts, "total_experts", None)  # longcat_flash: identities too, which have no weights
    if isinstance(total, int):
        return total
    down = getattr(experts, "down_proj", None)
    if isinstance(down, torch.Tensor) and down.ndim == 3:
        return int(down.shape[0])
    return int(getattr(experts, "num_experts", None) or router.num_experts)  # type: ignore[arg-type]


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
    named = re.search(r"Top(\d+)", type(modules[router]).__name__)  # SwitchTransformersTop1Router, NllbMoeTop2Router
    return None if named is None else int(named[1])


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
            f"{name} has Mixture-of-Experts parts ({found[0]}, …) of a shape that is not known to MoEscope; "
            "it is not captured, rather than captured wrongly."
        )
    return f"{name} is a dense model: it has no Mixture-of-Experts layer. `moescope models` lists models that do."


def plain_path(path: str) -> str:
    """A module's path as transformers has it, without the steps that a TransformerLens bridge adds."""
    return path.replace(WRAPPED, "")


def _own_name(path: str) -> str:
    return path.removesuffix(WRAPPED).rpartition(".")[2]


def _join(*names: str) -> str:
    return ".".join(name for name in names if name)
