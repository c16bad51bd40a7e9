"""The menu by which a figure shows one of its parts at a time: a label, a layer, a pair of layers."""

from __future__ import annotations

from collections.abc import Sequence

from moescope.figures.theme import plain


def menu(labels: Sequence[str], groups: Sequence[int], fixed: int) -> dict:
    """A menu that shows one group of traces at a time, and always the `fixed` ones after them."""
    buttons = [
        {
            "label": plain(name),
            "method": "restyle",
            "args": [
                {"visible": [which == index for which, size in enumerate(groups) for _ in range(size)] + [True] * fixed}
            ],
        }
        for index, name in enumerate(labels)
    ]
    return {"buttons": buttons, "x": 0, "xanchor": "left", "y": 1, "yanchor": "bottom", "pad": {"b": 30}}
