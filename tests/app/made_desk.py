"""The app's desk on small made stores, and its views drawn without a browser."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from moescope.app.answers import Answers, Pending
from moescope.app.jobs import Jobs
from moescope.app.place import Place, parse
from moescope.app.scene import Desk
from moescope.app.shelf import Shelf
from moescope.app.views import BlockView, FigureView, Partial, TableView
from tests.analysis.made_stores import random_truth, write

DOCUMENTS, WIDTHS, K = 36, [6, 4, 5], [2, 1, 2]
DOMAIN = ["code" if d % 3 == 0 else "math" if d % 3 == 1 else "prose" for d in range(DOCUMENTS)]


def made_shelf(folder: Path) -> Path:
    """`a`, `b`: one corpus, the last layer chosen otherwise; `c`, `even`: others. Expert 3 of layer 0 likes code."""
    prefer = np.zeros((DOCUMENTS, 3, 6))
    prefer[::3, 0, 3] = 3
    truth = random_truth(np.random.default_rng(0), DOCUMENTS, WIDTHS, K, prefer=prefer)
    words = {int(one): f"w{one} " for one in np.unique(truth.token_id)}
    write(folder / "a", truth, WIDTHS, {"domain": DOMAIN}, vocabulary=words)
    moved = [*truth.expert[:2], (truth.expert[2] + truth.token_id[:, None] % 2) % WIDTHS[2]]
    changed = type(truth)(**(vars(truth) | {"expert": moved}))
    write(folder / "b", changed, WIDTHS, {"domain": DOMAIN}, vocabulary=words, cuts=2)
    other = random_truth(np.random.default_rng(1), 12, WIDTHS, K)
    write(folder / "c", other, WIDTHS, {"domain": DOMAIN[:12]})
    even = random_truth(np.random.default_rng(2), 12, [4, 4, 4], [2, 2, 2])
    write(folder / "even", even, [4, 4, 4], {"domain": DOMAIN[:12]})
    return folder


def made_desk(folder: Path) -> Desk:
    """A desk on a shelf."""
    jobs = Jobs()
    return Desk(Shelf(folder), jobs, Answers(jobs))


def drawn(desk: Desk, view: Any, place: Place | str) -> Any:
    """What a view shows in the end."""
    here = parse(place)[0] if isinstance(place, str) else place
    while True:
        scene = desk.scene(here)
        try:
            shown = view.frame(scene) if isinstance(view, TableView) else view.draw(scene)
        except Pending as pending:
            pending.job.wait(60)
            continue
        if not isinstance(shown, Partial):
            assert isinstance(view, FigureView | BlockView | TableView)
            return shown
        shown.pending.job.wait(60)


def words(component: Any) -> str:
    """The text of Dash components."""
    if component is None:
        return ""
    if isinstance(component, list | tuple):
        return " ".join(words(part) for part in component)
    return words(component.children) if hasattr(component, "children") else str(component)
