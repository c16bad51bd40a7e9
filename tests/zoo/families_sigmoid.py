"""Zoo rows: text models whose router scores each expert by itself (sigmoid, or the root of softplus)."""

from __future__ import annotations

from dataclasses import replace

from .family import ExpertMath, Family, Routing
from .sizes import (
    CLAMPED,
    DENSE_FIRST,
    GROUPS,
    LATENT_ATTENTION,
    LOCAL,
    SIGMOID_BIAS,
    SIGMOID_GROUPS,
    SPARSE_INDEX,
    TEXT,
)

ROWS = [
    Family("deepseek_v3", "DeepseekV3ForCausalLM", LOCAL | LATENT_ATTENTION | GROUPS, SIGMOID_GROUPS),
    Family("glm4_moe", "Glm4MoeForCausalLM", LOCAL | GROUPS, SIGMOID_GROUPS),
    Family(
        "nemotron_h",
        "NemotronHForCausalLM",
        LOCAL
        | GROUPS
        | {"num_hidden_layers": 5, "layers_block_type": ["linear_attention", "moe", "full_attention", "mlp", "moe"]}
        | {"moe_shared_expert_intermediate_size": 24, "moe_latent_size": 16}
        | {"mamba_num_heads": 4, "mamba_head_dim": 8, "ssm_state_size": 8, "n_groups": 2, "chunk_size": 8},
        SIGMOID_GROUPS,
        ExpertMath(gate="none", activation="relu2"),
        notes="A layer is attention or mamba or MoE, all under `mixer`. Experts have no gate and work at the latent "
        "size, between two projections in the block.",
    ),
    Family(
        "lfm2_moe",
        "Lfm2MoeForCausalLM",
        TEXT
        | {"num_dense_layers": 1, "layer_types": ["conv", "full_attention", "conv"]}
        | {"use_expert_bias": True, "routed_scaling_factor": 1.5, "norm_topk_prob": True},
        Routing("sigmoid", bias="expert_bias", normalise="norm_topk_prob", epsilon=1e-6, scale="routed_scaling_factor"),
        notes="The block owns the selection bias and passes it to the router's forward.",
    ),
    Family(
        "minimax_m2",
        "MiniMaxM2ForCausalLM",
        LOCAL,
        replace(SIGMOID_BIAS, bias="e_score_correction_bias"),
        notes="The block owns the selection bias and passes it to the router's forward.",
    ),
    Family(
        "deepseek_v4",
        "DeepseekV4ForCausalLM",
        LOCAL
        | SPARSE_INDEX
        | {"num_hidden_layers": 4, "mlp_layer_types": ["hash_moe", "hash_moe", "moe", "moe"], "num_key_value_heads": 1}
        | {"head_dim": 16, "q_lora_rank": 16, "qk_rope_head_dim": 8, "o_groups": 2, "o_lora_rank": 8}
        | {"hc_mult": 2, "sliding_window": 8, "swiglu_limit": 0.5, "routed_scaling_factor": 1.5},
        Routing(
            "sqrtsoftplus",
            bias="gate.e_score_correction_bias",
            normalise=True,
            epsilon=1e-20,
            scale="routed_scaling_factor",
            kind="hash_or_topk",
        ),
        CLAMPED,
        notes="Hash layers choose by tid2eid[input_ids]; the logits only weight. Their router class is not recorded.",
    ),
    Family(
        "zaya",
        "ZayaForCausalLM",
        TEXT | {"num_hidden_layers": 4, "num_experts_per_tok": 1, "router_hidden_size": 16},
        Routing(bias="gate.balancing_biases", kind="skip_class"),
        gains={"router_mlp.out_proj.weight": 8.0},
        notes="E + 1 classes; the last means no expert, and is passed on as index 0 with weight 0. The router carries "
        "a state from layer to layer.",
    ),
    Family(
        "kimi_linear",
        "KimiLinearForCausalLM",
        LOCAL
        | LATENT_ATTENTION
        | GROUPS
        | {
            "layer_types": ["linear_attention", "full_attention", "linear_attention"],
            "linear_head_dim": 8,
            "linear_num_heads": 4,
        },
        SIGMOID_GROUPS,
    ),
    Family(
        "afmoe",
        "AfmoeForCausalLM",
        TEXT | {"num_dense_layers": 1, "num_shared_experts": 1, "route_scale": 1.5, "sliding_window": 4},
        Routing(
            "sigmoid", weight="gate.weight", bias="expert_bias", normalise=True, epsilon=1e-20, scale="route_scale"
        ),
        router="router",
        notes="The router's forward takes the block's selection bias; the router holds a linear named gate.",
    ),
    Family(
        "axk1", "AXK1ForCausalLM", LOCAL | LATENT_ATTENTION | GROUPS, SIGMOID_GROUPS, notes="RMSNorm after the sum."
    ),
    Family(
        "axk2",
        "AXK2ForCausalLM",
        LOCAL | LATENT_ATTENTION | GROUPS | SPARSE_INDEX | DENSE_FIRST | {"gated_norm_rank": 4},
        replace(SIGMOID_GROUPS, group_fill=0.0),
    ),
    Family(
        "bailing_hybrid",
        "BailingHybridForCausalLM",
        LOCAL | LATENT_ATTENTION | GROUPS | {"layer_types": ["linear_attention", "full_attention", "linear_attention"]},
        SIGMOID_GROUPS,
    ),
    Family(
        "beam",
        "BeamForCausalLM",
        LOCAL | GROUPS | DENSE_FIRST,
        replace(SIGMOID_GROUPS, scale=None),
        notes="The block multiplies by routed_scaling_factor after the experts.",
    ),
    Family(
        "cohere2_moe",
        "Cohere2MoeForCausalLM",
        LOCAL | {"expert_selection_fn": "sigmoid", "norm_topk_prob": True, "num_shared_experts": 1},
        Routing("sigmoid", over="selected", normalise="norm_topk_prob"),
        notes="Routed and shared outputs are averaged.",
    ),
    Family(
        "deepseek_v32",
        "DeepseekV32ForCausalLM",
        LOCAL | LATENT_ATTENTION | GROUPS | SPARSE_INDEX,
        SIGMOID_GROUPS,
    ),
    Family("dots1", "Dots1ForCausalLM", LOCAL | GROUPS, SIGMOID_GROUPS),
    Family(
        "dots3_note",
        "Dots3NoteForCausalLM",
        LOCAL
        | LATENT_ATTENTION
        | GROUPS
        | SPARSE_INDEX
        | DENSE_FIRST
        | {"shared_experts_intermediate_size": 24, "layer_types": ["indexed_attention"] * 3},
        SIGMOID_GROUPS,
    ),
    Family("exaone_moe", "ExaoneMoeForCausalLM", TEXT | GROUPS | {"num_shared_experts": 1}, SIGMOID_GROUPS),
    Family(
        "flint",
        "FlintForCausalLM",
        TEXT | {"shared_expert_intermediate_size": 24, "norm_topk_prob": True, "mlp_only_layers": [0]},
        Routing("sigmoid", normalise="norm_topk_prob"),
    ),
    Family("glm4_moe_lite", "Glm4MoeLiteForCausalLM", LOCAL | LATENT_ATTENTION | GROUPS, SIGMOID_GROUPS),
    Family("glm_moe_dsa", "GlmMoeDsaForCausalLM", LOCAL | LATENT_ATTENTION | GROUPS | SPARSE_INDEX, SIGMOID_GROUPS),
    Family(
        "hy_v3",
        "HYV3ForCausalLM",
        LOCAL | DENSE_FIRST | {"num_shared_experts": 1, "router_scaling_factor": 1.5},
        replace(SIGMOID_BIAS, bias="e_score_correction_bias", epsilon=1e-20, scale="router_scaling_factor"),
        notes="The block owns the selection bias and passes it to the router's forward.",
    ),
    Family(
        "hy_v4",
        "HYV4ForCausalLM",
        LOCAL | LATENT_ATTENTION | GROUPS | SPARSE_INDEX | DENSE_FIRST | {"hc_mult": 2, "swiglu_limit": 0.5},
        SIGMOID_GROUPS,
        CLAMPED,
    ),
    Family(
        "kolibri1",
        "Kolibri1ForCausalLM",
        LOCAL | {"shared_expert_intermediate_size": 24, "norm_topk_prob": True, "sliding_window": 5},
        Routing("sigmoid", bias="gate.e_score_correction_bias", bias_on="logit", normalise="norm_topk_prob"),
        notes="The selection bias is added to the logit, not to the score.",
    ),
    Family(
        "laguna",
        "LagunaForCausalLM",
        TEXT
        | DENSE_FIRST
        | {"shared_expert_intermediate_size": 24, "moe_routed_scaling_factor": 1.5, "sliding_window": 4}
        | {"moe_router_logit_softcapping": 1.0},
        replace(SIGMOID_BIAS, kind="softcapped"),
        notes="Logits are tanh-capped before the sigmoid; the block multiplies by the scale after the experts.",
    ),
    Family(
        "mimo_v2_flash",
        "MiMoV2FlashForCausalLM",
        LOCAL | GROUPS | {"v_head_dim": 8, "sliding_window": 4},
        SIGMOID_GROUPS,
    ),
    Family("solar_open", "SolarOpenForCausalLM", LOCAL | GROUPS, SIGMOID_GROUPS),
]
