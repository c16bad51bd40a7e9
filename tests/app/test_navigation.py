"""A page is made anew when what it is made from has changed, and only then."""

from __future__ import annotations

import shutil

import pytest

from moescope.app import navigation
from moescope.app.navigation import same_page, state
from moescope.app.place import Place
from tests.app.made_desk import made_desk, made_shelf, words


@pytest.fixture
def desk(tmp_path):
    return made_desk(made_shelf(tmp_path / "shelf"))


@pytest.mark.parametrize(("name", "stays"), [("overview", True), ("lab", True), ("compare", False), ("shelf", False)])
def test_only_the_pages_that_show_other_stores_change_with_them(desk, name, stays):
    here = Place(name, None if name == "shelf" else "a")
    before = state(desk, here)
    shutil.copytree(desk.shelf.root / "b", desk.shelf.root / "new")
    assert same_page(state(desk, here), before) is stays


def test_a_store_captured_again_under_its_name_makes_its_page_anew(desk):
    here = Place("overview", "c")
    before = state(desk, here)
    assert same_page(state(desk, here), before)
    shutil.rmtree(desk.shelf.root / "c")
    shutil.copytree(desk.shelf.root / "b", desk.shelf.root / "c")
    now = state(desk, here)
    assert now["layers"] == before["layers"]
    assert not same_page(now, before)


def test_an_error_nobody_foresaw_names_no_folder_of_this_machine(desk, monkeypatch):
    shown = {}
    monkeypatch.setattr(navigation, "set_props", lambda name, props: shown.update({name: props}))
    navigation.alarmed(desk, OSError(f"nothing left at {desk.shelf.root / 'a'}"))
    assert words(shown["alarm"]["children"]) == "OSError: nothing left at a"
