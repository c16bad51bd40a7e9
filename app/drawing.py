"""Panels draw themselves: one callback for all figures, one for all blocks; what is not ready shows its progress."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
from dash import MATCH, ClientsideFunction, Dash, Input, Output, State, ctx, html, no_update

from moescope import figures
from moescope.app import book
from moescope.app.answers import PATIENCE, Pending
from moescope.app.links import to
from moescope.app.panels import HIDDEN, MODEBAR, frame_of, note, progress, stop
from moescope.app.place import parse
from moescope.app.scene import Desk, Scene
from moescope.app.views import ElsewhereError, FigureView, Page, Partial, TableView, View
from moescope.errors import CancelledError, MoescopeError

if TYPE_CHECKING:
    import plotly.graph_objects as go

_SOONEST, _LATEST = 0.2, 1.0  # seconds between two questions of a panel that waits
_AT_ONCE = 0.04  # seconds that a page may take over what it comes with


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

    @app.callback(
        Output(graph, "figure"),
        Output(graph, "style"),
        Output({"type": "body", "of": "figure", "view": MATCH}, "tabIndex"),
        *outputs_of("figure"),
        *inputs_of("figure"),
        prevent_initial_call=True,
    )
    def _figure(wanted: Any, ticks: Any, act: Any, name: Any, place: Any, theme: Any, job: Any) -> Any:
        view = book.view(name["view"])
        drawn, words = _drawn(view, desk, wanted, act, place, theme, job)
        words = once_more(desk, words, ticks)
        if drawn is None:
            return no_update, HIDDEN, no_update, *words
        return drawn, frame_of(drawn), stop(view, drawn), *words

    @app.callback(
        Output({"type": "body", "of": "block", "view": MATCH}, "children"),
        *outputs_of("block"),
        *inputs_of("block"),
        prevent_initial_call=True,
    )
    def _block(wanted: Any, ticks: Any, act: Any, name: Any, place: Any, theme: Any, job: Any) -> Any:
        drawn, words = _drawn(book.view(name["view"]), desk, wanted, act, place, theme, job)
        return (None if drawn is None else _placed(drawn, place), *once_more(desk, words, ticks))


def at_hand(page: Page, scene: Scene, place: dict[str, Any], theme: str | None) -> dict[str, tuple[Any, list[Any]]]:
    """The blocks and figures of a page that need no waiting: they come with the page, as far as time allows.

    By view: the components or the figure, and their key, which is the one that the browser makes of the same place.
    What is not at hand begins to be computed here. What looks otherwise on a dark page comes later if `theme` is None.
    """
    found, begun = {}, time.monotonic()
    for view in page.shown(scene.place, scene.store):
        if isinstance(view, TableView) or (view.themed and theme is None) or time.monotonic() - begun >= _AT_ONCE:
            continue
        now = place | {"theme": theme}
        key = [now.get(name) for name in ("store", "version", "trouble", *view.follows)]
        try:
            drawn = _draw(view, scene, key)
        except (Pending, MoescopeError, OSError, pa.ArrowException):  # its panel will ask, and say why
            continue
        except Exception:  # so will it, and fail alone
            logging.getLogger(__name__).exception("%s did not come with its page", view.name)
            continue
        if not isinstance(drawn, Partial):
            found[view.name] = (drawn if isinstance(view, FigureView) else _placed(drawn, place)), key
    return found


def _placed(drawn: Any, place: dict[str, Any]) -> Any:
    """With where it was drawn: its links change the place from there, and the place may have moved on since."""
    return html.Div(drawn, **{"data-at": place["href"]})


def inputs_of(of: str) -> list[Any]:
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


def outputs_of(of: str) -> list[Any]:
    """What every panel says beside what it shows: a note, whether and when it asks again, the job it waits for."""

    def one(kind: str) -> dict[str, Any]:
        return {"type": kind, "of": of, "view": MATCH}

    return [
        Output(one("note"), "children"),
        Output(one("tick"), "max_intervals"),
        Output(one("tick"), "interval"),
        Output(one("job"), "data"),
    ]


def once_more(desk: Desk, words: list[Any], ticks: int | None) -> list[Any]:
    """The panel's state for the browser: a panel that waits asks once more, and again only when it was answered.

    A clock that ran on while an answer is on its way would ask anew, and the browser drops the answer to a question
    that was asked again: a figure that takes longer than a tick would never come. Long work is asked after less often.
    """
    said, over, name = words
    job = desk.jobs.get(name)
    pause = _SOONEST if job is None else min(max(_SOONEST, job.age / 5), _LATEST)
    return [said, 0 if over else (ticks or 0) + 1, round(1000 * pause), name]


def _drawn(view: View, desk: Desk, wanted: Any, act: Any, place: Any, theme: Any, job: Any) -> tuple[Any, list[Any]]:
    """What to show and the panel's state: (note, polling is off, job)."""
    if not wanted or not place or place.get("trouble"):
        return None, [None, True, None]
    if cancelled(desk, act, job):
        return None, [note("Cancelled.", retry=view), True, None]

    def draw() -> Any:
        # Who only asks whether it is there by now does not wait for it.
        scene = desk.scene(parse(place["href"])[0], theme == "dark", 0 if pressed("tick") else PATIENCE)
        return _draw(view, scene, wanted)

    return guarded(view, desk, draw)


