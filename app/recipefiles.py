"""Recipes leave the app as the files that `moescope apply` takes, and come back from them."""

from __future__ import annotations

import base64
import binascii

import yaml
from dash import Dash
from flask import Response, request

from moescope.app import labform, recipes
from moescope.app.place import parse
from moescope.app.scene import Desk, Scene
from moescope.edits import Recipe
from moescope.errors import MoescopeError

LARGEST = 64 << 10
"""Bytes of a recipe's file that are read: some thousand edits."""
DEEPEST = 12
"""Levels of a recipe's file: what suggested it may be nested, the edits are not."""


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
    """The recipe of a place as it is saved: for the lab's model alone.

    Raises:
        MoescopeError: there is none, or it cannot be read.
    """
    recipe = recipes.read(scene.place.recipe)
    if recipe is None:
        raise MoescopeError("There is no recipe yet: select an expert and add an edit of it.")
    note = f"made in the app on the store {scene.opened.name}"
    return Recipe(recipe.edits, config_hash=_model(scene), note=note)


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
    _refuse_traps(text, shown)
    recipe = Recipe.of_text(text, shown)
    model = _model(scene)
    if None not in (recipe.config_hash, model) and recipe.config_hash != model:
        raise MoescopeError(f"{shown} was made for another model than the lab's (its configuration differs).")
    recipe.require_consistent()
    return recipes.written(recipe)


def _model(scene: Scene) -> str | None:
    """The configuration's hash of the lab's model, None where it is not known before that is loaded."""
    chosen, held = labform.choice(scene), scene.desk.bench.held
    if held is not None and held[0] == chosen:
        return held[1].config_hash
    record = scene.store.manifest.model
    return record.config_hash if chosen.name == record.name else None


def _refuse_traps(text: str, name: str) -> None:
    """A few lines of YAML can stand for billions by naming each other, or nest until nothing can read them."""
    depth = 0
    try:
        for event in yaml.parse(text, Loader=yaml.SafeLoader):
            depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
            if isinstance(event, yaml.AliasEvent):
                raise MoescopeError(f"{name} refers to parts of itself (YAML aliases); write them out.")
            if depth > DEEPEST:
                raise MoescopeError(f"{name} nests more than {DEEPEST} levels; a recipe does not.")
    except yaml.YAMLError as error:
        raise MoescopeError(f"{name} is neither YAML nor JSON: {str(error).splitlines()[0]}.") from error
