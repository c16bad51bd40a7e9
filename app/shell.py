"""The frame round every page: header, menu, selection, help; one design, dark and light."""

from __future__ import annotations

from typing import Any, cast

import dash_mantine_components as dmc
from dash import ClientsideFunction, Dash, Input, Output, State, dcc, html

from moescope.app import book, controls, drawing, editbar, slicebar, stores
from moescope.app.aria import CURRENT, SILENT, named
from moescope.app.links import to
from moescope.app.panels import grid_of, note
from moescope.app.place import PAGES, Place
from moescope.app.scene import Desk

INDEX = """<!DOCTYPE html>
<html lang="en">
  <head>{%metas%}<title>{%title%}</title>{%favicon%}{%css%}<script src="/assets/plotly.js"></script></head>
  <body>{%app_entry%}<footer>{%config%}{%scripts%}{%renderer%}</footer></body>
</html>"""
"""The page that loads the rest, in Dash's template language."""

WATCH = 4_000
"""Milliseconds between two looks at whether the store has changed."""

_KEYS = (
    ("j / k", "next / previous expert"),
    ("J / K", "next / previous layer"),
    ("/", "search: L3E7, or words of a text"),
    ("p", "play or pause a replay of a text"),
    ("t", "dark or light"),
    ("?", "this help"),
    ("Esc", "leave the full window, close this"),
)


def layout(desk: Desk) -> Any:
    """The whole window, still without a page."""
    return dmc.MantineProvider(
        html.Div(
            [
                dcc.Location(id="url", refresh="callback-nav"),
                dcc.Store(id="place"),
                dcc.Store(id="choices"),
                dcc.Store(id="chosen"),
                dcc.Store(id="theme", storage_type="local"),
                dcc.Store(id="key"),
                dcc.Store(id="jump"),
                dcc.Store(id="seek"),
                dcc.Interval(id="watch", interval=WATCH),
                html.A("Skip to the page", href="#page", className="skip"),
                _header(),
                html.Nav(id="menu", className="menu", **named("Pages")),
                html.Main(
                    [html.Div(id="alarm", role="alert"), html.Div(id="said", role="status"), html.Div(id="page")],
                    className="main",
                ),
                _help(),
            ],
            id="frame",
        ),
        id="mantine",
        theme={
            "primaryColor": "blue",
            "fontFamily": "system-ui, -apple-system, 'Segoe UI', Roboto, 'Helvetica Neue', Arial, sans-serif",
            "defaultRadius": "sm",
            "cursorType": "pointer",
        },
    )


def register(app: Dash) -> None:
    """Adds what happens in the browser alone, and the recipe bar."""
    editbar.register(app)
    app.clientside_callback(
        ClientsideFunction("moescope", "theme"),
        Output("mantine", "forceColorScheme"),
        Output("theme", "data"),
        Input("theme-switch", "n_clicks"),
        State("theme", "data"),
    )
    app.clientside_callback(
        ClientsideFunction("moescope", "help"),
        Output("help", "opened"),
        Input("help-switch", "n_clicks"),
        State("help", "opened"),
    )
    app.clientside_callback(
        ClientsideFunction("moescope", "settle"), Output("page", "className"), Input("place", "data")
    )


def menu(here: Place) -> Any:
    """Links to the pages of the store, which keep what is chosen."""
    if here.store is None:
        return None
    pages = [book.PAGES[name] for name in PAGES if name in book.PAGES]
    return [
        to(
            here.go(page=page.name, full=None),
            page.title,
            className="current" if page.name == here.page else "",
            **(CURRENT if page.name == here.page else {}),
        )
        for page in pages
    ]


def page(desk: Desk, here: Place, now: dict[str, Any], theme: str | None) -> Any:
    """One page, with what is at hand of its panels; or the stores; or why there is nothing."""
    trouble = now.get("trouble")
    if trouble is not None:
        ways = [to("/", "All stores")]
        if here.store in desk.shelf.names():
            ways.insert(0, to(Place("overview", here.store), f"Overview of {here.store}"))
        return [note(trouble, trouble=True), html.Div(ways, className="ways")]
    if here.store is None:
        return stores.page(desk)
    shown = book.PAGES[here.page]
    scene = desk.scene(here, theme == "dark", patience=0)
    extra = [control(scene) for control in shown.controls]
    return [
        html.Div(
            [
                html.Div(
                    [dmc.Title(shown.title, order=1, size="h3"), dmc.Text(shown.question, c="dimmed", size="sm")],
                    className="page-title",
                ),
                html.Div(
                    [*controls.common(scene), slicebar.bar(), *extra, editbar.bar()],
                    className="controls",
                    role="group",
                    **named("Selection"),
                ),
            ],
            className="page-head",
        ),
        grid_of(shown, scene, drawing.at_hand(shown, scene, now, theme)),
    ]


def _header() -> Any:
    return html.Header(
        [
            to("/", [html.Span("MoE", className="moe"), "scope"], className="brand"),
            dmc.Select(
                id="store-choice",
                data=[],
                searchable=True,
                allowDeselect=False,
                size="xs",
                w=260,
                nothingFoundMessage="no such store",
                placeholder="choose a store",
                **named("Store"),
            ),
            html.Div(className="space"),
            dmc.TextInput(
                id="search",
                placeholder="Search:  L3E7, or words",
                size="xs",
                w=230,
                rightSection=dmc.Kbd("/", size="xs"),
                **named("Search an expert or words"),
            ),
            _button("theme-switch", "Dark or light", "◐"),
            _button("help-switch", "Keys and help", "?"),
        ],
        className="header",
    )


def _button(name: str, label: str, sign: str) -> Any:
    return dmc.ActionIcon(
        html.Span(sign, **SILENT),
        id=name,
        variant="default",
        size="md",
        n_clicks=0,
        attributes={"root": {"title": label}},
        **named(label),
    )


def _help() -> Any:
    rows = [html.Tr([html.Td(dmc.Kbd(keys)), html.Td(what)]) for keys, what in _KEYS]
    words = (
        "Everything you choose is in the address: copy it to share what you see. Click an expert, a token or a label "
        "anywhere, and every panel follows. The ? of a panel says how to read it."
    )
    return dmc.Modal(
        [dmc.Text(words, size="sm"), html.Table(html.Tbody(rows), className="keys")],
        id="help",
        title="Help",
        opened=False,
        closeButtonProps=cast("Any", named("Close")),
    )
