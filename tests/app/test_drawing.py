"""Panels: one that fails leaves the page and the others alone."""

from __future__ import annotations

import gc
import time
import weakref
from dataclasses import replace

import pytest
from dash import dcc

from moescope import figures
from moescope.app import book, drawing, panels, textsearch
from moescope.app.book import PAGES
from moescope.app.place import Place
from moescope.app.views import BlockView, FigureView
from tests.app.made_desk import drawn, made_desk, made_shelf, words


@pytest.fixture
def desk(tmp_path):
    return made_desk(made_shelf(tmp_path))


def test_a_block_that_fails_does_not_take_its_page_away(desk, monkeypatch, caplog):
    def fails(scene):
        raise KeyError("nobody foresaw this")

    monkeypatch.setattr(drawing, "_AT_ONCE", 60)
    bad = BlockView(name="bad", title="Bad", how="", reads=(), draw=fails)
    good = BlockView(name="good", title="Good", how="", reads=(), draw=lambda scene: "here")
    page = replace(PAGES["overview"], views=(bad, good))
    found = drawing.at_hand(page, desk.scene(Place("overview", "a")), {"href": "/store/a"}, None)
    assert list(found) == ["good"]
    assert "nobody foresaw this" in caplog.text


@pytest.mark.parametrize("theme", ["light", "dark", None])
def test_a_figure_comes_with_its_page_in_the_colours_of_the_page_where_they_are_known(desk, monkeypatch, theme):
    monkeypatch.setattr(drawing, "_AT_ONCE", 60)
    here = Place("overview", "a")
    grid = book.view("grid")
    light = drawn(desk, grid, here)  # from now on its answer is at hand
    scene = desk.scene(here, theme == "dark", patience=0)
    found = drawing.at_hand(replace(PAGES["overview"], views=(grid,)), scene, {"store": "a", "href": here.href}, theme)
    if theme is None:
        assert not found
        return
    figure, key = found["grid"]
    assert (key[0], key[-1], len(key)) == ("a", theme, 3 + len(grid.reads) + 1)  # as the page's script makes it
    ink = figure["layout"]["template"]["layout"]["font"]["color"]
    assert ink == (figures.dark(light) if theme == "dark" else light).layout.template.layout.font.color
    panel = panels.panel(grid, scene, figure, key)
    (graph,) = [one for one in panel._traverse() if isinstance(one, dcc.Graph)]
    assert graph.figure is figure
    assert graph.style != panels.HIDDEN


def test_a_panel_that_fails_shows_why_and_not_what_it_showed_before(desk, caplog):
    def fails():
        raise KeyError(f"nobody foresaw {desk.shelf.root / 'a'}")

    view = FigureView(name="bad", title="Bad", how="", reads=(), draw=None)
    shown, (said, over, job) = drawing.guarded(view, desk, fails)
    assert (shown, over, job) == (None, True, None)
    assert "nobody foresaw a" in words(said)
    assert "bad failed" in caplog.text


def test_what_is_counted_of_a_store_goes_with_it(desk):
    opened = desk.shelf.open("a")
    held = weakref.ref(textsearch.contents(desk.scene(Place("text", "a"), patience=30)))
    assert held() is not None
    desk.shelf._open.clear()
    del opened
    until = time.monotonic() + 30
    while held() is not None and time.monotonic() < until:  # the thread that counted may not have ended yet
        time.sleep(0.02)
        gc.collect()
    assert held() is None


@pytest.mark.parametrize(
    ("title", "what", "total", "said"),
    [
        ("generating", "waiting for its turn", 0, "generating: waiting for its turn"),
        ("counting tokens", "", 0, "counting tokens"),
        ("Which experts?", "shards", 9, "Which experts? shards: 3 of 9"),
        ("Masking L0E1:", "tokens", 9, "Masking L0E1: tokens: 3 of 9"),
    ],
)
def test_progress_is_a_sentence(title, what, total, said):
    view = next(view for view in PAGES["overview"].views if view.name == "grid")
    assert said in words(panels.progress(view, title, what, 3, total))
