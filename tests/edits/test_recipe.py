"""Recipes are data: they come back from a file as they were, refuse what contradicts itself, and act as named."""

from __future__ import annotations

import itertools
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import xarray as xr
from hypothesis import given, settings
from hypothesis import strategies as st

import moescope as ms
from moescope.edits import Demote, Mask, Promote, Prune, Recipe, Route, Rows, Scale, Zero
from moescope.edits.together import meeting
from tests.capturing.texts import model, rows

EDITS = [
    Scale(layer=1, expert=3, factor=64.0, stage="logit"),
    Mask(layer=1, expert=[1, 2]),
    Zero(layer="L002", expert=0, rows=Rows(phase="decode", positions=(2, 9))),
    Route(layer=0, top_p=0.5, renormalise=False),
    Promote(layer=0, expert=4),
    Demote(layer=0, expert=5),
]


@pytest.mark.parametrize("name", ["r.yaml", "r.json"])
def test_a_file_gives_back_the_recipe(name: str, tmp_path: Path) -> None:
    recipe = Recipe(EDITS, note="why", suggested_by={"analysis": "npmi", "values": [{"layer": 1}]})
    assert Recipe.load(recipe.save(tmp_path / name)) == recipe


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("edits: []", "edits"),
        ("edits: [{kind: scale, layer: 1, expert: 1}]", "factor"),
        ("edits: [{kind: melt, layer: 1, expert: 1}]", "melt"),
        ("edits: [{kind: zero, layer: 1, expert: -1}]", "greater than or equal to 0"),
        ("edits: [{kind: scale, layer: 1, expert: 1, factor: .nan}]", "factor"),
        ("edits: [{kind: route, layer: 1, top_k: 1, top_p: 0.5}]", "one of ranks, top_k and top_p"),
        ("edits: [{kind: zero, layer: 1, expert: 1, colour: red}]", "colour"),
        ("schema_version: 2\nedits: [{kind: zero, layer: 1, expert: 1}]", "schema_version"),
        ("- 1", "expected a mapping"),
        ("a: [", "neither YAML nor JSON"),
        ("edits: !!python/object/apply:os.system ['true']", "neither YAML nor JSON"),
    ],
)
def test_bad_recipes_are_refused_in_words(text: str, words: str, tmp_path: Path) -> None:
    file = tmp_path / "r.yaml"
    file.write_text(text)
    with pytest.raises(ms.MoescopeError, match=words):
        Recipe.load(file)


@pytest.mark.parametrize(
    ("edits", "words"),
    [
        ([Zero(layer=9, expert=1)], "no MoE layer 9"),
        ([Zero(layer=1, expert=99)], "no expert 99"),
        ([Promote(layer=1, expert=[1, 2]), Promote(layer=1, expert=3)], "3 experts are promoted, 2 are selected"),
        ([Mask(layer=1, expert=[1, 2, 3, 4]), Mask(layer=1, expert=[5, 6, 7])], "leave too few"),
        ([Mask(layer=1, expert=1), Promote(layer=1, expert=1)], "mask and promote contradict"),
        ([Mask(layer=1, expert=1), Promote(layer="L001", expert=1)], "mask and promote contradict"),
        ([Route(layer=1, ranks=[0]), Route(layer=1, ranks=[1])], "leave no rank in common"),
        (
            [
                Promote(layer=1, expert=[1, 2], rows=Rows(positions=(0, 4))),
                Promote(layer=1, expert=3, rows=Rows(positions=(3, 9))),
            ],
            "3 experts are promoted, 2 are selected",
        ),
        ([Route(layer=1, top_k=3)], "selects 2 experts"),
        ([Route(layer=1, ranks=[2])], "ranks 0 to 1"),
    ],
)
def test_what_does_not_fit_the_model_is_refused(edits: list[Any], words: str) -> None:
    with pytest.raises(ms.MoescopeError, match=words):
        model().edited(Recipe(edits))


@settings(max_examples=80, deadline=None)
@given(st.data())
def test_edits_meet_where_some_row_has_them_all(data: st.DataObject) -> None:
    """Against every row, position and phase looked at by itself."""
    span = st.tuples(st.integers(0, 4), st.integers(1, 5)).filter(lambda pair: pair[0] < pair[1])
    rows = st.builds(
        Rows,
        phase=st.sampled_from([None, "prefill", "decode"]),
        positions=st.none() | span,
        batch=st.none() | st.lists(st.integers(0, 2), min_size=1, max_size=2).map(tuple),
    )
    edits = [Zero(layer=1, expert=n, rows=where) for n, where in enumerate(data.draw(st.lists(rows, max_size=4)))]
    want = set()
    for row, position, phase in itertools.product(range(4), range(7), ("prefill", "decode")):
        here = frozenset(
            edit.expert[0]
            for edit in edits
            if (edit.rows.batch is None or row in edit.rows.batch)
            and (edit.rows.positions is None or position in range(*edit.rows.positions))
            and edit.rows.phase in (None, phase)
        )
        want |= {here} if here else set()
    got = {frozenset(edit.expert[0] for edit in some) for some in meeting(edits)}
    assert got == want


