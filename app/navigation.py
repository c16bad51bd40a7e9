"""Clicks, rows, keys, links and words become URLs; what a URL shows is said in `arriving`."""

from __future__ import annotations

import logging
from typing import Any

import dash_mantine_components as dmc
from dash import ALL, Dash, Input, Output, State, ctx, no_update, set_props

from moescope.analysis.cards import parsed
from moescope.app import arriving, book, choosing, controls, shell, slicebar
from moescope.app.place import Place, parse
from moescope.app.scene import Desk
from moescope.app.steps import stepped
from moescope.app.views import FigureView, TableView, to_expert
from moescope.errors import MoescopeError


def register(app: Dash, desk: Desk) -> None:
    """Adds the callbacks."""
    controls.register(app)
    choosing.register(app)
    shell.register(app)
    slicebar.register(app, desk)
    arriving.register(app, desk)
    _by_store(app)
    _by_point(app, desk)
    _by_row(app)
    _by_key(app, desk)
    _by_link(app)
    _by_words(app)


def _by_store(app: Dash) -> None:
    """Another store is chosen."""

    @app.callback(
        Output("url", "href", allow_duplicate=True),
        Input("store-choice", "value"),
        State("place", "data"),
        prevent_initial_call=True,
    )
    def _store(name: str | None, place: Any) -> Any:
        here = parse(place["href"])[0] if place else Place()
        return no_update if not name or name == here.store else here.go(store=name).href


def _by_point(app: Dash, desk: Desk) -> None:
    """A point of a figure is clicked, or a lasso drawn round some."""

    @app.callback(
        Output("url", "href", allow_duplicate=True),
        Output({"type": "graph", "of": "figure", "view": ALL}, "clickData"),
        Input({"type": "graph", "of": "figure", "view": ALL}, "clickData"),
        Input({"type": "graph", "of": "figure", "view": ALL}, "selectedData"),
        State("place", "data"),
        prevent_initial_call=True,
    )
    def _clicked(clicks: Any, selections: Any, place: Any) -> Any:
        kept = [no_update] * len(clicks)
        given = ctx.triggered[0]["value"] if ctx.triggered else None
        if not ctx.triggered_id or not given or not given.get("points") or not place:
            return no_update, kept
        here = parse(place["href"])[0]
        view = book.view(ctx.triggered_id["view"])
        there: Place | None = None
        if isinstance(view, FigureView) and ctx.triggered[0]["prop_id"].endswith(".selectedData"):
            if view.select is not None:
                there = view.select(desk.scene(here), given["points"])
        elif isinstance(view, FigureView) and view.click is not None:
            there = view.click(here, given["points"][0])
        elif isinstance(view, FigureView) and view.pick is not None:
            there = view.pick(desk.scene(here), given["points"][0])
        # Forgotten at once, so that a second click on the same point counts.
        cleared = [None if value else no_update for value in clicks]
        return (no_update if there is None or there == here else there.href), cleared


def _by_row(app: Dash) -> None:
    """A row of a table is clicked."""

    @app.callback(
        Output("url", "href", allow_duplicate=True),
        Output({"type": "grid", "of": "table", "view": ALL}, "selectedRows"),
        Input({"type": "grid", "of": "table", "view": ALL}, "selectedRows"),
        State("place", "data"),
        prevent_initial_call=True,
    )
    def _row(rows: Any, place: Any) -> Any:
        kept = [no_update] * len(rows)
        if not ctx.triggered_id or not ctx.triggered[0]["value"] or not place:
            return no_update, kept
        view = book.view(ctx.triggered_id["view"])
        chosen = ctx.triggered[0]["value"][0]
        if not isinstance(view, TableView):
            return no_update, kept
        here = parse(place["href"])[0]
        there = (
            view.go(here, chosen)
            if view.go
            # Two routers of one block share a number: their rows carry the site.
            else to_expert(here, {"x": chosen.get("expert"), "y": chosen.get("site", chosen.get("layer"))})
        )
        # Forgotten at once, so that a second click on the same row counts.
        return (no_update if there is None or there == here else there.href), [
            [] if found else no_update for found in rows
        ]


def _by_key(app: Dash, desk: Desk) -> None:
    """A key is pressed, a panel fills the window, or a table's columns are chosen."""

    @app.callback(
        Output("url", "href", allow_duplicate=True),
        Input("key", "data"),
        State("place", "data"),
        prevent_initial_call=True,
    )
    def _key(key: Any, place: Any) -> Any:
        if not key or not place or place.get("trouble") or not place.get("layers"):
            return no_update
        here = parse(place["href"])[0]
        if key.get("do") == "columns":
            return here.leaving_out(str(key.get("view")), [str(name) for name in key.get("leave") or ()]).href
        if key.get("do") != "walk":
            there = stepped(here, desk.scene(here), str(key.get("do")), str(key.get("view") or ""))
            return no_update if there == here else there.href
        there = parse(str(key["from"]))[0]
        scene = desk.scene(there)
        for step in key["steps"]:
            there = stepped(there, scene, str(step))
        return no_update if there == here else there.href


def _by_link(app: Dash) -> None:
    """A link is followed that was drawn at another place."""

    @app.callback(
        Output("url", "href", allow_duplicate=True),
        Input("jump", "data"),
        State("place", "data"),
        prevent_initial_call=True,
    )
    def _jump(jump: Any, place: Any) -> Any:
        if not jump or not place:
            return no_update
        start, end = (parse(str(jump[name]))[0] for name in ("from", "to"))
        here = parse(place["href"])[0]
        there = here.moved(start, end) if start.store == here.store == end.store else end
        return no_update if there == here else there.href


def _by_words(app: Dash) -> None:
    """Something is searched for."""

    @app.callback(
        Output("url", "href", allow_duplicate=True),
        Output("search", "value"),
        Input("seek", "data"),
        State("place", "data"),
        prevent_initial_call=True,
    )
    def _search(sought: Any, place: Any) -> Any:
        text = str((sought or {}).get("text") or "").strip()
        if not text or not place or not place.get("store"):
            return no_update, no_update
        return searched(parse(place["href"])[0], text).href, ""


def searched(here: Place, text: str) -> Place:
    """Where a search leads: an expert by its name, else the texts that hold the words."""
    try:
        layer, expert = parsed(text)
    except MoescopeError:
        return here.go(page="text", find=text, doc=None)
    return here.go(page="expert", layer=str(layer), expert=expert)


def alarmed(desk: Desk, error: Exception) -> None:
    """An error that nobody foresaw stays visible on the page, and its trace goes to the log."""
    logging.getLogger(__name__).error("a callback failed", exc_info=error)
    words = desk.shelf.without_root(str(error))
    shown = words if isinstance(error, MoescopeError) else f"{type(error).__name__}: {words}"
    set_props("alarm", {"children": dmc.Alert(shown, title="Something failed", color="red", withCloseButton=True)})
