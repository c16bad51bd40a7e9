"""The atlas says what the analyses behind it say, expert by expert, and names only what stands."""

from __future__ import annotations

import numpy as np
import pytest
import xarray as xr

from moescope import analysis, figures
from moescope.errors import MoescopeError
from moescope.report import write_atlas
from tests.analysis import function_stores
from tests.analysis.made_stores import random_truth, write
from tests.figures.tooltips import told

DOCUMENTS, WIDTHS = 60, [6, 5, 4]


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """Layer 2, expert 1 prefers label b; expert 4 of layer 4 always follows expert 2 of layer 2."""
    rng = np.random.default_rng(5)
    prefer = np.zeros((DOCUMENTS, 3, 6))
    prefer[1::2, 0, 1] = 2.5
    made = random_truth(rng, DOCUMENTS, WIDTHS, [2, 1, 1], longest=60, context=60, prefer=prefer)
    made.expert[1][made.expert[0][:, 0] == 2, 0] = 4
    maxima = np.exp(rng.normal(0, 0.1, (3, 6)))
    path = tmp_path_factory.mktemp("atlas") / "s"
    domain = ["a", "b"] * (DOCUMENTS // 2)
    return write(path, made, WIDTHS, {"domain": domain}, layers=[2, 4, 7], cuts=3, maxima=maxima, hidden=[1.0] * 8)


def test_planted_preference_and_link_are_named_and_nothing_else(store):
    found = analysis.atlas(store)
    named = [(int(found["layer"][r]), int(e)) for r, e in np.argwhere(found["prefers"].values != "")]
    assert (2, 1) in named
    assert found["prefers"].sel(layer=2, expert=1).item() == "b"
    assert not any(layer == 7 for layer, _ in named)  # what avoids b prefers a, in layer 2 and what follows it
    assert found["successor"].sel(layer=2, expert=2).values[0] == 4
    assert found["predecessor"].sel(layer=4, expert=4).values[0] == 2
    assert np.isnan(found["predecessor"].sel(layer=2)).all()
    assert np.isnan(found["successor"].sel(layer=7)).all()
    assert int(np.isfinite(found["successor"].sel(layer=4)).sum()) == 0


def test_its_numbers_are_those_of_the_analyses(store):
    found = analysis.atlas(store)
    load, npmi = analysis.load(store), analysis.npmi(store, by="domain")
    supers, affinity = analysis.super_experts(store), analysis.affinity(store)
    np.testing.assert_array_equal(found["relative_load"], load["relative_load"])
    np.testing.assert_array_equal(found["absmax"], supers["absmax"])
    for row, expert in np.argwhere(found["prefers"].values != ""):
        label = found["prefers"].values[row, expert]
        assert found["npmi"].values[row, expert] == npmi["npmi"].sel(label=label).values[row, expert]
        assert found["label_q"].values[row, expert] <= 0.05
    lift = affinity["lift"].isel(pair=0)
    assert found["successor_lift"].sel(layer=2, expert=2).values[0] == lift.values[2, 4]
    assert "captured without the experts tier" in found.attrs["absent"]
    assert "reap" not in found
    assert len(analysis.table(found)) == sum(WIDTHS)


def test_a_card_holds_its_row_and_its_text(store):
    found = analysis.atlas(store)
    card = analysis.card(store, "L2E1", found)
    assert (card.name, card.values["prefers"]) == ("L2E1", "b")
    assert card.values["relative_load"] == found["relative_load"].sel(layer=2, expert=1).item()
    assert card.predecessors == ()
    assert list(card.examples) == analysis.examples(store, 2, 1, n=3)
    assert list(card.tokens) == analysis.top_tokens(store, 2, [1])[1]
    assert analysis.card(store, (2, 1), found) == card
    assert dict(analysis.card(store, (4, 4), found).predecessors)["L2E2"] > 2
    page = card._repr_html_()
    assert "prefers b" in page
    assert "<mark" in page
    assert "no label it prefers beyond chance" in analysis.card(store, "L7E0", found)._repr_html_()


def test_a_preference_that_was_not_tested_is_not_said_to_be_chance(store):
    for few in (0, 5):
        found = analysis.atlas(store, permutations=few)
        card = analysis.card(store, "L2E1", found)
        assert "permutations" in card.absent["prefers"]
        assert "beyond chance" not in card._repr_html_()


def test_similar_experts_and_effects_are_taken_in(tmp_path):
    truth = function_stores.random_truth(np.random.default_rng(1), 40, (6, 4))
    truth.logits[0][:, 3] = truth.logits[0][:, 1] * 1.01  # two experts scored alike
    store = function_stores.write(tmp_path / "s", truth)
    effects = xr.DataArray([[0.5, -0.25]], dims=("layer", "expert"), coords={"layer": [1], "expert": [0, 3]})
    found = analysis.atlas(store, effects=effects)
    assert found["similar"].values[0, 1, 0] == 3
    assert found["similar"].values[0, 3, 0] == 1
    assert np.isnan(found["similar"].values[1]).all()
    assert found["effect"].values[1, 3] == -0.25
    assert np.isnan(found["effect"].values[0]).all()
    with pytest.raises(MoescopeError, match="not layer and expert"):
        analysis.atlas(store, effects=effects.rename(expert="neuron"))


def test_without_labels_and_with_one_layer_the_rest_stands(tmp_path):
    made = random_truth(np.random.default_rng(0), 8, [4], [2])
    found = analysis.atlas(write(tmp_path / "s", made, [4], {}))
    assert "prefers" not in found
    assert "successor" not in found
    assert "one MoE layer" in found.attrs["absent"]
    one = analysis.atlas(write(tmp_path / "t", made, [4], {"domain": ["x"] * 8}))
    assert "all documents carry one domain" in one.attrs["absent"]
    assert len(analysis.table(one)) == 4


def test_two_routers_of_one_layer_are_kept_apart(tmp_path):
    keys = ["L000-attention", "L000-mlp", "L001-mlp"]
    made = random_truth(np.random.default_rng(0), 12, [4, 4, 3], [2, 1, 1])
    store = write(tmp_path / "s", made, [4, 4, 3], {"domain": ["x", "y"] * 6}, layers=[0, 0, 1], keys=keys)
    similarity, redundant = np.full((3, 4, 4), np.nan), np.zeros((3, 4, 4), dtype=bool)
    for row, (i, j) in enumerate([(0, 1), (2, 3), (0, 2)]):
        similarity[row, [i, j], [j, i]], redundant[row, [i, j], [j, i]] = 0.9, True
    dims = ("layer", "expert", "other")
    coords = {"layer": [0, 0, 1], "site": ("layer", keys), "expert": range(4)}
    similar = xr.Dataset({"similarity": (dims, similarity), "redundant": (dims, redundant)}, coords=coords)
    effects = xr.DataArray(np.arange(12.0).reshape(3, 4), dims=("layer", "expert"), coords=coords)
    found = analysis.atlas(store, similar=similar.isel(layer=[2, 1, 0]), effects=effects.isel(layer=[1, 2, 0]))
    assert [found["similar"].values[row, e, 0] for row, e in ((0, 0), (1, 2), (2, 0))] == [1, 3, 2]
    assert np.isnan(found["similar"].values[1, 0]).all()
    np.testing.assert_array_equal(found["effect"].values, effects.values)
    with pytest.raises(MoescopeError, match="coordinate `site`"):
        analysis.atlas(store, effects=effects.drop_vars("site"))
    card = analysis.card(store, "L000-mlpE2", found)
    assert (card.name, card.layer, card.values["effect"], card.similar[0][0]) == ("L000-mlpE2", 0, 6, "L000-mlpE3")
    with pytest.raises(MoescopeError, match="name one: L000-attention or L000-mlp"):
        analysis.card(store, "L0E2", found)
    assert "scored like L000-mlpE3" in told(figures.draw(found).data[0], 1, 2)
    page = write_atlas(store, tmp_path / "atlas.html").read_text()
    assert all(f"id='{key}E0'" in page for key in keys)


@pytest.mark.parametrize(
    ("name", "says"),
    [("L9E0", "no MoE layer 9 in this store; it has 2, 4, 7"), ("L7E4", "experts 0 to 3"), ("expert 3", "as L3E7")],
)
def test_unknown_experts_are_named(store, name, says):
    with pytest.raises(MoescopeError, match=says):
        analysis.card(store, name, analysis.atlas(store))
