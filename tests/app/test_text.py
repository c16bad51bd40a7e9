"""The page of texts, without a browser: nothing of a hostile text acts, every token keeps its words, clicks lead on."""

from __future__ import annotations

import json
import shutil
import threading
import unicodedata

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moescope import analysis, figures
from moescope.app import book, textsearch, tokens
from moescope.app.answers import Pending
from moescope.app.place import Place, parse
from moescope.app.server import build
from moescope.errors import MoescopeError
from tests.analysis.made_stores import random_truth, write
from tests.app.hostile import TEXTS, write_hostile
from tests.app.made_desk import drawn as finished
from tests.app.made_desk import made_desk


@pytest.fixture(scope="module")
def desk(tmp_path_factory):
    root = tmp_path_factory.mktemp("shelf")
    write_hostile(root / "hostile")
    return made_desk(root)


def drawn(desk, name, dark=False, **fields):
    """What a view shows in the end; `dark` asks for the dark page's colours."""
    place = Place(page="text", store="hostile", **fields)
    finished(desk, book.view(name), place)
    return book.view(name).draw(desk.scene(place, dark))  # pyright: ignore[reportAttributeAccessIssue]


def walk(component):
    """Every component and string below one."""
    yield component
    children = getattr(component, "children", None)
    for child in children if isinstance(children, list | tuple) else [children]:
        if child is not None:
            yield from walk(child)


def said(component):
    return "".join(one for one in walk(component) if isinstance(one, str))


def options(component):
    return [one for one in walk(component) if getattr(one, "role", None) == "option"]


@pytest.mark.parametrize("document", range(len(TEXTS)))
def test_a_hostile_document_is_whole_and_nothing_but_text(desk, document):
    page = drawn(desk, "text-tokens", doc=document)
    kinds = {type(one).__name__ for one in walk(page) if not isinstance(one, str)}
    assert kinds <= {"Div", "Span", "A", "P", "Nav", "Bdi", "Sub"}
    shown = said(options(page)[0].__class__(options(page)))
    for mark in ("↵", "⇥"):
        shown = shown.replace(mark, "")
    odd = {c for c in TEXTS[document] if unicodedata.category(c) in ("Cc", "Cf", "Zl", "Zp") and c not in "\n\t"}
    expected = "".join(f"U+{ord(c):04X}" if c in odd else c for c in TEXTS[document])
    assert shown == expected
    links = [one.href for one in walk(page) if getattr(one, "href", None)]
    assert all(href.startswith("/store/hostile/") for href in links)


@given(st.text(max_size=30))
def test_no_invisible_or_turning_character_survives(text):
    for shown in (tokens.spelled(text), tokens.spoken(text), said(tokens.html.Span(tokens.marked(text)))):
        left = [c for c in shown if unicodedata.category(c) in ("Cc", "Cf", "Zl", "Zp", "Cs") and c not in "\n\t"]
        assert not left


@given(st.tuples(*[st.integers(0, 255)] * 3))
def test_ink_can_be_read_on_every_colour(colour):
    name = "#{:02x}{:02x}{:02x}".format(*colour)
    ground, ink = tokens.luminance(name), tokens.luminance(tokens.ink_on(name))
    assert (max(ground, ink) + 0.05) / (min(ground, ink) + 0.05) >= 4.5


@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("colour", [name for name in tokens.COLOURS if name != "loss"])
def test_every_token_tells_its_position_value_and_experts(desk, colour, dark):
    page = drawn(desk, "text-tokens", doc=3, colour=colour, layer="1", expert=4, dark=dark)
    found = analysis.passage(desk.shelf.open("hostile").store, 3, 1)
    shown = options(page)
    assert len(shown) == found.sizes["token"]
    for at, one in enumerate(shown):
        facts = one.to_plotly_json()["props"]
        ids = [int(pair.split(":")[0]) for pair in facts["data-routes"].split()]
        assert ids == found["expert"].values[at].tolist()
        assert facts["data-phase"] == found["phase"].values[at]
        assert facts["data-words"] in facts["aria-label"]
        fires = 4 in ids
        if colour == "fires":
            assert ("background" in facts["style"]) == fires
        if colour == "weight":
            weight = dict(zip(ids, found["weight"].values[at].tolist(), strict=True)).get(4)
            assert facts["data-words"] == ("not sent to expert 4" if weight is None else f"weight {weight:.3g}")
    assert sum(one.tabIndex == 0 for one in shown) == 1


