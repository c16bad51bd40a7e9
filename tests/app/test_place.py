"""The URL codec: every place survives its URL, and no URL breaks it."""

from __future__ import annotations

from dataclasses import fields

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moescope.app.book import PAGES as PAGES_OF_APP
from moescope.app.controls import chosen
from moescope.app.place import ALLOWED, PAGES, Place, parse
from moescope.errors import MoescopeError
from tests.app.made_desk import made_desk, made_shelf

_TEXT = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=30)
_LAYER = st.one_of(st.integers(0, 99_999).map(str), st.just("L012-attention"), st.just("L003x"))
_NUMBER = st.integers(0, 10**14)


def _written(layer: str) -> str:
    return f"L{layer}" if layer.isdigit() else layer


def _strategy(name: str, kind: str) -> st.SearchStrategy:
    if name in ("layer", "neighbour"):
        return st.one_of(st.none(), _LAYER)
    if name == "pin":
        return st.one_of(st.none(), st.builds(lambda layer, n: f"{layer}E{n}", _LAYER.map(_written), _NUMBER))
    if name in ALLOWED:
        return st.sampled_from([None, *ALLOWED[name]])
    if kind.startswith("int"):
        return st.one_of(st.none(), _NUMBER)
    if kind.startswith("float"):
        return st.one_of(st.none(), st.floats(0, 1e6))
    if kind == "bool":
        return st.booleans()
    if kind.startswith("tuple"):
        return st.lists(st.from_regex(r"[a-z-]{1,8}", fullmatch=True), max_size=3).map(tuple)
    return st.one_of(st.none(), _TEXT)


@st.composite
def _places(draw) -> Place:
    found = {
        field.name: draw(_strategy(field.name, str(field.type)))
        for field in fields(Place)
        if field.name not in ("page", "store", "expert")
    }
    name = draw(st.lists(_TEXT.filter(lambda text: text.strip("/")), min_size=1, max_size=2).map("/".join))
    return Place(
        page=draw(st.sampled_from(PAGES)),
        store=name,
        expert=draw(st.one_of(st.none(), _NUMBER)),
        **found,
    )


@given(_places())
def test_a_place_is_what_its_url_says(place):
    assert parse(place.href) == (place, ())


@given(_places())
def test_a_whole_address_is_read_as_its_end_is(place):
    assert parse(f"http://127.0.0.1:8050{place.href}") == parse(place.href)


@given(st.text(max_size=200))
def test_nonsense_leads_somewhere(text):
    place, _ = parse("/" + text)
    assert parse(place.href)[0] == place


@pytest.mark.parametrize(
    ("href", "words"),
    [
        ("/nowhere", "no page '/nowhere'"),
        ("/store/demo/nothing", "no page 'nothing'"),
        ("/store/demo/L3/E", "no page 'L3/E'"),
        ("/store/demo?foo=1", "'foo', which means nothing here"),
        ("/store/demo?page=lab", "'page', which means nothing here"),
        ("/store/demo?expert=-1", "'expert' as '-1'"),
        ("/store/demo?expert=1e3", "'expert' as '1e3'"),
        ("/store/demo?temperature=1e999", "'temperature' as '1e999'"),
        ("/store/demo?layer=../x", "'layer' as '../x'"),
        ("/store/demo?phase=both", "'phase' as 'both'"),
        ("/store/demo?value=share", "'value' as 'share'"),
        ("/store/demo/specialisation?measure=reap", "'measure' as 'reap'"),
        ("/store/demo/specialisation?kinds=load", "'kinds' as 'load'"),
        ("/store/demo?pin=3", "'pin' as '3'"),
        ("/store/demo?pin=L3E", "'pin' as 'L3E'"),
        ("/store/demo?pin=../xE3", "'pin' as '../xE3'"),
        ("/store/demo/L1/E2?expert=3", "'expert' twice"),
        (f"/store/demo?find={'x' * 9000}", "'find' as"),
        ("http://[", "could not be read"),
    ],
)
def test_what_cannot_be_read_is_said_and_left_out(href, words):
    place, notes = parse(href)
    assert any(words in note for note in notes), notes
    assert parse(place.href) == (place, ())


@pytest.mark.parametrize("href", ["/store/demo/{}/E1", "/store/demo?find={}"])
def test_a_very_long_address_is_read_as_any_other(href):
    """By a rule that tries every split of its digits it would take hours, in which nothing else is answered."""
    place, notes = parse(href.format(f"L{'1' * 1_000_000}!"))
    assert (place, len(notes)) == (Place("overview", "demo"), 1)


