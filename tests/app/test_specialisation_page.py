"""The specialisation page on a made store: what it counts, where clicks lead, what it follows."""

from __future__ import annotations

import numpy as np
import pytest

from moescope import analysis
from moescope.analysis.markers import occurring
from moescope.analysis.standing import beyond_chance
from moescope.app.pages.specialisation import SPECIALISATION, markers_of
from moescope.app.place import parse
from moescope.errors import MoescopeError
from tests.app.made_desk import DOMAIN, drawn, made_desk, made_shelf, words

VIEWS = {view.name: view for view in SPECIALISATION.views}


@pytest.fixture(scope="module")
def desk(tmp_path_factory):
    return made_desk(made_shelf(tmp_path_factory.mktemp("specialised")))


def test_cells_beyond_chance_are_counted_one_by_one(desk):
    result = analysis.npmi(desk.shelf.open("a").store, permutations=4000, alternative="two-sided")
    found = beyond_chance(result)
    cells = [
        (layer, expert, label)
        for layer in range(3)
        for expert in range(6)
        for label in range(3)
        if float(result["q"][layer, expert, label]) <= 0.05
    ]
    liked = [cell for cell in cells if float(result["npmi"].values[cell]) > 0]
    assert (found.standing, found.preferred) == (len(cells), len(liked))
    assert len(cells) > len(liked) > 0
    assert found.experts == len({cell[:2] for cell in liked})
    assert found.by_label == {name: sum(c[2] == i for c in liked) for i, name in enumerate(("code", "math", "prose"))}
    assert found.of == 15
    assert found.tested == 45
    assert found.false_alarms == pytest.approx(0.05 * len(cells))


def test_a_click_on_a_map_selects_expert_and_label(desk):
    figure = drawn(desk, VIEWS["labels"], "/store/a/specialisation")
    scene = desk.scene(parse("/store/a/specialisation")[0])
    trace = figure.data[3]  # the standing cells of the second label
    point = {"x": 2, "y": "1", "z": 0.1, "curveNumber": 3}  # as the browser tells it of a map
    there = VIEWS["labels"].pick(scene, point)
    assert (there.layer, there.expert, there.label, there.by) == ("1", 2, trace.meta, "domain")
    assert VIEWS["labels"].pick(scene, {"x": 2, "y": "1"}).label is None
    assert VIEWS["labels"].pick(scene, {"x": None, "y": "1"}) is None


def test_the_table_follows_the_label_and_leads_to_its_expert(desk):
    every = drawn(desk, VIEWS["cells"], "/store/a/specialisation")
    some = drawn(desk, VIEWS["cells"], "/store/a/specialisation?label=code")
    assert len(every) == 45
    assert len(some) == 15
    assert set(some["label"]) == {"code"}
    best = some.iloc[0].to_dict()
    assert (best["layer"], best["expert"]) == (0, 3)
    assert best["q"] <= 0.05
    there = VIEWS["cells"].go(parse("/store/a/specialisation")[0], best)
    assert (there.layer, there.expert, there.label) == ("0", 3, "code")
    with pytest.raises(MoescopeError, match="'klingon'"):
        drawn(desk, VIEWS["cells"], "/store/a/specialisation?label=klingon")


def test_words_say_how_many_and_select_a_label(desk):
    shown = drawn(desk, VIEWS["beyond"], "/store/a/specialisation")
    assert "of 15 experts prefer some domain beyond chance" in words(shown)
    assert "expert 3 fires for “code”" in words(shown)


def test_markers_are_given_by_a_person_or_those_that_occur(desk):
    scene = desk.scene(parse("/store/a/specialisation?markers=w1%20|%20%20w2%20|w1")[0])
    assert markers_of(scene) == ["w1", "w2"]
    asked = desk.scene(parse("/store/a/specialisation")[0])
    assert markers_of(asked) == [".", ","]
    store = desk.shelf.open("a").store
    ids, _ = analysis.token_totals(store)
    assert occurring(store, [f"w{ids[0]} ", "<think>"]) == [f"w{ids[0]} "]
    with pytest.raises(MoescopeError, match="does not occur"):
        drawn(desk, VIEWS["kinds"], "/store/a/specialisation?kinds=markers&markers=<think>")


def test_tokens_count_in_the_documents_of_the_label_alone(desk):
    figure = drawn(desk, VIEWS["kinds"], "/store/a/specialisation?kinds=markers&markers=w1|w2&label=code")
    store = desk.shelf.open("a").store
    alone = analysis.npmi_markers(store, ["w1", "w2"], where={"domain": "code"})
    at = np.array([trace.customdata[..., 6] for trace in figure.data[1::2]], dtype=float)
    np.testing.assert_array_equal(np.moveaxis(at, 0, -1), alone["count"].values.astype(float))


def test_the_finding_is_of_the_selected_value(desk):
    labels = {label: words(drawn(desk, VIEWS["beyond"], f"/store/a/specialisation?label={label}")) for label in DOMAIN}
    assert "expert 3 fires for “code”" in labels["code"]
    for label in ("math", "prose"):
        assert "“code”" not in labels[label]
        assert f"“{label}”" in labels[label]
    with pytest.raises(MoescopeError, match="'klingon'"):
        drawn(desk, VIEWS["beyond"], "/store/a/specialisation?label=klingon")
