"""Slices made where they are used: from what is selected or from a search of the texts, named, and let go again."""

from __future__ import annotations

from typing import Any

import dash_mantine_components as dmc
from dash import Dash, Input, Output, State, html, no_update

from moescope.analysis.finding import documents_with
from moescope.app.answers import Pending
from moescope.app.aria import named
from moescope.app.expert_words import where_of
from moescope.app.links import to
from moescope.app.place import Place, longest, parse
from moescope.app.scene import Desk, Scene
from moescope.app.slicing import names, with_documents, with_values, without_slice
from moescope.errors import MoescopeError

_PATIENCE = 1.0  # seconds that a slice may take before its button is to be pressed again


def bar() -> Any:
    """The button beside the list of slices, and what it opens."""
    words = dmc.TextInput(id="slice-words", label="with these words in them", placeholder="any", size="xs", value="")
    name = dmc.TextInput(id="slice-name", label="Name", placeholder="of the slice", size="xs", value="")
    return html.Details(
        [
            html.Summary("Slice…", title="Make or remove a slice", **named("Make or remove a slice")),
            html.Div(
                [
                    html.Div(id="slice-from", className="dim"),
                    words,
                    name,
                    dmc.Button("Make the slice", id="slice-add", size="xs", variant="light", n_clicks=0),
                    html.Div(id="slice-said", role="status", className="dim"),
                    html.Div(id="slice-list", className="slice-list"),
                ],
                className="slice-box",
            ),
        ],
        className="slice-make how-to-read",
    )


def register(app: Dash, desk: Desk) -> None:
    """Adds the callbacks."""

    @app.callback(
        Output("slice-from", "children"),
        Output("slice-list", "children"),
        Input("place", "data"),
    )
    def _shown(place: Any) -> Any:
        if not place or not place.get("store") or place.get("trouble"):
            return no_update, no_update
        here = parse(place["href"])[0]
        return of_what(here), listed(here)

    @app.callback(
        Output("url", "href", allow_duplicate=True),
        Output("slice-said", "children"),
        Output("slice-words", "value"),
        Output("slice-name", "value"),
        Input("slice-add", "n_clicks"),
        State("slice-name", "value"),
        State("slice-words", "value"),
        State("place", "data"),
        prevent_initial_call=True,
    )
    def _add(clicks: Any, name: Any, words: Any, place: Any) -> Any:
        if not clicks or not place or place.get("trouble"):
            return no_update, no_update, no_update, no_update
        try:
            scene = desk.scene(parse(place["href"])[0], patience=_PATIENCE)
            there = made(scene, str(name or "").strip(), str(words or "").strip())
        except Pending:
            return no_update, "The texts are still being searched: press again in a moment.", no_update, no_update
        except MoescopeError as error:
            return no_update, desk.shelf.without_root(str(error)), no_update, no_update
        return there.href, f"Made: {there.slice}.", "", ""


def of_what(here: Place) -> str:
    """What a new slice would be made of."""
    parts = [here.label and f"{here.label} (the selected value)", here.slice and f"slice {here.slice}"]
    chosen = " in ".join(part for part in parts if part)
    return f"A slice of the documents of {chosen}" if chosen else "A slice of all documents"


def made(scene: Scene, name: str, words: str) -> Place:
    """The place with a slice of what is selected, of the documents with some words in them if words are given.

    Args:
        scene: where we are.
        name: of the slice; the words or the label's value if empty.
        words: what the documents' texts must hold.

    Raises:
        Pending: the texts are being searched.
        MoescopeError: nothing narrows the documents, no document has the words, or an address cannot hold them.
    """
    here, where = scene.place, where_of(scene)
    shown = name or words or here.label or ""
    if not words:
        if here.label is None or scene.by is None:
            raise MoescopeError("Select a value of the label, or give words that the texts must hold.")
        if here.slice is None:
            return with_values(here, shown, scene.by, [here.label]).go(label=None)
    found = scene.compute(
        ("documents with", words, str(where)),
        "searching the texts",
        lambda: documents_with(scene.store, words or None, where),
    )
    if not found.size:
        raise MoescopeError(f"No document that counts here has {words!r} in it.")
    there = with_documents(here, shown, found.tolist()).go(label=None)
    if len(there.slices or "") > longest():
        raise MoescopeError(
            f"{found.size:,} documents, too scattered for an address: choose rarer words, or select a value "
            "of the label first."
        )
    return there


def listed(here: Place) -> Any:
    """Every slice, to be activated or removed."""
    try:
        known = names(here)
    except MoescopeError as error:
        return [html.Span(str(error)), " ", to(here.go(slices=None, slice=None), "remove all")]
    return [
        html.Div(
            [
                to(here.go(slice=None if name == here.slice else name), name, className="slice-name"),
                html.Span("active" if name == here.slice else "", className="dim"),
                to(without_slice(here, name), "remove", **named(f"Remove the slice {name}")),
            ]
        )
        for name in known
    ]
