"""Zoo rows: models with a text part and vision or audio towers, run on text alone."""

from __future__ import annotations

from typing import Any

from .family import ExpertMath, Family, Routing
from .sizes import LOCAL, TEXT, VISION

PLACEHOLDERS = {"image_token_id": 95, "video_token_id": 96, "audio_token_id": 97, "pad_token_id": 0}
GEMMA_TEXT = TEXT | {
    "top_k_experts": 2,
    "enable_moe_block": True,
    "hidden_size_per_layer_input": 0,
    "global_head_dim": 8,
    "num_hidden_layers": 4,
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention", "full_attention"],
    "sliding_window": 4,
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
        Routing(normalise=True, weight="proj.weight", kind="gemma", top_k="top_k_experts"),
        ExpertMath(activation="gelu_tanh"),
        router="router",
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
            | {"sliding_window_size": 4, "swa_num_attention_heads": 4, "swa_num_key_value_heads": 2, "swa_head_dim": 8}
            | {"layer_types": ["hybrid_sliding", "hybrid", "hybrid_sliding"], "d_rel": 4, "rel_extent": 16},
            vision_config={"text_hidden_size": 32, "num_hidden_layers": 1, "hidden_size": 16, "patch_size": 8},
            audio_config={"text_hidden_size": 32, "n_mel_bins": 4, "mel_vocab_size": 8},
        ),
        Routing("sigmoid", bias="gate.e_score_correction_bias", kind="joint_with_shared"),
        notes="Routed and shared weights are normalised together; the router's fourth output weights the shared.",
    ),
]
