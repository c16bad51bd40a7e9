"""What capture costs, as ratios in one run: against the plain forward pass, and against the two-line loop.

The model is a Qwen3-MoE configuration of 8 layers x 512 wide, 64 experts, top-8, random weights, float32 on the CPU
(bfloat16 is slower there). The contestants take turns over the same batches, and each turn is compared with its own
baseline, so that a busy machine slows all of them alike.
"""

from __future__ import annotations

import json
import platform
import random
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, Qwen3MoeConfig, Qwen3MoeForCausalLM

import moescope as ms
from moescope.capturing.batches import batches
from moescope.capturing.run import readings, want
from moescope.data import CORPUS, MODEL
from moescope.hooks import Model

RESULTS = Path(__file__).with_name("capture.json")
BACKENDS = Path(__file__).with_name("backends.json")
ROUNDS = 5
BATCH_TOKENS = 2048
TARGETS = {"routing": 0.97, "experts": 0.90, "loop": 1.3, "bytes": 30}


def build(dtype: torch.dtype = torch.float32) -> Model:
    """The benchmark's model, with the bundled tokenizer (its vocabulary is the smaller one)."""
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    config = Qwen3MoeConfig(
        vocab_size=8192,
        hidden_size=512,
        intermediate_size=1024,
        moe_intermediate_size=192,
        num_hidden_layers=8,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=64,
        num_experts=64,
        num_experts_per_tok=8,
        norm_topk_prob=True,
        max_position_embeddings=1024,
        pad_token_id=tokenizer.pad_token_id,
    )
    torch.manual_seed(0)
    return ms.wrap(Qwen3MoeForCausalLM(config).to(dtype), tokenizer, name="qwen3-moe 8x512, 64 experts, top-8")


def mixed_lengths(documents: int) -> list[str]:
    """Texts of very different lengths, shuffled: documents of the bundled corpus, alone or several joined."""
    draw = random.Random(0)
    texts = [document.text for document in ms.Corpus(CORPUS)]
    return ["\n".join(draw.sample(texts, draw.choice((1, 1, 1, 2, 4)))) for _ in range(documents)]


