"""What unlearning one expert takes in memory, beside inference and beside training the whole model.

A Qwen3-MoE of random numbers in float32: 4 layers of 32 experts, 0.4 GB, all experts of a layer in two parameters. Each
way runs in a process of its own, which makes the model, notes its resident memory, lets Linux forget the peak so far,
runs, and notes the peak. Training sees batches of the bundled facts, inference computes the loss of all of them, 32 at
a time, as training does to watch itself. "Whole gradient" is one expert with autograd's own gradient of the parameters
that it shares with the layer's other experts, which `moescope.unlearning.slices` does without.

`python -m tests.benchmarks.unlearning_memory` writes the results file.
"""

from __future__ import annotations

import gc
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, Qwen3MoeConfig, Qwen3MoeForCausalLM

import moescope as ms
from moescope.data import FORGET, MODEL
from moescope.unlearning import read_examples, trained, unlearn_expert
from moescope.unlearning.examples import tokenised
from moescope.unlearning.objective import mean_loss

RESULTS = Path(__file__).with_name("unlearning_memory.json")
LAYERS, EXPERTS, WIDTH = 4, 32, 512
OPTIONS: dict[str, Any] = {
    "steps": 3, "batch": 8, "retain_batch": 16, "max_length": 64, "check_every": 3, "learning_rate": 1e-4,
}  # fmt: skip
FIRST, LAST = {"target": (0, 5)}, {"target": (LAYERS - 1, 5)}
WAYS: dict[str, dict[str, Any]] = {
    "inference": {},
    "one expert, last layer": LAST,
    "one expert, first layer": FIRST,
    "one expert, first layer, activations again": FIRST | {"checkpointing": True},
    "one expert, first layer, whole gradient": FIRST | {"whole": True},
    "whole model": FIRST | {"scope": "model"},
}
LOADED = "the model alone"


def configuration(width: int = WIDTH, experts: int = EXPERTS) -> Qwen3MoeConfig:
    """Of the made model."""
    return Qwen3MoeConfig(
        vocab_size=2048,
        hidden_size=width,
        intermediate_size=width,
        moe_intermediate_size=width,
        num_hidden_layers=LAYERS,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=width // 8,
        num_experts=experts,
        num_experts_per_tok=4,
    )


def resident(line: str) -> float:
    """Resident memory of this process, MB: "VmRSS" now, "VmHWM" at its peak."""
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return next(int(text.split()[1]) for text in status.splitlines() if text.startswith(line)) / 1024


def forget_peak() -> float:
    """Let the peak start again from what is resident now, and give that."""
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")
    return resident("VmHWM")


def run(way: str, width: int = WIDTH, experts: int = EXPERTS) -> dict[str, float]:
    """Peak memory with the model alone, and after one way, MB."""
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    model = ms.wrap(Qwen3MoeForCausalLM(configuration(width, experts)).eval(), tokenizer, name="made")
    rows = read_examples(FORGET)
    options = OPTIONS | WAYS[way]
    with torch.inference_mode():
        model.forward(torch.tensor([[1, 2, 3]]))  # what is set up once
    alone = forget_peak()
    if way == "inference":
        mean_loss(model, tokenised(model, rows, OPTIONS["max_length"], "forget"))
    else:
        if options.pop("whole", False):
            trained.Slices.__enter__ = lambda self: self  # type: ignore[method-assign]
            trained.Slices.__exit__ = lambda self, *exc: None  # type: ignore[method-assign]
        unlearn_expert(model, rows[:60], rows[60:], **options)
    return {LOADED: alone, "peak": resident("VmHWM"), "model": 4e-6 * model.n_parameters}


def measured() -> dict[str, Any]:
    """Every way, each in a new process."""
    found = {}
    for way in WAYS:
        call = [sys.executable, "-W", "ignore", "-m", "tests.benchmarks.unlearning_memory", way]
        said = subprocess.run(call, capture_output=True, text=True, check=True).stdout
        found[way] = json.loads(said.splitlines()[-1])
        print(way, found[way], flush=True)
    return {
        "made": f"Qwen3-MoE of random numbers, {LAYERS} layers of {EXPERTS} experts, float32",
        "model, MB": round(found["inference"]["model"]),
        "one layer, MB": round(4e-6 * EXPERTS * 3 * WIDTH**2),
        "one expert, MB": round(4e-6 * 3 * WIDTH**2, 1),
        "batch": {name: OPTIONS[name] for name in ("batch", "retain_batch", "max_length")},
        "beyond the loaded model, MB": {way: round(one["peak"] - one[LOADED]) for way, one in found.items()},
        "peak, MB": {way: round(one["peak"]) for way, one in found.items()},
    }


def table(results: dict[str, Any]) -> str:
    """The README's table of the results file."""
    beyond = results["beyond the loaded model, MB"]
    lines = ["| peak memory beyond the loaded model | MB |", "|---|---|"]
    lines += [f"| {way} | {value:,} |" for way, value in beyond.items()]
    lines.append(
        f"\n{results['made']}: {results['model, MB']} MB, of which {results['one layer, MB']} are one layer's experts "
        f"and {results['one expert, MB']} one expert."
    )
    return "\n".join(lines)


if __name__ == "__main__":
    if len(sys.argv) > 1:
        print(json.dumps(run(sys.argv[1])))
    else:
        RESULTS.write_text(json.dumps(measured(), indent=1) + "\n", encoding="utf-8")
