"""Clicks and keys lead where they say, and an error that nobody foresaw stays visible."""

from __future__ import annotations

from moescope.app import navigation
from tests.app.made_desk import made_desk, made_shelf, words


def test_an_error_nobody_foresaw_names_no_folder_of_this_machine(tmp_path, monkeypatch):
    desk, shown = made_desk(made_shelf(tmp_path / "shelf")), {}
    monkeypatch.setattr(navigation, "set_props", lambda name, props: shown.update({name: props}))
    navigation.alarmed(desk, OSError(f"nothing left at {desk.shelf.root / 'a'}"))
    assert words(shown["alarm"]["children"]) == "OSError: nothing left at a"
