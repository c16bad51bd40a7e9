"""Tiny sizes shared by the zoo's configurations. Config classes keep what they do not know as plain attributes."""

from __future__ import annotations

from typing import Any

from .family import ExpertMath, Routing

TEXT: dict[str, Any] = {
    "vocab_size": 99,
    "hidden_size": 32,
    "intermediate_size": 40,
    "moe_intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    # 1 / sqrt(32): router logits of order one, so that selections are decided and not a coin toss.
    "initializer_range": 0.18,
}
# Configurations that say num_experts keep a num_local_experts attribute of their own, and the other way round.
LOCAL = TEXT | {"num_local_experts": 8, "n_routed_experts": 8}
LATENT_ATTENTION: dict[str, Any] = {
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "num_key_value_heads": 4,
}
GROUPS: dict[str, Any] = {
    "n_group": 4,
    "topk_group": 2,
    "routed_scaling_factor": 1.5,
    "norm_topk_prob": True,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
}
DENSE_FIRST: dict[str, Any] = {"mlp_layer_types": ["dense", "sparse", "sparse"]}
SPARSE_INDEX: dict[str, Any] = {"index_n_heads": 2, "index_head_dim": 16, "index_topk": 4}
GATED_DELTA: dict[str, Any] = {
    "layer_types": ["linear_attention", "full_attention", "linear_attention"],
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
}
PLACEHOLDERS: dict[str, Any] = {
    "image_token_id": 95,
    "video_token_id": 96,
    "audio_token_id": 97,
    "pad_token_id": 0,
    "initializer_range": 0.18,
}
# The spellings that vision configurations use; towers are built but never run.
VISION: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "depth": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "num_heads": 2,
    "head_dim": 8,
}

# DeepSeek-V3's router and its many descendants.
SIGMOID_GROUPS = Routing(
    score="sigmoid",
    bias="gate.e_score_correction_bias",
    groups="top2",
    normalise="norm_topk_prob",
    epsilon=1e-20,
    scale="routed_scaling_factor",
)
# DeepSeek-V2's: softmax, groups by their best member, never renormalised.
SOFTMAX_GROUPS = Routing(groups="max", group_fill=0.0, scale="routed_scaling_factor")
# The same sigmoid router without groups or a scale inside.
SIGMOID_BIAS = Routing(score="sigmoid", bias="gate.e_score_correction_bias", normalise=True)
# Mistral's: softmax, groups by their two best, the rest at zero instead of minus infinity.
SOFTMAX_TOP2_GROUPS = Routing(
    groups="top2", group_fill=0.0, normalise=True, epsilon=1e-20, scale="routed_scaling_factor"
)
QWEN = Routing(normalise="norm_topk_prob")
NORMALISED = Routing(normalise=True)
SOFTMAX_SELECTED = Routing(over="selected")
CLAMPED = ExpertMath(gate="clamped")
