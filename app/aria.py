"""What a screen reader says of a component, as attributes to unpack into it."""

from __future__ import annotations

from typing import Any


def named(label: str) -> dict[str, Any]:
    """The name of what shows none: an icon, a list without a heading, a bar."""
    return {"aria-label": label}


def titled_by(name: str) -> dict[str, Any]:
    """Named by the component with this id."""
    return {"aria-labelledby": name}


SILENT: dict[str, Any] = {"aria-hidden": "true"}
"""For signs that stand beside a name."""
CURRENT: dict[str, Any] = {"aria-current": "page"}
"""The link to where we are."""
