"""A whole study: attribution, the run, what it did to everything that is measured, its controls and baselines."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import xarray as xr

from moescope.analysis import table
from moescope.errors import MoescopeError
from moescope.unlearning.comparing import compared
from moescope.unlearning.evaluation import Evaluation, evaluate, kept_selection
from moescope.unlearning.examples import Example, read_examples, tokenised
from moescope.unlearning.keeping import finish, require_free
from moescope.unlearning.relearning import relearn
from moescope.unlearning.settings import Settings
from moescope.unlearning.targeting import Named, attribute, best_targets, named_targets, random_targets
from moescope.unlearning.training import OnStep, Rows, require_possible, unlearn_expert
from moescope.unlearning.unlearned import Unlearned

if TYPE_CHECKING:
    from moescope.hooks import Model
    from moescope.hooks.sites import Site

MAIN, BEFORE = "unlearned", "before"
CONTROLS = "controls"
WHOLE_MODEL_RATE = 0.1  # of the learning rate: all parameters at once move the model that much more
RELEARNT = 5  # steps of the attack that the table shows


@dataclass(frozen=True)
class Study:
    """A run with all that was measured.

    Attributes:
        done: the run.
        result: `compared` of before, the run and its controls.
        progress: the run's log.
        attribution: of the forget set; None where the target was named.
        relearning: the attack on the run; None without prompts and answers.
    """

    done: Unlearned
    result: xr.Dataset
    progress: xr.Dataset
    attribution: xr.Dataset | None
    relearning: xr.Dataset | None

    def parts(self) -> list[xr.Dataset]:
        """Every result, the table first."""
        found = [self.result, self.attribution, self.progress, self.relearning]
        return [part for part in found if part is not None]

    def as_dict(self) -> dict[str, Any]:
        """The run and the table as plain values; what is not a number is None."""
        rows = table(self.result).to_dict("records")
        return {
            "targets": [{"site": site, "expert": expert} for site, expert in self.done.targets],
            "stopped": self.done.stopped,
            "share": self.done.share,
            "attrs": dict(self.result.attrs),
            "rows": [{name: None if value != value else value for name, value in row.items()} for row in rows],
        }

    def save(self, path: str | Path) -> Path:
        """Write `as_dict` as JSON."""
        file = Path(path)
        try:
            file.write_text(json.dumps(self.as_dict(), indent=1) + "\n", encoding="utf-8")
        except OSError as error:
            raise MoescopeError(f"Cannot write {file}: {error.strerror or error}.") from error
        return file


def study(
    model: Model,
    forget: Rows,
    retain: Rows | None = None,
    *,
    also: Mapping[str, Rows] | None = None,
    target: list[Named] | None = None,
    top: int = 1,
    out: str | Path | None = None,
    resume: bool = False,
    compare: bool = False,
    attack: bool = True,
    tensorboard: bool = False,
    settings: Settings | None = None,
    on_step: OnStep | None = None,
    on_stage: Callable[[str], None] | None = None,
) -> Study:
    """Unlearn a set (see `unlearn_expert`) and measure it.

    Args:
        model, forget, retain, target, top, out, resume, tensorboard, settings: as in `unlearn_expert`. A study that was
            cut off while it measured is resumed too; of the controls' runs those are kept that leave a recipe, in
            `out`/controls.
        also: further sets by name that are only measured: facts and texts that no run trained on.
        compare: also run without the anchor, on random experts, on the top three, and on the whole model.
        attack: also try to relearn what was forgotten.
        on_step: called with the row of each step of any run.
        on_stage: called with what begins, in words.
    """
    settings = settings or Settings()
    say = on_stage or (lambda stage: None)
    wanted, kept = read_examples(forget), [] if retain is None else read_examples(retain)
    require_possible(model, settings, wanted, kept)
    if out is not None:
        require_free(Path(out), resume=resume)
    sets = {"forget": wanted} | ({"retain": kept} if kept else {})
    sets |= {name: read_examples(rows) for name, rows in (also or {}).items()}
    for name, examples in sets.items():  # before anything is run that takes time
        tokenised(model, examples, settings.max_length, name)
    found = None
    if target is None:
        say("finding the expert that carries the forget set")
        found = attribute(model, wanted, kept, max_length=settings.max_length, seed=settings.seed)
        targets = best_targets(found, model, top)
    else:
        targets = named_targets(model, target)
    runs = _runs(model, settings, targets, found, top) if compare else {}
    runs = {MAIN: (settings, [(site.key, expert) for site, expert in targets])} | runs
    measure: dict[str, Any] = {"max_length": settings.max_length, "seed": settings.seed}
    say("measuring the model as it is")
    before = evaluate(model, sets, **measure)
    states: dict[str, list[Evaluation]] = {BEFORE: [before]}
    figures: dict[str, list[dict[str, float]]] = {}
    folders: list[Path] = []
    main: Unlearned | None = None
    attacked: xr.Dataset | None = None
    for name, (own, where) in runs.items():
        first = name == MAIN
        more: dict[str, Any] = {}
        if out is not None and own.scope == "expert":
            folders.append(Path(out) if first else Path(out) / CONTROLS / name.replace(" ", "-"))
            more = {"out": folders[-1], "resume": resume, "keep_state": True, "tensorboard": tensorboard and first}
        say("training" if first else f"training, for comparison: {name}")
        done = unlearn_expert(
            model, wanted, kept or None, target=where, attributed=found, settings=own, on_step=on_step, **more
        )
        say("measuring what it did")
        after = evaluate(model, sets, done, **measure)
        states[name] = [after]
        figures[name] = [kept_selection(before, after, done.targets) | {"share": done.share}]
        if attack and sum(example.asks for example in wanted) > 1:
            say("trying to bring back what was forgotten")
            again = relearn(model, done, wanted, max_length=settings.max_length, seed=settings.seed)
            at = again.sel(step=RELEARNT)
            figures[name][0] |= {f"relearnt_{half}": float(at[half]) for half in ("shown", "hidden")}
            attacked = again if first else attacked
        main = done if first else main
    for folder in folders:
        finish(folder)
    assert main is not None
    result = compared(
        states, figures, seed=settings.seed, model=model.name, method=settings.method, stopped=main.stopped,
        targets=", ".join(f"{key} expert {expert}" for key, expert in main.targets), **_sizes(sets),
        settings="; ".join(f"{name}={value}" for name, value in settings.as_dict().items()),
    )  # fmt: skip
    return Study(main, result, main.progress(), found, attacked)


def _runs(
    model: Model, settings: Settings, targets: list[tuple[Site, int]], found: xr.Dataset | None, top: int
) -> dict[str, tuple[Settings, list[Named]]]:
    """Controls and baselines by name, each with its settings and its targets."""
    named: list[Named] = [(site.key, expert) for site, expert in targets]
    at_random: list[Named] = [(site.key, e) for site, e in random_targets(model, targets, settings.seed)]
    runs: dict[str, tuple[Settings, list[Named]]] = {"random expert": (settings, at_random)}
    if settings.anchors:
        runs["no anchor"] = replace(settings, anchor=0.0), named
    if found is not None and top < 3:
        runs["top 3 experts"] = settings, [(site.key, e) for site, e in best_targets(found, model, 3)]
    rate = settings.learning_rate * WHOLE_MODEL_RATE
    runs["whole model"] = replace(settings, scope="model", learning_rate=rate), named
    return runs


def _sizes(sets: Mapping[str, list[Example]]) -> dict[str, str]:
    return {"sets": ", ".join(f"{name} {len(examples)}" for name, examples in sets.items())}
