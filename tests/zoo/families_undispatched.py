"""Zoo rows: families whose experts do not go through transformers' experts registry."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from .family import ExpertMath, Family, Routing
from .sizes import DENSE_FIRST, LATENT_ATTENTION, LOCAL, PLACEHOLDERS, SIGMOID_BIAS, SOFTMAX_SELECTED, TEXT, VISION

# T5 and NLLB spell the same sizes their own way.
ENCODER_DECODER: dict[str, Any] = {
    "vocab_size": 99,
    "d_model": 32,
    "num_experts": 8,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 1,
    "max_position_embeddings": 128,
}
SWITCH = ENCODER_DECODER | {
    "d_kv": 8,
    "d_ff": 24,
    "num_heads": 4,
    "num_layers": 4,
    "num_decoder_layers": 4,
    "num_sparse_encoder_layers": 2,
    "num_sparse_decoder_layers": 2,
    "expert_capacity": 2,
}
NLLB = ENCODER_DECODER | {
    "encoder_layers": 4,
    "decoder_layers": 4,
    "encoder_ffn_dim": 24,
    "decoder_ffn_dim": 24,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_sparse_step": 2,
    "decoder_sparse_step": 2,
    "moe_token_dropout": 0.2,
    "init_std": 0.18,
}
LLAMA4_TEXT = LOCAL | {
    "num_experts_per_tok": 1,
    "intermediate_size_mlp": 40,
    "moe_layers": [1, 2],
    "attention_chunk_size": 16,
    "no_rope_layers": [1, 0, 1],
}

ROWS = [
    Family(
        "dbrx",
        "DbrxForCausalLM",
        {
            "vocab_size": 99,
            "d_model": 32,
            "n_heads": 4,
            "n_layers": 3,
            "max_seq_len": 128,
            "pad_token_id": 0,
            "initializer_range": 0.18,
            "attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8.0},
            "ffn_config": {"hidden_size": 32, "ffn_hidden_size": 24, "moe_num_experts": 8, "moe_top_k": 2}
            | {"moe_normalize_expert_weights": 2.0, "ffn_act_fn": {"name": "silu"}},
        },
        Routing(weight="layer.weight", top_k="ffn_config.moe_top_k", kind="p_norm"),
        ExpertMath(kind="flat"),
        router="router",
        dispatched=False,
        notes="The router returns logits alone; the block selects. Weights are flat [E * I, D] matrices. "
        "attn_config.rope_theta has no default.",
    ),
    Family(
        "doge",
        "DogeForCausalLM",
        TEXT | {"is_moe": True, "num_experts": 16, "norm_topk_prob": True},
        Routing(over="selected", kind="product_keys"),
        ExpertMath(kind="rank_one"),
        router="router_gate",
        experts_attribute="",
        block="DogeCDMoE",
        dispatched=False,
        gains={"mlp.down_embed.weight": 4.0, "mlp.up_embed.weight": 4.0},
        notes="Product-key retrieval over rank-one experts; the logits of different tokens are mixed. No module is "
        "ever given ids or weights.",
    ),
    Family(
        "jetmoe",
        "JetMoeForCausalLM",
        LOCAL | {"kv_channels": 8, "num_key_value_heads": 2},
        replace(SOFTMAX_SELECTED, weight="layer.weight"),
        ExpertMath(kind="packed"),
        router="router",
        experts_attribute="",
        block="JetMoeMoE",
        dispatched=False,
        notes="No experts module; the router returns a dispatch plan. Attention is a second mixture (JetMoeMoA), which "
        "the reference leaves alone.",
    ),
    Family(
        "llama4",
        "Llama4ForCausalLM",
        LLAMA4_TEXT,
        Routing("sigmoid", over="selected"),
        ExpertMath(transposed=True, weight_on="input"),
        router="router",
        dispatched=False,
        notes="Every expert runs on every token; the score multiplies the input, so an unselected expert sees zeros. "
        "The block adds in place into the shared expert's output. The class with the vision tower fails on every batch "
        "in transformers 5.24.0 (it reads image_outputs off its text model's output).",
    ),
    Family(
        "longcat_flash",
        "LongcatFlashForCausalLM",
        LOCAL
        | LATENT_ATTENTION
        | {"num_layers": 2, "num_hidden_layers": 4, "ffn_hidden_size": 40, "expert_ffn_hidden_size": 24}
        | {"moe_topk": 3, "zero_expert_num": 4, "routed_scaling_factor": 1.5},
        Routing(
            weight="classifier.weight",
            bias="router.e_score_correction_bias",
            scale="routed_scaling_factor",
            top_k="moe_topk",
        ),
        ExpertMath(kind="with_identities"),
        router="router",
        dispatched=False,
        notes="Ids past n_routed_experts return their input. The block's output is added one sub-layer later.",
    ),
    Family(
        "nllb_moe",
        "NllbMoeForConditionalGeneration",
        NLLB,
        Routing(weight="classifier.weight", kind="capacity_top2"),
        ExpertMath(gate="none", activation="relu", kind="module_dict"),
        router="router",
        dispatched=False,
        encoder_decoder=True,
        notes="Upstream bug in 5.23: only experts 0 and 1 ever run. Outputs are scaled by 1 - moe_token_dropout.",
    ),
    Family(
        "step3p7",
        "Step3p7ForConditionalGeneration",
        {
            "text_config": LOCAL
            | DENSE_FIRST
            | {"share_expert_dim": 24, "moe_router_scaling_factor": 1.5, "swiglu_limits": [0.0, 0.5, 0.3]}
            | {"sliding_window": 4},
            "vision_config": VISION | {"image_size": 16, "patch_size": 8},
        }
        | PLACEHOLDERS,
        SIGMOID_BIAS,
        ExpertMath(gate="clamp_after"),
        dispatched=False,
        notes="Looks standard and is not registered; each layer has its own clamp, after the activation.",
    ),
    Family(
        "switch_transformers",
        "SwitchTransformersForConditionalGeneration",
        SWITCH,
        Routing(weight="classifier.weight", kind="capacity_top1"),
        ExpertMath(gate="none", activation="relu", kind="module_dict"),
        router="router",
        dispatched=False,
        encoder_decoder=True,
        notes="Capacity counts per sequence; a dropped token gets zero from the block.",
    ),
]
