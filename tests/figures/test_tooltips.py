"""What the pointer is told of a point is what the result holds of that very expert, layer, head or label."""

import numpy as np
import pytest

from moescope import analysis, figures
from moescope.analysis.labelled import layer_names
from moescope.figures.theme import BLUE, ORANGE
from tests.analysis.made_stores import random_truth, write
from tests.figures.tooltips import told

KEYS = ["L002-attention", "L002-mlp", "L004-mlp"]


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """Two routers in layer 2, three widths; expert 1 of the first goes with "b", expert 2 of the last with "c"."""
    labels = ["a", "b", "c"] * 12
    prefer = np.zeros((36, 3, 5))
    prefer[1::3, 0, 1] = prefer[2::3, 2, 2] = 3
    made = random_truth(np.random.default_rng(3), 36, [4, 5, 3], [2, 1, 1], prefer=prefer)
    maxima = np.array([[5.0, 7, 6, 90, np.nan], [3, 2, 1, 4, 5], [10, 20, 30, np.nan, np.nan]])
    folder = tmp_path_factory.mktemp("told") / "s"
    return write(
        folder, made, [4, 5, 3], {"domain": labels}, layers=[2, 2, 4], keys=KEYS, maxima=maxima, hidden=[1.0, 2, 300, 4]
    )


def of_cell(result, row, expert, label):
    part = result.isel(layer=row, expert=expert, label=label)
    return {str(name): float(part[name]) for name in result.data_vars if not part[name].dims}


def test_every_label_of_one_expert(store):
    result = analysis.npmi(store, permutations=300, resamples=30)
    chance, dots = figures.expert_labels(result, KEYS[2], 2).data
    assert list(dots.x) == sorted(dots.x)
    for place, name in enumerate(dots.text):
        cell = of_cell(result, 2, 2, "abc".index(name))
        assert dots.x[place] == cell["npmi"]
        assert dots.error_x.array[place] == pytest.approx(cell["npmi_high"] - cell["npmi"])
        assert dots.error_x.arrayminus[place] == pytest.approx(cell["npmi"] - cell["npmi_low"])
        edge = ORANGE if cell["npmi"] > 0 else BLUE
        assert dots.marker.line.color[place] == edge
        assert (dots.marker.color[place] == edge) is (cell["q"] <= 0.05)
        text = told(dots, place)
        assert text.startswith(f"{name}  nPMI {cell['npmi']:.3f}")
        assert f"active at {cell['p_active']:.1%} of these tokens, {cell['lift']:.2f} × its share of all" in text
        assert f"p = {cell['p']:.2g}, q = {cell['q']:.2g} {cell['count']:,.0f} selections" in text
        between = f"mean {cell['null_mean']:.3f}, 99th percentile {cell['null_p99']:.3f}"
        assert told(chance, place) == f"{name} labels dealt anew: {between}"
        assert (chance.base[place], chance.x[place]) == (cell["null_mean"], cell["null_p99"] - cell["null_mean"])
    assert any(color == ORANGE for color in dots.marker.color)


def test_every_label_of_two_experts(store):
    result = analysis.npmi(store, permutations=300, resamples=30)
    figure = figures.experts_beside(result, (KEYS[0], 1), (KEYS[2], 2))
    ticks = dict(zip(figure.layout.yaxis.tickvals, figure.layout.yaxis.ticktext, strict=True))
    gaps = []
    for chance, dots, row, expert, name, side in (
        (*figure.data[:2], 0, 1, "L002-attentionE1", 1),
        (*figure.data[2:], 2, 2, "L004-mlpE2", -1),
    ):
        assert dots.name == name
        for place, label in enumerate(dots.text):
            cell = of_cell(result, row, expert, "abc".index(label))
            assert ticks[round(dots.y[place])] == label
            assert np.sign(dots.y[place] - round(dots.y[place])) == side  # the first stands above the second
            assert (dots.y[place], chance.base[place]) == (chance.y[place], cell["null_mean"])
            text = told(dots, place)
            assert text.startswith(f" {name} , {label}  nPMI {cell['npmi']:.3f} ")
            assert f"(chance: below {cell['null_p99']:.3f} in 99 of 100)" in text
            assert f"active at {cell['p_active']:.1%} of these tokens, {cell['lift']:.2f} × its share" in text
            assert text.endswith(f"q = {cell['q']:.2g}")
            assert (dots.marker.color[place] in (BLUE, ORANGE)) is (cell["q"] <= 0.05)
        gaps.append(dict(zip(dots.text, dots.x, strict=True)))
    apart = [gaps[0][label] - gaps[1][label] for label in figure.data[1].text]
    assert apart == sorted(apart)


