"""Commands that change what a model does: generate with a recipe or by self-contrast, write a recipe into files."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from moescope.cli import screen
from moescope.cli.models import Device, Dtype, Json, Revision, Trust, complete_model
from moescope.errors import MoescopeError

if TYPE_CHECKING:
    from moescope.decoding import Written

GENERATE_EXAMPLES = """Examples:

\b
  moescope generate "Question: What is 8 + 3 * 9?" --model tiny-qwen-moe
  moescope generate "Once upon a time" --model olmoe --recipe recipe.yaml
  moescope generate "Question: What is 8 + 3 * 9?" --model tiny-qwen-moe --self-contrast --beta 0.5
  moescope generate --model tiny-qwen-moe --self-contrast --tune problems.jsonl --after "</think>" --json"""

APPLY_EXAMPLES = """Examples:

\b
  moescope apply recipe.yaml --from ./checkpoint --to ./edited
  moescope apply recipe.yaml --from ./checkpoint --dry-run
  moescope apply recipe.yaml --from ./checkpoint --to ./edited --prompts prompts.txt --json"""

ModelOption = Annotated[
    str,
    typer.Option("--model", "-m", help="An alias, a hub id or a folder.", autocompletion=complete_model),
]


def generate(
    prompt: Annotated[str | None, typer.Argument(help="What to go on from; - reads it from standard input.")] = None,
    model: ModelOption = "tiny-qwen-moe",
    recipe: Annotated[Path | None, typer.Option(help="Edits to be live (YAML or JSON).")] = None,
    self_contrast: Annotated[
        bool, typer.Option("--self-contrast", help="Decode against a weaker routing (SCMoE).")
    ] = False,
    beta: Annotated[float, typer.Option(help="Strength of the contrast.")] = 0.5,
    alpha: Annotated[float, typer.Option(help="Least share of the likeliest token's probability.")] = 0.1,
    weak_rank: Annotated[int, typer.Option(help="Rank that the weak routing uses alone, from 1.")] = 2,
    tune: Annotated[
        Path | None, typer.Option(help="Problems (JSONL: prompt, answer) to try alphas and betas on.")
    ] = None,
    betas: Annotated[list[float] | None, typer.Option(help="Betas to try with --tune.")] = None,
    alphas: Annotated[list[float] | None, typer.Option(help="Alphas to try with --tune.")] = None,
    after: Annotated[str, typer.Option(help="With --tune: the answer stands behind the first such mark.")] = "",
    limit: Annotated[int | None, typer.Option(help="With --tune: only so many problems.")] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Tokens to write at most.")] = 64,
    sample: Annotated[bool, typer.Option("--sample", help="Sample instead of taking the likeliest token.")] = False,
    temperature: Annotated[float, typer.Option(help="Of sampling.")] = 1.0,
    seed: Annotated[int, typer.Option(help="Of sampling.")] = 0,
    steps: Annotated[bool, typer.Option("--steps", help="Show both distributions of each token.")] = False,
    dtype: Dtype = "auto",
    device: Device = None,
    revision: Revision = None,
    trust_remote_code: Trust = False,
    json: Json = False,
) -> None:
    """Let a model write on, plainly, with a recipe's edits live, or by self-contrast decoding."""
    import sys

    if (prompt is None) == (tune is None):
        raise MoescopeError("Give a prompt, or --tune with a file of problems (and not both).")
    if weak_rank < 1:
        raise MoescopeError("Ranks count from 1: --weak-rank 2 is each token's second best expert.")
    if prompt == "-":
        prompt = sys.stdin.read()
    screen.quiet_transformers()
    from moescope import decoding
    from moescope.decoding.contrast import weak_routing
    from moescope.edits import Recipe
    from moescope.hooks import load

    edits = None if recipe is None else Recipe.load(recipe)
    loaded = load(model, revision=revision, dtype=dtype, device=device, trust_remote_code=trust_remote_code)
    if tune is not None:
        _tune(loaded, tune, limit, alphas, betas, weak_routing(loaded, weak_rank - 1), after, max_new_tokens, json)
        return
    assert prompt is not None
    options: dict[str, Any] = {
        "max_new_tokens": max_new_tokens, "do_sample": sample, "temperature": temperature, "seed": seed,
    }  # fmt: skip
    if self_contrast:
        weak = weak_routing(loaded, weak_rank - 1)
        (one,) = decoding.self_contrast(
            loaded, prompt, beta=beta, alpha=alpha, weak=weak, strong=edits, steps=steps or json, **options
        )
    else:
        (one,) = decoding.generate(loaded, prompt, recipe=edits, **options)
    if json:
        screen.print_json({"prompt": one.prompt, "text": one.text, "tokens": one.tokens,
                           "steps": [vars(step) for step in one.steps]})  # fmt: skip
        return
    screen.say(one.text)
    if steps:
        _show_steps(one, loaded.tokenizer)


