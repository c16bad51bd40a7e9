"""Lab: what does the model say if its experts are changed?"""

from __future__ import annotations

from typing import Any

from moescope.app import labrecipe
from moescope.app.scene import Desk
from moescope.app.views import BlockView, Page


def _register(app: Any, desk: Desk) -> None:
    labrecipe.register(app, desk)


LAB = Page(
    name="lab",
    title="Lab",
    question="What does the model say if its experts are changed?",
    views=(
        BlockView(
            name="recipe",
            title="Recipe",
            how=(
                "The edits that are live in the edited answer, in the order in which they act. Select an expert "
                "anywhere in the app and add it from the bar beside the controls. The file is what `moescope apply` "
                "and `moescope generate --recipe` take."
            ),
            reads=("recipe", "model", "prompt"),
            width=5,
            draw=labrecipe.draw,
        ),
    ),
    register=_register,
)
