"""The report: one HTML file that says what a model does with its experts, and works without a network.

>>> from moescope import report
>>> report.write(store, "report.html")
>>> report.write_atlas(store, "atlas.html")    # a card for every expert
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from moescope.report.atlas import write_atlas
    from moescope.report.page import render, write
    from moescope.report.unlearning import write_unlearning

__all__ = ["render", "write", "write_atlas", "write_unlearning"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if name == "write_unlearning":
        from moescope.report import unlearning

        return unlearning.write_unlearning
    from moescope.report import atlas, page

    return atlas.write_atlas if name == "write_atlas" else getattr(page, name)
