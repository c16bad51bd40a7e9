"""Every way to read a layer's experts as matrices that their shapes allow: fused or apart, plain or transposed.

Nothing here is proven: `moescope.hooks.weights` believes the one that recomputes what the experts really gave out.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from moescope.hooks.facts import Facts
from moescope.hooks.gating import Function, roles
from moescope.hooks.sites import Site, expert_modules

Affine = tuple[torch.Tensor, torch.Tensor | None]


@dataclass(frozen=True)
class Layout:
    """One way to read a layer's experts; matrices and biases are views of the model's own parameters.

    Attributes:
        parts: of an expert, the maps [rows, D] that its input goes through, one after another; their rows together are
            those of its first map.
        down: of an expert, the map [D, I] that its output comes from.
        phi, tail: what stands between the two, and what follows the second.
        n_real: experts that have matrices.
        rows_gate, rows_up: [I] which row of the first map is neuron i's gate, which its linear factor.
        notes: what else to know.
    """

    name: str
    parts: Callable[[int], list[Affine]]
    down: Callable[[int], Affine]
    phi: Function
    tail: Function
    n_real: int
    rows_gate: torch.Tensor | None
    rows_up: torch.Tensor
    notes: tuple[str, ...] = ()

    def first(self, e: int) -> Affine:
        """All rows of the first map of an expert; a copy where they are stored apart."""
        weights, biases = zip(*self.parts(e), strict=True)
        if len(weights) == 1:
            return weights[0], biases[0]
        return torch.cat(weights), None if any(bias is None for bias in biases) else torch.cat(biases)


def layouts_of(hf: nn.Module, site: Site, facts: Facts, reasons: list[str]) -> Iterator[Layout]:
    """Every way to read the experts that their shapes allow; why others fall out goes into `reasons`."""
    experts = hf.get_submodule(site.experts)
    width = facts.hidden.shape[-1]
    if site.reader == "modules":
        yield from _of_modules(experts, facts, reasons)
        return
    for name, maps, down in _stored(experts, site, width):
        n_rows = sum(first.shape[1] for first in maps)
        phi = _gate_function(experts, n_rows, down)
        if phi is None:
            reasons.append("it has no activation that could be asked")
            continue
        pair = roles(phi, n_rows, down.shape[2], down.device)
        if isinstance(pair, str):
            reasons.append(pair)
            continue
        norm = getattr(experts, "post_expert_norm", None)
        yield Layout(
            name,
            _rows(maps, _bias(experts, ("gate_up_proj_bias", "up_proj_bias"), n_rows)),
            _slices(down, _bias(experts, ("down_proj_bias",), width)),
            phi,
            norm if isinstance(norm, nn.Module) else _same,
            down.shape[0],
            *pair,
            notes=("a norm of its own follows the down projection",) if isinstance(norm, nn.Module) else (),
        )


def _stored(experts: nn.Module, site: Site, width: int) -> Iterator[tuple[str, list[torch.Tensor], torch.Tensor]]:
    """Named readings of fused parameters as first maps [E, F, D] and down [E, D, I], each way the shapes allow."""
    found = dict(experts.named_parameters())
    if {"mlp.w1", "mlp.v1", "mlp.w2"} <= found.keys():  # dbrx: [E * I, D] each
        w1, v1, w2 = (found[f"mlp.{name}"].detach().view(site.n_experts, -1, width) for name in ("w1", "v1", "w2"))
        for name, halves in (("w1 gates", (w1, v1)), ("v1 gates", (v1, w1))):
            yield name, list(halves), w2.transpose(1, 2)
        return
    if site.reader == "product keys":  # doge: an expert is one neuron, a row of each of two embeddings
        one, other = (found[name].detach() for name in ("down_embed.weight", "up_embed.weight"))
        yield "rank one", [one[:, None, :]], other[:, :, None]
        return
    for first_name, down_name in (
        ("gate_up_proj", "down_proj"),
        ("up_proj", "down_proj"),
        ("input_linear.weight", "output_linear.weight"),
    ):
        first, down = found.get(first_name), found.get(down_name)
        if first is None or down is None or first.ndim != 3 or down.ndim != 3 or not first.is_floating_point():
            continue
        for (one, a), (other, b) in itertools.product(_both_ways(first.detach()), _both_ways(down.detach())):
            if a.shape[2] == width == b.shape[1] and a.shape[1] in (b.shape[2], 2 * b.shape[2]):
                yield f"{first_name} as {one} with {down_name} as {other}", [a], b


def _both_ways(stored: torch.Tensor) -> tuple[tuple[str, torch.Tensor], ...]:
    return ("[out, in]", stored), ("[in, out]", stored.transpose(1, 2))


def _gate_function(experts: nn.Module, n_rows: int, down: torch.Tensor) -> Function | None:
    """What stands between the two projections, [n, F] to [n, I], as the module itself computes it."""
    names = ("act_fn", "activation", "activation_fn", "mlp.activation_fn")
    activation = next((part for name in names if (part := _attribute(experts, name)) is not None), None)
    own: Function | None = getattr(experts, "_apply_gate", None)
    if n_rows == down.shape[2]:
        return activation
    if own is not None:
        return own
    if activation is None:
        return None

    def glu(rows: torch.Tensor) -> torch.Tensor:
        one, other = rows.chunk(2, dim=-1)
        return activation(one) * other

    return glu


def _of_modules(experts: nn.Module, facts: Facts, reasons: list[str]) -> Iterator[Layout]:
    """Experts as modules of their own: the last linear map that runs is down, those before it are given the input."""
    by_number = expert_modules(experts)
    chosen = next(iter(by_number.values()))
    model = copy.deepcopy(chosen).float()  # one expert alone; asked in single precision whatever the model's is
    linears = {name: part for name, part in model.named_modules() if isinstance(part, nn.Linear)}
    calls: list[tuple[str, torch.Tensor]] = []
    given = facts.hidden[:2].float()
    with _hooked(linears, lambda name, args, out: calls.append((name, args[0]))):
        model(given)
    names = [name for name, _ in calls]
    before, last = names[:-1], names[-1:]
    if len(set(names)) != len(names) or len(before) not in (1, 2) or len(names) != len(linears):
        reasons.append(f"an expert runs the linear maps {', '.join(names) or 'none'}")
        return
    if not all(torch.equal(seen, given) for _, seen in calls[:-1]):
        reasons.append("an expert's first linear maps are not given its input as it is")
        return
    widths = [linears[name].out_features for name in before]

    def phi(rows: torch.Tensor) -> torch.Tensor:
        parts = dict(zip(before, rows.split(widths, dim=-1), strict=True))
        entered: list[torch.Tensor] = []

        def replace(name: str, args: Any, out: torch.Tensor) -> torch.Tensor:
            if name in parts:
                return parts[name]
            entered.append(args[0])
            return out

        with _hooked(linears, replace):
            model(given.new_zeros(len(rows), given.shape[1]))
        return entered[0]

    pair = roles(phi, sum(widths), linears[last[0]].in_features, given.device)
    if isinstance(pair, str):
        reasons.append(pair)
        return

    def affine(e: int, name: str) -> Affine:
        part: Any = by_number[e].get_submodule(name)
        return part.weight.detach(), None if part.bias is None else part.bias.detach()

    yield Layout(
        "experts apart",
        lambda e: [affine(e, name) for name in before],
        lambda e: affine(e, last[0]),
        phi,
        _same,
        len(by_number),
        *pair,
    )


def _named(hook: Callable[[str, Any, torch.Tensor], Any], name: str) -> Callable[..., Any]:
    return lambda module, args, output: hook(name, args, output)


@contextmanager
def _hooked(modules: dict[str, nn.Linear], hook: Callable[[str, Any, torch.Tensor], Any]) -> Iterator[None]:
    """Forward hooks on named modules while inside."""
    undo = [part.register_forward_hook(_named(hook, name)).remove for name, part in modules.items()]
    try:
        yield
    finally:
        for remove in undo:
            remove()


def _rows(maps: list[torch.Tensor], bias: torch.Tensor | None) -> Callable[[int], list[Affine]]:
    """First maps of an expert, each with its rows of the bias."""
    sizes = [weight.shape[1] for weight in maps]

    def of(e: int) -> list[Affine]:
        biases = [None] * len(sizes) if bias is None else list(bias[e].split(sizes))
        return [(weight[e], b) for weight, b in zip(maps, biases, strict=True)]

    return of


def _slices(weight: torch.Tensor, bias: torch.Tensor | None) -> Callable[[int], Affine]:
    return lambda e: (weight[e], None if bias is None else bias[e])


def _bias(experts: nn.Module, names: tuple[str, ...], width: int) -> torch.Tensor | None:
    found = (getattr(experts, name, None) for name in names)
    return next((bias.detach() for bias in found if isinstance(bias, torch.Tensor) and bias.shape[-1] == width), None)


def _attribute(module: nn.Module, path: str) -> Any:
    found: Any = module
    for name in path.split("."):
        found = getattr(found, name, None)
    return found


def _same(rows: torch.Tensor) -> torch.Tensor:
    return rows
