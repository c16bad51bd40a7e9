"""The figures of two stores and of a series hold the results, with the control and what chance explains drawn in."""

import numpy as np
import pytest

from moescope import analysis, figures
from moescope.figures import comparing
from tests.analysis.made_stores import random_truth
from tests.analysis.paired_stores import changed, write_tiers

WIDTHS = [5, 4]


@pytest.fixture(scope="module")
def stores(tmp_path_factory):
    """Layer 1 collapses on experts 2 and 3 in the other store; layer 0 stays."""
    rng, folder = np.random.default_rng(0), tmp_path_factory.mktemp("f")
    made = random_truth(rng, 30, WIDTHS, [2, 2])
    labels = {"domain": ["ab"[d % 2] for d in range(30)]}
    picks = [ids.copy() for ids in made.expert]
    picks[1][rng.random(made.document.size) < 0.5] = [2, 3]
    loss = rng.random(made.document.size)
    first = write_tiers(folder / "a", made, WIDTHS, labels, loss=loss)
    return first, write_tiers(folder / "b", changed(made, expert=picks), WIDTHS, labels, loss=loss + 0.1)


def test_agreement_divergence_and_change(stores):
    result = analysis.compare(*stores, by="domain", permutations=99, resamples=30)
    figure = figures.draw(result)
    shown = [trace for trace in figure.data if trace.visible is not False]
    named = {trace.name: trace for trace in shown if trace.name != "chance"}
    for name, column in (("overlap", "overlap"), ("top1", "top1"), ("divergence", "jsd")):
        np.testing.assert_allclose(named[name].x, result[column].values[:, 0])
    chance = [trace for trace in shown if trace.name == "chance"]
    for trace, name in zip(chance, ("control_overlap", "control_top1", "jsd_null_p99"), strict=True):
        np.testing.assert_allclose(trace.x, result[name].values[:, 0])
    pale, full = (trace for trace in shown if trace.type == "heatmap")
    stands = result["share_q"].values[..., 0] <= 0.05
    assert stands[1, 2:4].all()
    assert not stands[0].any()
    np.testing.assert_array_equal(np.isnan(full.z), ~stands)
    np.testing.assert_array_equal(np.where(stands, full.z, pale.z), result["share_change"].values[..., 0])
    np.testing.assert_allclose(named["change of loss"].x, 0.1, atol=1e-6)
    assert list(named["change of loss"].y) == ["a", "b"]
    for index, button in enumerate(figure.layout.updatemenus[0].buttons):
        visible = button.args[0]["visible"]
        assert len(visible) == len(figure.data)
        assert visible[-1]  # the losses of all labels stay
        assert visible.index(True) == index * (len(figure.data) - 1) // 2
    assert "nats per token" in comparing.read(result)


@pytest.mark.parametrize("by", [None, "domain"])
def test_nothing_or_little_that_differs_is_said(stores, tmp_path, by):
    """An empty map of changes is told from a broken one: the title counts what differs, as it was made."""
    rng = np.random.default_rng(1)
    made = random_truth(rng, 30, WIDTHS, [2, 2])
    few = [ids.copy() for ids in made.expert]
    few[1][4, 0] = (set(range(4)) - set(few[1][4])).pop()
    kinds = {"a": made.expert, "turned": [ids[:, ::-1] for ids in made.expert], "few": few}
    labels = {"domain": ["ab"[d % 2] for d in range(30)]}
    made_of = {
        name: write_tiers(tmp_path / name, changed(made, expert=ids), WIDTHS, labels) for name, ids in kinds.items()
    }

    def said(first, second, **more):
        result = analysis.compare(first, second, by=by, permutations=99, resamples=20, **more)
        title = figures.compare(result).layout.title.text
        assert title == comparing.differing(result)
        return title

    alike = "The two choose the same experts for every token"
    assert said(stores[0], stores[0]) == f"{alike}, the same one first; no loss changes."
    assert said(made_of["a"], made_of["a"]) == f"{alike}, the same one first."
    assert said(made_of["a"], made_of["turned"]) == f"{alike}, but not always the same one first."
    differ = "The two choose different experts for some tokens in"
    cells = 9 if by is None else 18
    assert (
        said(made_of["a"], made_of["few"])
        == f"{differ} 1 of 2 layers; none of {cells} changes of load stands beyond chance."
    )
    assert said(made_of["a"], made_of["few"], layers=[1]).startswith(f"{differ} every layer; none of")
    result = analysis.compare(*stores, by=by, permutations=99, resamples=20)
    stand = int((result["share_q"].values <= 0.05).sum())
    assert (
        comparing.differing(result)
        == f"{differ} 1 of 2 layers; {stand} of {cells} changes of load stand beyond chance."
    )
    untested = analysis.compare(*stores, by=by, permutations=0, resamples=0)
    assert comparing.differing(untested) == f"{differ} 1 of 2 layers."


def test_risks_that_are_the_same_name_no_strongest(stores):
    names = ("one", "other")
    same = figures.risk_difference_between(
        analysis.risk_difference_between(stores[0], stores[0], names, permutations=9)
    )
    left, right = (note.text for note in same.layout.annotations[:2])
    assert "every expert is active equally often on both" in left
    assert "none" in right
    assert not any(len(trace.y) for trace in same.data if trace.type != "heatmap")
    moved = analysis.risk_difference_between(*stores, names, permutations=9)
    figure = figures.risk_difference_between(moved)
    assert "beyond chance" in figure.layout.annotations[0].text
    guessed = analysis.risk_difference_between(*stores, names, permutations=0)
    assert "not tested" in figures.risk_difference_between(guessed).layout.annotations[0].text
    drawn = next(trace for trace in figure.data if trace.type == "scatter")
    assert sorted(drawn.x) == sorted(moved["risk_difference"].values[1, :4])  # layer 0 stayed
    assert (drawn.x != 0).all()


def test_settling_over_checkpoints(stores):
    result = analysis.fluctuation([stores[1], stores[0], stores[0]], steps=[10, 20, 50], resamples=20)
    figure = figures.draw(result)
    for place, (name, control) in enumerate(
        [("settled", None), ("top1", "control_top1"), ("overlap", "control_overlap")]
    ):
        axis = f"x{place + 1}" if place else "x"
        mine = [trace for trace in figure.data if (trace.xaxis or "x") == axis]
        drawn = [trace for trace in mine if trace.name.startswith("layer")]
        for layer, trace in enumerate(drawn):
            assert list(trace.x) == [10, 20, 50]
            np.testing.assert_allclose(trace.y, result[name].values[:, layer, 0])
        controls = [trace for trace in mine if trace.name.startswith("control")]
        assert len(controls) == (2 if control else 0)
        for layer, trace in enumerate(controls):
            np.testing.assert_allclose(trace.y, result[control].values[:, layer, 0])
    assert not figure.layout.updatemenus


def test_nought_has_no_sign_on_the_colour_bar(stores):
    bar = figures.draw(analysis.compare(*stores, permutations=9, resamples=9)).layout.coloraxis.colorbar
    assert bar.tickvals[2] == 0
    assert bar.ticktext[2] == "0"
    assert bar.ticktext[-1] == f"{bar.tickvals[-1]:+.1%}"