def test_several_recipes_share_a_batch_each_on_its_own_row() -> None:
    """Masked in one row and promoted in another, the same expert is no contradiction."""
    ids = model().check_batch()
    recipes = [
        Recipe([Mask(layer=1, expert=1), Scale(layer=2, expert=3, factor=4.0)]),
        Recipe([Promote(layer=1, expert=1)]),
        None,
        Recipe([Promote(layer=1, expert=[2, 5]), Route(layer=2, ranks=[1])]),
    ]
    with torch.no_grad():
        with model().edited(Recipe.by_row(recipes)):
            together = model().forward(ids)
        for row, recipe in enumerate(recipes):
            with nullcontext() if recipe is None else model().edited(recipe):
                alone = model().forward(ids)
            torch.testing.assert_close(together[row], alone[row], atol=1e-6, rtol=1e-5)
    twice = Recipe([Zero(layer=1, expert=0, rows=Rows(batch=(1,)))])
    for wrong, words in [
        ([None, None], "edits anything"),
        ([twice], "names its rows"),
        ([Recipe([Prune(layer=1, expert=0)])], "prune is for all rows"),
        ([Recipe([Zero(layer=1, expert=0)], config_hash=name) for name in ("a", "b")], "different models"),
    ]:
        with pytest.raises(ms.MoescopeError, match=words):
            Recipe.by_row(wrong)


def test_another_models_recipe_is_refused() -> None:
    recipe = Recipe([Zero(layer=1, expert=1)], config_hash="0" * 32)
    with pytest.raises(ms.MoescopeError, match="another model"):
        model().edited(recipe)
    found = result(np.ones((2, 3, 2)))
    found.attrs["config_hash"] = "0" * 32  # what a store says of its model
    with pytest.raises(ms.MoescopeError, match="another model"):
        model().edited(Recipe.from_npmi(found, "a"))
    same = Recipe(recipe.edits, config_hash=model().config_hash)
    with model().edited(same):
        pass


def test_edited_is_live_inside_the_block_alone() -> None:
    ids = model().check_batch()
    run = lambda: model().forward(ids).clone()  # noqa: E731
    with torch.no_grad():
        before = run()
        with model().edited(Recipe([Zero(layer=1, expert=range(8))])):
            inside = run()
        pruned = Recipe([Prune(layer=1, expert=[0, 5])])
        with model().edited(pruned):
            live = run()
        with model().edited(Recipe([Mask(layer=1, expert=[0, 5])])):
            masked = run()  # without a selection bias the same
        assert torch.equal(run(), before)
    assert not torch.equal(inside, before)
    assert torch.equal(live, masked)


def test_a_capture_under_edits_says_so(tmp_path: Path) -> None:
    recipe = Recipe([Mask(layer=1, expert=[0, 5]), Scale(layer=2, expert=3, factor=2.0, rows=Rows(phase="prefill"))])
    with model().edited(recipe):
        store = ms.capture(model(), ms.Corpus(rows(4)), tmp_path / "edited", ["routing"])
    assert store.manifest.settings["edits"] == [
        "L001: mask experts 0, 5", "L002: scale expert 3, x 2 (weight), phase prefill",
    ]  # fmt: skip
    assert not set(np.unique(store.routing(1).expert)) & {0, 5}
    assert model().edits == []
    plain = ms.capture(model(), ms.Corpus(rows(4)), tmp_path / "plain", ["routing"])
    assert "edits" not in plain.manifest.settings


def result(values: np.ndarray, **more: Any) -> xr.Dataset:
    dims = ("layer", "expert", "label")[: values.ndim]
    coords = {"layer": [2, 5], "expert": [0, 1, 2], "label": ["a", "b"]}
    return xr.Dataset(
        dict.fromkeys(more.pop("names", ["npmi"]), (dims, values)),
        coords={dim: coords[dim] for dim in dims},
        attrs={"analysis": "npmi", "store_id": "s"},
    )


def test_analyses_suggest_recipes_and_say_so() -> None:
    values = np.arange(12.0).reshape(2, 3, 2)
    values[1, 2, 0] = np.nan  # no such expert
    npmi = Recipe.from_npmi(result(values), "a", top=2, factor=8)
    assert [(e.layer, e.expert, e.factor) for e in npmi.edits] == [(5, (1,), 8.0), (5, (0,), 8.0)]
    assert npmi.suggested_by["store_id"] == "s"
    steer = Recipe.from_risk_difference(result(values, names=["risk_difference"]), "a", promote=1, demote=1)
    assert [(type(e), e.layer, e.expert) for e in steer.edits] == [(Promote, 5, (1,)), (Demote, 2, (0,))]
    lowest = Recipe.from_importance(result(values[..., 0], names=["reap"]), "reap", lowest=2, kind="zero")
    assert [(e.kind, e.layer, e.expert) for e in lowest.edits] == [("zero", 2, (0,)), ("zero", 2, (1,))]
    two = result(values).assign_coords(layer=[2, 2], site=("layer", ["L002-attention", "L002-mlp"]))
    assert [e.layer for e in Recipe.from_npmi(two, "a", top=3).edits] == ["L002-mlp", "L002-mlp", "L002-attention"]
    table = result(values[..., 0], names=["absmax"])
    table["super"] = (("layer", "expert"), np.array([[False, True, False], [True, False, False]]))
    assert [(e.layer, e.expert) for e in Recipe.from_super_experts(table).edits] == [(5, (0,)), (2, (1,))]
    table["super"] = table["super"] & False
    for bad, words in [
        (lambda: Recipe.from_super_experts(table), "no super expert"),
        (lambda: Recipe.from_npmi(result(values), "c"), "no label 'c'"),
        (lambda: Recipe.from_npmi(result(values), "a", top=6), "values for 5"),
        (lambda: Recipe.from_importance(table, "reap", 1), "no 'reap'"),
    ]:
        with pytest.raises(ms.MoescopeError, match=words):
            bad()
