"""Toy models in three shapes from before transformers 5, still alive as remote code: experts in a ModuleList.

Written from a description of those blocks, not from their code. What matters here is who calls whom with what: experts
are modules that see only their own rows, never ids or weights, and the block combines.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput

from .family import ExpertMath, Family
from .sizes import GROUPS, LOCAL, NORMALISED, QWEN, SIGMOID_GROUPS, SOFTMAX_GROUPS, TEXT


class OldStyleConfig(PreTrainedConfig):
    """Keeps whatever it is given; the blocks read the names their originals used."""

    model_type = "old_style"


class GatedMLP(nn.Module):
    """An expert, or a shared expert, of the Qwen2-MoE and DeepSeek shapes."""

    def __init__(self, size: int, width: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(size, width, bias=False)
        self.up_proj = nn.Linear(size, width, bias=False)
        self.down_proj = nn.Linear(width, size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(functional.silu(self.gate_proj(x)) * self.up_proj(x))


class MixtralExpert(nn.Module):
    """Mixtral's names: w1 gates, w3 is the up projection, w2 the down projection."""

    def __init__(self, size: int, width: int) -> None:
        super().__init__()
        self.w1 = nn.Linear(size, width, bias=False)
        self.w2 = nn.Linear(width, size, bias=False)
        self.w3 = nn.Linear(size, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.w2(functional.silu(self.w1(x)) * self.w3(x))


class LinearGateBlock(nn.Module):
    """Mixtral's and Qwen2-MoE's v4 shape: a bare linear gate, everything else inline, returns (hidden, logits).

    An expert's rows come slot by slot (all first choices, then all second ones), in token order within a slot; the
    block multiplies each expert's output by its weight. Experts without rows are called with none.
    """

    def __init__(self, config: Any, experts: list[nn.Module], normalise: bool, shared_width: int = 0) -> None:
        super().__init__()
        self.top_k = config.num_experts_per_tok
        self.norm_topk_prob = normalise
        self.gate = nn.Linear(config.hidden_size, len(experts), bias=False)
        self.experts = nn.ModuleList(experts)
        if shared_width:
            self.shared_expert = GatedMLP(config.hidden_size, shared_width)
            self.shared_expert_gate = nn.Linear(config.hidden_size, 1, bias=False)

    def forward(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        flat = hidden.reshape(-1, hidden.shape[-1])
        logits = self.gate(flat)
        weights, ids = torch.topk(functional.softmax(logits, dim=-1, dtype=torch.float), self.top_k, dim=-1)
        if self.norm_topk_prob:
            weights = weights / weights.sum(-1, keepdim=True)
        weights = weights.to(flat.dtype)
        out = torch.zeros_like(flat)
        for number, expert in enumerate(self.experts):
            slot, token = torch.eq(ids.T, number).nonzero(as_tuple=True)
            out.index_add_(0, token, expert(flat[token]) * weights[token, slot, None])
        if hasattr(self, "shared_expert"):
            out = out + torch.sigmoid(self.shared_expert_gate(flat)) * self.shared_expert(flat)
        return out.reshape(hidden.shape), logits


class DeepseekGate(nn.Module):
    """DeepSeek's remote gate: takes 3-D hidden states and returns ids FIRST; no logits leave it.

    V3 scores by sigmoid with a correction bias and normalises; V2 by softmax, grouped by best member, and returns an
    auxiliary loss as a third item.
    """

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.config, self.top_k = config, config.num_experts_per_tok
        self.weight = nn.Parameter(torch.empty(config.n_routed_experts, config.hidden_size))
        if config.topk_method == "noaux_tc":
            self.e_score_correction_bias = nn.Parameter(torch.empty(config.n_routed_experts))

    def forward(self, hidden: Tensor) -> tuple[Any, ...]:
        flat = hidden.reshape(-1, hidden.shape[-1])
        logits = functional.linear(flat.float(), self.weight.float())
        bias = getattr(self, "e_score_correction_bias", None)
        scores = logits.softmax(-1) if bias is None else logits.sigmoid()
        choice = scores if bias is None else scores + bias.float()
        grouped = choice.reshape(len(flat), self.config.n_group, -1)
        totals = grouped.amax(-1) if bias is None else grouped.topk(2, dim=-1).values.sum(-1)
        kept = torch.zeros_like(totals).scatter(1, totals.topk(self.config.topk_group, dim=-1, sorted=False).indices, 1)
        choice = grouped.masked_fill(kept[..., None] == 0, 0.0 if bias is None else float("-inf")).reshape(scores.shape)
        ids = choice.topk(self.top_k, dim=-1, sorted=False).indices
        weights = scores.gather(1, ids)
        if self.config.norm_topk_prob:
            weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
        weights = weights * self.config.routed_scaling_factor
        return (ids, weights, None) if bias is None else (ids, weights)


class DeepseekBlock(nn.Module):
    """DeepSeek's remote block: experts are called from a method, in expert order, idle ones not at all."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.config = config
        self.gate = DeepseekGate(config)
        width = config.moe_intermediate_size
        self.experts = nn.ModuleList(GatedMLP(config.hidden_size, width) for _ in range(config.n_routed_experts))
        if config.n_shared_experts is not None:
            self.shared_experts = GatedMLP(config.hidden_size, width * config.n_shared_experts)

    def forward(self, hidden: Tensor) -> Tensor:
        ids, weights = self.gate(hidden)[:2]
        flat = hidden.reshape(-1, hidden.shape[-1])
        out = self.moe_infer(flat, ids, weights).reshape(hidden.shape)
        return out + self.shared_experts(hidden) if self.config.n_shared_experts is not None else out

    @torch.no_grad()
    def moe_infer(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        """Sorts (token, slot) pairs by expert, runs each expert on its stretch, and puts the rows back."""
        counts = torch.bincount(ids.reshape(-1), minlength=len(self.experts)).tolist()
        order = ids.reshape(-1).argsort()  # not stable: the order of tokens inside an expert is not promised
        rows, outputs, start = x[order // ids.shape[1]], [], 0
        for expert, count in zip(self.experts, counts, strict=True):
            if count:
                outputs.append(expert(rows[start : start + count]))
                start += count
        together = torch.empty_like(rows)
        together[order] = torch.cat(outputs)
        together = together.reshape(*ids.shape, -1).to(weights.dtype)
        return (together * weights[..., None]).sum(1).to(x.dtype)


class OldStyleLayer(nn.Module):
    """Norm, block, residual, after a parameter-free mixing of earlier tokens; DeepSeek's first layer is dense."""

    def __init__(self, config: Any, layer: int) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(config.hidden_size, eps=1e-6)
        size, count = config.hidden_size, config.num_experts
        match config.shape:
            case "mixtral":
                experts: list[nn.Module] = [MixtralExpert(size, config.intermediate_size) for _ in range(count)]
                self.block_sparse_moe = LinearGateBlock(config, experts, normalise=True)
            case "qwen2_moe":
                experts = [GatedMLP(size, config.moe_intermediate_size) for _ in range(count)]
                shared = config.shared_expert_intermediate_size
                self.mlp = LinearGateBlock(config, experts, config.norm_topk_prob, shared)
            case _:
                dense = layer < config.first_k_dense_replace
                self.mlp = GatedMLP(size, config.intermediate_size) if dense else DeepseekBlock(config)

    def forward(self, hidden: Tensor, mask: Tensor) -> Tensor:
        seen = mask[..., None].to(hidden.dtype)
        past = (hidden * seen).cumsum(1) / seen.cumsum(1).clamp(min=1)
        block = self.block_sparse_moe if hasattr(self, "block_sparse_moe") else self.mlp
        out = block(self.norm(hidden + past))
        return hidden + (out[0] if isinstance(out, tuple) else out)


class OldStyleBody(nn.Module):
    """Embedding and layers, under the names such models use."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, padding_idx=0)
        self.layers = nn.ModuleList(OldStyleLayer(config, layer) for layer in range(config.num_hidden_layers))
        self.norm = nn.RMSNorm(config.hidden_size, eps=1e-6)


class OldStyleForCausalLM(PreTrainedModel):
    """A causal LM whose MoE blocks have the shape named by config.shape."""

    config_class = OldStyleConfig

    def __init__(self, config: OldStyleConfig) -> None:
        super().__init__(config)
        self.model = OldStyleBody(config)
        self.lm_head = nn.Linear(
            self.model.norm.normalized_shape[0], self.model.embed_tokens.num_embeddings, bias=False
        )
        self.post_init()

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, **_: Any) -> CausalLMOutput:
        hidden = self.model.embed_tokens(input_ids)
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        for layer in self.model.layers:
            hidden = layer(hidden, mask)
        return CausalLMOutput(logits=self.lm_head(self.model.norm(hidden)))


def _row(name: str, config: dict[str, Any], routing: Any, notes: str) -> Family:
    return Family(
        name,
        "OldStyleForCausalLM",
        config,
        routing,
        ExpertMath(kind="module_list"),
        experts_attribute="",
        block="DeepseekBlock" if "deepseek" in name else "LinearGateBlock",
        dispatched=False,
        notes=notes,
    )


ROWS = [
    _row(
        "old_mixtral",
        LOCAL | {"shape": "mixtral"},
        NORMALISED,
        "gate is a bare linear; experts w1, w3, w2; attribute block_sparse_moe.",
    ),
    _row(
        "old_qwen2_moe",
        TEXT | {"shape": "qwen2_moe", "norm_topk_prob": False, "shared_expert_intermediate_size": 24},
        QWEN,
        "As Mixtral, with a gated shared expert and weights that do not sum to one.",
    ),
    _row(
        "old_deepseek_v3",
        LOCAL | GROUPS | {"shape": "deepseek", "topk_method": "noaux_tc"},
        SIGMOID_GROUPS,
        "gate returns (ids, weights): ids first, no logits. The correction bias is a Parameter.",
    ),
    _row(
        "old_deepseek_v2",
        LOCAL
        | GROUPS
        | {"shape": "deepseek", "topk_method": "group_limited_greedy", "norm_topk_prob": False}
        | {"num_experts_per_tok": 3},
        SOFTMAX_GROUPS,
        "gate returns (ids, weights, auxiliary loss).",
    ),
]
