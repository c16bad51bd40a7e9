"""Controls for the parameters of one analysis, built from its own list of them."""

from __future__ import annotations

from typing import Any

import dash_mantine_components as dmc
from dash import MATCH, ClientsideFunction, Dash, Input, Output, State, html

from moescope.analysis.question import Analysis, Parameter
from moescope.app import options
from moescope.app.aria import named
from moescope.app.place import Place
from moescope.app.scene import Scene


def of(scene: Scene, question: Analysis) -> Any:
    """One control for each parameter that does not follow the selection."""
    followed = options.followed(question)
    found = [_control(scene, question, p) for p in question.parameters if p.name not in followed]
    return html.Div(found, className="options", role="group", **named("Parameters"))


def register(app: Dash, desk: Any) -> None:
    """Adds the callback by which controls show what the place says; what is set in them is `choosing`'s."""
    any_option = {"type": "option", "of": MATCH, "name": MATCH, "default": MATCH}
    app.clientside_callback(
        ClientsideFunction("moescope_analyses", "option"),
        Output(any_option, "value"),
        Input("place", "data"),
        State(any_option, "id"),
        State(any_option, "value"),
        prevent_initial_call=True,
    )


def chosen(here: Place, control: dict[str, str], value: Any) -> Place:
    """The place after the control with this id was set.

    What was typed counts a moment later, when another question may be asked: it is none of that one's parameters.
    """
    if control["of"] != (here.question or ""):
        return here
    text = None if value in (None, "") or str(value) == control["default"] else str(value)
    return here.go(options=options.with_option(here.options, control["name"], text))


def default_of(parameter: Parameter) -> str:
    """A parameter's default as a person writes it; "" where the analysis chooses."""
    if parameter.default is None:
        return ""
    if isinstance(parameter.default, bool):
        return "yes" if parameter.default else "no"
    if isinstance(parameter.default, list | tuple):
        return ",".join(map(str, parameter.default))
    return f"{parameter.default:g}" if isinstance(parameter.default, float) else str(parameter.default)


def _control(scene: Scene, question: Analysis, parameter: Parameter) -> Any:
    default = default_of(parameter)
    value = options.shown(scene.place.options, parameter.name)
    common: dict[str, Any] = {
        # `of` is the question as the address has it: "" for the one that is asked first.
        "id": {"type": "option", "of": scene.place.question or "", "name": parameter.name, "default": default},
        "label": parameter.name.replace("_", " "),
        "description": parameter.help,
        "placeholder": default or "default",
        "size": "xs",
        "inputWrapperOrder": ["label", "input", "description"],
    }
    choices = ("yes", "no") if parameter.type is bool else parameter.choices
    if options.names_column(parameter):
        choices = tuple(scene.store.labels)
    if choices:
        return dmc.Select(
            data=list(choices), value=value or default or None, clearable=not default, allowDeselect=False, **common
        )
    if parameter.type in (int, float) and not parameter.many:
        return dmc.NumberInput(
            value=value, allowDecimal=parameter.type is float, debounce=400, hideControls=True, **common
        )
    return dmc.TextInput(value=value, debounce=True, **common)
