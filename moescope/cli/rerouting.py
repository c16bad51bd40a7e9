"""`moescope reroute`: decode with routing weights moved toward those of similar prompts answered correctly."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from moescope.cli import screen
from moescope.cli.editing import ModelOption
from moescope.cli.models import Device, Dtype, Json, Revision, Trust
from moescope.errors import MoescopeError

REROUTE_EXAMPLES = """Examples:

\b
  moescope reroute "Question: What is 8 + 3 * 9?" --references problems.jsonl --after "</think>"
  moescope reroute "Question: What is 8 + 3 * 9?" --references problems.jsonl --objective routing --neighbours 8
  moescope reroute --problems test.jsonl --references train.jsonl --model olmoe --limit 50 --json"""


def reroute(
    prompt: Annotated[str | None, typer.Argument(help="What to go on from; - reads it from standard input.")] = None,
    references: Annotated[
        Path | None, typer.Option(help="Problems (JSONL: prompt, answer); those solved plainly lead the way.")
    ] = None,
    problems: Annotated[
        Path | None, typer.Option(help="Instead of a prompt: problems to judge by, plainly, rerouted and by chance.")
    ] = None,
    model: ModelOption = "tiny-qwen-moe",
    neighbours: Annotated[int, typer.Option(help="References that pull at a prompt.")] = 5,
    steps: Annotated[int, typer.Option(help="Gradient steps.")] = 10,
    rate: Annotated[float, typer.Option(help="Length of the first, as a share of the weights' own.")] = 0.1,
    objective: Annotated[
        Literal["answers", "routing"],
        typer.Option(help="Toward the loss of the neighbours' right answers, or toward their routing."),
    ] = "answers",
    space: Annotated[
        Literal["routing", "embedding"], typer.Option(help="What neighbours are near each other in.")
    ] = "routing",
    last: Annotated[int, typer.Option(help="How many of the last prompt tokens are rerouted.")] = 1,
    layer: Annotated[list[int] | None, typer.Option(help="Only this layer; give it several times for more.")] = None,
    after: Annotated[str, typer.Option(help="The answer stands behind the first such mark.")] = "",
    limit: Annotated[int | None, typer.Option(help="Only so many references and problems.")] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Tokens to write at most.")] = 64,
    csv: Annotated[Path | None, typer.Option(help="With --problems: write the table to this file.")] = None,
    seed: Annotated[int, typer.Option(help="Of the random references.")] = 0,
    dtype: Dtype = "auto",
    device: Device = None,
    revision: Revision = None,
    trust_remote_code: Trust = False,
    json: Json = False,
) -> None:
    """Decode with a prompt's routing moved, at test time, toward that of similar prompts answered correctly (R2-T2)."""
    import sys

    if (prompt is None) == (problems is None):
        raise MoescopeError("Give a prompt, or --problems with a file of them (and not both).")
    if references is None:
        raise MoescopeError("Name the problems that lead the way with --references.")
    screen.quiet_transformers()
    from moescope import decoding
    from moescope.hooks import load

    known = decoding.read_problems(references, limit)
    asked = None if problems is None else decoding.read_problems(problems, limit)
    loaded = load(model, revision=revision, dtype=dtype, device=device, trust_remote_code=trust_remote_code)
    with screen.counting(len(known), "references") as advance:
        rerouter = decoding.Rerouter(
            loaded, known, neighbours=neighbours, steps=steps, rate=rate, objective=objective, space=space, last=last,
            layers=layer, after=after, max_new_tokens=max_new_tokens, on_progress=advance,
        )  # fmt: skip
    if asked is not None:
        _judge(rerouter, asked, after, max_new_tokens, seed, csv, json)
        return
    assert prompt is not None
    done = rerouter(sys.stdin.read() if prompt == "-" else prompt, max_new_tokens)
    leading = [
        {"prompt": loaded.tokenizer.decode(rerouter.known[number].prompt, skip_special_tokens=True), "weight": weight}
        for number, weight in done.neighbours
    ]
    if json:
        routing = {key: {"before": done.before[key].tolist(), "after": done.after[key].tolist()} for key in done.before}
        screen.print_json({
            "prompt": done.written.prompt, "text": done.written.text, "tokens": done.written.tokens,
            "losses": done.losses, "moved": done.moved, "neighbours": leading, "routing": routing,
        })  # fmt: skip
        return
    screen.say(done.written.text)
    screen.say()
    screen.say(
        f"loss over the neighbours {done.losses[0]:.4g} → {done.losses[-1]:.4g}; {done.moved:.1%} of the routing "
        "weight moved to other experts"
    )
    screen.table(("weight", "neighbour"), [(f"{one['weight']:.2f}", one["prompt"]) for one in leading], ("weight",))


def _judge(rerouter: Any, asked: Any, after: str, new: int, seed: int, csv: Path | None, json: bool) -> None:
    from moescope import decoding
    from moescope.analysis import table
    from moescope.analysis.spreadsheets import write_csv

    with screen.counting(2 * len(asked), "problems") as advance:
        result = decoding.judge(rerouter, asked, after=after, max_new_tokens=new, seed=seed, on_progress=advance)
    rows = table(result)
    if csv is not None:
        write_csv(rows, csv)
    if json:
        screen.print_json({"attrs": result.attrs, "rows": rows.to_dict("records")})
        return
    screen.say(f"{len(asked)} problems; {len(rerouter.known)} references were answered correctly")
    columns = [str(column) for column in rows.columns]
    screen.table(
        columns, [[v if isinstance(v, str) else f"{v:.3g}" for v in row] for row in rows.to_numpy()], columns[1:]
    )
