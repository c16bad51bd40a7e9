"""`moescope unlearn`: a forget set becomes a recipe of replaced tensors, with a report of what that did."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from moescope.cli import screen
from moescope.cli.editing import ModelOption
from moescope.cli.models import Device, Dtype, Json, Revision, Trust
from moescope.errors import MoescopeError

if TYPE_CHECKING:
    from moescope.unlearning import Study

BUNDLED = "tiny-qwen-moe"

UNLEARN_EXAMPLES = """Examples:

\b
  moescope unlearn --out forgot/                      ten of the bundled model's invented people, in two minutes
  moescope unlearn --forget forget.jsonl --retain retain.jsonl --method npo --out recipe/
  moescope unlearn --model olmoe --forget f.jsonl --retain r.jsonl --target 7:33 --out recipe/ --also other=o.jsonl
  moescope unlearn --forget f.jsonl --retain r.jsonl --out recipe/ --compare      controls and baselines too
  moescope apply recipe/recipe.yaml --from ./checkpoint --to ./forgot"""


def unlearn(
    out: Annotated[Path, typer.Option(help="Folder for the recipe, its tensors, the log and the report.")],
    forget: Annotated[
        Path | None,
        typer.Option(
            help="What to forget: prompt/answer JSONL, text, TOFU or WMDP rows, Parquet (default: ten of the people "
            "that the bundled model knows, with sets of its own to retain and to measure)."
        ),
    ] = None,
    retain: Annotated[Path | None, typer.Option(help="What to keep; all methods but ga need it.")] = None,
    model: ModelOption = BUNDLED,
    method: Annotated[Literal["ga", "gd", "npo", "rmu"], typer.Option(help="Forget objective.")] = "npo",
    target: Annotated[
        list[str] | None, typer.Option(help="layer:expert, each by its own --target (default: by attribution).")
    ] = None,
    top: Annotated[int, typer.Option(help="How many experts by attribution.")] = 1,
    anchor: Annotated[float, typer.Option(help="Weight of the router anchor; 0 for none.")] = 0.5,
    definition: Annotated[Literal["paper", "code"], typer.Option(help="Of the anchor: sum or mean.")] = "paper",
    retain_weight: Annotated[float, typer.Option(help="Weight of the retain term.")] = 3.0,
    retention: Annotated[Literal["kl", "loss"], typer.Option(help="What the retain term is.")] = "kl",
    beta: Annotated[float, typer.Option(help="Of npo.")] = 1.0,
    steps: Annotated[int, typer.Option(help="Optimiser steps at most.")] = 280,
    batch: Annotated[int, typer.Option(help="Forget sequences of a step.")] = 10,
    retain_batch: Annotated[int, typer.Option(help="Retain sequences of a step.")] = 24,
    accumulate: Annotated[int, typer.Option(help="Parts in which a step's gradient is gathered.")] = 1,
    learning_rate: Annotated[
        float, typer.Option(help="Of AdamW; tuned on the bundled model, larger ones want less.")
    ] = 3e-3,
    max_length: Annotated[int, typer.Option(help="Tokens of a sequence.")] = 512,
    precision: Annotated[
        Literal["no", "bf16", "fp16"], typer.Option(help="Mixed precision; fp16 on a GPU alone.")
    ] = "no",
    checkpointing: Annotated[bool, typer.Option("--checkpointing", help="Compute activations again.")] = False,
    patience: Annotated[int, typer.Option(help="Looks with fallen utility before it stops; 0 never.")] = 0,
    tolerance: Annotated[float, typer.Option(help="Share by which the held-out retain loss may rise.")] = 0.1,
    also: Annotated[
        list[str] | None, typer.Option(help="name=file: a further set to measure, each by its own.")
    ] = None,
    compare: Annotated[bool, typer.Option("--compare", help="Also run the controls and baselines.")] = False,
    tensorboard: Annotated[
        bool, typer.Option("--tensorboard", help="Log for TensorBoard too: moescope[tensorboard].")
    ] = False,
    attack: Annotated[bool, typer.Option(help="Also try to relearn what was forgotten.")] = True,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the unfinished run in --out.")] = False,
    seed: Annotated[int, typer.Option(help="Of batches, controls and intervals.")] = 0,
    dtype: Dtype = "auto",
    device: Device = None,
    revision: Revision = None,
    trust_remote_code: Trust = False,
    json: Json = False,
) -> None:
    """Train one expert to forget a set of texts, and write that as a recipe, with a report of what it did."""
    named = [_target(text) for text in target or []]
    further: dict[str, Any] = dict(_named(text) for text in also or [])
    bundled = forget is None
    if bundled and (model != BUNDLED or retain is not None):
        raise MoescopeError(f"Name what to forget by --forget; without it, {BUNDLED} forgets ten people that it knows.")
    screen.quiet_transformers()
    from moescope.hooks import load
    from moescope.report.unlearning import write_unlearning
    from moescope.unlearning import Settings, study
    from moescope.unlearning.people import bundled_sets, write_sets

    settings = Settings(
        method=method, anchor=anchor, definition=definition, retain_weight=retain_weight, retention=retention,
        beta=beta, steps=steps, batch=batch, retain_batch=retain_batch, accumulate=accumulate,
        learning_rate=learning_rate,
        max_length=max_length, precision=precision, checkpointing=checkpointing, patience=patience,
        tolerance=tolerance, seed=seed,
    )  # fmt: skip
    sets = bundled_sets(seed) if bundled else {"forget": forget, "retain": retain}
    further = {name: rows for name, rows in sets.items() if name not in ("forget", "retain")} | further
    say = (lambda stage: None) if json else screen.say
    loaded = load(model, revision=revision, dtype=dtype, device=device, trust_remote_code=trust_remote_code)
    try:
        with screen.counting(steps, f"{method}, {steps} steps") as advance:
            done = study(
                loaded, sets["forget"], sets["retain"], also=further, target=named or None, top=top, out=out,
                resume=resume, compare=compare, attack=attack, tensorboard=tensorboard, settings=settings,
                on_step=lambda row: _show(row, advance, json), on_stage=say,
            )  # fmt: skip
    except KeyboardInterrupt:
        screen.interrupted(f"interrupted; what was done is kept in {out}: the same command with --resume goes on")
    if bundled:
        write_sets(sets, out / "sets")
    page = write_unlearning(done.parts(), out / "report.html")
    done.save(out / "results.json")
    if json:
        screen.print_json(done.as_dict() | {"recipe": str(out / "recipe.yaml"), "report": str(page)})
        return
    _table(done)
    screen.say(f"{out / 'recipe.yaml'} is the recipe, {page} the report")
    source = loaded.name if loaded.name == model else "CHECKPOINT"
    screen.say(f"write it into a checkpoint: moescope apply {out / 'recipe.yaml'} --from {source} --to edited")


def _show(row: dict[str, Any], advance: Any, json: bool) -> None:
    advance(row["step"])
    if not json and "forgotten" in row:
        held = f", held-out retain loss {row['utility']:.3f}" if "utility" in row else ""
        screen.say(f"step {row['step']}: forget loss {row['forgotten']:.3f}{held}")


def _table(done: Study) -> None:
    result = done.result
    variants = [str(name) for name in result["variant"].values]
    values = result["value"].values
    rows = [
        (str(result["title"].values[column]), *(_number(str(measure), value) for value in values[:, column]))
        for column, measure in enumerate(result["measure"].values)
    ]
    screen.table(("measure", *variants), rows, variants)


def _number(measure: str, value: float) -> str:
    if value != value:
        return "–"
    return f"{value:.3f}" if measure.endswith("loss") else f"{value:.1%}"


def _target(text: str) -> tuple[int | str, int]:
    layer, _, expert = text.rpartition(":")
    if not layer or not expert.isdigit():
        raise MoescopeError(f"--target is layer:expert, such as 7:33, not {text!r}.")
    return (int(layer) if layer.isdigit() else layer), int(expert)


def _named(text: str) -> tuple[str, Path]:
    name, _, file = text.partition("=")
    if not name or not file or name in ("forget", "retain"):
        raise MoescopeError(f"--also is name=file with a name of its own, not {text!r}.")
    return name, Path(file)
