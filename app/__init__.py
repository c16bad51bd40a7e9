"""The explorer in the browser: every store below a folder, seen, clicked and steered.

>>> moescope.app.serve("runs")                 # what `moescope app runs` does
>>> store.explore()                            # the same, inline in a notebook

A face without logic of its own: figures come from `moescope.figures`, numbers from `moescope.analysis`.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from moescope.app.inline import explore
    from moescope.app.place import Place
    from moescope.app.server import build, serve

_HOME = {"Place": "place", "build": "server", "explore": "inline", "serve": "server"}

__all__ = ["Place", "build", "explore", "serve"]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return __all__
