"""What self-contrast and scaled experts cost and do, on the bundled model: ratios in one run, answers with intervals.

Speed: tokens per second of self-contrast (both streams in one doubled batch), of plain greedy decoding, and of two
separate forward passes with a cache each, batch 1 and 8. Answers: the bundled arithmetic problems, solved plainly, with
RICE's recipe (the two experts of the highest nPMI with the thinking markers, scaled), with two random experts scaled
alike, and by self-contrast; whatever they show.

`python -m tests.benchmarks.decoding` writes the results file; `make bench` puts it into the README.
"""

from __future__ import annotations

import inspect
import json
import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import LogitsProcessor, LogitsProcessorList, Qwen2MoeForCausalLM

import moescope as ms
from moescope import decoding
from moescope.analysis.association import score
from moescope.analysis.counts import token_counts, token_totals
from moescope.data import ARITHMETIC, CORPUS
from moescope.decoding.contrast import weak_routing
from moescope.effects import matched
from moescope.hooks import Model
from tests.benchmarks.capture import alternate

RESULTS = Path(__file__).with_name("decoding.json")
TOKENS, ROUNDS, PROBLEMS = 48, 5, 300
# What transformers calls the key-value cache changed in 5.24.
CACHE = "cache" if "cache" in inspect.signature(Qwen2MoeForCausalLM.forward).parameters else "past_key_values"
MARKERS = ("<think>", "</think>")


class _Never(LogitsProcessor):
    """Never ends, so that every contestant writes as many tokens."""

    def __init__(self, end: int) -> None:
        self._end = end

    def __call__(self, input_ids: Any, scores: Any) -> Any:
        scores[:, self._end] = -torch.inf
        return scores


def speed(model: Model, batch: int) -> dict[str, Any]:
    """Tokens per second of each way of decoding."""
    ids = model.tokenizer("Question: What is 8 + 3 * 9?\nAnswer:", return_tensors="pt")["input_ids"].expand(batch, -1)
    end = model.hf.generation_config.eos_token_id
    contrast, weak = decoding.SelfContrast(model), weak_routing(model)

    def greedy(**more: Any) -> None:
        with torch.inference_mode():
            model.hf.generate(
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=TOKENS, do_sample=False,
                logits_processor=LogitsProcessorList([_Never(end)]), pad_token_id=model.pad_id, **more,
            )  # fmt: skip

    def two_forwards() -> None:
        """Each token: a pass with the model's routing and one with the weak routing, each with its own cache."""
        caches: list[Any] = [None, None]
        step = ids
        with torch.inference_mode():
            for _ in range(TOKENS):
                logits = []
                for stream in range(2):
                    options = {} if caches[stream] is None else {CACHE: caches[stream]}
                    if stream:
                        with model.edited(weak, check=False):
                            output = model.hf(input_ids=step, use_cache=True, **options)
                    else:
                        output = model.hf(input_ids=step, use_cache=True, **options)
                    caches[stream] = getattr(output, CACHE)
                    logits.append(output.logits[:, -1].float())
                z = contrast.scores(*logits)
                z[:, end] = -torch.inf
                step = z.argmax(-1, keepdim=True)

    ways: dict[str, Callable[[], None]] = {
        "plain": greedy,
        "self-contrast": lambda: greedy(custom_generate=contrast),
        "two forwards": two_forwards,
    }
    seconds = alternate(ways, ROUNDS)
    return {
        "tokens_per_second": {name: batch * TOKENS / statistics.median(taken) for name, taken in seconds.items()},
        "time_over": {
            name: statistics.median(a / b for a, b in zip(seconds["self-contrast"], seconds[name], strict=True))
            for name in ("plain", "two forwards")
        },
    }


def cognitive(model: Model, top: int = 2) -> ms.Recipe:
    """RICE's recipe: the experts of the whole model whose nPMI with the thinking markers is highest, scaled by 64."""
    rows = [{"text": d.text} for d in ms.Corpus(CORPUS, ["domain"]) if d.labels["domain"] == "arithmetic"]
    ids = np.array([model.tokenizer.convert_tokens_to_ids(marker) for marker in MARKERS])
    found: list[tuple[float, int, int]] = []
    with tempfile.TemporaryDirectory() as folder:
        store = ms.capture(model, ms.Corpus(rows), Path(folder) / "s", ["routing"])
        tokens, times = token_totals(store)
        marked, total = float(times[np.isin(tokens, ids)].sum()), float(times.sum())
        for site in store.sites:
            pairs = token_counts(store, site)
            all_of = np.bincount(pairs.expert, weights=pairs.count, minlength=pairs.n_experts)
            here = np.isin(pairs.group, ids)
            joint = np.bincount(pairs.expert[here], weights=pairs.count[here], minlength=pairs.n_experts)
            values = score(joint, marked, all_of, total)
            found += [(float(value), site.layer, expert) for expert, value in enumerate(values)]
    best = sorted(found, reverse=True)[:top]
    return ms.Recipe(
        [ms.Scale(layer=layer, expert=expert, factor=64.0) for _, layer, expert in best],
        suggested_by={"values": [{"layer": a, "expert": b, "value": v} for v, a, b in best]},
    )


def answers(model: Model) -> dict[str, Any]:
    """Share of the problems solved each way, with 95 % intervals, and tokens written."""
    problems = decoding.read_problems(ARITHMETIC, PROBLEMS)
    rice = cognitive(model)
    controls = {f"random experts {n}": matched(rice, model, np.random.default_rng(n)) for n in range(2)}
    rows = {}
    for name, recipe in {"plain": None, "RICE, factor 64": rice, **controls}.items():
        texts = decoding.generate(model, [problem.prompt for problem in problems], recipe=recipe)
        rows[name] = _row([decoding.solved(t.text, p.answer, "</think>") for t, p in zip(texts, problems, strict=True)],
                          [len(t.tokens) for t in texts])  # fmt: skip
        print(name, rows[name], flush=True)
    texts = decoding.self_contrast(model, [problem.prompt for problem in problems], steps=False)
    right = [decoding.solved(t.text, p.answer, "</think>") for t, p in zip(texts, problems, strict=True)]
    rows["self-contrast, beta 0.5, alpha 0.1"] = _row(right, [len(t.tokens) for t in texts])
    return {"problems": len(problems), "experts": rice.suggested_by["values"], "solved": rows}


def _row(right: list[bool], tokens: list[int]) -> dict[str, float]:
    low, high = decoding.interval(np.array(right))
    return {"solved": float(np.mean(right)), "low": low, "high": high, "tokens": float(np.mean(tokens))}


def main() -> None:
    """Measure, print and write the results file."""
    model = ms.load("tiny-qwen-moe")
    results = {
        "model": "tiny-qwen-moe",
        "machine": f"{torch.get_num_threads()} CPU threads, torch {torch.__version__}",
        "speed": {f"batch {batch}": speed(model, batch) for batch in (1, 8)},
        "answers": answers(model),
    }
    RESULTS.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(results, indent=2))


if __name__ == "__main__":
    main()
