"""Figures show what the results hold: values, nulls and significance, and never run the text they show."""

import json

import numpy as np
import pytest

from moescope import analysis, figures
from moescope.errors import MoescopeError
from moescope.figures.pale import PALE
from moescope.figures.theme import plain

HOSTILE = '</script><img src=x onerror=alert(1)><a href="javascript:alert(2)">%{x}</a>\u202e\x00'


def specialised(labels=("a", "b", "c"), documents=30):
    rng = np.random.default_rng(0)
    counts = rng.integers(1, 6, (documents, 3, 8))
    names = [labels[d % len(labels)] for d in range(documents)]
    counts[[name == labels[0] for name in names], 1, 5] += 30
    return analysis.npmi_from_documents(
        counts, np.full(documents, 60), names, layers=[2, 5, 9], top_k=2, permutations=2000
    )


def heatmaps(figure):
    return [trace for trace in figure.data if trace.type == "heatmap"]


def test_load_map_and_its_null():
    counts = np.array([[8.0, 4, 4, 0], [5, 5, np.nan, np.nan]])
    result = analysis.load_from_counts(counts, layers=[3, 7], top_k=1)
    figure = figures.load(result)
    (drawn,) = heatmaps(figure)
    np.testing.assert_allclose(drawn.z[0][:3], np.log2([2, 1, 1]))
    assert np.isnan(drawn.z[0][3])
    assert list(drawn.y) == ["3", "7"]
    marks = {trace.name: trace for trace in figure.data}
    assert list(marks["never selected"].x) == [3]
    assert list(marks["never selected"].y) == ["3"]  # and not the experts that layer 7 does not have
    np.testing.assert_allclose(marks["busiest"].x, [2, 1])
    np.testing.assert_allclose(marks["chance"].x, result["null_max_vio_p99"] + 1)
    # Layers stand from the first at the top.
    assert list(figure.layout.yaxis.categoryarray) == ["3", "7"]
    assert figure.layout.yaxis.range == (1.5, -0.5)


def test_load_by_label_has_one_map_for_each():
    figure = figures.load(analysis.load_from_counts(np.ones((2, 4, 3)), labels=["x", "y", HOSTILE]))
    assert [trace.visible for trace in heatmaps(figure)] == [True, False, False]
    buttons = figure.layout.updatemenus[0].buttons
    assert len(buttons) == 3
    assert "<" not in buttons[2].label
    for index, button in enumerate(buttons):
        shown = [trace.name for trace, on in zip(figure.data, button.args[0]["visible"], strict=True) if on]
        assert shown == ["load", "never selected", "busiest", "chance"]
        assert button.args[0]["visible"].index(True) == 4 * index


def test_significance_is_drawn_in():
    result = specialised()
    drawn = heatmaps(figures.npmi(result))
    assert [trace.opacity for trace in drawn] == [PALE, 1.0] * 3
    q, value = result["q"].values, result["npmi"].values
    for label in range(3):
        pale, full = drawn[2 * label].z, drawn[2 * label + 1].z
        stands = q[..., label] <= 0.05
        np.testing.assert_array_equal(np.isnan(full), ~stands)
        np.testing.assert_array_equal(np.isnan(pale), stands)
        np.testing.assert_array_equal(np.where(stands, full, pale), value[..., label])
    assert not np.isnan(drawn[1].z[1][5])
    axes = figures.npmi(result).select_yaxes()
    assert {tuple(axis.range) for axis in axes} == {(2.5, -0.5)}


def test_many_labels_are_cut_with_a_word_about_it():
    names = [f"label {index}" for index in range(15)]
    result = specialised(labels=names, documents=60)
    figure = figures.npmi(result)
    assert len(heatmaps(figure)) == 24
    assert any("12 of 15 labels are drawn" in str(note.text) for note in figure.layout.annotations)
    chosen = figures.npmi(result, labels=["label 3", "label 0"])
    assert [
        str(note.text).startswith(f"<b>label {n}</b>")
        for note, n in zip(chosen.layout.annotations, (3, 0), strict=True)
    ]
    with pytest.raises(MoescopeError, match="no label 'zzz'"):
        figures.npmi(result, labels=["zzz"])


def test_without_a_null_no_cell_is_drawn_in_full():
    result = analysis.npmi_from_counts(np.array([[[3.0, 1], [1, 3]]]), np.array([4, 4]))
    figure = figures.npmi(result)
    assert np.isnan(heatmaps(figure)[1].z).all()
    np.testing.assert_array_equal(heatmaps(figure)[0].z, result["npmi"].values[..., 0])
    assert "no null" in figure.layout.annotations[0].text


def test_super_experts_and_their_thresholds():
    maxima = np.exp(np.random.default_rng(0).normal(0, 0.2, (4, 16)))
    maxima[1, 3] = 99.0
    maxima[2, 2] = np.nan
    result = analysis.super_experts_from_maxima(maxima, hidden=np.array([1.0, 90, 95, 96]))
    traces = {trace.name: trace for trace in figures.super_experts(result).data}
    assert list(traces["super expert by the rule"].text) == ["L1E3"]
    assert list(traces["super expert by the rule"].y) == [99.0]
    assert set(traces[f"largest / 10: {9.9:.3g}"].y) == {9.9}
    line = next(trace for name, trace in traces.items() if name.startswith("99.5th percentile"))
    assert line.y[0] == float(result["percentile"])
    shown = sum(len(traces[name].x) for name in ("not pooled", "pooled", "super expert by the rule"))
    assert shown == 63  # the expert never selected has nothing to show
    np.testing.assert_allclose(traces["10 × layer median"].y, 10 * result["layer_median"])
    np.testing.assert_allclose(traces["residual stream"].y, [1, 90, 95, 96])


def test_hostile_labels_stay_text():
    result = specialised(labels=(HOSTILE, "b", "c"))
    figure = figures.npmi(result)
    text = figure.to_json()
    assert "<img" not in text
    assert "<a " not in text
    assert "\x00" not in plain(HOSTILE)
    assert "\u202e" not in plain(HOSTILE)
    # In a template %{x} would be evaluated: the label stands in meta.
    assert all("img" not in trace.hovertemplate for trace in heatmaps(figure))


def test_draw_finds_the_figure_and_refuses_the_unknown():
    result = specialised()
    assert figures.draw(result).to_json() == figures.npmi(result).to_json()
    with pytest.raises(MoescopeError, match="no figure"):
        figures.draw(result.assign_attrs(analysis="other"))


def test_dark_changes_the_template_alone():
    figure = figures.npmi(specialised())
    night = figures.dark(figure)
    assert night.layout.template != figure.layout.template
    assert json.loads(night.to_json())["data"] == json.loads(figure.to_json())["data"]


def test_wide_and_deep_models_fit():
    """48 layers of 128 experts, as Qwen3-30B-A3B: heights stay readable and ticks stay few."""
    figure = figures.load(analysis.load_from_counts(np.random.default_rng(0).integers(1, 9, (48, 128))))
    assert 500 < figure.layout.height < 1000
    assert len(figure.layout.yaxis.tickvals) <= 26
    assert 128 / figure.layout.xaxis.dtick <= 16
