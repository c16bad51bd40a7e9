"""No stale figure: every view follows each field of the place that it is drawn from."""

from __future__ import annotations

import sys
from dataclasses import fields, replace

import pytest

from moescope.app.answers import Answers, Pending
from moescope.app.book import PAGES
from moescope.app.jobs import Jobs
from moescope.app.place import Place
from moescope.app.scene import Desk, Scene
from moescope.app.shelf import Shelf
from moescope.app.views import TableView
from moescope.errors import MoescopeError

_FIELDS = {field.name for field in fields(Place)}
# The page itself, its store and its second store are in every panel's key; a link may carry the rest along.
_ALWAYS = {"page", "store", "other", "embed", "hide", "full"}


# What a panel shows once and the browser keeps in step itself: the token pinned, the replay's step, a control's value.
_BY_THE_BROWSER = {"text-tokens": {"token", "step"}, "text-replay": {"token", "step"}, "asked": {"options"}}


class Watched(Place):
    """A place that remembers which of its fields were asked for, except to make another place or an address."""

    def __getattribute__(self, name):
        if name in _FIELDS:
            object.__getattribute__(self, "__dict__").setdefault("asked", set()).add(name)
        return super().__getattribute__(name)

    def plain(self) -> Place:
        held = object.__getattribute__(self, "__dict__")
        return Place(**{name: held[name] for name in _FIELDS})

    def go(self, **changes):
        return self.plain().go(**changes)

    @property
    def href(self):
        return self.plain().href


class Shaded(Scene):
    """A scene that remembers whether it was asked for the page's colours."""

    asked = False

    def __getattribute__(self, name):
        if name == "dark" and sys._getframe(1).f_globals["__name__"] != "dataclasses":  # replace() copies every field
            Shaded.asked = True
        return super().__getattribute__(name)


def _views():
    return [pytest.param(name, view, id=view.name) for name, page in PAGES.items() for view in page.views]


@pytest.fixture(scope="module")
def desk(shelf):
    jobs = Jobs()
    return Desk(Shelf(shelf), jobs, Answers(jobs))


@pytest.mark.parametrize(("page", "view"), _views())
def test_a_view_follows_what_it_is_drawn_from(desk, page, view):
    whole = Place(
        page, "demo", layer="2", expert=3, by="domain", label="python", slices="a~domain:python,facts", slice="a",
        doc=1, token=4, other="masked", pin="L1E2",
    )  # fmt: skip
    asked: set[str] = set()
    Shaded.asked = False
    for place in (whole, replace(whole, expert=None, layer=None, label=None, slice=None, token=None)):
        watched = Watched(**{field.name: getattr(place, field.name) for field in fields(Place)})
        for _ in range(60):
            try:
                scene = desk.scene(watched)
                scene = Shaded(desk, scene.place, scene.opened)
                view.frame(scene) if isinstance(view, TableView) else view.draw(scene)
                break
            except Pending as pending:
                pending.job.wait(120)
            except MoescopeError:
                break
        asked |= watched.__dict__.get("asked", set())
    missed = asked - _ALWAYS - set(view.reads) - _BY_THE_BROWSER.get(view.name, set())
    assert not missed, f"{view.name} must also read {missed}"
    assert view.themed or not Shaded.asked, f"{view.name} is drawn otherwise on a dark page"
