"""What a URL shows: it becomes the place, and the place becomes the page."""

from __future__ import annotations

import hashlib
import json
from contextlib import suppress
from typing import Any

from dash import Dash, Input, Output, State, no_update
from dash.exceptions import PreventUpdate

from moescope.app import book, shell, slicing, tables
from moescope.app.answers import Pending
from moescope.app.labels import label_values
from moescope.app.panels import note
from moescope.app.place import Place, parse
from moescope.app.scene import Desk, Scene
from moescope.errors import MoescopeError


def register(app: Dash, desk: Desk) -> None:
    """Adds the callback."""

    @app.callback(
        Output("place", "data"),
        Output("choices", "data"),
        Output("page", "children"),
        Output("menu", "children"),
        Output("said", "children"),
        Output("store-choice", "data"),
        Output("store-choice", "value"),
        Output("frame", "className"),
        Input("url", "href"),
        Input("watch", "n_intervals"),
        Input("theme", "data"),  # not for another theme, but to be asked when the first is known
        State("place", "data"),
        # The browser drops the answer to a question that it asks again: the clock waits for it, not for ever.
        running=[(Output("watch", "interval"), 60_000, shell.WATCH)],
    )
    def _arrive(href: str | None, ticks: int, theme: str | None, before: dict[str, Any] | None) -> Any:
        if href is None:
            raise PreventUpdate
        here, notes = parse(href)
        here, strange = tables.known(here)
        if here.page == "shelf" and (only := desk.shelf.sole()) is not None:
            here = here.go(store=only)
        now = state(desk, here)
        notes = (*notes, *strange, *_unfinished(now))
        now["notes"] = list(notes)
        offered = now.pop("choices")
        now["offered"] = _key(offered)
        if now == before:
            return [no_update] * 8  # and not an answer without a body, which the browser takes for unfinished
        if before is not None and now["offered"] == before.get("offered"):
            offered = no_update
        # Of a window that opens, figures come with the page: its browser has much to do before it would ask for them.
        opens = theme if before is None else None
        page = no_update if before is not None and same_page(now, before) else shell.page(desk, here, now, opens)
        names = [{"value": name, "label": name} for name in now["names"]]
        said = [note(line) for line in notes]
        return now, offered, page, shell.menu(here), said, names, here.store, _frame(here)


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


def _key(offered: dict[str, Any]) -> str:
    """Changes whenever what is offered does."""
    return hashlib.blake2b(json.dumps(offered).encode(), digest_size=8).hexdigest()


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


def _frame(here: Place) -> str:
    """Classes of the whole page."""
    kinds = {"embedded": here.embed}
    kinds |= {f"of-{field}": getattr(here, field) is not None for field in ("slice", "phase", "label")}
    return " ".join(kind for kind, holds in kinds.items() if holds)


def _choices(scene: Scene) -> dict[str, Any]:
    found: dict[str, Any] = {"slice": slicing.names(scene.place)}
    if scene.by is not None:
        found["label"] = label_values(scene)
    if scene.place.layer is not None:
        found["expert"] = [str(expert) for expert in range(scene.site().n_experts)]
    page = book.PAGES.get(scene.place.page)
    if page is not None and page.choices is not None:
        found |= page.choices(scene)
    return found
