"""Maps: what each kind lays out, where what has no features stands, and what cannot be had."""

import numpy as np
import pytest

from moescope.analysis.labelled import table
from moescope.analysis.layouts import lay_out
from moescope.analysis.maps import expert_map, expert_map_from_features, gate_map, token_map
from moescope.errors import MoescopeError
from tests.analysis import made_stores
from tests.analysis.function_stores import random_truth, write
from tests.analysis.test_layouts import groups, same_group_nearest

pytest.importorskip("umap")


def test_layers_of_different_width_and_experts_without_features():
    rng = np.random.default_rng(3)
    features = {2: rng.normal(size=(8, 5)), 5: rng.normal(size=(6, 5))}
    features[2][3] = np.nan
    result = expert_map_from_features(features, neighbours=4)
    assert result["layer"].values.tolist() == [2, 5]
    assert np.isnan(result["x"].sel(layer=2, expert=3))
    assert np.isnan(result["x"].sel(layer=5, expert=[6, 7])).all()
    assert int(result["x"].notnull().sum()) == int(result["points"]) == 13
    assert len(table(result)) == 14  # an expert without features is listed, one that does not exist is not
    plain = lay_out(np.concatenate([np.delete(features[2], 3, axis=0), features[5]]), neighbours=4)
    np.testing.assert_array_equal(result["x"].values[1, :6], plain.points[7:, 0])
    with pytest.raises(MoescopeError, match="same features"):
        expert_map_from_features({0: np.ones((8, 3)), 1: np.ones((8, 4))})


def specialists(tmp_path, labels=3):
    """A store in which expert e of both layers prefers documents of label e % labels."""
    rng = np.random.default_rng(4)
    domain = ["abc"[d % labels] for d in range(60)]
    prefer = np.zeros((60, 2, 12))
    for d in range(60):
        prefer[d, :, np.arange(12) % labels == d % labels] = 3.0
    made = made_stores.random_truth(rng, 60, [12, 12], [2, 2], longest=40, prefer=prefer)
    return made_stores.write(tmp_path / f"s{labels}", made, [12, 12], {"domain": domain}, cuts=3)


def test_experts_of_one_label_stand_together(tmp_path):
    store = specialists(tmp_path)
    result = expert_map(store, neighbours=6)
    points = np.stack([result["x"].values.ravel(), result["y"].values.ravel()], axis=1)
    assert same_group_nearest(points, np.tile(np.arange(12) % 3, 2)) == 1
    assert float(result["trustworthiness"]) > float(result["trustworthiness_chance"]) + 0.2
    assert result.attrs["label"] == "domain"
    again = expert_map(store, neighbours=6)
    np.testing.assert_array_equal(again["x"], result["x"])
    assert expert_map(store, by="tokens", neighbours=6)["x"].notnull().all()


def test_a_map_needs_what_it_is_of(tmp_path):
    store = specialists(tmp_path, labels=2)
    with pytest.raises(MoescopeError, match="2 values"):
        expert_map(store)
    with pytest.raises(MoescopeError, match="keeps no expert outputs"):
        expert_map(store, by="outputs")
    with pytest.raises(MoescopeError, match="use `gate_map`"):
        expert_map(store, by="gate")  # pyright: ignore[reportArgumentType]
    with pytest.raises(MoescopeError, match="token ids occur"):
        token_map(store, min_count=10**6)


def test_gate_rows_are_mapped_less_their_layers_mean():
    rng = np.random.default_rng(5)
    rows = {layer: groups(rng, each=3) + 100 * layer for layer in (0, 1)}
    result = gate_map(rows, neighbours=4)
    free = [values - values.mean(axis=0) for values in rows.values()]
    unit = [values / np.linalg.norm(values, axis=1, keepdims=True) for values in free]
    np.testing.assert_array_equal(result["x"].values.ravel(), lay_out(np.concatenate(unit), neighbours=4).points[:, 0])


def test_mean_outputs_are_those_of_the_tokens_in_any_number_of_shards(tmp_path):
    truth = random_truth(np.random.default_rng(6), documents=20, n_experts=(8, 6))
    maps = [expert_map(write(tmp_path / str(cuts), truth, cuts), by="outputs", neighbours=5) for cuts in (1, 4)]
    rows = []
    for layer, width in enumerate((8, 6)):
        mean = np.stack(
            [truth.outputs[layer][truth.expert[layer] == e].astype(float).mean(axis=0) for e in range(width)]
        )
        free = mean - mean.mean(axis=0)
        rows.append(free / np.linalg.norm(free, axis=1, keepdims=True))
    want = lay_out(np.concatenate(rows), neighbours=5)
    assert float(maps[0]["trustworthiness_pca"]) == pytest.approx(want.pca)
    for found in maps:
        np.testing.assert_allclose(found["x"].values[1, :6], want.points[8:, 0], atol=1e-3)


def test_tokens_that_are_routed_alike_stand_together(tmp_path):
    rng = np.random.default_rng(7)
    made = made_stores.random_truth(rng, 80, [8, 8], [2, 2], longest=60, vocabulary=24)
    for layer in range(2):
        score = rng.gumbel(size=(made.token_id.size, 8))
        score[np.arange(made.token_id.size), made.token_id % 4 * 2] += 4
        made.expert[layer] = np.argsort(-score, axis=1)[:, :2]
    store = made_stores.write(tmp_path / "s", made, [8, 8], {"domain": ["a"] * 80})
    result = token_map(store, neighbours=5)
    points = np.stack([result["x"].values, result["y"].values], axis=1)
    assert same_group_nearest(points, result["token"].values % 4) == 1
    np.testing.assert_array_equal(result["count"], np.bincount(made.token_id)[result["token"].values])
    assert result["text"].values[0] == f"w{result['token'].values[0]} "
    for layer, chosen in enumerate(made.expert):
        active = (chosen[:, :, None] == np.arange(8)).any(axis=1)
        for place, token in enumerate(result["token"].values):
            share, at = active[made.token_id == token].mean(axis=0), result.isel(token=place, layer=layer)
            assert at["top_share"].item() == pytest.approx(share.max())
            assert at["top_usual"].item() == pytest.approx(active.mean(axis=0)[int(at["top_expert"])])
    few = token_map(store, most=10, neighbours=3)
    assert few.sizes["token"] == 10
    assert int(few["count"].min()) >= int(np.sort(np.bincount(made.token_id))[-10])