def test_an_expert_has_the_link_people_write():
    assert Place("expert", "runs/a b", layer="12", expert=57).href == "/store/runs%2Fa%20b/L12/E57"
    assert parse("/store/demo/L012/E57")[0] == Place("expert", "demo", layer="12", expert=57)
    assert Place("expert", "demo", layer="L003-attention", expert=1).href == "/store/demo/L003-attention/E1"


def test_columns_are_left_out_table_by_table():
    here = Place("expert", "a").leaving_out("experts", ["ean", "reap"]).leaving_out("cells", ["p"])
    assert here.href == "/store/a/expert?without=experts.ean,experts.reap,cells.p"
    assert parse(here.href)[0].left_out("experts") == ["ean", "reap"]
    assert here.left_out("expert") == []
    assert here.leaving_out("experts", []).leaving_out("cells", []) == Place("expert", "a")
    assert here.go(store="b").without == here.without


def test_what_belonged_to_one_store_is_not_asked_of_another():
    here = Place("text", "a", layer="3", expert=1, doc=5, token=2, recipe="L1E2*3")
    assert here.go(store="b") == Place("text", "b", recipe="L1E2*3")
    assert here.go(doc=6).token is None
    assert Place("overview", "a", by="domain", label="code").go(by="source").label is None


def test_a_link_drawn_earlier_changes_only_what_it_is_about():
    drawn = Place("expert", "demo", layer="3", expert=0, label="code")
    link = drawn.go(expert=7, page="text")
    here = drawn.go(label="math", recipe="L1E2*3")
    assert here.moved(drawn, link) == Place("text", "demo", layer="3", expert=7, label="math", recipe="L1E2*3")
    assert drawn.moved(drawn, link) == link


def test_a_link_to_what_was_selected_selects_it_again():
    drawn = Place("text", "demo", layer="3", expert=0, doc=1, token=0, label="code")
    here = drawn.go(layer="4", expert=7, label="math")
    assert here.moved(drawn, drawn) == drawn.go(label="math")


@given(_places(), _places())
def test_from_where_it_was_drawn_a_link_leads_where_it_says(start, end):
    assert start.moved(start, end) == end


def test_what_an_address_cannot_hold_is_refused_and_not_forgotten():
    here = Place("lab", "demo", recipe="L3E7*64")
    with pytest.raises(MoescopeError, match="8,000 characters"):
        chosen(here, "recipe", "L3E7*64," * 2000, "")
    assert chosen(here, "recipe", "", "").recipe is None
    assert chosen(here, "expert", 0, "").expert == 0


def test_a_link_to_one_thing_leads_to_it_whatever_was_chosen_since():
    drawn = Place("overview", "demo", layer="3", expert=7)
    here = drawn.go(layer="9", expert=1)
    for link in (drawn.go(page="expert", layer="3", expert=7), drawn.go(page="expert", layer="3", expert=8)):
        assert here.moved(drawn, link) == link
    assert here.moved(drawn, drawn.go(page="lab")) == here.go(page="lab")
    read = Place("text", "demo", doc=0)
    pinned = read.go(token=300, start=256)
    assert pinned.moved(read, read.go(doc=5)) == Place("text", "demo", doc=5)
    assert pinned.moved(read, read.go(held=4)) == pinned.go(held=4)


def test_a_switch_sets_a_field_of_its_own_page_and_offers_what_the_address_allows(tmp_path):
    """From page to page goes what both know: a value of one page's switch never stands in another's."""
    scene = made_desk(made_shelf(tmp_path)).scene(Place("overview", "a"))
    used: dict[str, set[str]] = {}
    for page in PAGES_OF_APP.values():
        for control in (*page.controls, *(one for view in page.views for one in view.controls)):
            shown = control(scene)
            inner = shown if hasattr(shown, "id") else shown.children
            field, offered = inner.id["field"], [one["value"] for one in getattr(inner, "data", None) or []]
            used.setdefault(field, set()).add(page.name)
            if field in ALLOWED:
                assert set(offered) == set(ALLOWED[field])
    assert {"value", "measure", "kinds", "definition", "bands", "method"} <= set(used)
    assert {field: pages for field, pages in used.items() if len(pages) > 1} == {}


def test_a_pinned_expert_stays_while_others_are_selected():
    here = Place("expert", "demo", layer="3", expert=7, pin="L3E7")
    assert parse("/store/demo/L4/E1?pin=L003E07")[0] == here.go(layer="4", expert=1)
    assert here.go(layer="4", expert=1).pinned == here
    assert Place("expert", "demo", pin="L002-mlpE3").pinned.expert_name == "L002-mlpE3"
    assert here.go(store="other").pin is None
    assert Place("expert", "demo").pinned is None
