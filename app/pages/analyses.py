"""Analyses: every question that can be asked of a store, its answer, and the command that gives the same."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from dash import html

from moescope import analysis, figures
from moescope.app import controls, optioncontrols, options
from moescope.app.aria import named
from moescope.app.expert_words import worded
from moescope.app.linestocopy import copied
from moescope.app.links import to
from moescope.app.scene import Scene
from moescope.app.views import BlockView, FigureView, Page, TableView
from moescope.errors import MoescopeError

if TYPE_CHECKING:
    import pandas as pd
    import xarray as xr

_FIRST = "load"
_SELECTION = ("by", "phase", "slices", "slice")
_PLACEHOLDERS = {"weights": "MODEL", "other": "OTHER", "stores": "STORES"}


def _question(scene: Scene) -> analysis.Analysis:
    """The question that is asked.

    Raises:
        MoescopeError: there is no such analysis, or this store cannot answer it.
    """
    name = scene.place.question or _FIRST
    if name not in analysis.ANALYSES:
        raise MoescopeError(f"There is no analysis {name!r}: choose one of the list.")
    return analysis.ANALYSES[name]


def _answer(scene: Scene) -> xr.Dataset:
    question = _question(scene)
    why = options.unasked(scene, question)
    if why is not None:
        raise MoescopeError(why)
    return scene.ask(question.name, **options.parameters(scene, question))


def _asked(scene: Scene) -> Any:
    """The question in words, its parameters, and what it takes from the selection."""
    question = _question(scene)
    why = options.unasked(scene, question)
    words: list[Any] = [html.P(question.help, className="asked-question")]
    if question.reading:
        words.append(html.P(worded(question.reading), className="dim asked-reading"))
    if why is not None:
        return html.Div([*words, _instead(scene, question, why)], className="asked")
    return html.Div([*words, optioncontrols.of(scene, question), _followed(scene, question)], className="asked")


def _followed(scene: Scene, question: analysis.Analysis) -> Any:
    """What of the selection counts here."""
    said, place = [], scene.place
    for name in options.followed(question):
        if name == "phase":
            said.append(f"phase: {place.phase or 'both'}")
        elif name == "where":
            said.append(f"slice: {place.slice or 'all documents'}")
        elif scene.by is not None:
            said.append(f"label: {scene.by}")
    words = "Follows the selection above: " + "; ".join(said) if said else "Does not follow the selection above"
    return html.P(f"{words}.", className="dim")


def _figure(scene: Scene) -> Any:
    return figures.draw(_answer(scene))


def _rows(scene: Scene) -> pd.DataFrame:
    """The rows that `moescope analyze … --csv` writes."""
    rows = options.shown(scene.place.options, options.ROWS)
    return analysis.table(_answer(scene), [name.strip() for name in rows.split(",")] if rows else None)


def _same(scene: Scene) -> Any:
    """Commands that give the same answer, and the answer's provenance."""
    question, result = _question(scene), _answer(scene)
    given = options.parameters(scene, question)
    rows = options.shown(scene.place.options, options.ROWS)
    command = options.command(question, [scene.opened.name], given, rows)
    ways = [
        html.H3("On the command line"),
        copied("command line", command)
        if command is not None
        else html.P("The command line takes labels, not single documents; Python can say it.", className="dim"),
        html.H3("In Python"),
        copied("Python line", options.python(question, [scene.opened.name], given)),
        html.P("Both in the folder that the app shows.", className="dim"),
        html.H3("Tables of this answer"),
        html.P(_tables(scene, result), className="tables-of"),
    ]
    facts = [part for name, value in result.attrs.items() for part in (html.Dt(name), html.Dd(str(value)))]
    origin = [html.H3("Where it comes from"), html.Dl(facts, tabIndex=0, **named("Provenance"))]
    return html.Div([html.Div(ways), html.Div(origin)], className="same")


def _tables(scene: Scene, result: xr.Dataset) -> list[Any]:
    """A link to the table by each set of dimensions that the result has."""
    place, own = scene.place, str(result.attrs.get("table", ""))
    now = options.shown(place.options, options.ROWS) or own
    found: list[Any] = []
    offered = {", ".join(map(str, variable.dims)) for variable in result.data_vars.values()} - {""}
    for dims in sorted(offered, key=lambda dims: (dims.count(","), dims)):
        kept = dims.replace(", ", ",")
        there = place.go(options=options.with_option(place.options, options.ROWS, None if dims == own else kept))
        chosen = set(kept.split(",")) == set(now.replace(" ", "").split(","))
        found.append(html.Strong(f"by {dims}") if chosen else to(there, f"by {dims}"))
    return found


def _instead(scene: Scene, question: analysis.Analysis, why: str) -> Any:
    """Why it cannot be asked here, and the command that asks it."""
    takes = [scene.opened.name if name == "store" else _PLACEHOLDERS[name] for name in question.inputs]
    shown: list[Any] = [html.P(why, className="dim")]
    if question.inputs != ("store",):
        shown.append(copied(f"command of {question.name}", options.command(question, takes, {}) or ""))
    return html.Div(shown)


def _all(scene: Scene) -> Any:
    """Every analysis, with what it asks, or why it cannot be asked here."""
    cards = []
    for question in analysis.ANALYSES.values():
        why = options.unasked(scene, question)
        name = question.name.replace("_", " ")
        if why is None:
            head: Any = to(scene.place.go(question=question.name), name)
            cards.append(html.Article([head, html.Div(question.help, className="dim")]))
        else:
            head = html.Span(name, className="unasked")
            inside = [head, html.Div(question.help, className="dim"), _instead(scene, question, why)]
            cards.append(html.Article(inside))
    return html.Div(cards, className="questions")


def _choice(scene: Scene) -> Any:
    found = controls.select("question", "Question", [], _FIRST, width=260)
    found.data = [
        {"value": name, "label": name.replace("_", " "), "disabled": options.unasked(scene, question) is not None}
        for name, question in analysis.ANALYSES.items()
    ]
    found.searchable = True
    return found


ANALYSES = Page(
    name="analyses",
    title="Analyses",
    question="Every question that can be asked of this store, with the command that gives the same answer.",
    views=(
        BlockView(
            name="asked",
            title="Question",
            how="An empty parameter takes its default, which stands in grey. What is wrong in one is said below.",
            reads=("question", *_SELECTION),
            controls=(_choice,),
            draw=_asked,
        ),
        FigureView(
            name="answer",
            title="Answer",
            how="How to read it stands with the question above; its null is drawn in.",
            reads=("question", "options", *_SELECTION),
            draw=_figure,
        ),
        TableView(
            name="rows",
            title="As a table",
            how="The rows that the command line writes with --csv. A row with a layer and an expert leads to it.",
            reads=("question", "options", *_SELECTION),
            frame=_rows,
            height=460,
        ),
        BlockView(
            name="same",
            title="The same elsewhere",
            how="",
            reads=("question", "options", *_SELECTION),
            draw=_same,
        ),
        BlockView(
            name="questions",
            title="Every question",
            how="What is grey needs more than this store holds; why, and the command that asks it, stand with it.",
            reads=("question", *_SELECTION),
            draw=_all,
        ),
    ),
    register=optioncontrols.register,
)
