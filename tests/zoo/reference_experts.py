"""Slow expert arithmetic in float64: one expert, one vector, raw weights. Nothing here calls the model's own code."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from .family import ExpertMath

Expert = Callable[[Tensor], Tensor]


def silu(x: Tensor) -> Tensor:
    """x * sigmoid(x)."""
    return x / (1 + torch.exp(-x))


def gelu_tanh(x: Tensor) -> Tensor:
    """The tanh approximation of x * Phi(x)."""
    return 0.5 * x * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (x + 0.044715 * x**3)))


def relu(x: Tensor) -> Tensor:
    """max(x, 0)."""
    return torch.where(x > 0, x, torch.zeros_like(x))


def relu2(x: Tensor) -> Tensor:
    """max(x, 0) squared."""
    return relu(x) ** 2


ACTIVATIONS: dict[str, Expert] = {"silu": silu, "gelu_tanh": gelu_tanh, "relu": relu, "relu2": relu2}


def rms_norm(x: Tensor, weight: Tensor | None, epsilon: float) -> Tensor:
    """x divided by its root mean square, times weight."""
    normed = x / torch.sqrt((x * x).mean() + epsilon)
    return normed if weight is None else normed * weight.double()


def expert(math: ExpertMath, experts: Any, index: int, config: Any) -> Expert:
    """The function that expert `index` of an experts module (or block) computes from one float64 vector."""
    special = SPECIAL.get(math.kind)
    if special is not None:
        return special(math, experts, index, config)
    return lambda x: _fused(math, experts, index, config, x)


def _fused(math: ExpertMath, experts: Any, index: int, config: Any, x: Tensor) -> Tensor:
    """An expert whose weights are slices of 3-D parameters."""
    up_name = "up_proj" if math.gate == "none" else "gate_up_proj"
    hidden = _linear(experts, up_name, index, math, x)
    hidden = ACTIVATIONS[math.activation](hidden) if math.gate == "none" else _gate(math, hidden, experts, config)
    out = _linear(experts, "down_proj", index, math, hidden)
    if math.post_norm:
        # muse_spark: the vector is scaled first and normed after, and the weight is stored minus one.
        out = rms_norm(out * (1 + experts.post_expert_norm.weight.double()), None, config.post_norm_eps)
    return out


def _linear(experts: Any, name: str, index: int, math: ExpertMath, x: Tensor) -> Tensor:
    weight = getattr(experts, name)[index].double()
    out = x @ weight if math.transposed else weight @ x
    return out + getattr(experts, name + "_bias")[index].double() if math.biased else out


def _gate(math: ExpertMath, both: Tensor, experts: Any, config: Any) -> Tensor:
    """Combines the gate and up halves of one up projection."""
    half = len(both) // 2
    gate, up = (both[0::2], both[1::2]) if math.interleaved else (both[:half], both[half:])
    act = ACTIVATIONS[math.activation]
    match math.gate:
        case "clamped":
            limit = config.swiglu_limit
            return act(gate.clamp(max=limit)) * up.clamp(-limit, limit)
        case "clamp_after":
            # The limit differs by layer (step3p7), so it is the module's own number.
            return act(gate).clamp(max=experts.limit) * up.clamp(-experts.limit, experts.limit)
        case "gpt_oss":
            limit, gate = config.swiglu_limit, gate.clamp(max=config.swiglu_limit)
            return (up.clamp(-limit, limit) + 1) * gate / (1 + torch.exp(-config.swiglu_alpha * gate))
        case "softcapped":
            gate_cap, up_cap = config.mlp_gate_softcap, config.mlp_up_softcap
            return gate_cap * torch.tanh(gate / gate_cap) * torch.sigmoid(gate) * up_cap * torch.tanh(up / up_cap)
        case _:
            return act(gate) * up


def _dense(math: ExpertMath, experts: Any, index: int, config: Any) -> Expert:
    """Experts in a ModuleDict, two linears each (switch_transformers: wi, wo; nllb_moe: fc1, fc2 with biases)."""
    module = experts[f"expert_{index}"]
    first, second = (module.wi, module.wo) if hasattr(module, "wi") else (module.fc1, module.fc2)
    return lambda x: affine(second, ACTIVATIONS[math.activation](affine(first, x)))


def affine(linear: nn.Linear, x: Tensor) -> Tensor:
    """A linear layer with its bias, if any, in float64."""
    out = linear.weight.double() @ x
    return out if linear.bias is None else out + linear.bias.double()


def _flat(math: ExpertMath, experts: Any, index: int, config: Any) -> Expert:
    """dbrx: three matrices [E * I, D]; the third is used as [I, D] from the left."""
    width = config.ffn_config.ffn_hidden_size
    rows = slice(index * width, (index + 1) * width)
    w1, v1, w2 = (getattr(experts.mlp, name)[rows].double() for name in ("w1", "v1", "w2"))
    return lambda x: (ACTIVATIONS[math.activation](w1 @ x) * (v1 @ x)) @ w2


def _rank_one(math: ExpertMath, experts: Any, index: int, config: Any) -> Expert:
    """doge: each expert is one row of two embeddings."""
    down, up = experts.down_embed.weight[index].double(), experts.up_embed.weight[index].double()
    return lambda x: ACTIVATIONS[math.activation](down @ x) * up


def _module_list(math: ExpertMath, experts: Any, index: int, config: Any) -> Expert:
    """Experts before transformers 5: one module each, in a list on the block."""
    return lambda x: gated_mlp(experts.experts[index], x)


def gated_mlp(module: Any, x: Tensor) -> Tensor:
    """down(silu(gate x) * up x), whichever names a module has for the three linears."""
    names = ("w1", "w3", "w2") if hasattr(module, "w1") else ("gate_proj", "up_proj", "down_proj")
    gate, up, down = (getattr(module, name) for name in names)
    return affine(down, silu(affine(gate, x)) * affine(up, x))


def _packed(math: ExpertMath, experts: Any, index: int, config: Any) -> Expert:
    """jetmoe: the block's own input_linear and output_linear, [E, out, in] each."""

    def compute(x: Tensor) -> Tensor:
        hidden = _gate(math, experts.input_linear.weight[index].double() @ x, experts, config)
        return experts.output_linear.weight[index].double() @ hidden

    return compute


def _with_identities(math: ExpertMath, experts: Any, index: int, config: Any) -> Expert:
    """longcat_flash: ids past the real experts return their input."""
    if index >= config.n_routed_experts:
        return lambda x: x
    return lambda x: _fused(math, experts, index, config, x)


SPECIAL: dict[str, Callable[[ExpertMath, Any, int, Any], Expert]] = {
    "module_dict": _dense,
    "flat": _flat,
    "rank_one": _rank_one,
    "packed": _packed,
    "module_list": _module_list,
    "with_identities": _with_identities,
}
