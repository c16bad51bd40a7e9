"""Commands about stores: what is in one, is it whole, its analyses, its report."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from moescope.cli import screen
from moescope.cli.models import Json
from moescope.errors import MoescopeError

if TYPE_CHECKING:
    import xarray as xr

    from moescope.store import Store

INFO_EXAMPLES = """Examples:

\b
  moescope info runs/demo
  moescope info runs/demo --json"""

CHECK_EXAMPLES = """Examples:

\b
  moescope check runs/demo
  moescope check runs/demo --fast        sizes and contents, without checksums"""

PREPARE_EXAMPLES = """Examples:

\b
  moescope prepare runs/demo"""

ANALYZE_EXAMPLES = """Examples:

\b
  moescope analyze                       list the analyses
  moescope analyze npmi --help           the options of one
  moescope analyze load runs/demo
  moescope analyze npmi runs/demo --by domain --permutations 2000 --json
  moescope analyze super_experts runs/demo --csv outliers.csv --html outliers.html
  moescope analyze placement runs/demo --devices 4 --rows layer,expert,plan --csv plan.csv
  moescope analyze compare runs/before runs/after --where domain=code --html change.html"""

REPORT_EXAMPLES = """Examples:

\b
  moescope report runs/demo              writes runs/demo/report.html
  moescope report runs/demo --by domain --out report.html"""

ATLAS_EXAMPLES = """Examples:

\b
  moescope atlas runs/demo               writes runs/demo/atlas.html: a map, and a card for every expert
  moescope atlas runs/demo --by domain --contexts 3 --out atlas.html"""

EXPERT_EXAMPLES = """Examples:

