"""What writing edits into a checkpoint costs beside copying it, and how much memory it takes; in one run.

The checkpoint is a Qwen3-MoE of random numbers in the hub's layout: one bfloat16 tensor for each matrix of each expert,
in shards of 500 MB. Two recipes: one that scales two experts and zeroes one in every layer, so that every shard is
rewritten, and one that scales a single expert, so that all shards but one are hard-linked. `cp -r` of the same folder
takes turns with them. Memory is what the write adds to a process that has imported everything, at its peak.

`python -m tests.benchmarks.applying --gigabytes 4` writes the results file; `--seconds-of-command` also times the whole
`moescope apply` with its imports.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

import moescope as ms
from moescope.hooks.loading import skeleton
from moescope.hooks.names import reverted

RESULTS = Path(__file__).with_name("applying.json")
ROUNDS = 3
SHARD = 500_000_000
TARGETS = {"time over cp -r": 1.3, "memory beyond the largest touched tensor, MB": 300}


def configuration(gigabytes: float) -> Qwen3MoeConfig:
    """As many layers of 32 experts as fill the size; 0.2 GB each."""
    layers = max(2, round((gigabytes - 0.13) / 0.212))
    return Qwen3MoeConfig(
        vocab_size=16_384,
        hidden_size=2048,
        intermediate_size=2048,
        moe_intermediate_size=512,
        num_hidden_layers=layers,
        num_attention_heads=16,
        num_key_value_heads=4,
        head_dim=64,
        num_experts=32,
        num_experts_per_tok=4,
        dtype="bfloat16",
        architectures=["Qwen3MoeForCausalLM"],
    )


def stored(config: Qwen3MoeConfig) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Names and shapes in the hub's layout, without a number in memory."""
    hf = skeleton(Qwen3MoeForCausalLM, config, "synthetic")
    for name, parameter in hf.named_parameters():
        for key, tensor in reverted(hf, name, torch.empty_like(parameter, device="meta")).items():
            yield key, tuple(tensor.shape)


def build(folder: Path, gigabytes: float) -> tuple[Qwen3MoeConfig, int]:
    """Write the synthetic checkpoint; gives its configuration and its bytes."""
    config = configuration(gigabytes)
    config.save_pretrained(folder)
    draw = torch.Generator().manual_seed(0)
    shards: list[dict[str, torch.Tensor]] = [{}]
    weight_map: dict[str, str] = {}
    total = size = number = 0

    def flush() -> None:
        nonlocal size, number
        number += 1
        file = f"model-{number:05d}.safetensors"
        save_file(shards[0], folder / file, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(shards[0], file))
        shards[0] = {}
        size = 0

    for name, shape in stored(config):
        tensor = torch.empty(shape, dtype=torch.bfloat16).normal_(0, 0.02, generator=draw)
        shards[0][name] = tensor
        size += tensor.nbytes
        total += tensor.nbytes
        if size >= SHARD:
            flush()
    if shards[0]:
        flush()
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    return config, total


def recipes(config: Qwen3MoeConfig) -> dict[str, ms.Recipe]:
    """One that touches every shard, one that touches one."""
    layers = range(int(config.num_hidden_layers))
    every = [ms.Scale(layer=layer, expert=(1, 7), factor=1.5) for layer in layers]
    every += [ms.Zero(layer=layer, expert=3) for layer in layers]
    return {"every shard": ms.Recipe(every), "one shard": ms.Recipe([ms.Scale(layer=1, expert=5, factor=2.0)])}


# Run in a process of its own, so that what it holds at its peak is its own.
CHILD = """
import json, sys, time
from pathlib import Path
from moescope.edits import Recipe, plan, write
def of(name):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))
recipe, source, out = Recipe.load(sys.argv[1]), sys.argv[2], sys.argv[3]
changes = plan(recipe, source)  # and all imports with it
Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
before, start = of("VmRSS"), time.perf_counter()
done = write(recipe, source, out, verify=False)
seconds = time.perf_counter() - start
largest = max(change.tensor.end - change.tensor.start for change in changes)
print(json.dumps({"seconds": seconds, "memory": of("VmHWM") - before, "largest": largest, "changes": len(changes)}))
"""


def apply(recipe: Path, source: Path, out: Path) -> dict[str, Any]:
    """One write: seconds, bytes at the peak, bytes of the largest touched tensor."""
    command = [sys.executable, "-c", CHILD, str(recipe), str(source), str(out)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    shutil.rmtree(out)
    return json.loads(done.stdout.strip().splitlines()[-1])


def copy(source: Path, out: Path) -> float:
    """Seconds of `cp -r`."""
    start = time.perf_counter()
    subprocess.run(["cp", "-r", str(source), str(out)], check=True)
    seconds = time.perf_counter() - start
    shutil.rmtree(out)
    return seconds


def measure(gigabytes: float, folder: Path, *, command: bool = False) -> dict[str, Any]:
    """All contestants by turns; the first turn warms the page cache and does not count."""
    source, out = folder / "checkpoint", folder / "out"
    source.mkdir()
    config, total = build(source, gigabytes)
    files = {name: recipe.save(folder / f"{name.split()[0]}.yaml") for name, recipe in recipes(config).items()}
    copies: list[float] = []
    writes: dict[str, list[dict[str, Any]]] = {name: [] for name in files}
    for turn in range(ROUNDS + 1):
        seconds = copy(source, out)
        done = {name: apply(file, source, out) for name, file in files.items()}
        if turn:
            copies.append(seconds)
            for name, one in done.items():
                writes[name].append(one)
    results: dict[str, Any] = {
        "checkpoint": f"Qwen3-MoE, {config.num_hidden_layers} layers, 32 experts, bfloat16, {total / 1e9:.2f} GB",
        "seconds_cp": copies,
        "targets": TARGETS,
    }
    for name, some in writes.items():
        results[name] = {
            "changes": some[0]["changes"],
            "seconds": [one["seconds"] for one in some],
            "time over cp -r": statistics.median(
                one["seconds"] / seconds for one, seconds in zip(some, copies, strict=True)
            ),
            "peak memory, MB": max(one["memory"] for one in some) / 1e6,
            "largest touched tensor, MB": some[0]["largest"] / 1e6,
        }
    if command:
        start = time.perf_counter()
        subprocess.run([sys.executable, "-m", "moescope.cli", "apply", str(files["every shard"]), "--from", str(source),
                        "--to", str(out), "--no-verify"], check=True, capture_output=True)  # fmt: skip
        results["seconds of the whole command"] = time.perf_counter() - start
    return results


def main() -> None:
    """Measure, print and write the results file."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--gigabytes", type=float, default=4.0)
    parser.add_argument("--folder", type=Path, default=None, help="where there is room for twice that")
    parser.add_argument("--seconds-of-command", action="store_true")
    parser.add_argument("--out", type=Path, default=RESULTS)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=given.folder) as folder:
        results = measure(given.gigabytes, Path(folder), command=given.seconds_of_command)
    given.out.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(results, indent=2))


if __name__ == "__main__":
    main()
