"""`moescope steer`: find experts, edit them, and measure what that does, beside random experts."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from moescope.cli import screen
from moescope.cli.editing import ModelOption
from moescope.cli.models import Device, Dtype, Json, Revision, Trust
from moescope.errors import MoescopeError

if TYPE_CHECKING:
    from moescope.edits import Recipe
    from moescope.hooks import Model

STEER_EXAMPLES = """Examples:

\b
  moescope steer --store runs/demo --target python --do mask --top 6 --data texts.jsonl --label domain
  moescope steer --model olmoe --recipe recipe.yaml --data texts.jsonl --label domain --controls 99
  moescope steer --model olmoe --wanted polite.txt --other rude.txt --do promote --top 4 --prompt "Dear" --save r.yaml
  moescope steer --store runs/demo --target arithmetic --sweep 0 --sweep 2 --sweep 8 --data texts.jsonl --html s.html
  moescope steer --recipe recipe.yaml --problems problems.jsonl --after "</think>" --sweep 0.5 --sweep 2 --sweep 8"""

Do = Literal["scale", "mask", "zero", "promote", "demote"]
SHOWN = (
    "label", "plain", "edited", "change", "low", "high", "control_mean", "control_low", "control_high", "p",
    "divergence", "control_divergence",
)  # fmt: skip


def steer(
    model: ModelOption = "tiny-qwen-moe",
    recipe: Annotated[Path | None, typer.Option(help="Edits to try (YAML or JSON).")] = None,
    store: Annotated[Path | None, typer.Option(help="A store to find experts in, by nPMI.")] = None,
    target: Annotated[str | None, typer.Option(help="With --store: the label value whose experts are meant.")] = None,
    by: Annotated[str | None, typer.Option(help="With --store: the label (default: its first).")] = None,
    wanted: Annotated[Path | None, typer.Option(help="Text file: prompts of the behaviour, one a line.")] = None,
    other: Annotated[Path | None, typer.Option(help="Text file: prompts of its opposite, one a line.")] = None,
    do: Annotated[Do, typer.Option(help="What to do with the experts that are found.")] = "scale",
    top: Annotated[int, typer.Option(help="How many experts of the whole model.")] = 2,
    factor: Annotated[float, typer.Option(help="Of --do scale.")] = 64.0,
    stage: Annotated[
        Literal["logit", "score", "weight", "weight_renormalised"], typer.Option(help="Of --do scale.")
    ] = "weight",
    data: Annotated[Path | None, typer.Option(help="Corpus to measure the loss on.")] = None,
    label: Annotated[str | None, typer.Option(help="Label of that corpus.")] = None,
    limit: Annotated[int | None, typer.Option(help="Only so many of its documents, and of the problems.")] = None,
    controls: Annotated[int, typer.Option(help="Random recipes to hold it against.")] = 20,
    factors: Annotated[
        list[float] | None, typer.Option("--sweep", help="Strengths to try, each by its own --sweep.")
    ] = None,
    problems: Annotated[
        Path | None, typer.Option(help="Problems (JSONL: prompt, answer) to solve with and without.")
    ] = None,
    after: Annotated[str, typer.Option(help="The answer stands behind the first such mark.")] = "",
    prompt: Annotated[list[str] | None, typer.Option(help="Go on from this prompt, with and without.")] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Tokens to write at most.")] = 64,
    save: Annotated[Path | None, typer.Option(help="Write the recipe to this file.")] = None,
    html: Annotated[
        Path | None, typer.Option(help="Write the figure to this file: of --data, or else of --problems.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of controls and intervals.")] = 0,
    dtype: Dtype = "auto",
    device: Device = None,
    revision: Revision = None,
    trust_remote_code: Trust = False,
    json: Json = False,
) -> None:
    """Find experts, change what they do, and measure it: loss by label, answers, and text, beside random experts."""
    if sum(given is not None for given in (recipe, store, wanted)) != 1:
        raise MoescopeError("Say where the experts come from: one of --recipe, --store and --wanted (with --other).")
    if data is None and problems is None and not prompt and save is None:
        raise MoescopeError("Say what to measure: --data with texts, --problems, or --prompt; or --save the recipe.")
    screen.quiet_transformers()
    from moescope.capturing import Corpus
    from moescope.decoding import read_problems
    from moescope.edits import Recipe
    from moescope.effects import effect, solving, sweep
    from moescope.hooks import load

    corpus = None if data is None else Corpus(data, [label] if label else [], limit=limit)
    given = None if recipe is None else Recipe.load(recipe)
    loaded = load(model, revision=revision, dtype=dtype, device=device, trust_remote_code=trust_remote_code)
    found = given or _found(loaded, store, target, by, wanted, other, do, top, factor, stage, seed)
    answer: dict[str, Any] = {"recipe": found.model_dump(mode="json")}
    if not json:
        _show_recipe(found)
    if save is not None:
        found.save(save)
        if not json:
            screen.say(f"{save} is written")
    if corpus is not None:
        n = corpus.census().documents
        with screen.counting(0, f"{n} documents x {2 + controls} recipes") as advance:
            options: dict[str, Any] = {"by": label, "controls": controls, "seed": seed, "on_progress": advance}
            result = (
                sweep(loaded, corpus, found, factors, **options)
                if factors
                else effect(loaded, corpus, found, **options)
            )
        answer["effect"] = _show_effect(result, json)
        if html is not None:
            _draw(result, html)
    if problems is not None:
        with screen.counting(100, "problems") as advance:
            solved = solving(
                loaded, read_problems(problems, limit), found, factors=factors, after=after, seed=seed,
                max_new_tokens=max_new_tokens, on_progress=lambda done, total: advance(round(100 * done / total)),
            )  # fmt: skip
        answer["problems"] = _show_solving(solved, json)
        if html is not None and corpus is None:
            _draw(solved, html)
    for text in prompt or []:
        answer.setdefault("texts", []).append(_texts(loaded, found, text, max_new_tokens, seed, json))
    if json:
        screen.print_json(answer)


def _found(
    model: Model, store: Path | None, target: str | None, by: str | None, wanted: Path | None, other: Path | None,
    do: Do, top: int, factor: float, stage: Any, seed: int,
) -> Recipe:  # fmt: skip
    from moescope import analysis
    from moescope.edits import Mask, Recipe, Zero
    from moescope.store import Store

    if wanted is not None:
        if other is None:
            raise MoescopeError("--wanted needs --other: prompts of the opposite behaviour.")
        from moescope.effects.finding import WANTED, between

        result, target = between(model, _lines(wanted), _lines(other), seed=seed), WANTED
    else:
        assert store is not None
        opened = Store.open(store)
        if opened.manifest.model.config_hash != model.config_hash:
            raise MoescopeError(f"{store} was captured from another model ({opened.manifest.model.name}).")
        result = analysis.npmi(opened, by=by, permutations=0)
        if target is None:
            labels = ", ".join(str(name) for name in result["label"].values)
            raise MoescopeError(f"Name the label value with --target: one of {labels}.")
    if do in ("promote", "demote"):
        recipe = Recipe.from_risk_difference(result, target, **{do: top})
    else:
        recipe = Recipe.from_npmi(result, target, top=top, factor=factor, stage=stage)
        if do != "scale":
            kind = {"mask": Mask, "zero": Zero}[do]
            edits = [kind(layer=edit.layer, expert=edit.expert) for edit in recipe.edits if edit.kind == "scale"]
            recipe = Recipe(edits, suggested_by=recipe.suggested_by)
    return recipe.model_copy(update={"config_hash": model.config_hash})


def _lines(file: Path) -> list[str]:
    try:
        return [line for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise MoescopeError(f"Cannot read {file}: {getattr(error, 'strerror', None) or error}.") from error


def _show_recipe(recipe: Recipe) -> None:
    values = {(v["layer"], v["expert"]): v["value"] for v in recipe.suggested_by.get("values", [])}
    screen.table(
        ("layer", "edit", "experts", "score"),
        [
            (
                edit.layer,
                f"{edit.kind} x {edit.factor:g} ({edit.stage})" if edit.kind == "scale" else edit.kind,
                ", ".join(map(str, getattr(edit, "expert", ()))),
                ", ".join(
                    f"{values[edit.layer, e]:.3f}" for e in getattr(edit, "expert", ()) if (edit.layer, e) in values
                ),
            )
            for edit in recipe.edits
        ],
    )


def _show_effect(result: Any, json: bool) -> Any:
    from moescope.analysis import table

    rows = table(result)
    if not json:
        columns = [name for name in ("factor", *SHOWN) if name in rows]
        screen.say(
            "loss in nats per token; control: the same edits on random experts of the same layers; divergence: of "
            "next-token distributions from the plain model's, nats per token"
        )
        _table(rows[columns])
    return {"attrs": result.attrs, "rows": rows.to_dict("records")}


def _show_solving(result: Any, json: bool) -> Any:
    from moescope.analysis import table

    rows = table(result).dropna(axis="columns", how="all")
    if not json:
        screen.say(f"{result.attrs['problems']} problems; tokens: mean length of what was written")
        _table(rows)
    return {"attrs": result.attrs, "rows": rows.to_dict("records")}


def _table(rows: Any) -> None:
    cells = [[v if isinstance(v, str) else f"{v:.4g}" for v in row] for row in rows.to_numpy()]
    screen.table(list(rows), cells, [name for name in rows if name not in ("label", "routing")])


def _texts(model: Model, recipe: Recipe, text: str, new: int, seed: int, json: bool) -> Any:
    """One prompt gone on from plainly, under the recipe and, where it names experts, under random ones."""
    import numpy as np

    from moescope import decoding
    from moescope.effects import matched

    routings: dict[str, Recipe | None] = {"plain": None, "edited": recipe}
    if all(hasattr(edit, "expert") for edit in recipe.edits):
        routings["random experts"] = matched(recipe, model, np.random.default_rng(seed))
    found = {
        name: decoding.generate(model, text, recipe=edits, max_new_tokens=new)[0] for name, edits in routings.items()
    }
    if not json:
        screen.heading(text)
        for name, one in found.items():
            screen.say(f"{name} ({len(one.tokens)} tokens): {one.text}")
    return {"prompt": text, **{name: one.text for name, one in found.items()}}


def _draw(result: Any, html: Path) -> None:
    from moescope.figures import draw, save

    save(draw(result), html)
