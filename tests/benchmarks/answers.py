"""What scaled experts and self-contrast do to answers: the bundled arithmetic problems, with intervals, whatever comes.

Solved plainly and greedily; with RICE's recipe (the two experts of the highest nPMI with the thinking markers, scaled
by the paper's 64, and mildly by 2); with as many random experts of the same layers scaled alike; and by self-contrast
with the paper's numbers. The markers' experts are found on the demo corpus, which holds none of the problems.

`python -m tests.benchmarks.answers` writes the results file (minutes); it does not depend on how busy the machine is.
"""

from __future__ import annotations

import json
import sys
import tempfile
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import binomtest

import moescope as ms
from moescope import decoding
from moescope.analysis.association import score
from moescope.analysis.counts import token_counts, token_totals
from moescope.data import ARITHMETIC, CORPUS
from moescope.decoding import Problem
from moescope.decoding.problems import answered
from moescope.effects import matched
from moescope.hooks import Model

RESULTS = Path(__file__).with_name("answers.json")
MARKERS = ("<think>", "</think>")
CONTROLS = 3
MOST = 48  # tokens; the longest worked answer has 41, and the model does not end behind it


def cognitive(model: Model, factor: float = 64.0, top: int = 2) -> ms.Recipe:
    """RICE's recipe: the experts of the whole model whose nPMI with the thinking markers is highest, scaled."""
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
        [ms.Scale(layer=layer, expert=expert, factor=factor) for _, layer, expert in best],
        suggested_by={"values": [{"layer": a, "expert": b, "value": v} for v, a, b in best]},
    )


def scaled(recipe: ms.Recipe, factor: float) -> ms.Recipe:
    """The same recipe at another strength."""
    return ms.Recipe([edit.model_copy(update={"factor": factor}) for edit in recipe.edits])


def answers(model: Model, problems: list[Problem]) -> dict[str, Any]:
    """Problems solved each way: share with its interval (Wilson), gained and lost against plain, tokens thought."""
    rice = cognitive(model)
    ways: dict[str, ms.Recipe | None] = {"plain": None, "RICE, factor 64": rice, "RICE, factor 2": scaled(rice, 2.0)}
    for number in range(CONTROLS):
        other = matched(rice, model, np.random.default_rng(number))
        ways |= {f"random experts {number}, factor {f}": scaled(other, float(f)) for f in (64, 2)}
    prompts = [problem.prompt for problem in problems]
    rows: dict[str, dict[str, float]] = {}
    plain = np.zeros(0, dtype=bool)
    for name, recipe in [*ways.items(), ("self-contrast, beta 0.5, alpha 0.1", None)]:
        options = {"custom_generate": decoding.SelfContrast(model)} if name.startswith("self-contrast") else {}
        with nullcontext() if recipe is None else model.edited(recipe):
            texts = answered(model, prompts, MOST, do_sample=False, **options)
        right = np.array([decoding.solved(t.text, p.answer, "</think>") for t, p in zip(texts, problems, strict=True)])
        plain = right if name == "plain" else plain
        rows[name] = row(right, plain, [thought(model, t.text) for t in texts])
        print(f"{name}: {rows[name]}", file=sys.stderr, flush=True)
    return {"problems": len(problems), "experts": rice.suggested_by["values"], "solved": rows}


def thought(model: Model, text: str) -> int:
    """Tokens before `</think>`; all of them where it never comes."""
    return len(model.tokenizer(text.partition(MARKERS[1])[0])["input_ids"])


def row(right: np.ndarray, plain: np.ndarray, tokens: list[int]) -> dict[str, float]:
    """One way of decoding: solved, its interval, McNemar's exact test against plain decoding, and tokens thought."""
    low, high = decoding.interval(right)
    gained, lost = int((right & ~plain).sum()), int((plain & ~right).sum())
    p = float(binomtest(gained, gained + lost).pvalue) if gained + lost else 1.0
    return {
        "solved": float(np.mean(right)), "low": low, "high": high, "gained": gained, "lost": lost, "p": p,
        "thought": float(np.mean(tokens)),
    }  # fmt: skip


def main() -> None:
    """Run all problems, print and write the results file."""
    model = ms.load("tiny-qwen-moe")
    results = {"model": "tiny-qwen-moe", **answers(model, decoding.read_problems(ARITHMETIC))}
    RESULTS.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(results, indent=2))


if __name__ == "__main__":
    main()
