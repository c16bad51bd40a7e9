"""`moescope trace`: what an answer owes to each expert, layer, token or path."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from moescope.cli import screen
from moescope.cli.editing import ModelOption
from moescope.cli.models import Device, Dtype, Json, Revision, Trust
from moescope.errors import MoescopeError

TRACE_EXAMPLES = """Examples:

\b
  moescope trace "The capital of France is" --answer " Paris" --model olmoe --html experts.html
  moescope trace "What is 8 + 3?" --answer " 11" --wrong " 12" --what layers --do zero
  moescope trace "The Louvre is in" --answer " Paris" --source "The Prado is in" --what positions --html map.html
  moescope trace --cases cases.jsonl --what experts --do mask --keep runs/trace --csv experts.csv
  moescope trace --cases cases.jsonl --what paths --length 2 --top 10 --controls 50 --json
  moescope trace "The capital of France is" --answer " Paris" --what paths --path 1:3,2:7 --path 4:0,5:9"""

What = Literal["experts", "layers", "positions", "paths"]
SHOWN = {
    "experts": ("layer", "expert", "effect", "low", "high", "p", "tokens"),
    "layers": ("layer", "effect", "low", "high", "recovered", "control_mean", "control_low", "control_high", "p"),
    "positions": ("layer", "position", "word", "effect", "recovered", "control_mean", "p"),
    "paths": ("path", "effect", "low", "high", "parts", "travelled", "control_low", "control_high", "p"),
}
ROWS_SHOWN = 20


def trace(
    prompt: Annotated[str | None, typer.Argument(help="What the model reads; - reads it from standard input.")] = None,
    answer: Annotated[str | None, typer.Option(help="What should follow, with its leading space.")] = None,
    wrong: Annotated[
        str | None, typer.Option(help="What should not: measures the difference of the two first tokens' logits.")
    ] = None,
    source: Annotated[str | None, typer.Option(help="Another prompt, whose routing is patched in.")] = None,
    cases: Annotated[
        Path | None, typer.Option(help="Instead of a prompt: JSONL with prompt, answer, and wrong and source if used.")
    ] = None,
    model: ModelOption = "tiny-qwen-moe",
    what: Annotated[What, typer.Option(help="What is silenced or patched, one at a time.")] = "experts",
    do: Annotated[
        Literal["mask", "zero", "patch"] | None,
        typer.Option(help="Default: patch where there is a source; else mask, or zero for layers and positions."),
    ] = None,
    layer: Annotated[list[int] | None, typer.Option(help="Only this layer; give it several times for more.")] = None,
    window: Annotated[int, typer.Option(help="Of layers and positions: MoE layers changed together.")] = 1,
    span: Annotated[int, typer.Option(help="Of positions: tokens changed together.")] = 1,
    path: Annotated[list[str] | None, typer.Option(help="A path, as 1:3,2:7; default: the most travelled.")] = None,
    length: Annotated[int, typer.Option(help="Layers of the paths that are looked for.")] = 3,
    top: Annotated[int, typer.Option(help="How many paths are looked for.")] = 20,
    align: Annotated[
        Literal["same", "start", "end", "tokens"], typer.Option(help="How the source's tokens are aligned.")
    ] = "same",
    controls: Annotated[int | None, typer.Option(help="Random controls (default: 20; positions: 0).")] = None,
    rows: Annotated[int, typer.Option(help="Interventions in one forward pass.")] = 16,
    keep: Annotated[Path | None, typer.Option(help="Folder that lets a killed run go on.")] = None,
    csv: Annotated[Path | None, typer.Option(help="Write the table to this file.")] = None,
    html: Annotated[Path | None, typer.Option(help="Write the figure to this file.")] = None,
    seed: Annotated[int, typer.Option(help="Of controls and intervals.")] = 0,
    dtype: Dtype = "auto",
    device: Device = None,
    revision: Revision = None,
    trust_remote_code: Trust = False,
    json: Json = False,
) -> None:
    """Silence each expert, layer, token's routing or path, or patch it from another prompt, and measure the answer."""
    import sys

    if (prompt is None) == (cases is None):
        raise MoescopeError("Give a prompt (with --answer), or --cases with a file of them (and not both).")
    if prompt is not None and answer is None:
        raise MoescopeError("Say with --answer what should follow the prompt.")
    screen.quiet_transformers()
    from moescope import effects
    from moescope.analysis import table
    from moescope.analysis.spreadsheets import write_csv
    from moescope.effects.pathtraces import parsed
    from moescope.hooks import load

    if cases is not None:
        items = effects.read_cases(cases)
    else:
        assert prompt is not None and answer is not None  # noqa: PT018
        items = [effects.Case(sys.stdin.read() if prompt == "-" else prompt, answer, wrong, source)]
    if what == "positions" and len(items) > 1:
        raise MoescopeError("Positions are traced in one prompt; give one instead of several cases.")
    if (what == "paths" and layer) or (what != "paths" and path):
        raise MoescopeError("--path belongs to --what paths, and --layer to all others.")
    kind = do or _usual(what, items)
    metric = "difference" if all(case.wrong is not None for case in items) else "loss"
    n_controls = controls if controls is not None else 0 if what == "positions" else 20
    paths = [parsed(one) for one in path] if path else None
    loaded = load(model, revision=revision, dtype=dtype, device=device, trust_remote_code=trust_remote_code)
    options: dict[str, Any] = {
        "kind": kind, "metric": metric, "align": align, "rows": rows, "seed": seed, "out": keep,
    }  # fmt: skip
    if what != "paths":
        options["layers"] = layer
    with screen.counting(100, f"{what} {kind}") as advance:
        options["on_progress"] = lambda done, total: advance(round(100 * done / total))
        if what == "experts":
            result = effects.trace_experts(loaded, items, **options)
        elif what == "layers":
            result = effects.trace_layers(loaded, items, window=window, controls=n_controls, **options)
        elif what == "positions":
            result = effects.trace_positions(loaded, items[0], window=window, span=span, controls=n_controls, **options)
        else:
            result = effects.trace_paths(
                loaded, items, paths=paths, length=length, top=top, controls=n_controls, **options
            )
    rows_of = table(result)
    if what == "positions":
        words = result["word"].values
        rows_of.insert(2, "word", [words[position] for position in rows_of["position"]])
    if csv is not None:
        write_csv(rows_of, csv)
    if html is not None:
        from moescope.figures import draw, save

        save(draw(result), html)
    if json:
        known = {name: result[name].values for name in ("plain", "source")}
        screen.print_json({"attrs": result.attrs, **known, "rows": rows_of.to_dict("records")})
        return
    _show(result, rows_of, SHOWN[what])


