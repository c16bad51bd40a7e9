"""Affinity, co-activation and path figures show what the results hold, with what chance explains drawn pale."""

import numpy as np
import pytest

from moescope import figures
from moescope.analysis.affinities import affinity, affinity_from_counts
from moescope.analysis.coactive import coactivation
from moescope.analysis.pathways import paths
from moescope.errors import MoescopeError
from moescope.figures import lift_maps
from moescope.figures.affinities import mutual_information
from moescope.figures.pale import PALE
from moescope.figures.pathways import _GREY_BAND, _ORANGE_BAND
from tests.analysis.made_stores import Made, write


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """Four layers (5, 5, 4, 5 experts, top 2); layer 1 follows layer 0 at most tokens, the rest is at random."""
    rng = np.random.default_rng(0)
    documents, tokens, widths = 15, 60, [5, 5, 4, 5]
    n = documents * tokens
    expert = [np.argsort(rng.random((n, width)), axis=1)[:, :2] for width in widths]
    follow = rng.random(n) < 0.7
    expert[1][follow] = (expert[0][follow] + 1) % 5
    document = np.repeat(np.arange(documents), tokens)
    ones, valid = [np.ones((n, 2), np.float32)] * 4, [np.ones((n, 2), bool)] * 4
    made = Made(document, document, np.tile(np.arange(tokens), documents), np.zeros(n, int), expert, ones, valid)
    return write(tmp_path_factory.mktemp("figures") / "store", made, widths, {}, layers=[1, 2, 4, 6])


def of_type(figure, kind):
    return [trace for trace in figure.data if trace.type == kind]


def test_affinity_maps_and_information(store):
    result = affinity(store)
    assert result.attrs["permutations"] >= 1000  # enough for five discoveries among 65 cells to be told
    figure = figures.affinity(result)
    maps = of_type(figure, "heatmap")
    assert [trace.visible for trace in maps] == [True, True] + [False] * 4
    assert [trace.opacity for trace in maps] == [PALE, 1.0] * 3
    stands = result["q"].values[0] <= 0.05
    assert stands.sum() >= 5
    np.testing.assert_array_equal(np.isnan(maps[1].z), ~stands)
    drawn = np.where(stands, maps[1].z, maps[0].z)
    reach = figure.layout.coloraxis.cmax
    np.testing.assert_allclose(drawn, np.maximum(np.log2(result["lift"].values[0]), -reach))
    assert np.isnan(maps[2].z[:, 4]).all()  # layer 4 has four experts
    assert np.isnan(maps[3].z[:, 4]).all()
    assert "tokens for which the source expert comes first" in maps[0].hovertemplate
    (bar,), (chance,) = of_type(figure, "bar"), of_type(figure, "scatter")
    np.testing.assert_allclose(bar.x, result["mi_corrected"])
    assert list(bar.y) == ["1 → 2", "2 → 4", "4 → 6"]
    np.testing.assert_allclose(chance.x, result["mi_null_p99"] - result["mi_null"])
    for index, button in enumerate(figure.layout.updatemenus[0].buttons):
        visible = button.args[0]["visible"]
        assert len(visible) == len(figure.data)
        assert [place for place, on in enumerate(visible) if on] == [2 * index, 2 * index + 1, 6, 7]
    only = figures.affinity(result, pairs=["4-6"])
    assert len(of_type(only, "heatmap")) == 2
    assert not only.layout.updatemenus
    with pytest.raises(MoescopeError, match="no pair of layers 9-1"):
        figures.affinity(result, pairs=["9-1"])


def test_any_pairs_make_a_map_of_layers(store, monkeypatch):
    result = affinity(store, pairs="all", permutations=19)
    (drawn,) = of_type(mutual_information(result), "heatmap")
    assert list(drawn.x) == ["2", "4", "6"]
    assert list(drawn.y) == ["1", "2", "4"]
    for index in range(result.sizes["pair"]):
        row = list(drawn.y).index(str(result["source_layer"].values[index]))
        column = list(drawn.x).index(str(result["target_layer"].values[index]))
        assert drawn.z[row][column] == result["mi_corrected"].values[index]
    assert np.isnan(np.array(drawn.z)[2, 0])
    scores = affinity(store, pairs="all", permutations=19, cells=False)
    assert len(figures.affinity(scores).data) == 1
    monkeypatch.setattr(lift_maps, "CELLS", 60)
    few = figures.affinity(result)
    assert any("maps of 2 of 6 pairs" in str(note.text) for note in few.layout.annotations)
    assert of_type(few, "heatmap")[0].meta == "layer 1 → layer 2"  # the most informative one is among them


