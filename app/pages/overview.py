"""Overview: what is this model doing with its experts?"""

from __future__ import annotations

from typing import Any

from moescope import figures
from moescope.app.scene import Scene
from moescope.app.views import FigureView, Page, to_expert


def _load(scene: Scene) -> Any:
    return figures.load(scene.ask("load", where=scene.where, phase=scene.place.phase))


OVERVIEW = Page(
    name="overview",
    title="Overview",
    question="What is this model doing with its experts?",
    views=(
        FigureView(
            name="load",
            title="Load",
            how="Each cell is one expert of one layer.",
            reads=("phase", "slices", "slice"),
            draw=_load,
            click=to_expert,
            marks=True,
        ),
    ),
)
