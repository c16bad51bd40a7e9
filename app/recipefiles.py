"""Recipes leave the app as the files that `moescope apply` takes, and come back from them."""

from __future__ import annotations

import base64
import binascii

import yaml
from dash import Dash
from flask import Response, request

from moescope.app import recipes
from moescope.app.place import parse
from moescope.app.scene import Desk, Scene
from moescope.edits import Recipe
from moescope.errors import MoescopeError

LARGEST = 64 << 10
"""Bytes of a recipe's file that are read: some thousand edits."""


def register(app: Dash, desk: Desk) -> None:
    """Adds the route /recipe.yaml and /recipe.json, with the place in `at`."""

    @app.server.get("/recipe.<kind>")
    def _recipe(kind: str) -> Response:
        if kind not in ("yaml", "json"):
            return Response("There is no such file.", 404, mimetype="text/plain")
        try:
            recipe = for_file(desk.scene(parse(request.args.get("at", ""))[0]))
        except MoescopeError as error:
            return Response(desk.shelf.without_root(str(error)), 400, mimetype="text/plain")
        headers = {"Content-Disposition": f'attachment; filename="recipe.{kind}"'}
        kinds = {"yaml": "application/yaml", "json": "application/json"}
        return Response(recipe.text(as_json=kind == "json"), headers=headers, content_type=kinds[kind])


def for_file(scene: Scene) -> Recipe:
    """The recipe of a place as it is saved: for the store's model alone, unless another model is chosen in the lab.

    Raises:
        MoescopeError: there is none, or it cannot be read.
    """
    recipe = recipes.read(scene.place.recipe)
    if recipe is None:
        raise MoescopeError("There is no recipe yet: select an expert and add an edit of it.")
    model = scene.store.manifest.model
    own = scene.place.model in (None, model.name)
    return Recipe(
        recipe.edits,
        config_hash=model.config_hash if own else None,
        note=f"made in the app on the store {scene.opened.name}",
    )


def uploaded(scene: Scene, name: str, content: str) -> str:
    """The text of an uploaded file (`data:…;base64,…`), as `recipes.written` writes it.

    Raises:
        MoescopeError: too large, no recipe, one for another model, or one that the lab does not hold.
    """
    shown = name if len(name) <= 60 else name[:60] + "…"
    if len(content) > 2 * LARGEST:
        raise MoescopeError(f"{shown} is larger than {LARGEST >> 10} KiB; a recipe is not.")
    try:
        text = base64.b64decode(content.partition(",")[2], validate=True).decode("utf-8")
    except (binascii.Error, UnicodeDecodeError) as error:
        raise MoescopeError(f"{shown} is no text, so no recipe.") from error
    _refuse_aliases(text, shown)
    recipe = Recipe.of_text(text, shown)
    model = scene.store.manifest.model
    if recipe.config_hash not in (None, model.config_hash) and scene.place.model in (None, model.name):
        raise MoescopeError(f"{shown} was made for another model than {model.name} (its configuration differs).")
    recipe.require_consistent()
    return recipes.written(recipe)


def _refuse_aliases(text: str, name: str) -> None:
    """A few lines of YAML can stand for billions by naming each other; a recipe has no need of names."""
    try:
        if any(isinstance(event, yaml.AliasEvent) for event in yaml.parse(text, Loader=yaml.SafeLoader)):
            raise MoescopeError(f"{name} refers to parts of itself (YAML aliases); write them out.")
    except (yaml.YAMLError, RecursionError) as error:
        raise MoescopeError(f"{name} is neither YAML nor JSON: {str(error).splitlines()[0]}.") from error
