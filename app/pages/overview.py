"""Overview: what is this model doing with its experts?"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import xarray as xr
from dash import html

from moescope import figures
from moescope.analysis import expert_summary, summary
from moescope.analysis.facts import model_facts
from moescope.app import controls
from moescope.app.expert_words import (
    found_of,
    known_label,
    listed,
    of_all,
    result_of,
    result_with,
    results_of_expert,
)
from moescope.app.links import to
from moescope.app.scene import Scene
from moescope.app.views import BlockView, FigureView, Page, Partial, to_expert
from moescope.errors import MoescopeError
from moescope.figures.balances import READ as READ_BALANCE
from moescope.figures.grids import MEASURES

_CELLS = {
    "relative_load": "Load",
    "npmi": "Label (nPMI)",
    "reap": "REAP",
    "ean": "EAN",
    "absmax": "Outliers",
    "margin": "Margin",
}
"""What a cell of the grid can show, and its name on the switch."""
_FILTERS = ("by", "label", "phase", "slices", "slice")


def _facts(scene: Scene) -> Any:
    """One line on the model and the capture, and what is left out of the counts now."""
    manifest, told = scene.store.manifest, model_facts(scene.store)
    model = manifest.model
    edits = [html.Span("captured under edits", className="badge")] if manifest.settings.get("edits") else []
    if scene.store.status != "complete":
        edits.append(html.Span(f"capture {scene.store.status}", className="badge"))
    parts = [html.Span([html.Strong(number), f" {what}"]) for number, what in told["facts"]]
    captured = f"{manifest.corpus.source}; {', '.join(scene.store.tiers)}; {model.dtype}"
    return html.Div(
        [
            html.Strong(told["name"], className="facts-name"),
            html.Span(model.model_type, className="dim"),
            *parts,
            html.Span(captured, className="dim"),
            *edits,
            *_narrowed(scene),
        ],
        className="facts",
    )


def _narrowed(scene: Scene) -> list[Any]:
    place = scene.place
    found = []
    if place.label is not None and scene.by is not None:
        found.append(f"{scene.by} {place.label} only")
    if place.slice is not None:
        found.append(f"slice {place.slice}")
    if found:
        found[-1] += "; margins: all documents"
    if place.phase is not None:
        found.append(f"{place.phase} only")
    if found:
        found[-1] += "; outliers: the whole capture"
    return [html.Span(words, className="badge") for words in found]


def _grid(scene: Scene) -> Any:
    value = scene.place.value or "relative_load"
    if value not in _CELLS:
        raise MoescopeError(f"A cell shows one of {', '.join(_CELLS)}, not {value!r}.")
    result = result_with(scene, value)
    if value == "npmi" and (label := known_label(result, scene)) is not None:
        result = result.sel(label=[label])
    return figures.layer_expert_grid(result, value)


def _finding(question: str, say: Callable[[xr.Dataset, Scene], summary.Finding]) -> Callable[[Scene], Any]:
    def draw(scene: Scene) -> Any:
        try:
            found = say(result_of(scene, question), scene)
        except MoescopeError as reason:
            return found_of(summary.Finding(question, _CANNOT[question], str(reason), None), scene)
        return found_of(of_all(found, question, scene.place), scene)

    return draw


_CANNOT = {
    "load": "Load cannot be told here.",
    "npmi": "Who specialises in what cannot be told here.",
    "super_experts": "Outlier experts cannot be told from this store.",
}


def _chosen(scene: Scene) -> Any:
    """The selected expert in short; or how to select one."""
    chosen = scene.chosen()
    if chosen is None:
        words = "Click a cell: its expert is told here, and every page follows. j and k walk through the experts."
        return html.Div(words, className="dim")
    name = scene.place.expert_name or ""
    page = scene.place.go(page="expert", full=None)
    head = html.Div(
        [to(page, name, className="expert-name"), to(page, "Its page →")],
        className="chosen-head",
    )
    shown: list[Any] = [head]
    tells = (
        ("load", expert_summary.work_finding),
        ("npmi", expert_summary.preference_finding),
        ("importance", expert_summary.importance_of_expert),
        ("super_experts", expert_summary.outlier_of_expert),
    )
    found, pending = results_of_expert(scene, tells)
    shown.append(listed(found))
    return shown if pending is None else Partial(shown, pending)


def _balance(scene: Scene) -> Any:
    return figures.balance(result_of(scene, "load"))


def _switch(scene: Scene) -> Any:
    return controls.switch("value", "What a cell shows", list(_CELLS.items()), "relative_load")


_HOW = "Each cell is one expert of one layer; a click selects it.\n" + "\n".join(
    f"{name}: {MEASURES[value].read}" for value, name in _CELLS.items()
)


def _specialised(result: xr.Dataset, scene: Scene) -> summary.Finding:
    return summary.specialisation_finding(result, label=known_label(result, scene))


def _headline(name: str, title: str, question: str, say: Callable[..., summary.Finding], reads: Any) -> BlockView:
    draw = _finding(question, say)
    return BlockView(name=name, title=title, how="", reads=reads, width=4, draw=draw, bare=True)


OVERVIEW = Page(
    name="overview",
    title="Overview",
    question="What is this model doing with its experts?",
    views=(
        BlockView(name="facts", title="Model and capture", how="", reads=_FILTERS, draw=_facts, bare=True),
        _headline("even", "How even the work is", "load", lambda result, _: summary.balance_finding(result), _FILTERS),
        _headline("specialised", "Who specialises", "npmi", _specialised, _FILTERS),
        _headline(
            "outlying", "Outlier experts", "super_experts", lambda result, _: summary.outlier_finding(result), _FILTERS
        ),
        FigureView(
            name="grid",
            title="Every expert",
            how=_HOW,
            reads=("value", *_FILTERS),
            width=8,
            controls=(_switch,),
            draw=_grid,
            click=to_expert,
            marks="cell",
        ),
        BlockView(
            name="chosen",
            title="Selected expert",
            how="Each line is held against its null: what chance reaches, or the selections of its layer.",
            reads=("layer", "expert", *_FILTERS),
            width=4,
            draw=_chosen,
        ),
        FigureView(
            name="balance",
            title="Balance by layer",
            how=READ_BALANCE,
            reads=_FILTERS,
            draw=_balance,
        ),
    ),
)
