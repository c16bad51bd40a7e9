"""Each expert's matrices as NumPy arrays in one orientation, whichever way a family stores them, and only with proof.

Families store experts fused or apart, plain or transposed, gate and up one after the other or interleaved. Nothing is
believed from a name or a flag: which rows gate is found by asking the module's own gate function, and a layout counts
only if it recomputes what the experts really gave out in a forward pass. What cannot be proven is refused.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from moescope.errors import MoescopeError, RefusedError
from moescope.hooks.facts import Facts, Gather, Undo
from moescope.hooks.readers import READERS
from moescope.hooks.selfcheck import HALF_TOLERANCE, REBUILD_TOLERANCE
from moescope.hooks.sites import Site, expert_modules
from moescope.hooks.watching import override_forward

if TYPE_CHECKING:
    from jaxtyping import Float

    from moescope.hooks.model import Model

PROVEN_EXPERTS = 32
"""Experts recomputed at most: all of a layer lie in one tensor, so that more would say nothing new."""
ROWS_EACH = 4
SMALL = 0.1
"""Reach of the numbers with which a gate function is asked: no published clamp is as narrow as twice that."""
STRAIGHTER = 4.0
"""How many times more curved in one argument than in the other a gate function must be to say which one gates."""

Function = Callable[[torch.Tensor], torch.Tensor]
Affine = tuple[torch.Tensor, torch.Tensor | None]


@dataclass(frozen=True)
class ExpertWeights:
    """The matrices of one MoE layer: f_e(x) = down_e h + down_bias_e, h = gating(gate_e x + .., up_e x + ..).

    Neuron i of expert e is row i of `gate[e]` and `up[e]` and column i of `down[e]`. All arrays are float32.

    Attributes:
        site, layer: the site's key and model layer index.
        gate: [E, I, D], the rows that enter the activation; None for experts without a gate.
        up: [E, I, D], the rows multiplied in linearly; without a gate those that enter the activation.
        down: [E, D, I].
        gate_bias, up_bias: [E, I]; down_bias: [E, D]; None where there are none.
        router: [E, R], the router's row for each expert, in the space of the router's last linear map (R is D unless
            the router first projects); None where there is no such row. router_bias: [E] or None.
        error: largest relative error with which the arrays rebuilt an expert's real outputs.
        proven: how many experts were rebuilt.
        notes: what else to know, in words.

    Experts that compute nothing (longcat_flash's identities) have no matrices: their rows are NaN.
    """

    site: str
    layer: int
    gate: Float[np.ndarray, "expert neuron channel"] | None
    up: Float[np.ndarray, "expert neuron channel"]
    down: Float[np.ndarray, "expert channel neuron"]
    gate_bias: Float[np.ndarray, "expert neuron"] | None
    up_bias: Float[np.ndarray, "expert neuron"] | None
    down_bias: Float[np.ndarray, "expert channel"] | None
    router: Float[np.ndarray, "expert router_channel"] | None
    router_bias: Float[np.ndarray, " expert"] | None
    error: float
    proven: int
    notes: tuple[str, ...] = ()

    @property
    def n_experts(self) -> int:
        """E, experts that compute nothing included."""
        return len(self.down)

    def matrices(self) -> dict[str, np.ndarray]:
        """The matrices by name, without biases, neurons first: gate and up [E, I, D], down [E, I, D] (transposed)."""
        found = {} if self.gate is None else {"gate": self.gate}
        return found | {"up": self.up, "down": self.down.transpose(0, 2, 1)}


def expert_weights(model: Model, layer: int | str) -> ExpertWeights:
    """Read one layer's expert matrices and router rows, and prove them on the self-check's batch.

    Costs one forward pass of 256 tokens and, on the host, four bytes for each of the layer's parameters.

    Args:
        model: a loaded or wrapped model.
        layer: a model layer index, or a site key where a layer has several sites.

    Raises:
        MoescopeError: no such layer.
        RefusedError: the experts' layout cannot be proven (quantised, of an unknown shape, not a function of their
            input alone); the message says why.
    """
    site = _site(model, layer)
    layout, error, experts, (row, bias) = _proven(model, site)
    arrays = _arrays(layout, site)
    notes = list(layout.notes)
    kept = site.n_experts
    if row is None or row.shape[0] < kept:
        notes.append("the router has no row for each expert")
        row = bias = None
    return ExpertWeights(
        site=site.key,
        layer=site.layer,
        **arrays,
        router=None if row is None else _numpy(row[:kept]),
        router_bias=None if bias is None else _numpy(bias[:kept]),
        error=error,
        proven=experts,
        notes=tuple(notes),
    )


def expert_layout(model: Model, layer: int | str) -> Layout:
    """How one layer's experts are stored, proven as for `expert_weights`; its tensors are the model's own.

    Raises:
        MoescopeError: no such layer.
        RefusedError: the layout cannot be proven.
    """
    return _proven(model, _site(model, layer))[0]


def _proven(model: Model, site: Site) -> tuple[Layout, float, int, tuple[torch.Tensor | None, torch.Tensor | None]]:
    """The one layout that rebuilds what the experts gave out, its error, over how many; and the router's last map."""
    facts, router = _observe(model, site)
    reasons: list[str] = []
    proven: list[tuple[Layout, float, int]] = []
    for layout in _layouts(model.hf, site, facts, reasons):
        error, experts = _rebuild(layout, facts, site)
        if error <= _tolerance(facts):
            proven.append((layout, error, experts))
        else:
            reasons.append(f"{layout.name} misses the experts' real outputs by {error:.2g} (relative)")
    if len(proven) != 1:
        why = "; ".join(reasons) or "its experts have none of the known shapes"
        if proven:
            why = f"several layouts fit ({', '.join(layout.name for layout, _, _ in proven)})"
        raise RefusedError(f"The expert matrices at {site.experts} cannot be oriented with proof: {why}.")
    return *proven[0], router


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


