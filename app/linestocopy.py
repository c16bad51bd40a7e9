"""A line of code with a button that copies it."""

from __future__ import annotations

from typing import Any

import dash_mantine_components as dmc
from dash import html

from moescope.app.aria import named


def copied(what: str, line: str) -> Any:
    """The line and its button.

    Args:
        what: the line is, for a screen reader.
        line: as it is copied.
    """
    more: dict[str, Any] = {"data-copy": line, **named(f"Copy the {what}")}
    button = dmc.Button("Copy", size="compact-xs", variant="default", **more)
    return html.Div([html.Code(line, tabIndex=0), button], className="copied")
