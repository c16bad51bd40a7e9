"""Controls that choose: each sets one field of the place; the place sets them back."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import dash_mantine_components as dmc
from dash import MATCH, ClientsideFunction, Dash, Input, Output, State

from moescope.app.aria import named
from moescope.app.place import Place, coerced, longest
from moescope.app.scene import Scene
from moescope.errors import MoescopeError


def select(
    field: str,
    label: str,
    options: Sequence[tuple[str, str]],
    default: str = "",
    width: int = 130,
    many: bool = False,
    **more: Any,
) -> Any:
    """A list to choose from.

    Args:
        field: of the place.
        label: above it.
        options: (value, shown text).
        default: what counts when nothing is chosen; with one, the list cannot be cleared.
        width: pixels.
        many: the options come later, and may be many.
        more: further properties of `dmc.Select`.
    """
    return dmc.Select(
        id=_id(field, default),
        label=label,
        data=[{"value": value, "label": shown} for value, shown in options],
        value=default or None,
        clearable=not default,
        allowDeselect=False,
        searchable=many or len(options) > 12,
        filter={"function": "firstOptions"},
        size="xs",
        w=width,
        comboboxProps={"shadow": "md"},
        **more,
    )


def switch(field: str, label: str, options: Sequence[tuple[str, str]], default: str) -> Any:
    """A few choices side by side."""
    return dmc.InputWrapper(
        dmc.SegmentedControl(
            id=_id(field, default),
            data=[{"value": value, "label": shown} for value, shown in options],
            value=default,
            size="xs",
            **named(label),
        ),
        label=label,
        size="xs",
        labelElement="div",
    )


def number(field: str, label: str, default: int, low: int, high: int, width: int = 96) -> Any:
    """A whole number."""
    return dmc.NumberInput(
        id=_id(field, str(default)),
        label=label,
        value=default,
        min=low,
        max=high,
        allowDecimal=False,
        clampBehavior="strict",
        debounce=300,
        size="xs",
        w=width,
    )


def slider(
    field: str, label: str, default: int, low: int, high: int, marks: Sequence[tuple[int, str]] = (), width: int = 150
) -> Any:
    """A whole number on a scale; it counts when it is let go."""
    return dmc.InputWrapper(
        dmc.Slider(
            id=_id(field, str(default)),
            value=default,
            min=low,
            max=high,
            step=1,
            marks=[{"value": value, "label": shown} for value, shown in marks],  # pyright: ignore[reportArgumentType]
            updatemode="mouseup",
            size="sm",
            w=width,
            thumbLabel=label,
        ),
        label=label,
        size="xs",
        labelElement="div",
        className="slider",
    )


def text(field: str, label: str, placeholder: str = "", width: int = 240) -> Any:
    """Words to look for; they count on Enter or when the field is left."""
    return dmc.TextInput(
        id=_id(field, ""), label=label, placeholder=placeholder, value="", debounce=True, size="xs", w=width
    )


def common(scene: Scene) -> list[Any]:
    """The selection that every panel follows: layer, expert, label, phase, slice."""
    store = scene.store
    widest = max(site.n_experts for site in store.sites)
    found = [
        select("layer", "Layer", [(name, name) for name in scene.layers], width=wide(scene.layers), placeholder="all"),
        select("expert", "Expert", [(str(e), str(e)) for e in range(widest)], width=82, placeholder="all"),
    ]
    if store.labels:
        first = store.labels[0]
        found.append(select("by", "Label", [(name, name) for name in store.labels], first, width=104))
        found.append(select("label", "Value", [], width=116, many=True, placeholder="all"))
    found.append(
        select("phase", "Phase", [("prefill", "prefill"), ("decode", "decode")], width=104, placeholder="both")
    )
    found.append(select("slice", "Slice", [], width=104, placeholder="all"))
    return found


def wide(names: Sequence[str], least: int = 82) -> int:
    """Pixels of a list of these names: layers have long ones where a block holds two routers."""
    return max(least, 66 + 8 * max(len(name) for name in names))


def register(app: Dash) -> None:
    """Adds the callbacks by which controls show what the place says; what is set in them is `choosing`'s."""
    app.clientside_callback(
        ClientsideFunction("moescope", "setting"),
        Output({"type": "set", "field": MATCH, "default": MATCH}, "value"),
        Input("place", "data"),
        State({"type": "set", "field": MATCH, "default": MATCH}, "id"),
        State({"type": "set", "field": MATCH, "default": MATCH}, "value"),
    )
    # What there is to choose from changes with the label and with the slices; the rest is the store's. It goes to the
    # browser on its own: a label can have very many values, and the place goes back with every callback.
    app.clientside_callback(
        ClientsideFunction("moescope", "choices"),
        Output({"type": "set", "field": MATCH, "default": MATCH}, "data"),
        Input("choices", "data"),
        State({"type": "set", "field": MATCH, "default": MATCH}, "id"),
        State({"type": "set", "field": MATCH, "default": MATCH}, "data"),
    )


def chosen(here: Place, field: str, value: Any, default: str) -> Place:
    """The place after a control was set; its default leaves the URL short.

    Raises:
        MoescopeError: more than an address can hold; what the place says of it stays.
    """
    if len(str(value)) > longest():
        raise MoescopeError(f"This is longer than the {longest():,} characters that an address can hold of it.")
    plain = None if value in (None, "") or str(value) == default else coerced(field, str(value))
    return here.go(**{field: plain})


def _id(field: str, default: str) -> dict[str, str]:
    return {"type": "set", "field": field, "default": default}
