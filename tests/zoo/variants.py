"""Zoo rows: the same families with a switch thrown that changes the routing, the experts, or who is called."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from .families_composite import ROWS as COMPOSITE
from .families_sigmoid import ROWS as SIGMOID
from .families_softmax import ROWS as SOFTMAX
from .families_undispatched import ROWS as UNDISPATCHED
from .family import Family

BASE = {row.name: row for row in [*SOFTMAX, *SIGMOID, *COMPOSITE, *UNDISPATCHED]}


def _vary(name: str, config: Mapping[str, Any] | None = None, routing: Mapping[str, Any] | None = None, **changes: Any):
    """The family before the plus sign with some settings changed; a composite's settings are its text part's."""
    base = BASE[name.partition("+")[0]]
    if config is not None and "text_config" in base.config:
        config = {"text_config": {**base.config["text_config"], **config}}
    return replace(
        base,
        name=name,
        config={**base.config, **(config or {})},
        routing=replace(base.routing, **(routing or {})),
        **{"notes": "", **changes},
    )


def _text_only(name: str, model: str) -> Family:
    """A composite's text model on its own."""
    base = BASE[name.partition("+")[0]]
    return replace(base, name=name, model=model, config=base.config["text_config"], notes="")


ROWS = [
    _vary("axk2+nogroup", {"n_group": None, "topk_group": None}),
    _vary("cohere2_moe+noshared", {"num_shared_experts": 0}),
    _vary(
        "cohere2_moe+softmax_sum",
        {"expert_selection_fn": "softmax", "shared_expert_combination_strategy": "sum"},
        routing={"score": "softmax", "normalise": False},
    ),
    _vary("dbrx+nonorm", {"ffn_config": {**BASE["dbrx"].config["ffn_config"], "moe_normalize_expert_weights": None}}),
    _vary("deepseek_v2+greedy", {"topk_method": "greedy"}),
    _vary("deepseek_v3+nonorm", {"norm_topk_prob": False}),
    _vary("deepseek_v4+nohash", {"mlp_layer_types": ["moe"] * 4}),
    _vary("ernie4_5_moe+noshared", {"moe_num_shared_experts": 0}),
    _vary(
        "ernie4_5_vl_moe+mm",
        token_types={"moe_mm_token_type_ids": "random01"},
        notes="Both pools run, each on its own tokens: two sites in one layer, with different T.",
    ),
    _text_only("gemma4+text", "Gemma4ForCausalLM"),
    _vary("granitemoeshared+noshared", {"shared_intermediate_size": 0}),
    _vary("jetmoe+top3", {"num_experts_per_tok": 3}),
    _vary("lfm2_moe+nobias", {"use_expert_bias": False}, routing={"bias": None}),
    _vary("llama4+top2", {"num_experts_per_tok": 2}),
    _vary("longcat_flash+nozero", {"zero_expert_num": 0}),
    _vary("mixtral+top1", {"num_experts_per_tok": 1}, notes="Every weight is exactly one."),
    _vary("nemotron_h+nolatent", {"moe_latent_size": None}),
    _vary(
        "nllb_moe+drop",
        {"moe_eval_capacity_token_fraction": 0.2},
        notes="Capacity empties slots of real tokens.",
    ),
    _vary("qwen2_moe+sparse2", {"num_hidden_layers": 4, "decoder_sparse_step": 2}),
    _text_only("qwen3_5_moe+text", "Qwen3_5MoeForCausalLM"),
    _vary("step3p7+nolimit", {"swiglu_limits": None}),
    _vary("switch_transformers+nodrop", {"expert_capacity": 64}),
]
