"""Trains `tiny-qwen-moe` on the generated corpus, on two CPU cores: `python -m moescope.data.train --out DIR`.

Nothing here depends on the clock, on hash randomisation or on earlier runs: the same library versions on the same kind
of processor give the same weights. The figures that `evaluate` prints at the end are those of the stored half-precision
weights, loaded in float32, and are written beside them.
"""

import argparse
import json
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from transformers import PreTrainedTokenizerFast, Qwen2MoeConfig, Qwen2MoeForCausalLM

from . import evaluate, generate, sorted_experts
from .mixture import BATCH, CONTEXT, PHASES, Phase, contexts, no_counts
from .tokenizer import VOCABULARY, train_tokenizer

THREADS = 2
SEED = 20
WARMUP = 60
PEAK_RATE = 3e-3
FINAL_RATE = 1e-4
WEIGHT_DECAY = 0.05
CLIP = 1.0
#: Weight of the load-balancing loss, which is taken per layer: an expert must live, but may specialise.
BALANCE = 0.01
#: Documents the tokenizer learns from, per domain.
TOKENIZER_DOCUMENTS = 1200
CONFIG = {
    "vocab_size": VOCABULARY,
    "hidden_size": 128,
    "intermediate_size": 384,  # unused: every layer is an MoE layer
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_experts": 16,
    "num_experts_per_tok": 4,
    "moe_intermediate_size": 96,
    "shared_expert_intermediate_size": 128,
    "decoder_sparse_step": 1,
    "norm_topk_prob": False,
    "router_aux_loss_coef": BALANCE,
    "max_position_embeddings": CONTEXT,
    "tie_word_embeddings": True,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}


def balance_loss(router_logits: tuple[torch.Tensor, ...], top_k: int) -> torch.Tensor:
    """The Switch load-balancing loss of each layer (1 when balanced), averaged over layers."""
    losses = []
    for logits in router_logits:
        score = logits.softmax(-1)
        experts = score.shape[-1]
        chosen = torch.bincount(score.topk(top_k).indices.reshape(-1), minlength=experts) / (len(score) * top_k)
        losses.append(experts * (chosen * score.mean(0)).sum())
    return torch.stack(losses).mean()


def rate(step: int, decay: int) -> float:
    """Learning rate: linear warm-up, then a cosine that reaches `FINAL_RATE` at step `decay`."""
    if step < WARMUP:
        return PEAK_RATE * (step + 1) / WARMUP
    progress = (step - WARMUP) / max(1, decay - WARMUP)
    return FINAL_RATE + (PEAK_RATE - FINAL_RATE) * 0.5 * (1 + math.cos(math.pi * progress))


def parameter_groups(model: torch.nn.Module) -> list[dict]:
    """Weight decay for matrices, none for norms and biases."""
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    vectors = [p for p in model.parameters() if p.ndim < 2]
    return [{"params": matrices, "weight_decay": WEIGHT_DECAY}, {"params": vectors, "weight_decay": 0.0}]


def fit(model, batches: Iterator[list[int]], phase: Phase) -> None:
    """Trains `model` in place for one phase, with a fresh optimiser and a progress line every 25 steps."""
    started, steps = time.monotonic(), phase.steps
    optimizer = torch.optim.AdamW(parameter_groups(model), lr=PEAK_RATE, betas=(0.9, 0.98), fused=True)
    model.train()
    shown = 0.0
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = rate(step, phase.decay)
        ids = torch.tensor([next(batches) for _ in range(BATCH)])
        out = model(input_ids=ids, use_cache=False, output_router_logits=True)
        loss = F.cross_entropy(out.logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
        (loss + BALANCE * balance_loss(out.router_logits, CONFIG["num_experts_per_tok"])).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        optimizer.zero_grad()
        shown += loss.item()
        if (step + 1) % 25 == 0:
            spent = time.monotonic() - started
            left = spent / (step + 1) * (steps - step - 1)
            print(f"step {step + 1}/{steps}  loss {shown / 25:.4f}  {spent:.0f} s, {left:.0f} s left", flush=True)
            shown = 0.0


def save(model, tokenizer: PreTrainedTokenizerFast, out: Path) -> None:
    """Stores the weights in half precision, beside a configuration that loads them in float32."""
    out.mkdir(parents=True, exist_ok=True)
    model.set_experts_implementation("grouped_mm")
    model.half().save_pretrained(out)
    (out / "model.safetensors").chmod(0o644)
    tokenizer.save_pretrained(out)
    path = out / "config.json"
    config = json.loads(path.read_text()) | {"dtype": "float32"}
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def train(out: Path, phases: Sequence[Phase]) -> None:
    """Trains, stores and evaluates the model; see the module's text."""
    torch.set_num_threads(THREADS)
    torch.use_deterministic_algorithms(True)
    # Nothing reads uninitialised memory here, and filling it costs 3 % of a step.
    torch.utils.deterministic.fill_uninitialized_memory = False  # pyright: ignore[reportAttributeAccessIssue]
    started, started_cpu = time.monotonic(), time.process_time()
    texts = (d.text for name in generate.DOMAINS for d in generate.documents(name, "train", TOKENIZER_DOCUMENTS))
    tokenizer = train_tokenizer(texts, CONTEXT)
    torch.manual_seed(SEED)
    model = Qwen2MoeForCausalLM(Qwen2MoeConfig(**CONFIG))
    sorted_experts.use(model)
    counts = no_counts()
    for number, phase in enumerate(phases, 1):
        print(f"phase {number} of {len(phases)}", flush=True)
        fit(model, contexts(tokenizer, phase, counts), phase)
    save(model, tokenizer, out)
    run = {
        "steps": [phase.steps for phase in phases],
        "tokens": sum(phase.steps for phase in phases) * BATCH * CONTEXT,
        "tokens_per_domain": {name: int(count.sum()) for name, count in counts.items()},
    }
    figures = evaluate.evaluate(out, counts)
    seconds = {"wall": round(time.monotonic() - started), "cpu": round(time.process_time() - started_cpu)}
    text = json.dumps({"training": run, **figures, "seconds": seconds}, indent=2)
    (out / "figures.json").write_text(text + "\n")
    print(text)


def main(arguments: list[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m moescope.data.train", description="Train tiny-qwen-moe.")
    parser.add_argument("--out", type=Path, required=True, help="folder to write the model, tokenizer and figures into")
    parser.add_argument("--short", type=int, metavar="N", help="only N steps of each phase, to see that it runs")
    parsed = parser.parse_args(arguments)
    phases = [replace(phase, steps=min(phase.steps, parsed.short or phase.steps)) for phase in PHASES]
    train(parsed.out, phases)


if __name__ == "__main__":
    main()