\b
  moescope expert runs/demo L3E7
  moescope expert runs/demo L3E7 --json
  moescope expert runs/demo L3E7 --model tiny-qwen-moe --html effect.html"""

StorePath = Annotated[Path, typer.Argument(help="Folder of a store.")]


def info(store: StorePath, json: Json = False) -> None:
    """Say what a store holds."""
    from moescope.store import Store

    opened = Store.open(store)
    manifest = opened.manifest
    if json:
        screen.print_json(manifest.model_dump() | {"n_tokens": opened.n_tokens, "n_documents": opened.n_documents})
        return
    model, corpus = manifest.model, manifest.corpus
    screen.heading(f"{store}: {opened.n_tokens:,} tokens of {opened.n_documents:,} documents, {opened.status}")
    active = f", {model.n_active_parameters:,} active" if model.n_active_parameters else ""
    screen.say(f"model   {model.name} ({model.architecture}, {model.n_parameters:,} parameters{active}, {model.dtype})")
    screen.say(f"corpus  {corpus.source}; labels: {', '.join(corpus.labels) or 'none'}; context {corpus.max_length}")
    screen.say(f"tiers   {', '.join(manifest.tiers)}{', loss' if manifest.loss else ''}; captured {manifest.created}")
    for edit in manifest.settings.get("edits", []):
        screen.say(f"edited  {edit}")
    screen.table(
        ("layer", "experts", "active", "score", "weights", "slots ranked by"),
        [(s.key, s.n_experts, s.top_k, s.score_function, s.weight_dtype, s.rank_by) for s in opened.sites],
        numbers=("experts", "active"),
    )


def check(
    store: StorePath,
    fast: Annotated[bool, typer.Option("--fast", help="Skip the checksums.")] = False,
    json: Json = False,
) -> None:
    """Check that a store is whole (exit code 1 if not).

    Compares sizes, checksums, ids and order with what was committed.
    """
    from moescope.store import check_store

    problems = check_store(store, checksums=not fast)
    if json:
        screen.print_json({"store": str(store), "whole": not problems, "problems": [str(p) for p in problems]})
    else:
        for problem in problems:
            screen.say(str(problem))
        screen.say(f"{store}: {len(problems)} problems" if problems else f"{store} is whole")
    raise typer.Exit(1 if problems else 0)


def prepare(store: StorePath) -> None:
    """Count ahead what the app's first pages and most analyses read.

    Keeps it in STORE/aggregates, which may be deleted; what is there already is not counted again.
    """
    from moescope import analysis
    from moescope.store import Store

    opened = Store.open(store)
    with screen.watching():
        analysis.prepare(opened)
    kept = sum(file.stat().st_size for file in (store / "aggregates").glob("*.parquet"))
    screen.say(f"{store}: {screen.size(kept)} counted ahead")


def analyze(
    context: typer.Context,
    name: Annotated[str | None, typer.Argument(help="Which analysis; leave it out to list them.")] = None,
) -> None:
    """Run one analysis on a store.

    Prints a table, or JSON with --json; --csv FILE and --html FILE write the table and the figure.
    """
    from moescope.cli.analyze import run

    run(name, context.args, context.get_help)


def report(
    store: StorePath,
    out: Annotated[Path | None, typer.Option(help="HTML file to write (default: report.html in the store).")] = None,
    by: Annotated[str | None, typer.Option(help="Label to look for specialists in (default: the first).")] = None,
) -> None:
    """Write one HTML page that answers the first questions.

    What the model does with its experts, in words and figures, with how to read each. It works offline.
    """
    from moescope.report import write
    from moescope.store import Store

    page = out or store / "report.html"
    write(Store.open(store), page, by=by)
    screen.say(f"{page} is written; open it in a browser")


By = Annotated[str | None, typer.Option(help="The document label (default: the store's first).")]


def atlas(
    store: StorePath,
    by: By = None,
    tokens: Annotated[int, typer.Option(min=0, help="Preferred tokens on each card.")] = 10,
    contexts: Annotated[int, typer.Option(min=0, help="Stretches of text on each card.")] = 2,
    out: Annotated[Path | None, typer.Option(help="The HTML file (default: atlas.html in the store).")] = None,
) -> None:
    """Write one HTML page with a map of all experts and a card for each; it works offline."""
    from moescope.report import write_atlas
    from moescope.store import Store

    path = write_atlas(Store.open(store), out or store / "atlas.html", by=by, tokens=tokens, contexts=contexts)
    screen.say(f"{path} is written; open it in a browser, and add #L3E7 to its address to go to an expert")


def _effect(
    store: Store, model: str, name: str, by: str | None, documents: int, controls: int, html: Path | None
) -> xr.Dataset:
    """What masking the expert does (`effects.causal_effect`), and its figure in a file."""
    screen.quiet_transformers()
    from moescope import figures
    from moescope.analysis.cards import parsed
    from moescope.effects import causal_effect
    from moescope.hooks import load

    layer, number = parsed(name)
    with screen.counting(0, f"masking {name}, and others of its layer beside it") as advance:
        result = causal_effect(
            load(model), store, layer, number, by=by or next(iter(store.labels), None), documents=documents,
            controls=controls, on_progress=lambda done, total: advance(done),
        )  # fmt: skip
    if html is not None:
        figures.save(figures.draw(result), html)
    return result


def expert(
    store: StorePath,
    name: Annotated[str, typer.Argument(help="The expert, as in L3E7: layer 3, expert 7.")],
    by: By = None,
    model: Annotated[
        str | None,
        typer.Option(
            help="Also mask it in this model, and say what that does to the loss of some of the store's texts."
        ),
    ] = None,
    documents: Annotated[int, typer.Option(help="With --model: texts of each label.")] = 8,
    controls: Annotated[int, typer.Option(help="With --model: other experts of its layer to hold it against.")] = 20,
    html: Annotated[Path | None, typer.Option(help="With --model: write the figure of that to this file.")] = None,
    json: Json = False,
) -> None:
    """Show one expert's card: its work, preferred label and tokens, neighbours, importance, and text it is busy in."""
    from dataclasses import asdict

    from moescope.analysis import card
    from moescope.store import Store

    if html is not None and model is None:
        raise MoescopeError("--html draws what masking the expert does: name the model to mask it in with --model.")
    opened = Store.open(store)
    found = card(opened, name, by=by)
    effect = None if model is None else _effect(opened, model, name, by, documents, controls, html)
    if json:
        from moescope.analysis import table

        caused = (
            {}
            if effect is None
            else {"causal_effect": {"attrs": effect.attrs, "rows": table(effect).to_dict("records")}}
        )
        screen.print_json(asdict(found) | caused)
        return
    screen.heading(found.name)
    screen.table(("measure", "value"), [(key, screen.cell(value)) for key, value in found.values.items()], ("value",))
    for title, near in (
        ("comes after", found.predecessors),
        ("goes on to", found.successors),
        ("scored like", found.similar),
    ):
        if near:
            screen.say(f"{title}: " + ", ".join(f"{other} ({value:.2f})" for other, value in near))
    screen.table(
        ("token", "fires on", "of", "chance would give"),
        [(repr(token.text), token.active, token.occurrences, f"{token.expected:.1f}") for token in found.tokens],
        ("fires on", "of", "chance would give"),
    )
    for example in found.examples:
        words = "".join(token.text if token.weight is None else f"[{token.text}]" for token in example.tokens)
        screen.say(f"document {example.id or example.document}, from position {example.position}:")
        screen.say(f"  {words!r}")
    for part, why in found.absent.items():
        screen.say(f"not in this store: {part} ({why})")
    if effect is not None:
        from moescope.analysis.effect_summary import effect_finding

        told = effect_finding(effect)
        screen.say(f"{told.headline} {told.detail}")
