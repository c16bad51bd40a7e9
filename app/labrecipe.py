"""The lab's recipe: its edits, each with a way to take it away; as text, from a file, into a file."""

from __future__ import annotations

from typing import Any
from urllib.parse import quote

import dash_mantine_components as dmc
from dash import Dash, Input, Output, State, dcc, html, no_update

from moescope.app import recipefiles, recipes
from moescope.app.aria import named
from moescope.app.links import to
from moescope.app.panels import note
from moescope.app.place import Place, parse
from moescope.app.scene import Desk, Scene
from moescope.errors import MoescopeError

_CHOOSES: dict[str, Any] = {"data-lab-file": "recipe-file"}  # lab.js reads the file into that store


def draw(scene: Scene) -> Any:
    """The panel."""
    return html.Div(
        [*_edits(scene), _by_hand(), html.Div(id="recipe-said", role="status"), _files(scene)], className="recipe"
    )


def register(app: Dash, desk: Desk) -> None:
    """Adds the callbacks and the routes."""
    recipefiles.register(app, desk)

    @app.callback(
        Output("url", "href", allow_duplicate=True),
        Output("recipe-said", "children"),
        Input("recipe-file", "data"),
        State("place", "data"),
        prevent_initial_call=True,
    )
    def _uploaded(file: Any, place: Any) -> Any:
        if not file or not place or place.get("trouble"):
            return no_update, no_update
        here = parse(place["href"])[0]
        try:
            text = recipefiles.uploaded(desk.scene(here), str(file.get("name")), str(file.get("content")))
            return here.go(recipe=text).href, None
        except MoescopeError as error:
            return no_update, note(desk.shelf.without_root(str(error)), trouble=True)


def _edits(scene: Scene) -> list[Any]:
    here = scene.place
    try:
        recipe = recipes.read(here.recipe)
    except MoescopeError as error:
        return [note(str(error), trouble=True), to(here.go(recipe=None), "Start anew")]
    if recipe is None:
        words = (
            "No edit yet: the edited answer is the plain one. Select an expert - here, or by a click on any page - and "
            "press Add beside the controls."
        )
        return [html.P(words, className="dim")]
    rows = [html.Li(_row(here, scene, number, one)) for number, one in enumerate(recipe.edits)]
    return [html.Ol(rows, className="edits", **named("Edits"))]


def _row(here: Place, scene: Scene, number: int, one: Any) -> list[Any]:
    layer = recipes.layer_of(one)
    first = next(iter(recipes.experts_of(one)), None)
    there = here.go(page="overview" if first is None else "expert", layer=layer, expert=first)
    name = to(there, recipes.named(one)) if layer in scene.layers else html.Span(recipes.named(one))
    gone = to(
        here.go(recipe=recipes.without(here.recipe, number)), "×", className="gone",
        title="Take this edit away", **named(f"Take away edit {number + 1}, {recipes.named(one)} {recipes.said(one)}"),
    )  # fmt: skip
    return [html.Span([name, html.Span(recipes.said(one), className="what")]), gone]


def _by_hand() -> Any:
    return dmc.TextInput(
        id={"type": "set", "field": "recipe", "default": ""},
        label="As text",
        placeholder="L3E7*64,L4E2!mask,L5!top_k:1",
        value="",
        debounce=True,
        size="xs",
        classNames={"input": "mono"},
    )


def _files(scene: Scene) -> Any:
    at = quote(scene.place.href, safe="")
    saved = [
        html.A(f"Save as {kind.upper()}", href=f"/recipe.{kind}?at={at}", download=f"recipe.{kind}")
        for kind in ("yaml", "json")
    ]
    load = html.Div(dmc.Button("Load from a file…", size="compact-sm", variant="default"), **_CHOOSES)
    return html.Div(
        [load, dcc.Store(id="recipe-file"), *(saved if scene.place.recipe else [])], className="recipe-files"
    )
