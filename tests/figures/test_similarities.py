"""Figures of similarities and maps show what the results hold, and never run the text they show."""

import numpy as np
import pytest
import xarray as xr

from moescope.analysis import layouts
from moescope.analysis import maps as expert_maps
from moescope.analysis.maps import expert_map_from_features
from moescope.analysis.matching import neuron_matching
from moescope.analysis.similarities import gate_similarity, weight_similarity
from moescope.errors import MoescopeError
from moescope.figures import maps, matching
from moescope.figures.similarities import clustered, norm_against_score, read, similarity
from moescope.figures.theme import dark

HOSTILE = "</script><img src=x onerror=alert(1)>%{x}"


def pairs(layers=(2, 5), n=10, draws=19):
    rng = np.random.default_rng(0)
    rows = {layer: rng.normal(size=(n, 30)) for layer in layers}
    rows[layers[0]][min(7, n - 1)] = rows[layers[0]][1] + 0.02 * rng.normal(size=30)
    return gate_similarity(rows, draws=draws)


def heatmaps(figure):
    return [trace for trace in figure.data if trace.type == "heatmap"]


def test_every_pair_is_drawn_in_its_place():
    result = pairs()
    figure = similarity(result)
    drawn = heatmaps(figure)
    assert len(drawn) == 2
    for row, trace in enumerate(drawn):
        names = [int(name) for name in trace.x]
        assert sorted(names) == list(range(10))
        assert list(trace.x) == list(trace.y)
        for i, first in enumerate(names):
            for j, second in enumerate(names):
                want = result["similarity"].isel(layer=row).sel(expert=first, other=second).item()
                np.testing.assert_allclose(trace.z[i][j], want)
    # The twins stand side by side, and a ring marks them both ways.
    order = [int(name) for name in drawn[0].x]
    assert abs(order.index(1) - order.index(7)) == 1
    rings = [trace for trace in figure.data if trace.name == "beyond the null"]
    assert set(zip(rings[0].x, rings[0].y, strict=True)) == {("1", "7"), ("7", "1")}
    assert "1 pair beyond" in figure.layout.annotations[0].text
    assert "cosine of router rows" in read(result)
    assert dark(figure).layout.template != figure.layout.template


def test_layers_of_different_width_and_without_a_null():
    rng = np.random.default_rng(1)
    layers = {n: {"up": rng.normal(size=(n, 5, 4)), "down": rng.normal(size=(n, 5, 4))} for n in (9, 3, 1)}
    figure = similarity(weight_similarity(layers, draws=0))
    assert [len(trace.x) for trace in heatmaps(figure)] == [9, 3, 1]
    assert "no null" in figure.layout.annotations[0].text


def test_many_layers_are_cut_to_those_with_the_closest_pairs():
    result = pairs(layers=tuple(range(15)), n=4)
    figure = similarity(result, most=5)
    assert len(heatmaps(figure)) == 5
    closest = np.nanmax(result["similarity"].values, axis=(1, 2))
    kept = sorted(np.argsort(closest)[::-1][:5].tolist())
    assert [f"layer {layer}</b>" in figure.layout.annotations[i].text for i, layer in enumerate(kept)] == [True] * 5
    assert "5 of 15 layers" in figure.layout.annotations[-1].text
    assert len(heatmaps(similarity(result, layers=[3, 14]))) == 2
    with pytest.raises(MoescopeError, match="no layer 99"):
        similarity(result, layers=[99])
    with pytest.raises(MoescopeError, match="not a result about pairs"):
        similarity(xr.Dataset())


def test_clusters_stand_together():
    rng = np.random.default_rng(2)
    group = rng.permutation(np.repeat(np.arange(3), 5))
    matrix = (group[:, None] == group[None]) * 0.8 + 0.05 * rng.random((15, 15))
    matrix = (matrix + matrix.T) / 2
    np.fill_diagonal(matrix, np.nan)
    order = clustered(matrix)
    assert sorted(order) == list(range(15))
    assert int((np.diff(group[order]) != 0).sum()) == 2
    assert clustered(np.full((4, 4), np.nan)).tolist() == [0, 1, 2, 3]


def ranked():
    count = np.zeros((2, 3, 3))
    count[0] = np.diag([10, 10, 10])
    count[1] = 10 / 3
    each = {
        name + end: ("layer", np.array([0.9, 0.0]) + more)
        for name in ("spearman", "spearman_within")
        for end, more in (("", 0.0), ("_low", -0.05), ("_high", 0.05), ("_p", 0.1))
    }
    return xr.Dataset(
        {"count": (("layer", "score_rank", "norm_rank"), count), "tokens": ("layer", np.array([10, 10]))} | each,
        coords={"layer": [4, 6], "site": ("layer", np.array(["L004", "L006"], dtype=object))},
    )


