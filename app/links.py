"""Links within the app: real links that open in a new tab as any other, and without loading the page when clicked."""

from __future__ import annotations

from typing import Any

from dash import html

from moescope.app.place import Place


def to(place: Place | str, children: Any, **more: Any) -> Any:
    """A link to a place."""
    href = place if isinstance(place, str) else place.href
    return html.A(children, href=href, **{"data-go": href}, **more)


def goes(place: Place) -> dict[str, Any]:
    """Attributes that make any component lead to a place when clicked, for what has a real link beside it."""
    return {"data-go": place.href}