def cancelled(desk: Desk, act: Any, job: str | None) -> bool:
    """Whether this call is a panel's cancel button; its job is told to stop."""
    if not (pressed("act") and act and act.get("do") == "cancel"):
        return False
    running = desk.jobs.get(job)
    if running is not None:
        running.cancel()
    return True


def pressed(kind: str) -> bool:
    """Whether this call comes from this part of a panel: its clock, its buttons."""
    return isinstance(ctx.triggered_id, dict) and ctx.triggered_id.get("type") == kind


def guarded(view: View, desk: Desk, draw: Callable[[], Any]) -> tuple[Any, list[Any]]:
    """`draw()`, or the word of why there is nothing to see."""
    try:
        drawn = draw()
    except Pending as pending:
        job = pending.job
        return None, [progress(view, job.title, job.what, job.done, job.total), False, job.id]
    except CancelledError as stopped:
        return None, [note(str(stopped), retry=view), True, None]
    except ElsewhereError as error:
        return None, [note(f"{error} ", way=to(error.there, error.way)), True, None]
    except MoescopeError as error:
        return None, [note(desk.shelf.without_root(str(error))), True, None]
    except (OSError, pa.ArrowException) as error:
        said = f"The store could not be read: {desk.shelf.without_root(str(error))}"
        return None, [note(said, trouble=True, retry=view), True, None]
    except Exception as error:  # what was drawn of an earlier place must not stay
        logging.getLogger(__name__).exception("%s failed", view.name)
        said = f"This panel failed: {type(error).__name__}: {desk.shelf.without_root(str(error))}"
        return None, [note(said, trouble=True, retry=view), True, None]
    if isinstance(drawn, Partial):
        job = drawn.pending.job
        return drawn.shown, [progress(view, job.title, job.what, job.done, job.total), False, job.id]
    return drawn, [None, True, None]


def _draw(view: View, scene: Scene, key: list[Any]) -> Any:
    """A block's components, or a figure as the browser gets it; `key` says what it shows."""
    if isinstance(view, FigureView):
        return sent(view, scene, figure_of(view, scene), key)
    return view.draw(scene)  # pyright: ignore


def figure_of(view: FigureView, scene: Scene) -> go.Figure:
    """A view's figure, in the page's colours."""
    figure = view.draw(scene)
    return figures.dark(figure) if scene.dark else figure


def sent(view: FigureView, scene: Scene, figure: go.Figure, key: Any = None) -> dict[str, Any]:
    """A figure as the browser gets it; what belongs to the page is written into its layout without checking it anew.

    Zooming survives until `key`, what it shows, changes. What points carry goes as lists, not as packed numbers, or a
    click would not report it; so do words, or the whole figure would be searched for what JSON does not know.
    """
    parts = figure.to_plotly_json()
    layout = parts["layout"]
    layout |= {"uirevision": str(key[:-1] if isinstance(key, list) else key), "autosize": True, "modebar": MODEBAR}
    traces: Any = figure.data
    if view.marks:
        maps = [(trace.xaxis or "x", trace.yaxis or "y") for trace in traces if trace.type == "heatmap"]
        layout["meta"] = {view.marks: scene.layers, "axes": list(dict.fromkeys(maps))}
    for trace, part in zip(traces, parts["data"], strict=True):
        if isinstance(trace.customdata, np.ndarray):
            part["customdata"] = trace.customdata
        for name, values in part.items():
            if isinstance(values, np.ndarray) and values.dtype.kind not in "biuf":
                part[name] = values.tolist()
    return parts
