"""Flow: which pair and window the place means, what the tables hold, what a simulation asks for."""

from __future__ import annotations

import numpy as np
import pytest

from moescope import analysis
from moescope.app.pages.flow import FLOW, pair_of
from moescope.app.place import parse
from moescope.errors import MoescopeError
from tests.analysis.made_stores import random_truth, write
from tests.app.made_desk import drawn, made_desk, made_shelf, words

VIEWS = {view.name: view for view in FLOW.views}


@pytest.fixture(scope="module")
def desk(tmp_path_factory):
    return made_desk(made_shelf(tmp_path_factory.mktemp("flowing")))


@pytest.mark.parametrize(
    ("query", "pair"),
    [
        ("", ("0", "1")),
        ("layer=1", ("1", "2")),
        ("layer=2", ("2", "1")),
        ("layer=2&neighbour=0", ("2", "0")),
        ("neighbour=0", ("1", "0")),
        ("neighbour=2", ("1", "2")),
    ],
)
def test_a_pair_of_layers(desk, query, pair):
    assert pair_of(desk.scene(parse(f"/store/a/flow?{query}")[0])) == pair


def test_a_pair_that_is_none_is_refused(desk):
    for query, said in (("layer=1&neighbour=1", "chosen twice"), ("neighbour=9", "no MoE layer 9")):
        with pytest.raises(MoescopeError, match=said):
            pair_of(desk.scene(parse(f"/store/a/flow?{query}")[0]))


def test_links_are_those_of_the_expert_and_add_up(desk):
    every = drawn(desk, VIEWS["links"], "/store/a/flow?layer=0")
    store = desk.shelf.open("a").store
    first = store.routing(layer=0).expert[:, 0]
    assert every["count"].sum() == store.n_tokens
    assert every["count"].is_monotonic_decreasing
    some = drawn(desk, VIEWS["links"], "/store/a/flow?layer=0&expert=3")
    assert some["count"].sum() == (first == 3).sum()
    there = VIEWS["links"].go(parse("/store/a/flow?layer=0")[0], some.iloc[0].to_dict())
    assert there.href.startswith(f"/store/a/L1/E{int(some.iloc[0]['target'])}")


def test_one_selection_drives_the_figures_and_no_menu_is_left(desk):
    href = "/store/a/flow?layer=1&label=code"
    for name in ("transitions", "paths", "information"):
        assert drawn(desk, VIEWS[name], href).layout.updatemenus == ()
    assert drawn(desk, VIEWS["together"], "/store/a/flow?layer=2").layout.updatemenus == ()
    with pytest.raises(MoescopeError, match="one expert"):
        drawn(desk, VIEWS["together"], href)
    shown = drawn(desk, VIEWS["transitions"], href)
    counts = np.nansum([trace.customdata[..., 2] * ~np.isnan(trace.z) for trace in shown.data])
    store = desk.shelf.open("a").store
    kept = analysis.load(store, where={"domain": "code"})
    assert counts == kept["tokens"].values.max()
    scene = desk.scene(parse(href)[0])
    assert VIEWS["information"].pick(scene, {"y": "0 → 1"}).go(label=None).layer == "0"
    assert VIEWS["information"].pick(scene, {"y": "nonsense"}) is None
    assert VIEWS["transitions"].pick(scene, {"x": 1, "y": 2}).expert_name == "L1E2"


def test_a_window_ends_with_the_model(desk):
    figure = drawn(desk, VIEWS["paths"], "/store/a/flow?layer=2&length=2&bands=transitions")
    assert [note.text for note in figure.layout.annotations[:2]] == ["layer 1", "layer 2"]
    assert len(figure.data) == 1 and figure.data[0].name == "strongest transitions"  # noqa: PT018


def test_a_simulation_says_what_it_found_beside_chance(desk):
    href = "/store/even/flow?devices=2&method=eplb&group=2"
    rows = drawn(desk, VIEWS["plans"], href).set_index("plan")
    store = desk.shelf.open("even").store
    result = analysis.placement(store, 2, "eplb", redundant=2, time_limit=5)
    assert rows.loc["random", "crossings_per_token"] == float(result["crossings_per_token"].sel(plan="random"))
    assert rows.loc["EPLB", "imbalance_mean"] == float(result["imbalance_mean"].sel(plan="eplb"))
    said = words(drawn(desk, VIEWS["said"], href))
    fewest = float(result["crossings_per_token"].min())
    assert f"{fewest:.2f}" in said
    assert f"random {rows.loc['random', 'crossings_per_token']:.2f}" in said
    with pytest.raises(MoescopeError):
        drawn(desk, VIEWS["plans"], "/store/a/flow?devices=2&method=eplb")  # 5 experts do not divide


def test_devices_are_what_the_control_says_where_none_are_chosen(tmp_path):
    write(tmp_path / "six", random_truth(np.random.default_rng(0), 12, [6, 6], [2, 2]), [6, 6], {})
    desk = made_desk(tmp_path)
    href = "/store/six/flow?method=eplb"
    control = next(c for c in VIEWS["placement"].controls if c.__name__ == "_devices")(desk.scene(parse(href)[0]))
    named = drawn(desk, VIEWS["plans"], f"{href}&devices={control.value}")
    chosen = drawn(desk, VIEWS["plans"], href)
    np.testing.assert_array_equal(chosen["crossings_per_token"], named["crossings_per_token"])


@pytest.mark.parametrize(
    ("query", "said"),
    [
        ("bandwidth=0", "bandwidth must be above 0"),
        ("node_bandwidth=0", "node_bandwidth must be above 0"),
        ("patience=0", "1 to 120 seconds"),
        ("patience=500", "1 to 120 seconds"),
        ("nodes=0", "do not divide"),
    ],
)
def test_what_cannot_be_is_said_and_not_taken_as_the_default(desk, query, said):
    with pytest.raises(MoescopeError, match=said):
        drawn(desk, VIEWS["plans"], f"/store/even/flow?devices=2&method=eplb&{query}")


def test_nodes_are_offered_that_the_devices_divide_into(tmp_path):
    write(tmp_path / "wide", random_truth(np.random.default_rng(0), 12, [12, 12], [2, 2]), [12, 12], {})
    desk = made_desk(tmp_path)

    def offered(query):
        found = FLOW.choices(desk.scene(parse(f"/store/wide/flow{query}")[0]))["nodes"]
        assert all(shown == f"{value} a node" for value, shown in found)
        return [value for value, _ in found]

    assert offered("") == ["1", "2"]  # of 4
    assert offered("?devices=12") == ["1", "2", "3", "4", "6"]
    assert offered("?devices=0") == []
    # Another number of devices forgets what it may not divide into.
    assert parse("/store/wide/flow?devices=12&nodes=6")[0].go(devices=4).nodes is None
    assert parse("/store/wide/flow?devices=12&nodes=6")[0].go(devices=12).nodes == 6
