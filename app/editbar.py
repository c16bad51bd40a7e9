"""A recipe grows by clicking experts anywhere: the bar beside every page's controls adds the selected one to it."""

from __future__ import annotations

from typing import Any

import dash_mantine_components as dmc
from dash import Dash, Input, Output, State, html, no_update

from moescope.app import recipes
from moescope.app.aria import named
from moescope.app.links import to
from moescope.app.panels import HIDDEN, SHOWN
from moescope.app.place import Place, parse
from moescope.errors import MoescopeError

STRENGTH = 64.0  # RICE's factor (arXiv 2505.14681), as `moescope steer` begins with
_NUMBERS = {"scale": "factor", "merge": "other", "copy": "other", "top_k": "kept"}
"""The number that a kind of edit asks for."""


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
                        w=124,
                        comboboxProps={"shadow": "md"},
                        persistence=True,
                        persistence_type="session",
                    ),
                    _number("factor", "Factor", STRENGTH, 0, 1e6, decimals=True),
                    _number("other", "The other expert of this layer", None, 0, 999_999),
                    _number("kept", "How many of a token's experts count", 1, 1, 999_999),
                    dmc.Button("Add", id="edit-add", size="xs", variant="default", n_clicks=0),
                ],
                id="edit-adds",
                className="edit-adds",
                style=HIDDEN,
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
        Output("edit-other-box", "style"),
        Output("edit-kept-box", "style"),
        Output("edit-badge", "children"),
        Input("place", "data"),
        Input("edit-kind", "value"),
    )
    def _shown(place: Any, kind: str | None) -> Any:
        boxes = [SHOWN if _NUMBERS.get(str(kind)) == name else HIDDEN for name in ("factor", "other", "kept")]
        if not place or not place.get("store") or place.get("trouble"):
            return HIDDEN, "Edit", *boxes, None
        here = parse(place["href"])[0]
        adds = HIDDEN if here.expert_name is None else SHOWN
        of = f"layer {here.layer}" if kind == "top_k" else here.expert_name or ""
        return adds, f"Edit {of}", *boxes, badge(here)

    @app.callback(
        Output("url", "href", allow_duplicate=True),
        Input("edit-add", "n_clicks"),
        State("edit-kind", "value"),
        State("edit-factor", "value"),
        State("edit-other", "value"),
        State("edit-kept", "value"),
        State("place", "data"),
        prevent_initial_call=True,
    )
    def _add(clicks: Any, kind: Any, factor: Any, other: Any, kept: Any, place: Any) -> Any:
        if not clicks or not place or place.get("trouble"):
            return no_update
        here = parse(place["href"])[0]
        numbers = {"factor": factor, "other": other, "kept": kept}
        there = adding(here, str(kind), numbers.get(_NUMBERS.get(str(kind), "")))
        return no_update if there == here else there.href


def _number(name: str, label: str, value: float | None, low: int, high: float, *, decimals: bool = False) -> Any:
    """A field for a number of an edit, which is shown where the edit has one."""
    field = dmc.NumberInput(
        id=f"edit-{name}",
        value=value,
        min=low,
        max=high,
        step=1,
        allowDecimal=decimals,
        size="xs",
        w=76,
        attributes={"root": {"title": label}},
        persistence=True,
        persistence_type="session",
        **named(label),
    )
    return html.Div(field, id=f"edit-{name}-box", style=HIDDEN)


def adding(here: Place, kind: str, number: Any) -> Place:
    """The place with the selected expert's edit in its recipe.

    Args:
        here: with the expert selected.
        kind: of `recipes.KINDS`.
        number: as `recipes.edit` takes it, perhaps as text; of a kind without one it does not count.

    Raises:
        MoescopeError: no expert is selected, the number is none, or the recipe cannot be read or contradicts the edit.
    """
    if here.layer is None or here.expert is None:
        raise MoescopeError("Select an expert first.")
    try:
        given = float(number) if kind in _NUMBERS and number not in (None, "") else None
    except (TypeError, ValueError) as error:
        raise MoescopeError("Give a number, 0 or more.") from error
    if kind == "scale" and given is None:
        raise MoescopeError("Give the factor as a number, 0 or more.")
    return here.go(recipe=recipes.added(here.recipe, recipes.edit(kind, here.layer, here.expert, given)))


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
