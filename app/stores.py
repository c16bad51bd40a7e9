"""The first page: every store below the folder, what it is of, and which of them cannot be read."""

from __future__ import annotations

from typing import Any

import dash_mantine_components as dmc
from dash import html

from moescope.analysis.facts import model_facts
from moescope.app.links import to
from moescope.app.panels import note
from moescope.app.place import Place
from moescope.app.scene import Desk
from moescope.errors import MoescopeError
from moescope.store import Store


def page(desk: Desk) -> Any:
    """One card for each store."""
    names = desk.shelf.names()
    if not names:
        return note("There is no store in this folder yet. `moescope demo` or `moescope capture` makes one.")
    counted = "1 store" if len(names) == 1 else f"{len(names)} stores"
    return [
        html.Div(
            [
                dmc.Title("Stores", order=1, size="h3"),
                dmc.Text(
                    f"{counted} below {desk.shelf.root.name}: what models did with their experts", c="dimmed", size="sm"
                ),
            ],
            className="page-title shelf-title",
        ),
        html.Div([_card(desk, name) for name in names], className="shelf"),
    ]


def _card(desk: Desk, name: str) -> Any:
    link = to(Place("overview", name), name, className="shelf-name")
    try:
        store = desk.shelf.open(name).store
        status, inside = store.status, _about(store)
        badge = html.Span(status, className="badge good" if status == "complete" else "badge")
    except (MoescopeError, OSError) as error:
        badge = html.Span("cannot be read", className="badge bad")
        inside = [html.Div(desk.shelf.without_root(str(error)), className="dim")]
    return html.Article([html.Div([link, badge], className="shelf-head"), *inside], className="panel shelf-card")


def _about(store: Store) -> list[Any]:
    manifest, told = store.manifest, model_facts(store)
    facts = [html.Div([html.Dt(what), html.Dd(number)]) for number, what in told["facts"]]
    tiers = [html.Span(tier, className="tag") for tier in store.tiers]
    edited = [html.Span("under edits", className="badge")] if manifest.settings.get("edits") else []
    labels = f"labels: {', '.join(store.labels)}" if store.labels else "no labels"
    return [
        html.Div(
            [html.Strong(told["name"]), html.Span(told["type"], className="dim"), *edited], className="shelf-model"
        ),
        html.Dl(facts, className="shelf-facts"),
        html.Div(tiers, className="shelf-tags"),
        html.Div(f"{manifest.corpus.source}, {labels}; captured {str(manifest.created)[:10]}", className="dim"),
    ]