def alternate(contestants: dict[str, Callable[[], None]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each contestant, taking turns; the first turn warms up and does not count."""
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    for turn in range(rounds + 1):
        for name, run in contestants.items():
            start = time.perf_counter()
            run()
            if turn:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def forward_costs(model: Model) -> dict[str, Any]:
    """Tokens per second of the taps, against the forward pass that they observe: same batches, same head."""
    batch = next(batches(ms.Corpus(mixed_lengths(200)), model.tokenizer, max_length=512, batch_tokens=BATCH_TOKENS))
    ids, mask = (torch.from_numpy(a) for a in batch.padded(model.tokenizer.pad_token_id))

    def plain() -> None:
        with torch.inference_mode():
            model.forward(ids, mask, head=False)

    def tapped(*tiers: str) -> Callable[[], None]:
        def run() -> None:
            for _ in readings(model, iter([batch]), want(tiers)):
                pass

        return run

    contestants = {
        "plain": plain,
        "routing": tapped("routing"),
        "logits": tapped("routing", "logits"),
        "experts": tapped("routing", "experts"),
        "all tiers": tapped("routing", "logits", "experts", "outliers"),
    }
    seconds = alternate(contestants, ROUNDS)
    base = statistics.median(seconds["plain"])
    return {
        "tokens": batch.n_tokens,
        "tokens_per_second": {name: batch.n_tokens / statistics.median(s) for name, s in seconds.items()},
        # each turn is compared with the plain pass of the same turn, so that drift of the machine cancels
        "speed_over_plain": {
            name: statistics.median(p / t for p, t in zip(seconds["plain"], s, strict=True))
            for name, s in seconds.items()
        },
        "seconds_plain": base,
    }


def two_line_loop(model: Model, texts: list[str], out: Path) -> None:
    """What people write today: batches in file order, every router logit kept, torch.save."""
    hf, tokenizer = model.hf, model.tokenizer
    size = 16
    for start in range(0, len(texts), size):
        batch = tokenizer(
            texts[start : start + size], return_tensors="pt", padding=True, truncation=True, max_length=512
        )
        with torch.no_grad():
            output = hf(**batch, output_router_logits=True)
        torch.save(output.router_logits, out / f"{start}.pt")


def end_to_end(model: Model) -> dict[str, Any]:
    """The two-line loop against a capture of the routing and logits tiers, from text to disk."""
    texts = mixed_lengths(80)
    with tempfile.TemporaryDirectory() as folder:
        there = Path(folder)

        def loop() -> None:
            shutil.rmtree(there / "loop", ignore_errors=True)
            (there / "loop").mkdir()
            two_line_loop(model, texts, there / "loop")

        def capture() -> None:
            shutil.rmtree(there / "store", ignore_errors=True)
            ms.capture(
                model,
                ms.Corpus(texts),
                there / "store",
                ["routing", "logits"],
                max_length=512,
                batch_tokens=BATCH_TOKENS,
            )

        seconds = alternate({"two-line loop": loop, "capture": capture}, 3)
        return {
            "tokens": ms.open(there / "store").n_tokens,
            "seconds": {name: statistics.median(values) for name, values in seconds.items()},
            "times_faster": statistics.median(
                a / b for a, b in zip(seconds["two-line loop"], seconds["capture"], strict=True)
            ),
        }


def bytes_per_row(model: Model) -> float:
    """Bytes on disk of the routing tier for each (token, MoE layer), k = 8."""
    with tempfile.TemporaryDirectory() as folder:
        store = ms.capture(model, ms.Corpus(mixed_lengths(16)), Path(folder) / "s", ["routing"], max_length=512)
        size = sum(file.stat().st_size for file in store.path.glob("shards/*/routing.parquet"))
        return size / (store.n_tokens * len(store.sites))


def table(results: dict[str, Any]) -> str:
    """The README's table of one results file."""
    speed, loop, size = results["forward"]["speed_over_plain"], results["end_to_end"], results["bytes_per_row"]
    rows = [
        ("routing tier, speed over the plain forward pass", f"{speed['routing']:.2f}x", "0.97x"),
        ("experts tier, the same", f"{speed['experts']:.2f}x", "0.90x"),
        ("all four tiers, the same", f"{speed['all tiers']:.2f}x", ""),
        ("text to disk, over the two-line loop (`output_router_logits`, `torch.save`)",
         f"{loop['times_faster']:.2f}x", "1.3x"),
        ("bytes for each token and layer, routing tier, k = 8, bf16 model", f"{size['bfloat16']:.1f}", "30"),
        ("the same, fp32 model", f"{size['float32']:.1f}", ""),
    ]  # fmt: skip
    peers = json.loads(BACKENDS.read_text(encoding="utf-8"))["times_faster"]
    for peer, name in {
        "nnsight trace": "an nnsight trace",
        "run_with_cache": "TransformerLens `run_with_cache`",
    }.items():
        faster, with_head = (peers[ours][peer] for ours in ("moescope", "moescope, head too"))
        rows.append((f"the same router values, over {name}", f"{faster:.2f}x ({with_head:.2f}x with the head)", "1x"))
    lines = ["| measured in one run | result | target |", "|---|---|---|"]
    lines += [f"| {' | '.join(row)} |" for row in rows]
    lines.append(f"\n{results['model']}; {results['machine']}.")
    return "\n".join(lines)


def main() -> None:
    """Measure, print, and write the results file."""
    model = build()
    print("forward passes, then text to disk, then bytes: some minutes on two cores")
    results: dict[str, Any] = {
        "model": f"Qwen3-MoE, 8 layers x 512, 64 experts, top-8, {model.n_parameters / 1e6:.0f}M parameters, float32",
        "machine": f"{torch.get_num_threads()} CPU threads, torch {torch.__version__}, "
        f"Python {platform.python_version()}",
        "forward": forward_costs(model),
        "end_to_end": end_to_end(model),
        "bytes_per_row": {"float32": bytes_per_row(model), "bfloat16": bytes_per_row(build(torch.bfloat16))},
        "targets": TARGETS,
    }
    RESULTS.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    print(table(results))


if __name__ == "__main__":
    main()