def _site(model: Model, layer: int | str) -> Site:
    found = [site for site in model.sites if layer in (site.key, site.layer)]
    if len(found) == 1:
        return found[0]
    names = ", ".join(site.key for site in found or model.sites)
    raise MoescopeError(
        f"Layer {layer} has several sites; name one: {names}."
        if found
        else f"No MoE layer {layer!r}; there are {names}."
    )


class _LastLinear(TorchFunctionMode):
    """Remembers the matrix and bias of the last linear map inside its scope."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: tuple[torch.Tensor | None, torch.Tensor | None] = (None, None)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is nn.functional.linear:
            given = dict(zip(("input", "weight", "bias"), args, strict=False)) | (kwargs or {})
            self.seen = given["weight"].detach(), given.get("bias")
        return func(*args, **(kwargs or {}))


def _observe(model: Model, site: Site) -> tuple[Facts, tuple[torch.Tensor | None, torch.Tensor | None]]:
    """What the site's experts were given and gave out on the self-check's batch, and the router's last linear map."""
    seen: list[Facts] = []
    watch = _LastLinear()

    def run(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        with watch:
            return original(*args, **kwargs)

    def keep(facts: Facts) -> None:
        if facts.ids.numel() and not seen:
            seen.append(
                Facts(
                    facts.hidden.clone(), facts.ids.clone(), facts.weights.clone(),
                    facts.missing, slots={"vectors": facts.slots["vectors"].clone()},
                )
            )  # fmt: skip

    top_k = model.semantics[site.key].top_k
    reader = READERS[site.reader](model.hf, site, Gather(vectors=True), keep, top_k)
    batch = model.check_batch()
    undo: list[Undo] = []
    try:
        undo += reader.install()
        undo.append(override_forward(model.hf.get_submodule(site.router), run))
        with torch.no_grad():
            model.forward(batch, torch.ones_like(batch), head=False)
    finally:
        for remove in reversed(undo):
            remove()
    if not seen:
        raise RefusedError(
            f"The experts at {site.experts} did not run on the check batch; nothing proves their layout."
        )
    facts = seen[0]
    if model.semantics[site.key].weight_on == "input":  # one row for each slot, as its expert saw it
        rows = facts.hidden.unsqueeze(1) * facts.weights.unsqueeze(-1).to(facts.hidden.dtype)
    else:
        rows = facts.hidden.unsqueeze(1).expand(-1, facts.ids.shape[1], -1)
    facts.hidden = rows.reshape(-1, rows.shape[-1])
    return facts, watch.seen


def _layouts(hf: nn.Module, site: Site, facts: Facts, reasons: list[str]) -> Iterator[Layout]:
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
        pair = _roles(phi, n_rows, down.shape[2], down.device)
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


def _roles(
    phi: Function, n_rows: int, n_neurons: int, device: torch.device
) -> tuple[torch.Tensor | None, torch.Tensor] | str:
    """Which rows of the first map gate and which are linear, found by asking `phi`; a reason if it cannot be told."""
    plain = torch.arange(n_neurons, device=device)
    if n_rows == n_neurons:
        ours = _depends(phi, plain[None, :])
        return (None, plain) if ours else "its neurons do not stand for themselves between its projections"
    for pair in (torch.stack([plain, plain + n_neurons]), torch.stack([2 * plain, 2 * plain + 1])):
        if not _depends(phi, pair):
            continue
        curved = [_curvature(phi, pair, role) for role in (0, 1)]
        if max(curved) <= STRAIGHTER * min(curved):
            return "its gate function is as curved in one argument as in the other"
        gate = int(curved[1] > curved[0])
        return pair[gate], pair[1 - gate]
    return "its gate function pairs rows in no known order"


def _depends(phi: Function, pair: torch.Tensor) -> bool:
    """Does each neuron depend on its own pair of rows [role, neuron], and on no other?"""
    draw = torch.Generator().manual_seed(0)
    base, other = (SMALL * (2 * torch.rand(1, pair.numel(), generator=draw) - 1).to(pair.device) for _ in range(2))
    before = phi(base)
    for _ in range(24):  # a row of another neuron stays unseen with probability 2^-24
        moved = (torch.rand(pair.shape[1], generator=draw) < 0.5).to(pair.device)
        mask = torch.zeros(pair.numel(), dtype=torch.bool, device=pair.device)
        mask[pair.flatten()] = moved.repeat(pair.shape[0])
        same = (phi(torch.where(mask, other, base)) == before)[0]
        if not same[~moved].all():
            return False
    return bool((phi(other) != before).float().mean() > 0.2)  # relu leaves a quarter where it was, at zero


def _curvature(phi: Function, pair: torch.Tensor, role: int) -> float:
    draw = torch.Generator().manual_seed(1)
    base = SMALL * (2 * torch.rand(8, pair.numel(), generator=draw) - 1).to(pair.device)
    step = torch.zeros_like(base)
    step[:, pair[role]] = SMALL
    return float((phi(base + step) - 2 * phi(base) + phi(base - step)).abs().mean())


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

    pair = _roles(phi, sum(widths), linears[last[0]].in_features, given.device)
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


def _rebuild(layout: Layout, facts: Facts, site: Site) -> tuple[float, int]:
    """Largest relative error over the experts recomputed, and how many they were."""
    ids = facts.ids.flatten()
    there = ids < layout.n_real
    if facts.missing is not None:
        there &= ~facts.missing.flatten()
    worst, rebuilt = 0.0, 0
    ran = ids[there].unique().tolist()
    for e in ran[:: max(1, -(-len(ran) // PROVEN_EXPERTS))]:
        rows = ((ids == e) & there).nonzero().flatten()[:ROWS_EACH]
        true = facts.slots["vectors"][rows].float()
        if not float(true.norm()):
            continue
        with torch.no_grad():
            hidden = layout.phi(_affine(layout.first(e), facts.hidden[rows].float()))
            output = layout.tail(_affine(layout.down(e), hidden.float())).float()
        error = float((output - true).norm() / true.norm())
        worst, rebuilt = max(worst, error if error == error else np.inf), rebuilt + 1
    return (worst, rebuilt) if rebuilt else (np.inf, 0)


def _arrays(layout: Layout, site: Site) -> dict[str, Any]:
    """The proven layout as float32 arrays; NaN rows for experts without matrices."""
    parts: dict[str, np.ndarray | None] = dict.fromkeys(
        ("gate", "up", "down", "gate_bias", "up_bias", "down_bias"), None
    )

    def put(name: str, e: int, value: torch.Tensor | None) -> None:
        if value is None:
            return
        if parts[name] is None:
            parts[name] = np.full((site.n_experts, *value.shape), np.nan, dtype=np.float32)
        parts[name][e] = _numpy(value)  # type: ignore[index]

    for e in range(layout.n_real):
        weight, bias = layout.first(e)
        for name, rows in (("gate", layout.rows_gate), ("up", layout.rows_up)):
            if rows is not None:
                put(name, e, weight[rows])
                put(f"{name}_bias", e, None if bias is None else bias[rows])
        weight, bias = layout.down(e)
        put("down", e, weight)
        put("down_bias", e, bias)
    return parts


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


def _affine(parameters: Affine, rows: torch.Tensor) -> torch.Tensor:
    weight, bias = parameters
    return nn.functional.linear(rows, weight.float(), None if bias is None else bias.float())


def _attribute(module: nn.Module, path: str) -> Any:
    found: Any = module
    for name in path.split("."):
        found = getattr(found, name, None)
    return found


def _same(rows: torch.Tensor) -> torch.Tensor:
    return rows


def _tolerance(facts: Facts) -> float:
    dtype = facts.slots["vectors"].dtype  # a float64 model's arrays are float32 all the same
    return REBUILD_TOLERANCE.get(torch.float32 if dtype is torch.float64 else dtype, HALF_TOLERANCE)


def _numpy(tensor: torch.Tensor) -> np.ndarray:
    return tensor.detach().float().cpu().numpy()
