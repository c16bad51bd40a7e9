"""What is set in controls becomes a URL; what was set before the last was answered counts with it."""

from __future__ import annotations

from typing import Any

from dash import ALL, ClientsideFunction, Dash, Input, Output, no_update

from moescope.app import controls, optioncontrols
from moescope.app.place import Place, parse


def register(app: Dash) -> None:
    """Adds the callbacks. The browser drops the answer to a question that was asked again, so each carries them all."""
    app.clientside_callback(
        ClientsideFunction("moescope", "chosen"),
        Output("chosen", "data"),
        Input("place", "data"),
        Input({"type": "set", "field": ALL, "default": ALL}, "value"),
        Input({"type": "option", "of": ALL, "name": ALL, "default": ALL}, "value"),
        prevent_initial_call=True,
    )

    @app.callback(
        Output("url", "href", allow_duplicate=True),
        Input("chosen", "data"),
        prevent_initial_call=True,
    )
    def _chosen(sent: Any) -> Any:
        if not sent:
            return no_update
        here = parse(str(sent["from"]))[0]
        there = chosen(here, sent["values"])
        return no_update if there.href == here.href else there.href


def chosen(here: Place, values: list[tuple[dict[str, str], Any]]) -> Place:
    """The place after these controls were set, in turn.

    Args:
        here: where the first was set.
        values: the id of each and what it shows.

    Raises:
        MoescopeError: more than an address can hold.
    """
    for control, value in values:
        if control["type"] == "option":
            here = optioncontrols.chosen(here, control, value)
        else:
            here = controls.chosen(here, control["field"], value, control["default"])
    return here
