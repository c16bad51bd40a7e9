"""`inspect` on published models: their totals, active parameters and layers, from configurations written here."""

from __future__ import annotations

import resource
from pathlib import Path
from typing import Any

import pytest
import transformers

from moescope.hooks import inspect, wrap
from tests.zoo import CAPTURED, build

# Billions of parameters as published, total and active. gpt-oss counts its active ones without the embeddings.
PUBLISHED: dict[str, tuple[str, dict[str, Any], float, float | None]] = {
    "Qwen3-30B-A3B": (
        "Qwen3MoeConfig",
        {"vocab_size": 151936, "hidden_size": 2048, "num_hidden_layers": 48, "num_attention_heads": 32}
        | {"num_key_value_heads": 4, "head_dim": 128, "moe_intermediate_size": 768, "intermediate_size": 6144}
        | {"num_experts": 128, "num_experts_per_tok": 8},
        30.5,
        3.3,
    ),
    "Mixtral-8x7B": ("MixtralConfig", {"vocab_size": 32000}, 46.7, 12.9),
    "OLMoE-1B-7B": (
        "OlmoeConfig",
        {"vocab_size": 50304, "hidden_size": 2048, "intermediate_size": 1024, "num_hidden_layers": 16}
        | {"num_attention_heads": 16, "num_key_value_heads": 16, "num_experts": 64, "num_experts_per_tok": 8},
        6.9,
        1.3,
    ),
    "gpt-oss-120b": ("GptOssConfig", {}, 116.8, None),
    "DBRX": (
        "DbrxConfig",
        {"d_model": 6144, "n_heads": 48, "n_layers": 40, "vocab_size": 100352, "max_seq_len": 32768}
        | {"attn_config": {"kv_n_heads": 8, "rope_theta": 5e5, "clip_qkv": 8}}
        | {
            "ffn_config": {"hidden_size": 6144, "ffn_hidden_size": 10752, "moe_num_experts": 16, "moe_top_k": 4}
            | {"ffn_act_fn": {"name": "silu"}}
        },
        132,
        36,
    ),
    "DeepSeek-V3": ("DeepseekV3Config", {}, 671, 37),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_totals_are_those_published(name: str, tmp_path: Path) -> None:
    kind, settings, total, active = PUBLISHED[name]
    config = getattr(transformers, kind)(**settings)
    config.architectures = [kind.replace("Config", "ForCausalLM")]
    config.save_pretrained(tmp_path)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    anatomy = inspect(str(tmp_path))
    assert anatomy.n_parameters / 1e9 == pytest.approx(total, rel=0.015)
    assert anatomy.n_active_parameters is not None
    if active is not None:
        assert anatomy.n_active_parameters / 1e9 == pytest.approx(active, rel=0.03)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 500_000  # kB: no weights were made


@pytest.mark.parametrize("name", [name for name in CAPTURED if not name.startswith("old_")])
def test_a_configuration_shows_the_sites_that_the_model_has(name: str, tmp_path: Path) -> None:
    hf = build(name)
    hf.config.architectures = [type(hf).__name__]
    hf.config.save_pretrained(tmp_path)
    anatomy, model = inspect(str(tmp_path)), wrap(hf)
    running = {site.key: site for site in anatomy.sites if site.key in model.semantics}
    assert list(running.values()) == model.sites
    assert {key: site.top_k for key, site in running.items()} == {
        key: semantics.top_k for key, semantics in model.semantics.items()
    }
    assert anatomy.n_parameters == model.n_parameters
    if set(running) == {site.key for site in anatomy.sites}:
        assert anatomy.n_active_parameters == model.n_active_parameters
