"""Panels draw themselves: one callback for all figures, one for all blocks; what is not ready shows its progress."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pyarrow as pa
from dash import MATCH, ClientsideFunction, Dash, Input, Output, State, ctx, html, no_update

from moescope import figures
from moescope.app import book
from moescope.app.answers import Pending
from moescope.app.panels import note, progress
from moescope.app.place import parse
from moescope.app.scene import Desk, Scene
from moescope.app.views import FigureView, Partial, View
from moescope.errors import CancelledError, MoescopeError

_HIDDEN = {"display": "none"}


def register(app: Dash, desk: Desk) -> None:
    """Adds the callbacks."""

    def any_panel(kind: str) -> dict[str, Any]:
        return {"type": kind, "of": MATCH, "view": MATCH}

    # A panel asks the server only when something it reads has changed; this is decided in the browser.
    app.clientside_callback(
        ClientsideFunction("moescope", "wanted"),
        Output(any_panel("wanted"), "data"),
        Input("place", "data"),
        Input("theme", "data"),
        State(any_panel("reads"), "data"),
        State(any_panel("wanted"), "data"),
    )
    graph = {"type": "graph", "of": "figure", "view": MATCH}
    # The selected expert is outlined in the browser: a click elsewhere does not draw a map again.
    app.clientside_callback(
        ClientsideFunction("moescope", "mark"),
        Output(graph, "className"),
        Input("place", "data"),
        Input(graph, "figure"),
        State(graph, "id"),
    )

    @app.callback(Output(graph, "figure"), Output(graph, "style"), *said("figure"), *asked("figure"))
    def _figure(wanted: Any, ticks: Any, act: Any, name: Any, place: Any, theme: Any, job: Any) -> Any:
        drawn, words = _drawn(book.view(name["view"]), desk, wanted, act, place, theme, job)
        words = once_more(words, ticks)
        return (no_update, _HIDDEN, *words) if drawn is None else (_sent(drawn), _shown(drawn), *words)

    @app.callback(Output({"type": "body", "of": "block", "view": MATCH}, "children"), *said("block"), *asked("block"))
    def _block(wanted: Any, ticks: Any, act: Any, name: Any, place: Any, theme: Any, job: Any) -> Any:
        drawn, words = _drawn(book.view(name["view"]), desk, wanted, act, place, theme, job)
        # Where it was drawn: its links change the place from there, and the place may have moved on since.
        held = None if drawn is None else html.Div(drawn, **{"data-at": place["href"]})
        return (held, *once_more(words, ticks))


def _shown(figure: Any) -> dict[str, str]:
    """As tall as the figure says: its frame must not be lower, whoever draws it again in the browser."""
    height = figure.layout.height
    return {"display": "block"} | ({"minHeight": f"{height}px"} if height else {})


def asked(of: str) -> list[Any]:
    """What every panel of one kind is drawn from: (wanted, ticks, act, its id, place, theme, job)."""

    def one(kind: str) -> dict[str, Any]:
        return {"type": kind, "of": of, "view": MATCH}

    inputs = [Input(one("wanted"), "data"), Input(one("tick"), "n_intervals"), Input(one("act"), "data")]
    return [
        *inputs,
        State(one("wanted"), "id"),
        State("place", "data"),
        State("theme", "data"),
        State(one("job"), "data"),
    ]


def said(of: str) -> list[Any]:
    """What every panel says beside what it shows: a note, whether it asks again, the job it waits for."""

    def one(kind: str) -> dict[str, Any]:
        return {"type": kind, "of": of, "view": MATCH}

    return [Output(one("note"), "children"), Output(one("tick"), "max_intervals"), Output(one("job"), "data")]


def once_more(words: list[Any], ticks: int | None) -> list[Any]:
    """The panel's state for the browser: a panel that waits asks once more, and again only when it was answered.

    A clock that ran on while an answer is on its way would ask anew, and the browser drops the answer to a question
    that was asked again: a figure that takes longer than a tick would never come.
    """
    said, over, job = words
    return [said, 0 if over else (ticks or 0) + 1, job]


def _drawn(view: View, desk: Desk, wanted: Any, act: Any, place: Any, theme: Any, job: Any) -> tuple[Any, list[Any]]:
    """What to show and the panel's state: (note, polling is off, job)."""
    if not wanted or not place or place.get("trouble"):
        return None, [None, True, None]
    if cancelled(desk, act, job):
        return None, [note("Cancelled.", retry=view), True, None]

    def draw() -> Any:
        scene = desk.scene(parse(place["href"])[0], theme == "dark")
        return figure_of(view, scene, wanted) if isinstance(view, FigureView) else view.draw(scene)  # pyright: ignore

    return guarded(view, desk, draw)


def cancelled(desk: Desk, act: Any, job: str | None) -> bool:
    """Whether this call is a panel's cancel button; its job is told to stop."""
    pressed = isinstance(ctx.triggered_id, dict) and ctx.triggered_id.get("type") == "act"
    if not (pressed and act and act.get("do") == "cancel"):
        return False
    running = desk.jobs.get(job)
    if running is not None:
        running.cancel()
    return True


def guarded(view: View, desk: Desk, draw: Callable[[], Any]) -> tuple[Any, list[Any]]:
    """`draw()`, or the word of why there is nothing to see."""
    try:
        drawn = draw()
    except Pending as pending:
        job = pending.job
        return None, [progress(view, job.title, job.what, job.done, job.total), False, job.id]
    except CancelledError as stopped:
        return None, [note(str(stopped), retry=view), True, None]
    except MoescopeError as error:
        return None, [note(desk.shelf.without_root(str(error))), True, None]
    except (OSError, pa.ArrowException) as error:
        said = f"The store could not be read: {desk.shelf.without_root(str(error))}"
        return None, [note(said, trouble=True, retry=view), True, None]
    if isinstance(drawn, Partial):
        job = drawn.pending.job
        return drawn.shown, [progress(view, job.title, job.what, job.done, job.total), False, job.id]
    return drawn, [None, True, None]


def figure_of(view: FigureView, scene: Scene, key: Any = None) -> Any:
    """A view's figure, for the page's colours; zooming survives until what it shows changes."""
    figure = view.draw(scene)
    if scene.dark:
        figure = figures.dark(figure)
    figure.update_layout(uirevision=str(key[1:] if isinstance(key, list) else key), autosize=True)
    figure.update_layout(modebar={"bgcolor": "rgba(0,0,0,0)", "color": "#8b919a", "activecolor": "#3f84c9"})
    if view.marks:
        traces: Any = figure.data
        maps = [(trace.xaxis or "x", trace.yaxis or "y") for trace in traces if trace.type == "heatmap"]
        figure.update_layout(meta={"marks": scene.layers, "axes": list(dict.fromkeys(maps))})
    return figure


def _sent(figure: Any) -> dict[str, Any]:
    """A figure as the browser gets it: with what its points carry as lists, or a click would not report them."""
    parts = figure.to_plotly_json()
    for trace, part in zip(figure.data, parts["data"], strict=True):
        if isinstance(trace.customdata, np.ndarray):
            part["customdata"] = trace.customdata.tolist()
    return parts
