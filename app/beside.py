"""The selected expert beside a pinned one: what each prefers, and what is known of either."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from dash import html

from moescope import figures
from moescope.analysis import expert_summary
from moescope.analysis.summary import Finding
from moescope.app.aria import SILENT
from moescope.app.expert_words import result_of, results_of_expert, sign
from moescope.app.links import to
from moescope.app.place import Place
from moescope.app.scene import Scene
from moescope.app.views import Partial
from moescope.errors import MoescopeError

_ASKS = (
    ("Work", "load", expert_summary.work_finding),
    ("Labels", "npmi", expert_summary.preference_finding),
    ("Importance", "importance", expert_summary.importance_of_expert),
    ("Margin", "margins", expert_summary.margin_of_expert),
    ("Outputs", "super_experts", expert_summary.outlier_of_expert),
)


def two(place: Place) -> bool:
    """Whether another expert is pinned than is selected."""
    return place.pin != place.expert_name


def pin(scene: Scene) -> Any:
    """In an expert's heading: pins it, or says that it is pinned and lets it go."""
    place = scene.place
    if not two(place):
        words = [html.Span("pinned", className="badge"), to(place.go(pin=None), "Let it go")]
        return html.Span(
            [*words, html.Span("Select another (j, k, J, K) to see both.", className="dim")], className="pin"
        )
    title = "Keep it in view beside the experts you select next"
    return to(place.go(pin=place.expert_name), "Pin", className="step wide", title=title)


def labels(scene: Scene) -> Any:
    """What either prefers."""
    other = _pinned(scene)
    first, second = scene.chosen(), other.chosen()
    if first is None or second is None:
        raise MoescopeError("No expert is selected.")
    return figures.experts_beside(result_of(scene, "npmi"), first, second)


def known(scene: Scene) -> Any:
    """What is known of either, line by line, as far as it is there."""
    other = _pinned(scene)
    rows, waits = [], None
    for name, question, say in _ASKS:
        cells = []
        for side in (scene, other):
            found, pending = results_of_expert(side, [(question, say)])
            waits = waits or pending
            cells.append(html.Td([_told(one) for one in found] or "…"))
        rows.append(html.Tr([html.Th(name, scope="row"), *cells]))
    place, there = scene.place, other.place
    exchanged = there.go(pin=place.expert_name)
    ways = [
        to(exchanged, "Exchange the two", title=f"Select {there.expert_name}, pin {place.expert_name}"),
        to(place.go(pin=None), f"Let {there.expert_name} go"),
    ]
    head = html.Tr(
        [
            html.Td(""),
            html.Th([html.Span("● ", className="first", **SILENT), place.expert_name or ""], scope="col"),
            html.Th(
                [
                    html.Span("◆ ", className="second", **SILENT),
                    to(there, there.expert_name),
                    html.Span(" pinned", className="dim"),
                ],
                scope="col",
            ),
        ]
    )
    shown = [
        html.Table([html.Thead(head), html.Tbody(rows)], className="rules beside"),
        html.Div(ways, className="beside-ways"),
    ]
    return shown if waits is None else Partial(shown, waits)


def _told(finding: Finding) -> Any:
    """A headline; the numbers behind it stand on the expert's own page, and here under the pointer."""
    return html.Div([sign(finding), html.Div(finding.headline)], className="signed", title=finding.detail)


def _pinned(scene: Scene) -> Scene:
    """The scene with the pinned expert selected.

    Raises:
        MoescopeError: none is pinned.
    """
    place = scene.place.pinned
    if place is None:
        raise MoescopeError("No expert is pinned: open one and press Pin.")
    return replace(scene, place=place)
