"""The pages of a store and their views, by name."""

from __future__ import annotations

from functools import cache

from moescope.app.pages import ALL
from moescope.app.views import Page, View
from moescope.errors import MoescopeError

PAGES: dict[str, Page] = {page.name: page for page in ALL}


def view(name: str) -> View:
    """A view by its name.

    Raises:
        MoescopeError: no page has such a view.
    """
    if name not in _views():
        raise MoescopeError(f"There is no view {name!r}.")
    return _views()[name]


@cache
def _views() -> dict[str, View]:
    return {view.name: view for page in PAGES.values() for view in page.views}
