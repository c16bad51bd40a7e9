"""Ten invented people unlearned from the bundled model: one expert, its ablations and baselines, on three seeds.

Each seed draws ten people to forget; the facts of thirty others and texts of the other domains are the retain set; the
last ten people are in neither, and the demo corpus's documents of other domains are never trained on. Variants: NPO on
the top-1 expert by attribution with the router anchor; without the anchor; on a random expert; on the top three; on the
whole model; the other objectives on the top-1 expert; and the best expert of a lower layer.

`python -m tests.benchmarks.unlearning` writes the results file, a run at a time: killed, it goes on where it was.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np

import moescope as ms
from moescope import unlearning
from moescope.data import CORPUS, RETAIN
from moescope.hooks import Model
from moescope.unlearning import Example, Unlearned, evaluate, kept_selection, read_examples, relearn
from moescope.unlearning.people import people, texts

RESULTS = Path(__file__).with_name("unlearning.json")
SEEDS = (0, 1, 2)
SETTINGS = {
    "steps": 280,
    "check_every": 60,
    "learning_rate": 3e-3,
    "retain_weight": 3.0,
    "batch": 10,
    "retain_batch": 24,
    "max_length": 64,
}
MAIN = "one expert, anchored"
VARIANTS: dict[str, dict[str, Any]] = {
    MAIN: {},
    "no anchor": {"anchor": 0.0},
    "random expert": {"random": True},
    "whole model": {"scope": "model", "learning_rate": 3e-4, "steps": 80},
    "top 3 experts": {"top": 3},
    "lower layer": {"lower": True},
    "gradient difference": {"method": "gd"},
    "gradient ascent": {"method": "ga"},
    "RMU": {"method": "rmu"},
}


def sets_of(seed: int) -> dict[str, list[Example]]:
    """What is measured, by name."""
    forget, retain, others = people(seed)
    return {
        "forget": read_examples(forget),
        "retained facts": read_examples(retain[::3]),
        "other facts": read_examples(others),
        "other domains": read_examples(texts(CORPUS, 8)),
    }


def trial(model: Model, seed: int, variant: str) -> Unlearned:
    """One run."""
    options = SETTINGS | VARIANTS[variant] | {"seed": seed}
    forget, retain, _ = people(seed)
    kept = [*retain, *texts(RETAIN, 4)]
    top, lower, at_random = options.pop("top", 1), options.pop("lower", False), options.pop("random", False)
    found = unlearning.attribute(model, read_examples(forget), read_examples(kept), max_length=64, seed=seed)
    target: Any = None
    if lower:
        table = found["attribution"].isel(layer=1).values
        target = (model.sites[1].layer, int(np.nanargmax(table)))
    if at_random:
        best = unlearning.best_targets(found, model)
        target = [(site.key, expert) for site, expert in unlearning.random_targets(model, best, seed)]
    return unlearning.unlearn_expert(model, forget, kept, target=target, top=top, attributed=found, **options)


def measured(model: Model, seed: int, variant: str, before: Any, sets: dict[str, list[Example]]) -> dict[str, Any]:
    """A run's figures: every item, so that intervals can be drawn of them."""
    done = trial(model, seed, variant)
    after = evaluate(model, sets, done, max_length=384)
    attack = relearn(model, done, sets["forget"], max_length=64, seed=seed)
    return {
        "seed": seed,
        "variant": variant,
        "targets": [list(target) for target in done.targets],
        "share": done.share,
        "stopped": done.stopped,
        "selection": kept_selection(before, after, done.targets),
        "relearning": {
            "step": attack["step"].values.tolist(), "shown": attack["shown"].values.tolist(),
            "hidden": attack["hidden"].values.tolist(),
        },
        **_items(after),
    }  # fmt: skip


def _items(found: Any) -> dict[str, Any]:
    return {
        "mean": {f"{name}/{measure}": round(found.mean(name, measure), 6) for name, measure in found.items},
        "items": {
            f"{name}/{measure}": [None if np.isnan(v) else round(float(v), 4) for v in values]
            for (name, measure), values in found.items.items()
        },
        "tokens": {name: values.tolist() for name, values in found.tokens.items()},
        "chance": found.chance,
    }


def main(arguments: list[str]) -> None:
    """Run what the results file does not have yet: all seeds of a variant before the next variant."""
    seeds = tuple(map(int, arguments)) or SEEDS
    model = ms.load("tiny-qwen-moe")
    for variant in VARIANTS:
        for seed in seeds:
            parts = RESULTS.with_suffix(f".{seed}.part")
            kept = [json.loads(line) for line in parts.read_text().splitlines()] if parts.is_file() else []
            if any(row["variant"] == variant for row in kept):
                continue
            sets = sets_of(seed)
            before = evaluate(model, sets, max_length=384)
            if not any(row["variant"] == "before" for row in kept):
                _append(parts, {"seed": seed, "variant": "before", **_items(before)})
            row = measured(model, seed, variant, before, sets)
            _append(parts, row)
            shown = {name: row["mean"][name] for name in row["mean"] if name.endswith(("exact", "domains/loss"))}
            print(seed, variant, row["targets"], shown, row["selection"], flush=True)
    gather()


def _append(file: Path, row: dict[str, Any]) -> None:
    with file.open("a", encoding="utf-8") as handle:
        handle.write(json.dumps(row) + "\n")


def gather() -> None:
    """Put the parts of all seeds together."""
    rows = [
        json.loads(line)
        for seed in SEEDS
        if (file := RESULTS.with_suffix(f".{seed}.part")).is_file()
        for line in file.read_text(encoding="utf-8").splitlines()
    ]
    said = {"model": "tiny-qwen-moe", "settings": SETTINGS, "variants": VARIANTS, "runs": rows}
    RESULTS.write_text(json.dumps(said) + "\n", encoding="utf-8")


def table(results: dict[str, Any]) -> str:
    """The README's table of the results file: the range over seeds."""
    lines = [
        "| trained | forgotten people, exact | reworded | retained people | people in neither set "
        "| other domains' loss | target still chosen | parameters |",
        "|---|---|---|---|---|---|---|---|",
    ]
    runs = results["runs"]
    plain = {run["seed"]: run["mean"]["other domains/loss"] for run in runs if run["variant"] == "before"}

    def span(values: list[float], form: str) -> str:
        low, high = form.format(min(values)), form.format(max(values))
        return low if low == high else f"{low} to {high}"

    for variant in ("before", *results["variants"]):
        some = [run for run in runs if run["variant"] == variant]
        shares = [
            span([run["mean"][f"{name}"] for run in some], "{:.0%}")
            for name in ("forget/exact", "forget/paraphrase", "retained facts/exact", "other facts/exact")
        ]
        if variant == "before":
            lines.append(f"| nothing | {' | '.join(shares)} | | | |")
            continue
        change = [run["mean"]["other domains/loss"] / plain[run["seed"]] - 1 for run in some]
        chosen = [run["selection"]["kept"] for run in some]
        cells = [variant, *shares, span(change, "{:+.1%}"), span(chosen, "{:.0%}"), f"{some[0]['share']:.1%}"]
        lines.append(f"| {' | '.join(cells)} |")
    seeds = len({run["seed"] for run in runs})
    lines.append(f"\nRanges over {seeds} seeds, each with ten other people to forget; {results['model']}.")
    return "\n".join(lines)


if __name__ == "__main__":
    main(sys.argv[1:])
