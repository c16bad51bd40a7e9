"""Zoo rows: text models whose router scores each expert by itself (sigmoid, or the root of softplus)."""

from __future__ import annotations

from dataclasses import replace

from .family import ExpertMath, Family, Routing
from .sizes import CLAMPED, GROUPS, LATENT_ATTENTION, LOCAL, SIGMOID_BIAS, SIGMOID_GROUPS, SPARSE_INDEX, TEXT

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
]