def _usual(what: What, items: list[Any]) -> Literal["mask", "zero", "patch"]:
    if all(case.source is not None for case in items):
        return "patch"
    return "zero" if what in ("layers", "positions") else "mask"


def _show(result: Any, rows: Any, shown: tuple[str, ...]) -> None:
    """The largest effects, whatever their sign."""
    attrs = result.attrs
    plain = float(result["plain"].mean())
    screen.say(f"plain: {plain:.4g} {attrs['unit']}, over {attrs['cases']} case{'s' * (attrs['cases'] > 1)}")
    if attrs["kind"] == "patch":
        screen.say(f"in the source's own run: {float(result['source'].mean()):.4g}")
    if str(attrs.get("control", "none")) != "none":
        screen.say(attrs["control"])
    order = rows["effect"].abs().sort_values(ascending=False, kind="stable").index
    best = rows.loc[order][rows.loc[order]["effect"].notna()]
    columns = [name for name in shown if name in best and best[name].notna().any()]
    cells = [[_cell(value) for value in row] for row in best[columns].head(ROWS_SHOWN).itertuples(index=False)]
    numbers = [name for name in columns if name not in ("path", "word")]
    screen.table(columns, cells, numbers)
    if len(best) > ROWS_SHOWN:
        screen.say(f"the {ROWS_SHOWN} largest of {len(best)}; --csv FILE, --json or --html FILE for all of them")


def _cell(value: Any) -> str:
    if isinstance(value, str):
        return repr(value) if value != value.strip() or not value else value
    return str(value) if isinstance(value, int) else f"{value:.4g}"