def test_what_cannot_be_shown_is_said(desk):
    for fields, words in (
        ({"doc": 99}, "no document 99"),
        ({"doc": 0, "start": 5000}, "there is none from"),
        ({"colour": "loss"}, "no loss"),
        ({"colour": "weight"}, "Select an expert"),
        ({"colour": "shoe"}, "cannot be coloured"),
        ({"layer": "9"}, "no MoE layer 9"),
    ):
        with pytest.raises(MoescopeError, match=words):
            drawn(desk, "text-tokens", **fields)
    with pytest.raises(MoescopeError, match="no token 700"):
        drawn(desk, "text-routing", doc=0, token=700)
    with pytest.raises(MoescopeError, match="Click a token"):
        drawn(desk, "text-routing", doc=0)


def test_a_click_on_a_tokens_expert_selects_it_and_its_page_is_one_link_away(desk):
    figure = drawn(desk, "text-routing", doc=2, token=5)
    numbers = next(trace for trace in figure.data if trace.name == "numbers")
    view = book.view("text-routing")
    place = Place(page="text", store="hostile", doc=2, token=5)
    facts = json.loads(json.dumps(numbers.customdata[3].tolist()))
    there = view.click(place, {"customdata": facts})  # pyright: ignore[reportAttributeAccessIssue]
    assert (there.layer, there.expert, there.token) == ("1", facts[2], 5)
    assert view.click(place, {"customdata": None}) is None  # pyright: ignore[reportAttributeAccessIssue]
    about = drawn(desk, "text-token", doc=2, token=5, layer="1")
    pages = [parse(one.href)[0] for one in walk(about) if getattr(one, "href", None)]
    assert any(one.page == "expert" and one.expert_name == there.expert_name for one in pages)


def test_a_search_takes_every_character_as_itself(desk):
    def found(text):
        page = drawn(desk, "text-find", find=text)
        return {parse(one.href)[0].doc for one in walk(page) if getattr(one, "className", None) == "opening"}

    for text in ("(", ".*", "[31M", "</TEXTAREA>", "window.hacked", "\\u003c", "\u202e"):
        assert found(text) == {d for d, one in enumerate(TEXTS) if text.casefold() in one.casefold()}


@pytest.mark.parametrize(
    ("search", "asked"),
    [("tokens_matching", {"find": "a"}), ("token_occurrences", {"word": 3}), ("find_documents", {"find": "b"})],
)
def test_a_search_that_takes_long_shows_its_progress(tmp_path, monkeypatch, search, asked):
    write_hostile(tmp_path / "hostile")
    desk, done, real = made_desk(tmp_path), threading.Event(), getattr(analysis, search)
    monkeypatch.setattr(analysis, search, lambda *given, **more: done.wait(60) and real(*given, **more))
    view, place = book.view("text-find"), Place("text", "hostile", **asked)
    try:
        textsearch.contents(desk.scene(place, patience=60))
        with pytest.raises(Pending):
            view.draw(desk.scene(place, patience=0.2))
    finally:
        done.set()
    assert finished(desk, view, place) is not None


def test_an_occurrence_leads_to_its_token(desk):
    store = desk.shelf.open("hostile").store
    page = drawn(desk, "text-find", word=3)
    places = [
        parse(one.href)[0] for one in walk(page) if type(one).__name__ == "A" and said(one).startswith("document ")
    ]
    assert places
    for place in places:
        assert analysis.passage(store, place.doc, 0, place.token, place.token + 1)["token_id"].item() == 3


