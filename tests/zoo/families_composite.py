"""Zoo rows: models with a text part and vision or audio towers, run on text alone."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from .family import ExpertMath, Family, Routing
from .sizes import (
    CLAMPED,
    DENSE_FIRST,
    GATED_DELTA,
    GROUPS,
    LATENT_ATTENTION,
    LOCAL,
    NORMALISED,
    PLACEHOLDERS,
    QWEN,
    SIGMOID_BIAS,
    SIGMOID_GROUPS,
    SOFTMAX_GROUPS,
    SOFTMAX_TOP2_GROUPS,
    SPARSE_INDEX,
    TEXT,
    VISION,
)

GEMMA_TEXT = TEXT | {
    "top_k_experts": 2,
    "enable_moe_block": True,
    "hidden_size_per_layer_input": 0,
    "global_head_dim": 8,
    "num_hidden_layers": 4,
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention", "full_attention"],
    "sliding_window": 4,
}

GEMMA_ROUTING = Routing(normalise=True, weight="proj.weight", kind="gemma", top_k="top_k_experts")
INKLING_ATTENTION = {
    "sliding_window_size": 4,
    "swa_num_attention_heads": 4,
    "swa_num_key_value_heads": 2,
    "swa_head_dim": 8,
    "layer_types": ["hybrid_sliding", "hybrid", "hybrid_sliding"],
    "d_rel": 4,
    "rel_extent": 16,
}
# With k equal to the number of kept groups, the best members' groups would always hold the plain top-k.
GREEDY_GROUPS = {"topk_method": "group_limited_greedy", "num_experts_per_tok": 3}
MROPE = {
    "rope_parameters": {
        "rope_type": "default",
        "rope_theta": 10000.0,
        "mrope_section": [1, 1, 2],
        "partial_rotary_factor": 1.0,
    }
}
OCR_VISION = {
    "sam_config": VISION
    | {"output_channels": 8, "image_size": 32, "patch_size": 8, "mlp_dim": 16, "downsample_channels": [8, 8]}
    | {"global_attn_indexes": [0], "window_size": 2},
    "encoder_config": VISION | {"image_size": 32, "patch_size": 8},
}
QWEN_VISION = VISION | {
    "out_hidden_size": 32,
    "patch_size": 4,
    "num_position_embeddings": 16,
    "deepstack_visual_indexes": [0],
}


def _composite(text: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {"text_config": text, "vision_config": VISION} | PLACEHOLDERS | more


ROWS = [
    Family(
        "aria",
        "AriaForConditionalGeneration",
        _composite(
            TEXT | {"moe_num_experts": 8, "moe_topk": 2, "moe_num_shared_experts": 1},
            image_token_index=95,
            vision_config=VISION | {"model_type": "idefics3_vision", "image_size": 16, "patch_size": 8},
        ),
        Routing(over="selected", top_k="moe_topk"),
        ExpertMath(transposed=True),
        router="router",
    ),
    Family(
        "gemma4",
        "Gemma4ForConditionalGeneration",
        _composite(GEMMA_TEXT, audio_config=None),
        GEMMA_ROUTING,
        ExpertMath(activation="gelu_tanh"),
        router="router",
        gains={"router.scale": 5.0},
        notes="Router, experts and a dense mlp are siblings in the decoder layer; router and experts get different "
        "inputs; the router returns probabilities; the weights include per_expert_scale.",
    ),
    Family(
        "muse_spark",
        "MuseSparkForConditionalGeneration",
        _composite(
            LOCAL
            | {"moe_hidden_size": 16, "mlp_layer_types": ["dense", "sparse", "sparse"], "routed_scaling_factor": 1.5}
            | {"output_multiplier": 0.7, "sliding_window": 4},
            audio_config={"out_hidden_size": 32, "hidden_sizes": [8] * 4, "depths": [1] * 4},
            out_hidden_size=64,
            projector_hidden_size=16,
        ),
        Routing(
            "sigmoid",
            bias="gate.e_score_correction_bias",
            normalise=True,
            epsilon=1e-15,
            scale="routed_scaling_factor",
            kind="multiplied",
        ),
        ExpertMath(post_norm=True),
        notes="Experts work at moe_hidden_size between two projections, and norm their output before the weight.",
    ),
    Family(
        "inkling",
        "InklingForConditionalGeneration",
        _composite(
            LOCAL
            | {"mlp_layer_types": ["dense", "sparse", "sparse"], "n_shared_experts": 2, "route_scale": 1.5}
            | INKLING_ATTENTION,
            vision_config={"text_hidden_size": 32, "num_hidden_layers": 1, "hidden_size": 16, "patch_size": 8},
            audio_config={"text_hidden_size": 32, "n_mel_bins": 4, "mel_vocab_size": 8},
        ),
        Routing("sigmoid", bias="gate.e_score_correction_bias", kind="joint_with_shared"),
        notes="Routed and shared weights are normalised together; the router's fourth output weights the shared.",
    ),
    Family(
        "hy_v4_vl",
        "HYV4VLForConditionalGeneration",
        _composite(
            LOCAL
            | LATENT_ATTENTION
            | GROUPS
            | SPARSE_INDEX
            | DENSE_FIRST
            | {"hc_mult": 2, "swiglu_limit": 0.5}
            | {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]}},
            vision_config=VISION | {"out_hidden_size": 32, "patch_size": 4, "max_image_size": 16},
        ),
        SIGMOID_GROUPS,
        CLAMPED,
    ),
    Family(
        "inkling2",
        "Inkling2ForConditionalGeneration",
        _composite(
            LOCAL
            | INKLING_ATTENTION
            | {"route_scale": 1.5, "mlp_gate_softcap": 0.5, "mlp_up_softcap": 0.7, "unpadded_vocab_size": 99},
            vision_config=VISION | {"text_hidden_size": 32, "patch_size": 4, "projection_hidden_dim": 16},
        ),
        replace(SIGMOID_BIAS, epsilon=1e-20, scale="route_scale"),
        ExpertMath(gate="softcapped"),
        notes="The router's weight must stay float32 under bfloat16. act_fn takes two arguments.",
    ),
    Family(
        "inkling2_loop",
        "Inkling2LoopForConditionalGeneration",
        _composite(
            LOCAL
            | INKLING_ATTENTION
            | {"route_scale": 1.5, "mlp_gate_softcap": 0.5, "mlp_up_softcap": 0.7, "unpadded_vocab_size": 99}
            | {"n_layers_per_attn_res_block": 1, "loop_layer_index_start": 1, "loop_layer_index_end": 2}
            | {"loop_num_passes": 2, "loop_gate_rank": 4},
            vision_config=VISION
            | {"model_type": "inkling2_vision", "text_hidden_size": 32, "patch_size": 4, "projection_hidden_dim": 16},
        ),
        replace(SIGMOID_BIAS, epsilon=1e-20, scale="route_scale"),
        ExpertMath(gate="softcapped"),
        notes="Layers 1 to loop_layer_index_end run loop_num_passes times in one forward pass, each on other inputs.",
    ),
    Family(
        "deepseek_ocr2",
        "DeepseekOcr2ForConditionalGeneration",
        _composite(LOCAL | GROUPS | DENSE_FIRST | GREEDY_GROUPS, vision_config=OCR_VISION),
        SOFTMAX_GROUPS,
    ),
    Family(
        "unlimited_ocr",
        "UnlimitedOcrForConditionalGeneration",
        _composite(LOCAL | GROUPS | DENSE_FIRST | GREEDY_GROUPS, vision_config=OCR_VISION),
        SOFTMAX_GROUPS,
    ),
    Family(
        "diffusion_gemma",
        "DiffusionGemmaForBlockDiffusion",
        _composite(GEMMA_TEXT, canvas_length=6),
        GEMMA_ROUTING,
        ExpertMath(activation="gelu_tanh"),
        router="router",
        gains={"router.scale": 5.0},
        encoder_decoder=True,
        canvas=6,
        notes="Encoder and decoder run the same Parameters under two names, each on its own tokens. Without "
        "decoder_input_ids the decoder draws a random canvas: two forwards then differ.",
    ),
    Family(
        "ernie4_5_vl_moe",
        "Ernie4_5_VLMoeForConditionalGeneration",
        _composite(
            TEXT
            | DENSE_FIRST
            | MROPE
            | {"moe_num_experts": 8, "moe_k": 2, "moe_num_shared_experts": 1, "moe_intermediate_size": [24, 12]},
            vision_config=VISION | {"hidden_size": 32, "patch_size": 4},
        ),
        replace(NORMALISED, bias="gate.moe_statics.e_score_correction_bias", epsilon=1e-12),
        notes="Two pools, text_moe and vision_moe, chosen per token by moe_mm_token_type_ids; the shared expert sits "
        "on the outer block; the pools return flattened tensors.",
    ),
    Family(
        "glm4v_moe",
        "Glm4vMoeForConditionalGeneration",
        _composite(LOCAL | GROUPS | MROPE, vision_config=VISION | {"out_hidden_size": 32, "patch_size": 4}),
        SIGMOID_GROUPS,
    ),
    Family(
        "glm5_next",
        "Glm5NextForConditionalGeneration",
        _composite(
            LOCAL
            | LATENT_ATTENTION
            | GROUPS
            | SPARSE_INDEX
            | DENSE_FIRST
            | {"layer_types": ["linear_attention", "indexed_attention", "linear_attention"], "qk_rope_head_dim": 0}
            | {"linear_head_dim": 8, "linear_num_heads": 4, "hc_mult": 2, "swiglu_limit": 0.5, "index_kpool": 4},
            vision_config=VISION | {"out_hidden_size": 32, "patch_size": 4, "projection_intermediate_size": 16},
        ),
        SIGMOID_GROUPS,
        CLAMPED,
    ),
    Family(
        "minimax_m3_vl",
        "MiniMaxM3SparseForConditionalGeneration",
        _composite(
            LOCAL
            | DENSE_FIRST
            | {"dense_intermediate_size": 40, "shared_intermediate_size": 24, "rotary_dim": 4, "swiglu_limit": 0.5}
            | {"index_n_heads": 2, "index_head_dim": 8, "index_block_size": 4, "index_topk_blocks": 2},
            vision_config=VISION | {"patch_size": 4},
            projector_hidden_size=16,
        ),
        SIGMOID_BIAS,
        ExpertMath(gate="gpt_oss"),
        notes="The block multiplies by routed_scaling_factor after the experts.",
    ),
    Family(
        "mistral_large4",
        "MistralLarge4ForConditionalGeneration",
        _composite(
            LOCAL | LATENT_ATTENTION | GROUPS | SPARSE_INDEX,
            vision_config=VISION | {"model_type": "pixtral", "image_size": 16, "patch_size": 4},
        ),
        SOFTMAX_TOP2_GROUPS,
    ),
    Family(
        "qwen3_5_moe",
        "Qwen3_5MoeForConditionalGeneration",
        _composite(TEXT | GATED_DELTA | MROPE | {"shared_expert_intermediate_size": 24}, vision_config=QWEN_VISION),
        NORMALISED,
    ),
    Family(
        "qwen3_omni_moe",
        "Qwen3OmniMoeThinkerForConditionalGeneration",
        _composite(
            TEXT | MROPE | {"norm_topk_prob": True},
            vision_config=QWEN_VISION,
            audio_config={"d_model": 16, "encoder_layers": 1, "encoder_attention_heads": 2, "encoder_ffn_dim": 16}
            | {"num_mel_bins": 8, "output_dim": 32, "downsample_hidden_size": 4},
            vision_start_token_id=94,
        ),
        QWEN,
    ),
    Family(
        "qwen3_vl_moe",
        "Qwen3VLMoeForConditionalGeneration",
        _composite(LOCAL | MROPE, vision_config=QWEN_VISION),
        NORMALISED,
    ),
    Family(
        "qwen4_exp",
        "Qwen4ExpForConditionalGeneration",
        _composite(
            TEXT
            | GATED_DELTA
            | MROPE
            | {"shared_expert_intermediate_size": 24, "norm_topk_prob": True, "hc_count": 2, "hc_lowrank": 8}
            | {"indexer_n_heads": 2, "indexer_kv_heads": 1, "indexer_head_dim": 8, "indexer_budget": 8}
            | {"indexer_compress_ratio": 2},
            vision_config=QWEN_VISION,
        ),
        QWEN,
    ),
]
