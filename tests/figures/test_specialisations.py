"""Domains, risk differences, token classes, vocabulary and TCESS: the figures show what the results hold."""

import numpy as np
import pytest
import xarray as xr

from moescope import analysis, figures
from moescope.figures.specialisation import read
from tests.analysis.test_vocabulary import made_vocabulary
from tests.analysis.token_truth import made_properties
from tests.figures.test_figures import HOSTILE, heatmaps


def counted(names=("a", "b"), documents=20):
    rng = np.random.default_rng(0)
    counts = rng.integers(0, 6, (documents, 2, 5))
    labels = [names[d % len(names)] for d in range(documents)]
    counts[[label == names[0] for label in labels], 1, 3] += 20
    counts[:, 0, 4] = 0
    return counts, np.full(documents, 40), labels


def test_domains_are_drawn_in_doublings_of_uniform():
    result = analysis.domain_specialisation_from_documents(*counted(), top_k=1, permutations=500, resamples=20)
    drawn = heatmaps(figures.draw(result))
    pale, full = drawn[0].z, drawn[1].z
    stands = result["q"].values[..., 0] <= 0.05
    assert stands[1, 3]
    np.testing.assert_array_equal(np.isnan(full), ~stands)
    shown = np.where(stands, full, pale)
    known = result["share"].values[..., 0] > 0
    np.testing.assert_allclose(shown[known], np.log2(result["share"].values[..., 0][known] * 5))
    assert (shown[0, 4] < -10).all()  # never chosen: the end of the scale, and no gap


def test_only_experts_above_chance_are_counted_as_such():
    counts, tokens, labels = counted()
    both = {"permutations": 2000, "resamples": 0, "alternative": "two-sided"}
    shares = analysis.domain_specialisation_from_documents(counts, tokens, labels, **both)
    scores = analysis.tcess_from_documents(counts * 0.1, tokens, labels, **both)
    for result, value in ((shares, "share"), (scores, "tcess")):
        texts = [str(note.text) for note in figures.draw(result).layout.annotations]
        for place, own in enumerate("ab"):
            stands = result["q"].values[..., place] <= 0.05
            means = result[value].values
            above = int((stands & (means[..., place] > means[..., 1 - place])).sum())
            assert above < stands.sum() or own == "a"
            assert f"<b>{own}</b>" in texts[place]
            assert f">{above} expert{'' if above == 1 else 's'} above chance<" in texts[place]


def test_risk_differences_with_intervals_and_dealt_sets():
    counts, tokens, labels = counted()
    result = analysis.risk_difference_from_documents(counts, tokens, [one == "a" for one in labels], layers=[4, 7])
    figure = figures.draw(result)
    full = heatmaps(figure)[1].z
    np.testing.assert_array_equal(np.isfinite(full), result["q"].values <= 0.05)
    bar, dots = figure.data[2:]
    assert dots.y[0] == "L7 E3"
    assert dots.x[0] == result["risk_difference"].values[1, 3]
    assert dots.error_x.array[0] == pytest.approx(float(result["high"][1, 3] - result["risk_difference"][1, 3]))
    assert bar.base[0] == result["null_p01"].values[1, 3]
    assert "L4 E4" not in dots.y  # never selected: no difference to show
    assert figures.risk_difference_between(result).to_json() == figure.to_json()


def test_token_classes_say_what_they_are_held_against():
    result = analysis.npmi_from_properties(*made_properties(np.random.default_rng(0)), labels=["w", "x", "y", '"'])
    figure = figures.draw(result)
    assert [str(title.text).split("<br>")[0] for title in figure.layout.annotations][3] == '<b>"</b>'
    assert len(heatmaps(figure)) == 8
    assert "the other tokens of the same documents" in read(result)
    assert "labels dealt anew" in read(result.assign_attrs(analysis="npmi"))
    marked = result.assign_attrs(analysis="npmi_markers", matched="position")
    assert "at the same places" in read(marked)
    assert "of the same documents" in read(marked.assign_attrs(matched="document"))


def test_vocabulary_names_what_is_furthest_above_chance():
    made = made_vocabulary(np.random.default_rng(0), planted=(3, 4))
    result = analysis.vocabulary_from_counts(*made, layers=[6])
    result = result.assign_coords(token=["t0", "t1", "t2", HOSTILE, "t4", "t5"])
    figure = figures.draw(result)
    dots = figure.data[-1]
    assert dots.x[0] == 1
    assert dots.y[0].startswith("L6")
    assert dots.y[0].endswith("E4")
    assert "<img" not in figure.to_json()
    (mean,) = (trace for trace in figure.data if trace.name == "mean over tokens")
    np.testing.assert_allclose(mean.x, result["mean_share"])
    stand = int((result["q"].values <= 0.05).sum())
    assert 0 < stand < result["share"].size
    listed = result["share"].size
    assert f"<b>Settled most; {stand} of {listed} beyond chance</b>" in figure.layout.annotations[1].text
    # The token furthest above chance need not be one that stands: what is said is of those listed.
    furthest = result["share"] - result["null_p99"] == (result["share"] - result["null_p99"]).max()
    weak = result.assign(q=xr.where(furthest, 0.2, 0.01).where(result["q"].notnull()))
    words = [figures.vocabulary_specialisation(weak, n).layout.annotations[1].text for n in (1, listed)]
    assert "<b>Settled most; none of 1 beyond chance</b>" in words[0]
    assert f"<b>Settled most; {listed - 1} of {listed} beyond chance</b>" in words[1]
    none = figures.draw(result.assign(q=result["q"] * 0 + 0.06))
    assert f"<b>Settled most; none of {listed} beyond chance</b>" in none.layout.annotations[1].text
    guessed = figures.draw(result.assign(q=result["q"] * np.nan))
    assert "<b>Settled most, not tested</b>" in guessed.layout.annotations[1].text
    both = figures.draw(result.expand_dims(label=["one", "two"], axis=-1))
    assert [trace.name for trace in both.data if trace.type == "scatter" and trace.showlegend is None] == ["one", "two"]


def test_tcess_is_drawn_against_all_texts_and_hostile_labels_stay_text():
    counts, tokens, labels = counted(names=(HOSTILE, "b"))
    result = analysis.tcess_from_documents(counts * 0.1, tokens, labels, permutations=200, resamples=10)
    figure = figures.draw(result)
    drawn = heatmaps(figure)
    place = [str(name).startswith("<") for name in result["label"].values].index(True)
    shown = np.where(np.isnan(drawn[2 * place + 1].z), drawn[2 * place].z, drawn[2 * place + 1].z)
    np.testing.assert_allclose(shown, result["tcess"].values[..., place] - result["overall"].values)
    assert "<img" not in figure.to_json()
    for other in (
        figures.draw(analysis.domain_specialisation_from_documents(counts, tokens, labels, permutations=9)),
        figures.draw(analysis.risk_difference_from_documents(counts, tokens, np.arange(20) < 9, permutations=9)
                     .assign_attrs(first=HOSTILE)),
    ):  # fmt: skip
        assert "<img" not in other.to_json()
        assert "<a " not in other.to_json()


def test_one_label_has_no_null_and_is_drawn_pale():
    counts, tokens, _ = counted()
    for result in (
        analysis.domain_specialisation_from_documents(counts, tokens, ["x"] * 20),
        analysis.tcess_from_documents(counts * 0.1, tokens, ["x"] * 20),
    ):
        assert result["p"].isnull().all()
        assert "with one label" in result.attrs["undefined"]
        pale, full = heatmaps(figures.draw(result))
        assert np.isnan(full.z).all()
        assert not np.isnan(pale.z).any()