def test_a_replay_adds_up_to_the_load_of_the_stretch(desk):
    store = desk.shelf.open("hostile").store
    routes = analysis.passage_routes(store, 3)
    for row, layer in enumerate((0, 1)):
        np.testing.assert_array_equal(routes["expert"].values[:, row], analysis.passage(store, 3, layer)["expert"])
    for steps in (0, 1, 7, None):
        figure = figures.replay(routes, steps)
        part = routes["expert"].values[:steps]
        for row in range(2):
            assert list(figure.data[0].z[row]) == [int((part[:, row] == e).sum()) for e in range(8)]
        assert len(figure.data[1].x) == (4 if steps else 0)
    whole = figures.replay(analysis.passage_routes(store, 3, 5, 9))
    assert whole.data[0].meta["first"] == 5
    with pytest.raises(MoescopeError, match="there are none"):
        analysis.passage_routes(store, 3, 9, 5)


def test_a_replay_hatches_what_a_layer_does_not_have(desk):
    routes = analysis.passage_routes(desk.shelf.open("hostile").store, 3)
    assert len(figures.replay(routes).data) == 2
    narrow = routes.assign(n_experts=("layer", [8, 5]), expert=routes["expert"] % 5)
    hatched = figures.replay(narrow).data[2]
    assert (hatched.name, list(hatched.base), list(hatched.x), list(hatched.y)) == ("no such expert", [4.5], [3], ["1"])


def test_a_new_document_forgets_the_token_and_a_new_search_its_page():
    place = Place(page="text", store="s", doc=1, token=4, held=2, step=3, find="a", listed=25, word=7, hit=10)
    assert place.go(doc=2) == Place(page="text", store="s", doc=2, find="a", listed=25, word=7, hit=10)
    assert place.go(find="b") == Place(page="text", store="s", doc=1, token=4, held=2, step=3, find="b")


def test_the_page_is_served(tmp_path):
    write_hostile(tmp_path / "hostile")
    answer = build(tmp_path).server.test_client().get("/store/hostile/text", headers={"Host": "127.0.0.1"})
    assert answer.status_code == 200


def test_a_document_without_labels_is_listed_without_a_gap(tmp_path):
    write(tmp_path / "plain", random_truth(np.random.default_rng(5), 3, [4], [1]), [4], {})
    shown = finished(made_desk(tmp_path), book.view("text-find"), Place("text", "plain"))
    assert " tokens" in said(shown)
    assert "·  ·" not in said(shown)


def test_occurrences_are_of_all_documents_and_say_so(desk):
    assert "In all documents" not in said(drawn(desk, "text-find", word=3))
    shown = drawn(desk, "text-find", word=3, slices="few~documents:1", slice="few")
    assert "In all documents, whichever are selected." in said(shown)
    assert "Documents: 1" in said(shown)


def test_a_store_without_a_shard_yet_says_so(tmp_path):
    write_hostile(tmp_path / "new")
    for shard in (tmp_path / "new" / "shards").iterdir():
        shutil.rmtree(shard)
    manifest = tmp_path / "new" / "manifest.json"
    said_of = json.loads(manifest.read_text(encoding="utf-8"))
    manifest.write_text(json.dumps(said_of | {"status": "capturing", "shards": [], "files": {}}), encoding="utf-8")
    desk = made_desk(tmp_path)
    with pytest.raises(MoescopeError, match="no tokens yet"):
        finished(desk, book.view("text-tokens"), Place("text", "new"))
    broken = {}
    for page in book.PAGES.values():
        for view in page.shown(Place(page.name, "new")):
            try:
                finished(desk, view, Place(page.name, "new"))
            except MoescopeError as reason:
                broken[view.name] = str(reason)
    assert not [why for why in broken.values() if " failed: " in why]


def test_a_token_in_a_table_does_not_turn_what_stands_around_it(tmp_path):
    truth = random_truth(np.random.default_rng(0), 12, [4, 4], [2, 2], longest=60)
    words = {token: f"\u202e\u200b{token}\n" for token in range(20)}
    write(tmp_path / "turned", truth, [4, 4], {}, vocabulary=words)
    table = finished(made_desk(tmp_path), book.view("expert-tokens"), Place("expert", "turned", layer="0", expert=1))
    assert len(table)
    for token, text, number in zip(table["token"], table["text"], table["token_id"], strict=True):
        assert text == words[number]  # as it is, for the search that a click begins
        assert token == f"⟨U+202E⟩⟨U+200B⟩{number}↵"
