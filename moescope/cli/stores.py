"""Commands about stores: what is in one, is it whole, its analyses, its report."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from moescope.cli import screen
from moescope.cli.models import Json

INFO_EXAMPLES = """Examples:

\b
  moescope info runs/demo
  moescope info runs/demo --json"""

CHECK_EXAMPLES = """Examples:

\b
  moescope check runs/demo
  moescope check runs/demo --fast        sizes and contents, without checksums"""

ANALYZE_EXAMPLES = """Examples:

\b
  moescope analyze                       list the analyses
  moescope analyze npmi --help           the options of one
  moescope analyze load runs/demo
  moescope analyze npmi runs/demo --by domain --permutations 2000 --json
  moescope analyze super_experts runs/demo --csv outliers.csv --html outliers.html"""

REPORT_EXAMPLES = """Examples:

\b
  moescope report runs/demo              writes runs/demo/report.html
  moescope report runs/demo --by domain --out report.html"""

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