def test_norms_against_scores():
    figure = norm_against_score(ranked())
    (grid,) = heatmaps(figure)
    share = (np.eye(3) * 10 + 10 / 3) / 20
    np.testing.assert_allclose(grid.z, share - 1 / 3)
    np.testing.assert_allclose(grid.customdata[..., 0], share)
    lines = {trace.name: trace for trace in figure.data if trace.type == "scatter"}
    np.testing.assert_allclose(lines["weight and norm"].y, [0.9, 0.0])
    np.testing.assert_allclose(lines["weight and norm"].error_y.array, 0.05)
    assert list(lines["weight and norm"].x) == ["4", "6"]


def test_the_map_of_experts_says_how_far_it_can_be_trusted(monkeypatch):
    # Any layout will do here, and compiling UMAP's loops takes ten seconds.
    monkeypatch.setattr(
        expert_maps, "lay_out", lambda features, *_: layouts.Layout(features[:, :2], 0.87, 0.53, 0.7, 4)
    )
    features = {2: np.random.default_rng(0).normal(size=(8, 5)), 5: np.random.default_rng(1).normal(size=(6, 5))}
    features[2][3] = np.nan
    result = expert_map_from_features(features, neighbours=4)
    figure = maps.expert_map(result)
    (dots,) = figure.data
    assert len(dots.x) == 13
    assert ["2", 3] not in [list(row) for row in dots.customdata]
    place = [list(row) for row in dots.customdata].index(["5", 4])
    assert dots.x[place] == result["x"].sel(layer=5, expert=4).item()
    assert f"{float(result['trustworthiness']):.2f}" in figure.layout.title.text
    assert "1 expert has no features" in figure.layout.title.text
    assert f"{float(result['trustworthiness_chance']):.2f}" in maps.read(result)


def test_the_map_of_tokens_shows_text_as_written():
    result = xr.Dataset(
        {"x": ("token", np.arange(3.0)), "y": ("token", np.arange(3.0)), "count": ("token", np.array([5, 500, 50]))}
        | dict.fromkeys(("trustworthiness", "trustworthiness_chance", "trustworthiness_pca"), ((), 0.5))
        | {"points": ((), 3), "ids": ((), 40), "covered": ((), 0.5)}
        | {"document": ("token", [1, 2, 2]), "place": ("token", [0, 4, 5])},
        coords={"token": [7, 8, 9], "text": ("token", np.array(["a", HOSTILE, "\n"], dtype=object))},
        attrs={"features": "x", "analysis": "token_map", "min_count": 5, "seed": 3},
    )
    figure = maps.token_map(result, named=2)
    (dots,) = figure.data
    assert [bool(text) for text in dots.text] == [False, True, True]
    assert "<" not in dots.text[1]
    assert "%{x}" in dots.text[1]  # printed: text is no template
    assert dots.text[2] == "↵"
    np.testing.assert_allclose(dots.marker.color, np.log10(np.array([5, 500, 50]) / 5))
    assert "3 of 40 token ids" in figure.layout.title.text


def test_matched_pairs_stand_beside_their_null():
    rng = np.random.default_rng(2)
    parts = {name: rng.normal(size=(6, 9, 5)) for name in ("up", "down")}
    order = rng.permutation(9)
    for values in parts.values():
        values[4] = values[1][order]
    result = neuron_matching({3: parts}, most=5)
    figure = matching.neuron_matching(result)
    dots = [trace for trace in figure.data if trace.name == "beyond the null"]
    assert [list(trace.x) for trace in dots] == [["3"], [result["in_place"].sel(layer=3, expert=1, other=4).item()]]
    assert dots[0].y[0] == pytest.approx(1)
    assert dots[0].customdata[0].tolist()[:3] == ["3", 1, 4]
    assert sum(len(trace.x) for trace in figure.data if trace.name == "within the null") == 8  # 4 pairs, twice
    (bar,) = (trace for trace in figure.data if trace.type == "bar")
    np.testing.assert_allclose((bar.base + bar.y).astype(float), result["null_extreme"].values)
    with pytest.raises(MoescopeError, match="neuron matching"):
        matching.neuron_matching(pairs())


def test_far_points_do_not_blow_up_the_frame():
    rng = np.random.default_rng(0)
    points = np.concatenate([rng.normal(size=(300, 2)), [[500.0, -400.0]]])
    result = xr.Dataset(
        {"x": ("token", points[:, 0]), "y": ("token", points[:, 1]), "count": ("token", np.arange(301) + 1)}
        | dict.fromkeys(("trustworthiness", "trustworthiness_chance", "trustworthiness_pca"), ((), 0.5))
        | {"points": ((), 301), "ids": ((), 301), "covered": ((), 1.0)}
        | {"document": ("token", np.arange(301)), "place": ("token", np.arange(301))},
        coords={"token": np.arange(301), "text": ("token", np.array([f"t{n}" for n in range(301)], dtype=object))},
        attrs={"features": "x", "analysis": "token_map", "min_count": 5, "seed": 3},
    )
    figure = maps.token_map(result, named=1000)
    assert figure.layout.xaxis.range[1] < 10
    assert "1 of them outside" in figure.layout.title.text
    named = [place for place, text in enumerate(figure.data[0].text) if text]
    assert 10 < len(named) < 200  # not on one another