def test_the_atlas_and_its_words(store):
    found = analysis.atlas(store, permutations=300)
    maps = {trace.name: trace for trace in figures.draw(found).data}
    names = layer_names(found)
    for name, trace in maps.items():
        np.testing.assert_array_equal(trace.z, found[name].values)
        for row, expert in ((0, 1), (0, 3), (1, 4), (2, 2)):
            text = told(trace, row, expert)
            assert f"layer {names[row]}, expert {expert} " in text
            assert f"{found[name].values[row, expert]:.3g}" in text
            label = found["prefers"].values[row, expert]
            assert (f"prefers {label}" in text) is bool(label)
            assert ("super expert" in text) is bool(found["super"].values[row, expert])
    assert [found["prefers"].values[at] for at in ((0, 1), (2, 2))] == ["b", "c"]
    assert set(maps) == {"relative_load", "npmi", "absmax"}


def test_super_experts_of_two_routers_keep_their_names(store):
    result = analysis.super_experts(store, depth=4)
    by_name = {}
    for trace in figures.super_experts(result).data:
        for place in range(len(trace.x) if trace.customdata is not None else 0):
            layer, expert, *_, name = trace.customdata[place]
            row = KEYS.index(layer)
            assert name == f"{layer}E{expert}"
            assert trace.y[place] == result["absmax"].values[row, expert]
            text = told(trace, place)
            assert f"{trace.y[place]:.4g} {result['ratio_to_median'].values[row, expert]:.2f} × its layer's" in text
            assert text.endswith(f"robust z {result['robust_z'].values[row, expert]:.1f}")
            by_name[name] = by_name.get(name, 0) + 1
    assert set(by_name.values()) == {2}  # once in order, once by layer
    assert len(by_name) == int(np.isfinite(result["absmax"]).sum())


def test_heads_and_residuals_of_every_layer(store):
    result = analysis.attention_sinks(store)
    bars = figures.draw(result).data[-1]
    assert list(bars.y) == ["0", "1", "2", "3"]
    np.testing.assert_allclose(bars.x, [1, 2, 300, 4])
    assert told(bars, 2).startswith("layer 2  300 , 1.5e+02 times the layer before")
    shares = np.array([[0.1, 0.7, np.nan], [0.2, 0.3, 0.4], [0.5, 0.6, 0.9], [np.nan, 0.8, 0.05]])
    cells = figures.draw(
        result.drop_dims("head").drop_vars("head", errors="ignore").assign(share=(("layer", "head"), shares))
        .assign_coords(head=range(3))
    ).data[0]  # fmt: skip
    np.testing.assert_array_equal(cells.z, shares)
    assert told(cells, 2, 1) == "layer 2, head 1  60.0% on the first token "


def test_no_p_is_written_as_0():
    """Single precision ends at 1e-45, and the bounds that tests of tokens give go far below."""
    tokens = np.full(400, 60)
    held = np.full((400, 1), 20)
    joint = np.zeros((400, 1, 2, 1), dtype=int)
    joint[..., 0, 0] = np.random.default_rng(0).integers(15, 21, (400, 1))
    selections = np.stack([joint[:, :, 0, 0], 60 - joint[:, :, 0, 0]], axis=2)
    joint[..., 1, 0] = 20 - joint[..., 0, 0]
    result = analysis.npmi_from_properties(joint, held, selections, tokens, resamples=0)
    assert 0 < result["p"].values[0, 0, 0] < 1e-45
    _, full = figures.draw(result).data
    assert "p = 1e-30, q = 1e-30, family-wise p = 1e-30" in told(full, 0, 0)
    p = result["p"].values[0, 1, 0]
    assert f"p = {p:.2g}, " in told(figures.draw(result).data[0], 0, 1)
    linked = analysis.affinity_from_counts(np.eye(8) * 1000)
    assert "p = 1e-30, q = 1e-30" in told(figures.affinity(linked).data[-2], 0)