def _show_steps(one: Written, tokenizer: Any) -> None:
    def shown(best: list[tuple[int, float]]) -> str:
        return "  ".join(f"{tokenizer.decode([token])!r} {p:.2f}" for token, p in best[:3])

    screen.table(
        ("token", "strong", "weak", "likeliest, strong", "likeliest, weak"),
        [
            (
                repr(tokenizer.decode([s.token])),
                f"{s.strong:.3f}",
                f"{s.weak:.3f}",
                shown(s.top_strong),
                shown(s.top_weak),
            )
            for s in one.steps
        ],
        numbers=("strong", "weak"),
    )


def _tune(
    model: Any, file: Path, limit: int | None, alphas: Any, betas: Any, weak: Any, after: str, new: int, json: bool
) -> None:
    from moescope import decoding
    from moescope.analysis import table

    problems = decoding.read_problems(file, limit)
    alphas, betas = alphas or [0.1], betas or [0.0, 0.25, 0.5, 1.0]
    with screen.counting(len(problems) * (1 + len(alphas) * len(betas)), "problems") as advance:
        result = decoding.tune(
            model, problems, alphas=alphas, betas=betas, weak=weak, after=after, max_new_tokens=new, on_progress=advance
        )
    rows = table(result)
    plain = {name: result[name].item() for name in ("plain", "plain_low", "plain_high", "plain_tokens")}
    if json:
        screen.print_json({"attrs": result.attrs, **plain, "rows": rows.to_dict("records")})
        return
    screen.say(
        f"plain greedy decoding solves {plain['plain']:.1%} of {len(problems)} "
        f"({plain['plain_low']:.1%} to {plain['plain_high']:.1%})"
    )
    columns = [str(column) for column in rows.columns]
    screen.table(columns, [[f"{value:.3g}" for value in row] for row in rows.to_numpy()], columns)


def apply(
    recipe: Annotated[Path, typer.Argument(help="The recipe (YAML or JSON).")],
    source: Annotated[Path, typer.Option("--from", help="Folder of the checkpoint; it is never written to.")],
    out: Annotated[Path | None, typer.Option("--to", help="Folder of the edited checkpoint; must not exist.")] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say which tensors would change, and write nothing.")
    ] = False,
    approximate: Annotated[
        bool, typer.Option("--approximate", help="Allow what a checkpoint cannot hold exactly.")
    ] = False,
    verify: Annotated[bool, typer.Option(help="Compare the written checkpoint with the live edit.")] = True,
    prompts: Annotated[Path | None, typer.Option(help="Text file: one prompt a line to compare on.")] = None,
    json: Json = False,
) -> None:
    """Write a recipe's edits into a copy of a checkpoint, and prove that it computes what the live edit does."""
    if out is None and not dry_run:
        raise MoescopeError("Name the new folder with --to, or ask for --dry-run.")
    screen.quiet_transformers()
    from moescope.edits import Recipe, plan, plan_leaving, write

    edits = Recipe.load(recipe)
    if dry_run:
        leaving = plan_leaving(edits, source)
        prunes = any(edit.kind == "prune" for edit in edits.edits)
        changes = [] if prunes else plan(edits, source, approximate=approximate)
        if json:
            screen.print_json({"changes": [_plain(change) for change in changes], "leaving": leaving})
            return
        for change in [*changes, *leaving]:
            screen.say(str(change))
        more = f", and {len(leaving)} tensors would be cut, renamed or gone" if leaving else ""
        if any(edit.kind == "route" for edit in edits.edits):
            more += ", and the configuration's number of experts for each token"
        screen.say(f"{len(changes)} tensor parts would change{more}; nothing was written")
        return
    assert out is not None
    texts = None
    if prompts is not None:
        try:
            texts = [line for line in prompts.read_text(encoding="utf-8").splitlines() if line.strip()]
        except (OSError, UnicodeDecodeError) as error:
            raise MoescopeError(f"Cannot read {prompts}: {getattr(error, 'strerror', None) or error}.") from error
    if approximate and not verify:
        raise MoescopeError("--approximate needs the comparison that says how near it comes; leave out --no-verify.")
    done = write(edits, source, out, approximate=approximate, verify=verify, prompts=texts)
    if json:
        proof = None if done.proof is None else vars(done.proof)
        screen.print_json({"path": str(done.path), "changes": [_plain(c) for c in done.changes],
                           "pruned": done.pruned, "settings": done.settings, "exact": done.exact,
                           "proof": proof})  # fmt: skip
        return
    screen.say(f"{done.path} is written: {done.difference}")
    if not done.exact and done.proof is not None:
        inexact = [change for change in done.changes if not change.exact]
        screen.say(
            f"approximate: {len(inexact)} of {len(done.changes)} tensor parts do not hold their edit exactly; "
            f"next-token distributions differ by {done.proof.divergence:.3g} nats from the live edit"
        )
    if done.proof is not None:
        screen.say(
            f"live and written differ by at most {done.proof.largest:.2g} in a logit over {done.proof.tokens} tokens "
            f"(the edit itself changes up to {done.proof.changed:.2g}); divergence {done.proof.divergence:.2g} nats"
        )


def _plain(change: Any) -> dict[str, Any]:
    return {
        "file": change.tensor.file, "tensor": change.tensor.name, "entry": change.entry, "factor": change.factor,
        "value": None if change.value is None else str(change.value), "exact": change.exact,
    }  # fmt: skip
