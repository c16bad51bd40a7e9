"""A recipe grows by clicking experts anywhere: the bar beside every page's controls adds the selected one to it."""

from __future__ import annotations

from typing import Any

import dash_mantine_components as dmc
from dash import Dash, Input, Output, State, html, no_update

from moescope.app import recipes
from moescope.app.aria import named
from moescope.app.links import to
from moescope.app.place import Place, parse
from moescope.errors import MoescopeError

STRENGTH = 64.0  # RICE's factor (arXiv 2505.14681), as `moescope steer` begins with
_HIDDEN, _SHOWN = {"display": "none"}, {}


def bar() -> Any:
    """What to do to the selected expert, and how many edits there are; shows itself when there is something to show."""
    return html.Div(
        [
            html.Div(
                [
                    dmc.Select(
                        id="edit-kind",
                        label="Edit",
                        data=[{"value": kind, "label": shown} for kind, shown in recipes.KINDS.items()],
                        value="scale",
                        allowDeselect=False,
                        size="xs",
                        w=104,
                        comboboxProps={"shadow": "md"},
                        persistence=True,
                        persistence_type="session",
                    ),
                    html.Div(
                        dmc.NumberInput(
                            id="edit-factor",
                            value=STRENGTH,
                            min=0,
                            max=1e6,
                            step=1,
                            size="xs",
                            w=76,
                            persistence=True,
                            persistence_type="session",
                            **named("Factor"),
                        ),
                        id="edit-factor-box",
                    ),
                    dmc.Button("Add", id="edit-add", size="xs", variant="default", n_clicks=0),
                ],
                id="edit-adds",
                className="edit-adds",
                style=_HIDDEN,
            ),
            html.Span(id="edit-badge"),
        ],
        className="edit-bar",
        role="group",
        **named("Recipe of edits"),
    )


def register(app: Dash) -> None:
    """Adds the callbacks."""

    @app.callback(
        Output("edit-adds", "style"),
        Output("edit-kind", "label"),
        Output("edit-factor-box", "style"),
        Output("edit-badge", "children"),
        Input("place", "data"),
        Input("edit-kind", "value"),
    )
    def _shown(place: Any, kind: str | None) -> Any:
        if not place or not place.get("store") or place.get("trouble"):
            return _HIDDEN, "Edit", _HIDDEN, None
        here = parse(place["href"])[0]
        adds = _HIDDEN if here.expert_name is None else _SHOWN
        return adds, f"Edit {here.expert_name or ''}", _SHOWN if kind == "scale" else _HIDDEN, badge(here)

    @app.callback(
        Output("url", "href", allow_duplicate=True),
        Input("edit-add", "n_clicks"),
        State("edit-kind", "value"),
        State("edit-factor", "value"),
        State("place", "data"),
        prevent_initial_call=True,
    )
    def _add(clicks: Any, kind: Any, factor: Any, place: Any) -> Any:
        if not clicks or not place or place.get("trouble"):
            return no_update
        here = parse(place["href"])[0]
        there = adding(here, str(kind), factor)
        return no_update if there == here else there.href


def adding(here: Place, kind: str, factor: Any) -> Place:
    """The place with the selected expert's edit in its recipe.

    Raises:
        MoescopeError: no expert is selected, the factor is no number, or the recipe cannot be read.
    """
    if here.layer is None or here.expert is None:
        raise MoescopeError("Select an expert first.")
    try:
        strength = None if kind != "scale" else float(factor)
    except (TypeError, ValueError) as error:
        raise MoescopeError("Give the factor as a number, 0 or more.") from error
    return here.go(recipe=recipes.added(here.recipe, recipes.edit(kind, here.layer, here.expert, strength)))


def badge(here: Place) -> Any:
    """How many edits the recipe has, as a link to the laboratory; nothing without one."""
    if not here.recipe:
        return None
    try:
        recipe = recipes.read(here.recipe)
        shown = f"recipe ({0 if recipe is None else len(recipe.edits)})"
    except MoescopeError:
        shown = "recipe (unreadable)"
    label = dmc.Badge(shown, variant="default", size="lg", tt="none")
    return to(here.go(page="lab", full=None), label, className="edit-badge", title="to the lab")
