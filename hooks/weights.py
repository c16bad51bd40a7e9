"""Each expert's matrices as NumPy arrays in one orientation, whichever way a family stores them, and only with proof.

Families store experts fused or apart, plain or transposed, gate and up one after the other or interleaved. Nothing is
believed from a name or a flag: which rows gate is found by asking the module's own gate function, and a layout counts
only if it recomputes what the experts really gave out in a forward pass. What cannot be proven is refused.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from moescope.errors import MoescopeError, RefusedError
from moescope.hooks.facts import Facts, Gather, Undo
from moescope.hooks.layouts import Affine, Layout, layouts_of
from moescope.hooks.readers import READERS
from moescope.hooks.selfcheck import HALF_TOLERANCE, REBUILD_TOLERANCE
from moescope.hooks.sites import Site
from moescope.hooks.watching import override_forward

if TYPE_CHECKING:
    from jaxtyping import Float

    from moescope.hooks.model import Model

PROVEN_EXPERTS = 32
"""Experts recomputed at most: all of a layer lie in one tensor, so that more would say nothing new."""
ROWS_EACH = 4


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
    for layout in layouts_of(model.hf, site, facts, reasons):
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


def _affine(parameters: Affine, rows: torch.Tensor) -> torch.Tensor:
    weight, bias = parameters
    return nn.functional.linear(rows, weight.float(), None if bias is None else bias.float())


def _tolerance(facts: Facts) -> float:
    dtype = facts.slots["vectors"].dtype  # a float64 model's arrays are float32 all the same
    return REBUILD_TOLERANCE.get(torch.float32 if dtype is torch.float64 else dtype, HALF_TOLERANCE)


def _numpy(tensor: torch.Tensor) -> np.ndarray:
    return tensor.detach().float().cpu().numpy()
