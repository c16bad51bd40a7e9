"""Measures a model folder on the corpus: held-out loss, facts recalled, arithmetic solved, experts that specialise.

Everything is computed from the stored weights, loaded in float32, and from documents that `generate` draws.
`python -m moescope.data.evaluate DIR` measures a folder again and compares it with the figures stored there.
"""

import argparse
import json
import math
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerFast

from . import generate
from .grammars.arithmetic import LEVELS
from .mixture import PHASES, token_counts

THREADS = 2
PERMUTATIONS = 1000
PERMUTATION_SEED = 0
#: Documents per forward pass; batches hold documents in their own order, padded on the right.
BATCH = 16
#: Prompts per generated batch, padded on the left.
PROMPTS = 50


def load(folder: Path) -> tuple[PreTrainedModel, PreTrainedTokenizerFast]:
    """The model in float32, in evaluation mode, and its tokenizer."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, local_files_only=True)
    return model.eval(), AutoTokenizer.from_pretrained(folder, local_files_only=True)


@torch.no_grad()
def read_documents(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, texts: Sequence[str]
) -> tuple[list[list[int]], np.ndarray, np.ndarray]:
    """Runs documents through the model, each cut at the longest context.

    Returns:
        ids: Token ids per document, `<|bos|>` first.
        losses: [D] summed loss in nats of all tokens but the first.
        counts: [D, layer, expert] selections, over all tokens.
    """
    limit, experts = model.config.max_position_embeddings, model.config.num_experts
    ids = [tokenizer(text, truncation=True, max_length=limit).input_ids for text in texts]
    losses = np.zeros(len(ids))
    counts = np.zeros((len(ids), model.config.num_hidden_layers, experts), dtype=np.int64)
    for first in range(0, len(ids), BATCH):
        rows = ids[first : first + BATCH]
        longest = max(map(len, rows))
        padded = torch.tensor([row + [tokenizer.pad_token_id] * (longest - len(row)) for row in rows])
        mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows])
        out = model(input_ids=padded, attention_mask=mask, output_router_logits=True, use_cache=False)
        scores = out.logits.log_softmax(-1)[:, :-1].gather(-1, padded[:, 1:, None])[..., 0]
        for i, row in enumerate(rows):
            losses[first + i] = -scores[i, : len(row) - 1].double().sum().item()
            for layer, logits in enumerate(out.router_logits):
                chosen = logits.view(len(rows), longest, experts)[i, : len(row)].topk(model.config.num_experts_per_tok)
                counts[first + i, layer] = torch.bincount(chosen.indices.reshape(-1), minlength=experts).numpy()
    return ids, losses, counts


@torch.no_grad()
def complete(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, prompts: Sequence[str], new_tokens: int
) -> list[str]:
    """Greedy continuations of prompts, up to the end of the document or `new_tokens`."""
    found = []
    for first in range(0, len(prompts), PROMPTS):
        batch = tokenizer(list(prompts[first : first + PROMPTS]), return_tensors="pt", padding=True)
        out = model.generate(  # pyright: ignore[reportCallIssue]
            input_ids=batch["input_ids"],
            attention_mask=batch["attention_mask"],
            do_sample=False,
            max_new_tokens=new_tokens,
        )
        found += tokenizer.batch_decode(out[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
    return found


def fact_answer(text: str) -> str:
    """The answer in a continuation: its first line."""
    return text.strip().split("\n")[0].strip()


def final_answer(text: str) -> str:
    """What a continuation gives behind `</think>`, up to the end of that line; empty if it never gets there."""
    return text.partition("</think>")[2].strip().split("\n")[0].strip()


def unigram_loss(ids: Sequence[Sequence[int]], counts: np.ndarray) -> float:
    """Mean loss in nats of a unigram model with add-one smoothing, over all tokens but each document's first.

    Args:
        ids: Token ids per document.
        counts: [vocabulary] how often each token was trained on.
    """
    log_p = np.log((counts + 1) / (counts.sum() + len(counts)))
    flat = np.concatenate([row[1:] for row in ids])
    return float(-log_p[flat].mean())


def npmi(joint: np.ndarray, of_label: np.ndarray, of_expert: np.ndarray, tokens: float) -> np.ndarray:
    """nPMI of labels and experts from counts that broadcast against `joint`; -1 where the two never meet."""
    p = joint / tokens
    with np.errstate(divide="ignore", invalid="ignore"):
        value = np.log(p * tokens * tokens / (of_label * of_expert)) / -np.log(p)
    return np.where(joint > 0, value, -1.0)


def specialisation(counts: np.ndarray, lengths: np.ndarray, labels: Sequence[str]) -> dict[str, dict]:
    """Each domain's best expert by nPMI, against labels permuted over documents.

    The null is the 99th percentile of the *best expert's* nPMI under permutation, so that choosing the best expert out
    of all layers is paid for.

    Args:
        counts: [D, layer, expert] selections per document.
        lengths: [D] tokens per document.
        labels: [D] domains.
    """
    names = sorted(set(labels))
    member = np.array([[label == name for label in labels] for name in names], dtype=float)  # [label, D]
    flat, tokens = counts.reshape(len(counts), -1).astype(float), float(lengths.sum())

    def table(of: np.ndarray) -> np.ndarray:
        return npmi(of @ flat, (of @ lengths)[:, None], flat.sum(0), tokens)

    real = table(member)
    rng = np.random.default_rng(PERMUTATION_SEED)
    null = np.array([table(member[:, rng.permutation(len(labels))]).max(1) for _ in range(PERMUTATIONS)])
    limit = np.percentile(null, 99, axis=0)
    result = {}
    for i, name in enumerate(names):
        layer, expert = np.unravel_index(real[i].argmax(), counts.shape[1:])
        result[name] = {
            "layer": int(layer),
            "expert": int(expert),
            "npmi": round(float(real[i].max()), 4),
            "null_99": round(float(limit[i]), 4),
            "experts_above_null": int((real[i] > limit[i]).sum()),
        }
    return result


def evaluate(folder: Path, unigram_counts: dict[str, np.ndarray]) -> dict:
    """All figures of the model in `folder`.

    Args:
        folder: A model folder with its tokenizer.
        unigram_counts: Per domain [vocabulary], how often each token was trained on.
    """
    model, tokenizer = load(folder)
    rows = generate.demo_corpus()
    labels = [row["domain"] for row in rows]
    ids, losses, counts = read_documents(model, tokenizer, [row["text"] for row in rows])
    lengths = np.array([len(row) for row in ids])
    heldout = {}
    for name in generate.DOMAINS:
        at = [i for i, label in enumerate(labels) if label == name]
        heldout[name] = {
            "documents": len(at),
            "tokens": int(lengths[at].sum()),
            "loss": round(float(losses[at].sum() / (lengths[at] - 1).sum()), 4),
            "unigram": round(unigram_loss([ids[i] for i in at], unigram_counts[name]), 4),
        }
        print(f"held-out loss, {name}: {heldout[name]}", flush=True)

    facts = generate.fact_set()
    recalled = complete(model, tokenizer, [row["prompt"] for row in facts], 12)
    reworded = complete(model, tokenizer, [prompt for row in facts for prompt in row["paraphrases"]], 12)
    wordings = len(facts[0]["paraphrases"])
    exact = [fact_answer(text) == row["answer"] for text, row in zip(recalled, facts, strict=True)]
    exact_reworded = [fact_answer(text) == facts[i // wordings]["answer"] for i, text in enumerate(reworded)]
    print(f"facts recalled: {np.mean(exact):.4f}, reworded {np.mean(exact_reworded):.4f}", flush=True)

    problems = generate.arithmetic_set()
    solutions = complete(model, tokenizer, [row["prompt"] for row in problems], 72)
    right = np.array([final_answer(text) == row["answer"] for text, row in zip(solutions, problems, strict=True)])
    steps = np.array([row["steps"] for row in problems])
    levels = np.array([row["level"] for row in problems])
    first = [text.split("\n\n")[0] for text in solutions]  # another question may follow
    thought = [text.count("<think>") == 1 and text.count("</think>") == 1 for text in first]
    print(f"arithmetic solved: {right.mean():.4f}", flush=True)

    load_share = counts.sum(0) / counts.sum(0).sum(-1, keepdims=True)  # [layer, expert]
    return {
        "parameters": sum(p.numel() for p in model.parameters()),
        "weights_bytes": (folder / "model.safetensors").stat().st_size,
        "heldout": heldout,
        "facts": {
            "number": len(facts),
            "recalled": round(float(np.mean(exact)), 4),
            "recalled_reworded": round(float(np.mean(exact_reworded)), 4),
        },
        "arithmetic": {
            "problems": len(problems),
            "solved": round(float(right.mean()), 4),
            "solved_by_steps": {str(n): round(float(right[steps == n].mean()), 4) for n in np.unique(steps)},
            "solved_by_level": {n: round(float(right[levels == n].mean()), 4) for n in LEVELS},
            "well_formed": round(float(np.mean(thought)), 4),
            "standard_error": round(math.sqrt(right.mean() * (1 - right.mean()) / len(right)), 4),
        },
        "specialisation": specialisation(counts, lengths, labels),
        "load": {
            "smallest_share": round(float(load_share.min()), 5),
            "largest_share": round(float(load_share.max()), 5),
        },
    }


def main(arguments: list[str] | None = None) -> None:
    """The command line; leaves with status 1 where a figure differs from the stored one."""
    parser = argparse.ArgumentParser(
        prog="python -m moescope.data.evaluate", description="Measure a model folder again."
    )
    parser.add_argument("folder", type=Path, help="folder that moescope.data.train wrote")
    folder: Path = parser.parse_args(arguments).folder
    torch.set_num_threads(THREADS)
    stored = json.loads((folder / "figures.json").read_text())
    print("counting the training tokens again", flush=True)
    phases = [replace(phase, steps=n) for phase, n in zip(PHASES, stored["training"]["steps"], strict=True)]
    counts = token_counts(load(folder)[1], phases)
    measured = evaluate(folder, counts)
    different = [name for name, value in measured.items() if stored[name] != value]
    for name in different:
        print(f"{name}: stored {stored[name]}, measured {measured[name]}")
    print("the figures differ" if different else "the same figures")
    sys.exit(bool(different))


if __name__ == "__main__":
    main()
