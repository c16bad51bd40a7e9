"""The URL is the state: it becomes the place, the place becomes the page, and clicks and keys become URLs."""

from __future__ import annotations

import logging
from contextlib import suppress
from typing import Any

import dash_mantine_components as dmc
from dash import ALL, Dash, Input, Output, State, ctx, no_update, set_props
from dash.exceptions import PreventUpdate

from moescope.analysis.cards import parsed
from moescope.app import book, controls, shell, slicebar, slicing, tables
from moescope.app.answers import Pending
from moescope.app.labels import label_values
from moescope.app.panels import note
from moescope.app.place import Place, parse
from moescope.app.scene import Desk, Scene
from moescope.app.steps import stepped
from moescope.app.views import FigureView, TableView, to_expert
from moescope.errors import MoescopeError


def register(app: Dash, desk: Desk) -> None:
    """Adds the callbacks."""
    controls.register(app)
    shell.register(app)
    slicebar.register(app, desk)

    @app.callback(
        Output("place", "data"),
        Output("page", "children"),
        Output("menu", "children"),
        Output("said", "children"),
        Output("store-choice", "data"),
        Output("store-choice", "value"),
        Output("frame", "className"),
        Input("url", "href"),
        Input("watch", "n_intervals"),
        State("place", "data"),
        # The browser drops the answer to a question that it asks again: the clock waits for it, not for ever.
        running=[(Output("watch", "interval"), 60_000, shell.WATCH)],
    )
    def _arrive(href: str | None, ticks: int, before: dict[str, Any] | None) -> Any:
        if href is None:
            raise PreventUpdate
        here, notes = parse(href)
        here, strange = tables.known(here)
        if here.page == "shelf" and (only := desk.shelf.sole()) is not None:
            here = here.go(store=only)
        now = state(desk, here)
        notes = (*notes, *strange, *_unfinished(now))
        now["notes"] = list(notes)
        if now == before:
            raise PreventUpdate
        page = no_update if before is not None and same_page(now, before) else shell.page(desk, here, now)
        names = [{"value": name, "label": name} for name in now["names"]]
        said = [note(line) for line in notes]
        return now, page, shell.menu(here), said, names, here.store, _frame(here)

    @app.callback(
        Output("url", "href", allow_duplicate=True),
        Input("store-choice", "value"),
        State("place", "data"),
        prevent_initial_call=True,
    )
    def _store(name: str | None, place: Any) -> Any:
        here = parse(place["href"])[0] if place else Place()
        return no_update if not name or name == here.store else here.go(store=name).href

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


def state(desk: Desk, here: Place) -> dict[str, Any]:
    """What the page needs of a place: its fields, the store's version, what there is to choose from, or the trouble."""
    now: dict[str, Any] = {
        name: list(value) if isinstance(value, tuple) else value for name, value in vars(here).items()
    }
    now |= {"href": here.href, "version": None, "trouble": None, "names": desk.shelf.names(), "choices": {}}
    if here.store is None:
        now["version"] = "|".join(now["names"])
        return now
    try:
        scene = desk.scene(here)
        shown = book.PAGES[here.page].shown(here, scene.store) if here.page in book.PAGES else []
        now["views"] = [view.name for view in shown]
        manifest = scene.store.manifest
        now |= {"version": scene.opened.version, "layers": scene.layers, "status": manifest.status}
        now["capture"] = manifest.store_id
        with suppress(Pending):  # other work is before it in the line: the next look at the store has them
            now["choices"] = _choices(scene)
        if here.other is not None:
            now["version"] += desk.shelf.changed(here.other)
    except MoescopeError as error:
        now["trouble"] = desk.shelf.without_root(str(error))
    except OSError as error:
        now["trouble"] = f"The store {here.store!r} cannot be read: {error.strerror}."
    return now


def same_page(now: dict[str, Any], before: dict[str, Any]) -> bool:
    """Whether the page stands as it is, and only its panels may change: of one page of one capture.

    The shelf and the choice of a second store also show which stores there are.
    """
    parts = ["page", "store", "trouble", "views", "capture"]
    parts += {"shelf": ["names", "version"], "compare": ["names"]}.get(now["page"], [])
    return all(now.get(part) == before.get(part) for part in parts)


def _unfinished(now: dict[str, Any]) -> list[str]:
    """The word that a store is not whole."""
    words = {
        "capturing": "This store is being captured, or its capture was killed: what has been written so far is shown, "
        "and the page follows.",
        "interrupted": "This store's capture was interrupted: what was written is shown. `moescope capture … --resume` "
        "completes it.",
    }
    return [words[now["status"]]] if now.get("status") in words else []


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


def _frame(here: Place) -> str:
    """Classes of the whole page."""
    kinds = {"embedded": here.embed}
    kinds |= {f"of-{field}": getattr(here, field) is not None for field in ("slice", "phase", "label")}
    return " ".join(kind for kind, holds in kinds.items() if holds)


def _choices(scene: Scene) -> dict[str, Any]:
    found: dict[str, Any] = {"slice": slicing.names(scene.place)}
    found["against"] = [f"slice:{name}" for name in found["slice"]]
    if scene.by is not None:
        found["label"] = label_values(scene)
        found["against"] = [*found["label"], *found["against"]]
    if scene.place.layer is not None:
        found["expert"] = [str(expert) for expert in range(scene.site().n_experts)]
    page = book.PAGES.get(scene.place.page)
    if page is not None and page.choices is not None:
        found |= page.choices(scene)
    return found
