"""Zoo rows: text models whose router takes a softmax over all experts or over the selected ones."""

from __future__ import annotations

from dataclasses import replace

from .family import ExpertMath, Family, Routing
from .sizes import (
    GATED_DELTA,
    GROUPS,
    LATENT_ATTENTION,
    LOCAL,
    NORMALISED,
    QWEN,
    SOFTMAX_GROUPS,
    SOFTMAX_SELECTED,
    SOFTMAX_TOP2_GROUPS,
    TEXT,
)

GPT_OSS = ExpertMath(gate="gpt_oss", transposed=True, interleaved=True, biased=True)

ROWS = [
    Family(
        "qwen2_moe",
        "Qwen2MoeForCausalLM",
        TEXT | {"shared_expert_intermediate_size": 24, "norm_topk_prob": False},
        QWEN,
        notes="The shared expert is gated by sigmoid(shared_expert_gate(x)). Weights do not sum to one.",
    ),
    Family("qwen3_moe", "Qwen3MoeForCausalLM", TEXT | {"norm_topk_prob": True, "mlp_only_layers": [1]}, QWEN),
    Family("olmoe", "OlmoeForCausalLM", LOCAL | {"norm_topk_prob": False}, QWEN),
    Family("mixtral", "MixtralForCausalLM", LOCAL, NORMALISED),
    Family(
        "deepseek_v2",
        "DeepseekV2ForCausalLM",
        LOCAL | LATENT_ATTENTION | GROUPS | {"topk_method": "group_limited_greedy", "num_experts_per_tok": 3},
        SOFTMAX_GROUPS,
        notes="Selection is by group first, weights are raw softmax scores times the scale.",
    ),
    Family(
        "gpt_oss",
        "GptOssForCausalLM",
        LOCAL | {"swiglu_limit": 1.0, "sliding_window": 4},
        replace(SOFTMAX_SELECTED, logit_bias="bias"),
        GPT_OSS,
        router="router",
        notes="Router and both expert projections have biases; gate and up interleave; the block returns a tuple.",
    ),
    Family(
        "openai_privacy_filter",
        "OpenAIPrivacyFilterForTokenClassification",
        LOCAL | {"swiglu_limit": 1.0, "sliding_window": 4},
        replace(SOFTMAX_SELECTED, logit_bias="bias", kind="divided_by_k"),
        replace(GPT_OSS, interleaved=False),
        router="router",
        notes="The router divides the weights by k and the block multiplies its sum by k. No causal LM class.",
    ),
    Family(
        "phimoe",
        "PhimoeForCausalLM",
        LOCAL | {"router_jitter_noise": 0.2},
        Routing(kind="sparsemixer"),
        router="router",
        notes="Each weight is a softmax over near-ties of one pick: usually near one, and they do not sum to one. "
        "The default jitter of 0.01 leaves every weight at exactly one here.",
    ),
    Family("granitemoe", "GraniteMoeForCausalLM", LOCAL, SOFTMAX_SELECTED, router="router"),
    Family(
        "ernie4_5_moe",
        "Ernie4_5_MoeForCausalLM",
        TEXT | {"moe_layer_start_index": 1, "moe_layer_interval": 1, "moe_num_shared_experts": 1, "moe_k": 2},
        replace(NORMALISED, bias="gate.moe_statics.e_score_correction_bias", epsilon=1e-12),
        notes="The selection bias is a [1, E] parameter two modules down.",
    ),
    Family(
        "jamba",
        "JambaForCausalLM",
        TEXT
        | {"num_hidden_layers": 4, "expert_layer_period": 2, "expert_layer_offset": 1}
        | {"attn_layer_period": 2, "attn_layer_offset": 1, "mamba_d_state": 8},
        Routing(),
        router="router",
        notes="MoE only in odd layers; dense layers use the same attribute name. Weights are not renormalised.",
    ),
    Family(
        "hunyuan_v1_moe",
        "HunYuanMoEV1ForCausalLM",
        TEXT | {"moe_topk": 2},
        replace(NORMALISED, weight="wg.weight", top_k="moe_topk"),
    ),
    Family("flex_olmo", "FlexOlmoForCausalLM", LOCAL | {"norm_topk_prob": True}, QWEN),
    Family("mellum", "MellumForCausalLM", LOCAL | {"norm_topk_prob": True}, QWEN),
    Family("minimax", "MiniMaxForCausalLM", LOCAL | {"block_size": 4}, NORMALISED),
    Family(
        "granitemoeshared",
        "GraniteMoeSharedForCausalLM",
        LOCAL | {"shared_intermediate_size": 24},
        SOFTMAX_SELECTED,
        router="router",
        notes="The shared MLP is the block's sibling in the decoder layer.",
    ),
    Family(
        "granitemoe_swa",
        "GraniteMoeSWAForCausalLM",
        LOCAL | {"shared_intermediate_size": 24, "sliding_window": 4},
        SOFTMAX_SELECTED,
        router="router",
    ),
    Family(
        "granitemoehybrid",
        "GraniteMoeHybridForCausalLM",
        LOCAL
        | {"shared_intermediate_size": 24, "layer_types": ["linear_attention", "full_attention", "linear_attention"]}
        | {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_chunk_size": 8},
        SOFTMAX_SELECTED,
        router="router",
    ),
    Family(
        "mistral4",
        "Mistral4ForCausalLM",
        LOCAL | LATENT_ATTENTION | GROUPS | {"head_dim": 16},
        replace(SOFTMAX_TOP2_GROUPS, normalise="norm_topk_prob"),
    ),
    Family(
        "lara_mini",
        "LaraMiniForCausalLM",
        TEXT
        | GATED_DELTA
        | {"layer_types": ["linear_attention", "sliding_attention", "full_attention"], "sliding_window": 4}
        | {"shared_expert_intermediate_size": 24, "norm_topk_prob": True},
        QWEN,
        notes="The shared expert is added in full, without a gate.",
    ),
    Family(
        "qwen3_next",
        "Qwen3NextForCausalLM",
        TEXT | GATED_DELTA | {"shared_expert_intermediate_size": 24, "norm_topk_prob": True},
        QWEN,
    ),
]
