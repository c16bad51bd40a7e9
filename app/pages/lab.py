"""Lab: what does the model say if its experts are changed?"""

from __future__ import annotations

from typing import Any

from moescope.app import labanswers, labcheckpoint, labform, labrecipe
from moescope.app.scene import Desk
from moescope.app.views import BlockView, FigureView, Page, TableView, to_expert
from moescope.figures.apart import READ


def _register(app: Any, desk: Desk) -> None:
    for part in (labform, labrecipe, labanswers, labcheckpoint):
        part.register(app, desk)


LAB = Page(
    name="lab",
    title="Lab",
    question="What does the model say if its experts are changed?",
    views=(
        BlockView(
            name="ask",
            title="Model and prompt",
            how=(
                "Every answer starts from the same prompt and the same seed. One model is in memory for everybody who "
                "has the app open; whoever presses Generate takes a turn. Self-contrast chooses the next token by what "
                "the plain model says against what it says with each token's second best expert alone (SCMoE)."
            ),
            reads=(),
            width=7,
            draw=labform.draw,
        ),
        BlockView(
            name="recipe",
            title="Recipe",
            how=(
                "The edits that are live in the edited answer, in the order in which they act. Select an expert "
                "anywhere in the app and add it from the bar beside the controls. A pruned expert is masked here and "
                "leaves a written checkpoint; merged ones all hold their mean, neurons aligned to the first's. The "
                "file is what `moescope apply` and `moescope generate --recipe` take."
            ),
            reads=("recipe", "model"),
            width=5,
            draw=labrecipe.draw,
        ),
        BlockView(
            name="answers",
            title="Answers",
            how=(
                "A token is orange where the edited model finds it likelier than the plain one does after the same "
                "text, blue where less; the four shades begin at 2, 10, 25 and 50 points of probability. Where both "
                "agree it stays plain, which is what an edit without effect looks like."
            ),
            reads=("run",),
            draw=labanswers.draw,
        ),
        FigureView(
            name="moved",
            title="Routing under the recipe",
            how=READ,
            reads=("run",),
            draw=labanswers.moved,
            click=to_expert,
            marks="cell",
        ),
        TableView(
            name="tokens",
            title="Token by token",
            how=(
                "Every token of every answer: its probability under the plain and under the edited model after the "
                "same text, and what either finds likeliest there."
            ),
            reads=("run",),
            width=8,
            frame=labanswers.tokens,
            columns={
                "answer": ("Answer", ""),
                "place": ("Place", ""),
                "text": ("Token", ""),
                "plain": ("Plain", ".1%"),
                "edited": ("Edited", ".1%"),
                "change": ("Change", "+.1%"),
                "plain_says": ("Plain says", ""),
                "edited_says": ("Edited says", ""),
            },
            height=360,
        ),
        BlockView(
            name="checkpoint",
            title="Checkpoint",
            how=(
                "The written copy is loaded and held against the live edits on three short texts; if its logits "
                "differ by more than its precision explains, it is not kept. Edits that weights cannot hold exactly "
                "are refused unless you allow them."
            ),
            reads=("model",),
            width=4,
            draw=labcheckpoint.draw,
        ),
    ),
    register=_register,
)
