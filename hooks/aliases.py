"""Short names for models that people ask for first."""

from __future__ import annotations

from dataclasses import dataclass

BUNDLED = "tiny-qwen-moe"


@dataclass(frozen=True)
class Alias:
    """A short name, the hub id behind it (or the bundled folder), and one line about it."""

    name: str
    target: str
    about: str


ALIASES = {
    alias.name: alias
    for alias in (
        Alias(BUNDLED, "(bundled)", "the model that comes with MoEscope: six million parameters, really trained"),
        Alias("qwen-moe", "Qwen/Qwen1.5-MoE-A2.7B", "60 experts, 4 active, shared expert"),
        Alias("qwen3-moe", "Qwen/Qwen3-30B-A3B", "128 experts, 8 active"),
        Alias("olmoe", "allenai/OLMoE-1B-7B-0125", "64 experts, 8 active, open data and checkpoints"),
        Alias("mixtral", "mistralai/Mixtral-8x7B-v0.1", "8 experts, 2 active"),
        Alias(
            "deepseek-moe",
            "deepseek-ai/deepseek-moe-16b-base",
            "64 experts, 6 active, 2 shared; its remote code is not captured yet",
        ),
        Alias("deepseek-v2-lite", "deepseek-ai/DeepSeek-V2-Lite", "64 experts, 6 active, 2 shared"),
        Alias("gpt-oss", "openai/gpt-oss-20b", "32 experts, 4 active"),
        Alias("phi-moe", "microsoft/Phi-3.5-MoE-instruct", "16 experts, 2 active, sparsemixer routing"),
        Alias("granite-moe", "ibm-granite/granite-3.1-3b-a800m-base", "40 experts, 8 active"),
        Alias("jetmoe", "jetmoe/jetmoe-8b", "8 experts, 2 active, attention experts too; not captured yet"),
    )
}
