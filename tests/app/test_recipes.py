"""The recipe codec: recipes survive their text, clicks leave a text that can be read, nonsense is one sentence."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moescope.app import recipes
from moescope.app.editbar import adding, badge
from moescope.app.place import Place, parse
from moescope.edits import Demote, Mask, Merge, Promote, Prune, Recipe, Replace, Route, Rows, Scale, Zero
from moescope.errors import MoescopeError

_LAYERS = st.one_of(st.integers(0, 99_999), st.from_regex(r"L0[0-9]{2}([A-Za-z_-][A-Za-z0-9_-]{0,8})?", fullmatch=True))
_EXPERTS = st.lists(st.integers(0, 999_999), min_size=1, max_size=4, unique=True)
_STAGES = st.sampled_from(["logit", "score", "weight", "weight_renormalised"])


@st.composite
def _edits(draw):
    where = {"layer": draw(_LAYERS), "expert": draw(_EXPERTS)}
    kind = draw(st.sampled_from([Scale, Mask, Zero, Promote, Demote, Prune, Merge, Route]))
    if kind is Scale:
        where |= {"factor": draw(st.floats(0, allow_infinity=False, allow_nan=False)), "stage": draw(_STAGES)}
    if kind is Merge:
        where["expert"] = draw(st.lists(st.integers(0, 999_999), min_size=2, max_size=4, unique=True))
        weights = [draw(st.floats(0.001, 1e9)) for _ in where["expert"]]
        where |= {"weights": draw(st.sampled_from([None, weights]))}
        where |= {"keep": draw(st.sampled_from(["all", "first"])), "align": draw(st.booleans())}
    if kind is Route:
        rule = draw(st.sampled_from(["top_k", "top_p", "ranks"]))
        value = {"top_k": 3, "top_p": 0.9, "ranks": [0, 2]}[rule]
        where = {"layer": where["layer"], rule: value, "renormalise": draw(st.booleans())}
    return kind(**where)


def _consistent(recipe):
    try:
        recipe.require_consistent()
    except MoescopeError:
        return False
    return True


@given(st.lists(_edits(), min_size=1, max_size=6).map(Recipe).filter(_consistent))
def test_a_recipe_is_what_its_text_says(recipe):
    text = recipes.written(recipe)
    assert recipes.read(text).edits == recipe.edits
    # … through an address as well.
    assert recipes.read(parse(Place("lab", "demo", recipe=text).href)[0].recipe).edits == recipe.edits


@given(st.lists(_edits(), min_size=1, max_size=4).map(Recipe).filter(_consistent), st.data())
def test_one_edit_can_be_taken_away(recipe, data):
    number = data.draw(st.integers(0, len(recipe.edits) - 1))
    left = recipes.read(recipes.without(recipes.written(recipe), number))
    assert ([] if left is None else left.edits) == [e for n, e in enumerate(recipe.edits) if n != number]


@given(st.text("L0123E*.:!@mask_logitergpn, -e+", max_size=40))
def test_nonsense_is_refused_in_one_sentence_or_means_what_it_says(text):
    said = ""
    try:
        recipe = recipes.read(text)
    except MoescopeError as error:
        recipe, said = None, str(error)
    assert "\n" not in said
    assert recipe is None or recipes.read(recipes.written(recipe)) == recipe


def test_the_text_people_write():
    text = (
        "L3E7*64, L2E1*0,L4E2.5!mask,L003-attentionE1*0.5@logit,L1E4!prune,L5E2.7!merge,L6E2.7.1!merge:3:1:0.5@first,"
        "L7E2.7!merge:1:0@unaligned,L5!top_k:1,L003-attention!top_p:0.9@raw,L6!ranks:0.2"
    )
    assert recipes.read(text).edits == [
        Scale(layer=3, expert=7, factor=64.0),
        Scale(layer=2, expert=1, factor=0.0),
        Mask(layer=4, expert=[2, 5]),
        Scale(layer="L003-attention", expert=1, factor=0.5, stage="logit"),
        Prune(layer=1, expert=4),
        Merge(layer=5, expert=[2, 7]),
        Merge(layer=6, expert=[2, 7, 1], weights=[3, 1, 0.5], keep="first"),
        Merge(layer=7, expert=[2, 7], weights=[1, 0], align=False),
        Route(layer=5, top_k=1),
        Route(layer="L003-attention", top_p=0.9, renormalise=False),
        Route(layer=6, ranks=[0, 2]),
    ]
    assert [f"{recipes.named(one)} {recipes.said(one)}" for one in recipes.read(text).edits[4:]] == [
        "L1E4 prune",
        "L5E2, 7 merge",
        "L6E2, 7, 1 merge into E2, 3 : 1 : 0.5",
        "L7E2, 7 copies of E2",
        "L5 only the top 1",
        "L003-attention only the first to reach a share of 0.9, weights as they are",
        "L6 only ranks 0, 2",
    ]
    assert recipes.read("") is recipes.read(None) is None


@pytest.mark.parametrize(
    "text",
    [
        "L3E7",
        "L3E7*",
        "L3E7*-1",
        "L3E7!kill",
        "E7*2",
        "L3E7*2@moon",
        "L3E7*1e999",
        "x",
        "L3E7!merge",
        "L3E7.7!merge",
        "L3E7.2!merge:1",
        "L3E7!merge@all",
        "L3E7!top_k:1",
        "L3!top_k:0",
        "L3!top_p:2",
        "L3!mask",
        f"L{'1' * 1_000_000}",  # a rule that tries every split of its digits would take hours
    ],
    ids=lambda text: text[:24],
)
def test_what_is_no_edit_is_said(text):
    with pytest.raises(MoescopeError, match="is not an edit"):
        recipes.read(f"L1E1*2,{text}")


def test_edits_that_contradict_are_said():
    with pytest.raises(MoescopeError, match="mask and promote contradict"):
        recipes.read("L3E7!mask,L3E7!promote")


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (Replace(layer=3, expert=1, file="new.safetensors", digest="0" * 32), "is a replace"),
        (Mask(layer=3, expert=1, rows=Rows(phase="decode")), "some rows only"),
        (Mask(layer="../x", expert=1), "names layer"),
    ],
)
def test_what_the_lab_cannot_hold_is_said_with_what_can(edit, words):
    with pytest.raises(MoescopeError, match=words):
        recipes.written(Recipe([edit]))


def test_clicks_build_a_recipe_and_the_latest_edit_of_an_expert_counts():
    here = Place("overview", "demo", layer="3", expert=7)
    here = adding(here, "scale", 64).go(expert=0)
    here = adding(here, "mask", None).go(layer="L002-attention", expert=5)
    here = adding(here, "promote", "")
    assert here.recipe == "L3E7*64,L3E0!mask,L002-attentionE5!promote"
    assert adding(here.go(layer="3", expert=0), "scale", "0.5").recipe == ("L3E7*64,L002-attentionE5!promote,L3E0*0.5")
    assert here.go(store="other").recipe == here.recipe
    assert badge(here).children.children == "recipe (3)"
    assert parse(badge(here).href)[0] == here.go(page="lab")


def test_clicks_prune_merge_replace_and_route():
    here = Place("overview", "demo", layer="3", expert=7)
    assert adding(here, "prune", None).recipe == "L3E7!prune"
    assert adding(here, "merge", 2).recipe == "L3E7.2!merge"
    there = adding(here, "copy", "2")
    assert recipes.read(there.recipe).edits == [Merge(layer=3, expert=[2, 7], weights=[1, 0], align=False)]
    # The same two experts again: the latest counts. Another of either contradicts, and the recipe stays as it was.
    assert adding(there, "merge", 2).recipe == "L3E7.2!merge"
    with pytest.raises(MoescopeError, match="expert 7: merge and mask contradict"):
        adding(there, "mask", None)
    routed = adding(adding(there, "top_k", 2).go(expert=0), "top_k", 1)
    assert routed.recipe == "L3E2.7!merge:1:0@unaligned,L3!top_k:1"
    assert adding(here.go(layer="L002-attention"), "top_k", 1).recipe == "L002-attention!top_k:1"


@pytest.mark.parametrize(
    ("kind", "number", "words"),
    [
        ("merge", None, "Give the other expert"),
        ("copy", "", "Give the other expert"),
        ("copy", 7, "selected expert itself"),
        ("merge", 2.5, "whole number"),
        ("merge", float("nan"), "whole number"),
        ("top_k", float("inf"), "whole number"),
        ("top_k", None, "how many"),
        ("top_k", 0, "is not an edit"),
    ],
)
def test_a_number_that_an_edit_lacks_is_asked_for(kind, number, words):
    with pytest.raises(MoescopeError, match=words):
        adding(Place("overview", "demo", layer="3", expert=7), kind, number)


@pytest.mark.parametrize("factor", [None, "", "x", -1, float("nan"), float("inf")])
def test_a_factor_that_is_none_is_refused(factor):
    with pytest.raises(MoescopeError):
        adding(Place("overview", "demo", layer="3", expert=7), "scale", factor)


def test_a_recipe_that_cannot_be_read_is_not_lost_silently():
    here = Place("overview", "demo", layer="3", expert=7, recipe="nonsense")
    assert "unreadable" in badge(here).children.children
    with pytest.raises(MoescopeError, match="is not an edit"):
        adding(here, "mask", None)
    assert badge(Place("overview", "demo")) is None


@pytest.mark.parametrize(("given", "layer"), [("L012", "12"), ("L1234", "1234"), ("L000", "0")])
def test_a_layer_and_the_key_of_its_sole_router_are_one(given, layer):
    here = Place("overview", "demo", layer=layer, expert=7)
    recipe = recipes.written(Recipe([Scale(layer=given, expert=7, factor=2.0), Mask(layer=f"{given}-mlp", expert=7)]))
    there = adding(here.go(recipe=recipe), "promote", None)
    assert [(one.layer, one.kind) for one in recipes.read(there.recipe).edits] == [
        (f"{given}-mlp", "mask"),
        (int(layer), "promote"),
    ]
    both = recipes.read(adding(here.go(recipe=recipe, layer=f"{given}-mlp"), "zero", None).recipe)
    assert [recipes.layer_of(one) for one in both.edits] == [layer, f"{given}-mlp"]
