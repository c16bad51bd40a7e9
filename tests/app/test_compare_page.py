"""Compare: which sets and stores are held against each other, what is refused, where clicks lead."""

from __future__ import annotations

import numpy as np
import pytest

from moescope import analysis
from moescope.app.pages.compare import COMPARE, sets_of
from moescope.app.place import parse
from moescope.app.slicing import with_documents, with_values
from moescope.errors import MoescopeError
from tests.analysis.made_stores import random_truth, write
from tests.app.made_desk import DOCUMENTS, DOMAIN, drawn, made_desk, made_shelf, words

VIEWS = {view.name: view for view in COMPARE.views}


@pytest.fixture(scope="module")
def desk(tmp_path_factory):
    return made_desk(made_shelf(tmp_path_factory.mktemp("compared")))


def test_two_stores_of_the_same_tokens(desk):
    place = parse("/store/a/compare?with=b")[0]
    moved = drawn(desk, VIEWS["shifts"], place)
    result = analysis.compare(desk.shelf.open("a").store, desk.shelf.open("b").store)
    assert set(moved["layer"][:2]) == {2}
    top = moved.iloc[0]
    at = result.isel(label=0).sel(layer=top["layer"], expert=top["expert"])
    assert top["share_change"] == pytest.approx(float(at["share_change"]))
    assert abs(top["share_change"]) == pytest.approx(float(np.nanmax(np.abs(result["share_change"]))))
    by_label = drawn(desk, VIEWS["agreements"], place)
    assert list(by_label["label"]) == ["code", "math", "prose"]
    assert "captured without edits" in words(drawn(desk, VIEWS["pair"], place))
    assert drawn(desk, VIEWS["agreement"], place.go(label="code")).layout.updatemenus == ()


@pytest.mark.parametrize(
    ("href", "view", "said"),
    [
        ("/store/a/compare?with=c", "agreement", "c"),
        ("/store/a/compare?with=a", "pair", "same store"),
        ("/store/a/compare?with=gone", "pair", "no store 'gone'"),
        ("/store/a/compare", "texts", "Select a value of the label, or a slice"),
        ("/store/a/compare?label=code&against=code", "texts", "Both sets are 'code'"),
        ("/store/a/compare?label=code&against=klingon", "texts", "'klingon'"),
        ("/store/a/compare?label=code&against=slice:no", "texts", "no slice 'no'"),
    ],
)
def test_what_cannot_be_compared_is_refused_in_a_sentence(desk, href, view, said):
    with pytest.raises(MoescopeError, match=said):
        drawn(desk, VIEWS[view], href)


def test_sets_of_texts(desk):
    def asked(place):
        return sets_of(desk.scene(place))

    place = parse("/store/a/compare?label=code")[0]
    assert asked(place) == ({"domain": ["code"]}, {"domain": ["math", "prose"]}, ("code", "other domains"))
    assert asked(place.go(against="math"))[1:] == ({"domain": ["math"]}, ("code", "math"))
    few = with_documents(parse("/store/a/compare")[0], "few", range(6))
    assert asked(few) == ({"document": list(range(6))}, None, ("slice few", "all others"))
    inside = asked(few.go(label="code", against="math"))
    assert inside[0] == {"document": list(range(6)), "domain": ["code"]}
    assert inside[1] == {"document": list(range(6)), "domain": ["math"]}
    many = with_documents(few, "rest", range(6, DOCUMENTS)).go(slice="few", against="slice:rest")
    assert asked(many)[1:] == ({"document": list(range(6, DOCUMENTS))}, ("slice few", "slice rest"))


def test_the_second_set_stays_in_the_slice(desk):
    two = with_values(parse("/store/a/compare?label=code")[0], "two", "domain", ["code", "math"])
    assert sets_of(desk.scene(two))[:2] == ({"domain": ["code"]}, {"domain": ["math"]})
    with pytest.raises(MoescopeError, match="No document of the slice 'two' has 'prose'"):
        sets_of(desk.scene(two.go(against="prose")))
    assert sets_of(desk.scene(two.go(label=None, against="prose")))[:2] == (
        {"domain": ["code", "math"]},
        {"domain": ["prose"]},
    )
    one = with_values(two, "one", "domain", ["code"])
    with pytest.raises(MoescopeError, match="Every document of the slice 'one' has 'code'"):
        sets_of(desk.scene(one))


def test_sets_by_documents_give_what_the_label_gives(desk):
    store = desk.shelf.open("a").store
    code = [d for d in range(DOCUMENTS) if DOMAIN[d] == "code"]
    of = analysis.risk_difference_of(store, {"document": code}, permutations=50, resamples=20)
    by = analysis.risk_difference(store, "code", permutations=50, resamples=20)
    for name in ("risk_difference", "count_first", "count_second", "p_first", "p", "low"):
        np.testing.assert_allclose(of[name].values, by[name].values, err_msg=name)
    pair = analysis.risk_difference_of(store, {"domain": "code"}, {"domain": "math"}, permutations=0, resamples=0)
    label = analysis.risk_difference(store, "code", "math", permutations=0, resamples=0)
    np.testing.assert_allclose(pair["risk_difference"].values, label["risk_difference"].values)
    with pytest.raises(MoescopeError, match="share 12 documents"):
        analysis.risk_difference_of(store, {"domain": "code"}, {"document": list(range(DOCUMENTS))})
    with pytest.raises(MoescopeError, match="is every document"):
        analysis.risk_difference_of(store, {"document": list(range(DOCUMENTS))})


def test_clicks_lead_to_experts_and_never_to_numbers_that_are_none():
    place, click = parse("/store/a/compare?with=b")[0], VIEWS["between"].click
    assert click(place, {"x": 3, "y": "2", "z": 0.1}).expert_name == "L2E3"
    assert click(place, {"x": 0.12, "y": "L2 E4"}).expert_name == "L2E4"
    assert click(place, {"x": 0.97, "y": "2"}) is None


def test_the_page_follows_a_second_store(desk):
    from moescope.app.arriving import state

    here = parse("/store/a/compare?with=b")[0]
    assert state(desk, here)["version"] != state(desk, here.go(other="c"))["version"]
    assert state(desk, here.go(label="code"))["choices"]["against"] == ["code", "math", "prose"]


def test_stores_of_other_experts_are_not_offered(desk):
    offered = words(drawn(desk, VIEWS["pair"], "/store/a/compare")).partition("for instance:")[2].split()
    assert offered == ["b", "c"]
    assert "No other store in this folder is of this model" in words(drawn(desk, VIEWS["pair"], "/store/even/compare"))


def test_a_store_without_labels_asks_for_no_value(tmp_path):
    write(tmp_path / "bare", random_truth(np.random.default_rng(3), 6, [4], [2]), [4], {})
    with pytest.raises(MoescopeError, match=r"^Select a slice above"):
        drawn(made_desk(tmp_path), VIEWS["texts"], "/store/bare/compare")