def test_without_a_null_no_cell_is_drawn_in_full():
    figure = figures.affinity(affinity_from_counts(np.array([[9.0, 1], [0, 10]])))
    pale, full = of_type(figure, "heatmap")
    assert np.isnan(full.z).all()
    np.testing.assert_allclose(pale.z[0], [1, -1], atol=1e-12)  # twice; 2/11 is beyond the scale
    assert pale.z[1][0] == -figure.layout.coloraxis.cmax  # never met: at the end of the scale, not a gap


def test_coactivation_maps(store):
    result = coactivation(store, groups=5)
    figure = figures.coactivation(result, level=0.2)
    maps = of_type(figure, "heatmap")
    assert len(maps) == 8
    stands = result["q"].values[1] <= 0.2
    np.testing.assert_array_equal(np.isnan(maps[3].z), ~stands)
    assert np.isnan(np.diagonal(maps[2].z)).all()
    assert [button.label for button in figure.layout.updatemenus[0].buttons] == [f"layer {n}" for n in (1, 2, 4, 6)]
    assert len(of_type(figures.coactivation(result, layers=[4]), "heatmap")) == 2
    with pytest.raises(MoescopeError, match="no layer 3; it has 1, 2, 4, 6"):
        figures.coactivation(result, layers=[3])


def test_what_was_not_tested_is_pale_and_said_so(store):
    alone = coactivation(store, where={"document": [0]})
    assert np.isnan(alone["q"]).all()
    drawn = {
        "one document alone": figures.coactivation(alone),
        "not tested, so all is pale": figures.affinity_map(affinity(store, permutations=0)),
    }
    for words, figure in drawn.items():
        maps = of_type(figure, "heatmap")
        assert all(np.isnan(full.z).all() for full in maps[1::2])
        assert any(np.isfinite(pale.z).any() for pale in maps[::2])
        assert words in str([note.text for note in figure.layout.annotations])
    tested = figures.coactivation(coactivation(store))
    assert "not tested" not in str([note.text for note in tested.layout.annotations])


def test_sankey_of_paths_and_transitions(store):
    result = paths(store, length=3, top=12, links=7, draws=19)
    figure = figures.paths(result, most=10)
    routes, steps = figure.data
    assert (routes.visible, steps.visible) == (True, False)
    assert len(routes.link.value) == 20  # ten paths of two steps
    labels = [tuple(text.removeprefix("layer ").split(", expert ")) for text in routes.node.customdata]
    for index in range(10):
        expert = result["expert"].values[index]
        for step, layers in enumerate([("1", "2"), ("2", "4")]):
            band = 2 * index + step
            assert labels[routes.link.source[band]] == (layers[0], str(expert[step]))
            assert labels[routes.link.target[band]] == (layers[1], str(expert[step + 1]))
            assert routes.link.value[band] == result["count"].values[index]
            beyond = result["p"].values[index] <= 0.05
            assert routes.link.color[band] == (_ORANGE_BAND if beyond else _GREY_BAND)
    assert len(set(routes.link.color)) == 2 or _ORANGE_BAND in routes.link.color
    assert sorted(steps.link.value) == sorted(result["link_count"].values.ravel().tolist())
    texts = [str(note.text) for note in figure.layout.annotations]
    assert texts[:3] == ["layer 1", "layer 2", "layer 4"]
    assert f"path entropy {float(result['path_entropy']):.2f} nats" in texts[3]
    # Nodes of one layer share a column and do not cover one another's middle.
    for x in set(routes.node.x):
        column = [y for place, y in zip(routes.node.x, routes.node.y, strict=True) if place == x]
        assert len(set(column)) == len(column)
    p, q, of_rank = (float(result[name][0]) for name in ("p", "q", "control_rank"))
    assert f"{of_rank:,.1f} for the path of its rank" in routes.link.customdata[0]
    assert f"p = {p:.2g}, q = {q:.2g}; 19 controls cannot give less than p = 0.05" in routes.link.customdata[0]
    alone = {kind: figures.paths(result, bands=kind).layout.annotations[-1].text for kind in ("paths", "transitions")}
    assert ["paths drawn" in alone[kind] for kind in ("paths", "transitions")] == [True, False]
    uncontrolled = figures.paths(paths(store, length=2, draws=0))
    assert set(uncontrolled.data[0].link.color) == {_GREY_BAND}
    assert "not tested, so all are grey" in uncontrolled.layout.annotations[-1].text
    assert "not tested" not in texts[3]


def test_ticks_of_a_pair_of_layers_stand_at_whole_experts():
    figure = figures.affinity_map(affinity_from_counts(np.ones((4, 24)) + np.eye(4, 24)))
    assert (figure.layout.yaxis.tick0, figure.layout.yaxis.dtick) == (0, 1)
    assert (figure.layout.xaxis.tick0, figure.layout.xaxis.dtick) == (0, 5)
