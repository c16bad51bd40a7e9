"""Bits under a budget: against every possible choice on small cases, and on a store against loops."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moescope.analysis import bit_budget, watched
from moescope.analysis.bit_budget import allocate, bits, bits_from_importance
from moescope.errors import CancelledError, MoescopeError
from tests.analysis.made_stores import random_truth
from tests.analysis.paired_stores import changed, write_tiers


def cheapest(costs, widths, budget):
    """The least cost of all choices within the budget, by trying them."""
    experts = len(costs)
    return min(
        sum(costs[e][c] for e, c in enumerate(choice))
        for choice in itertools.product(range(len(widths)), repeat=experts)
        if sum(widths[c] for c in choice) <= budget * experts + 1e-9
    )


@given(
    st.integers(0, 10_000),
    st.integers(1, 6),
    st.sampled_from([(1, 2, 3), (2, 4), (0, 1, 3, 8)]),
    st.floats(0, 1),
)
@settings(deadline=None, max_examples=60)
def test_no_choice_is_cheaper(seed, experts, widths, place):
    rng = np.random.default_rng(seed)
    budget = widths[0] + place * (widths[-1] - widths[0])
    costs = rng.random((experts, len(widths))) * rng.choice([0, 1e-6, 1, 1e5])
    found = allocate(costs, widths, budget)
    assert np.asarray(widths)[found.choice].sum() <= budget * experts + 1e-6
    best = cheapest(costs.tolist(), widths, budget)
    assert found.cost == pytest.approx(best, rel=1e-6)
    assert found.bound <= best * (1 + 1e-9) + 1e-12
    assert found.bound == pytest.approx(best, rel=1e-6)
    assert found.optimal


def test_what_a_second_does_not_solve_is_solved_aside_and_ends_with_its_watcher(monkeypatch):
    monkeypatch.setattr(bit_budget, "SHORT", 1e-9)  # no program is solved by then
    costs = np.random.default_rng(0).random((12, 3))
    want = allocate(costs, (1, 2, 3), 2.0)
    told = []
    with watched(lambda what, done, total: told.append(what)):
        found = allocate(costs, (1, 2, 3), 2.0)
    assert "seconds of the solver" in told
    assert (found.choice.tolist(), found.cost, found.bound) == (want.choice.tolist(), want.cost, want.bound)
    assert found.optimal
    assert found.cost == pytest.approx(cheapest(costs.tolist(), (1, 2, 3), 2.0))

    def stops(what, done, total):
        if what == "seconds of the solver":
            raise CancelledError("enough")

    with watched(stops), pytest.raises(CancelledError, match="enough"):
        bits_from_importance(costs, 2.0, scope="model")


def test_who_watches_can_stop_between_two_layers():
    def stops(what, done, total):
        if what == "programs of the layers":
            assert total == 2
            if done == 1:
                raise CancelledError("enough")

    with watched(stops), pytest.raises(CancelledError, match="enough"):
        bits_from_importance(np.random.default_rng(0).random((2, 4)), 2.0)


@pytest.mark.parametrize("scope", ["layer", "model"])
def test_a_whole_model_within_its_budget(scope):
    rng = np.random.default_rng(0)
    importance = rng.random((2, 4))
    importance[1, 3] = np.nan
    errors = rng.random((2, 4, 3))
    errors[:, :, 1:] *= 0.5
    found = bits_from_importance(importance, 2.0, (1, 2, 3), errors, gamma=1.5, scope=scope, draws=50)
    costs = [importance[0][:, None] * errors[0] ** 1.5, importance[1, :3, None] * errors[1, :3] ** 1.5]
    if scope == "layer":
        best = sum(cheapest(layer.tolist(), (1, 2, 3), 2.0) for layer in costs)
        assert (found["mean_bits"] <= 2).all()
    else:
        best = cheapest(np.concatenate(costs).tolist(), (1, 2, 3), 2.0)
    assert found["total_cost"].item() == pytest.approx(best)
    assert found["gap"].item() == pytest.approx(0, abs=1e-9)
    assert found["bits"].sum() <= 2 * 7
    uniform = sum(layer[:, 1].sum() for layer in costs)
    assert found["uniform_cost"].item() == pytest.approx(uniform)
    assert found["saving"].item() == pytest.approx(1 - best / uniform)
    assert found["random_saving"] < found["saving"]
    assert np.isnan(found["bits"].values[1, 3])
    np.testing.assert_allclose(found["layer_cost"].sum(), best)


def test_without_errors_the_stand_in_is_named_and_falls_by_four_a_bit():
    found = bits_from_importance(np.array([[8.0, 1, 1, 0]]), 2.0)
    assert found.attrs["errors"].startswith("stand-in")
    np.testing.assert_array_equal(found["bits"], [[3, 2, 2, 1]])
    np.testing.assert_allclose(found["cost"], [[8 / 64, 1 / 16, 1 / 16, 0]])


def test_equal_experts_get_uniform_bits():
    found = bits_from_importance(np.full((1, 6), 0.3), 2.0)
    np.testing.assert_array_equal(found["bits"], 2)
    assert found["saving"].item() == pytest.approx(0)


def test_the_importance_of_a_store_is_what_a_loop_says(tmp_path):
    rng = np.random.default_rng(5)
    widths, k = [6, 4, 1], [2, 2, 1]
    made = random_truth(rng, 14, widths, k, missing=0.2)
    store = write_tiers(tmp_path / "s", made, widths, cuts=3, slots_can_miss=True)
    found = bits(store, 2.0, alpha=0.5, beta=2.0)
    n = made.document.size
    for layer, width in enumerate(widths):
        frequency, weight = np.zeros(width), np.zeros(width)
        for t in range(n):
            for e, w, ok in zip(made.expert[layer][t], made.weight[layer][t], made.valid[layer][t], strict=True):
                if ok:
                    frequency[e] += 1 / n
                    weight[e] += w / n
        np.testing.assert_allclose(found["frequency"].values[layer, :width], frequency)
        np.testing.assert_allclose(found["importance"].values[layer, :width], frequency**0.5 * weight**2, rtol=1e-6)
        assert np.isnan(found["importance"].values[layer, width:]).all()
    plain = bits_from_importance(found["importance"].values, 2.0)
    np.testing.assert_allclose(found["total_cost"], plain["total_cost"])


def test_busy_experts_get_more_and_it_holds_on_other_documents(tmp_path):
    rng = np.random.default_rng(6)
    prefer = np.tile(np.array([3.0, 3, 0, 0, 0, 0]), (40, 1, 1))
    made = random_truth(rng, 40, [6], [2], prefer=prefer)
    found = bits(write_tiers(tmp_path / "s", made, [6]), 2.0)
    assert (found["bits"].values[0, :2] == 3).all()
    assert found["heldout_saving"] > 0.2
    assert found["heldout_saving"] > found["random_saving_p99"]
    single = changed(made, document=np.zeros_like(made.document), sequence=made.sequence)
    assert np.isnan(bits(write_tiers(tmp_path / "one", single, [6]), 2.0)["heldout_saving"])


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"budget": 0.5}, "below the smallest width"),
        ({"widths": (3, 1)}, "ascending"),
        ({"scope": "all"}, "`scope` is"),
        ({"errors": np.ones((1, 2, 3))}, "need"),
        ({"errors": -np.ones((1, 4, 3))}, "not numbers of 0 or more"),
    ],
)
def test_mistakes_are_one_sentence(options, words):
    with pytest.raises(MoescopeError, match=words):
        bits_from_importance(np.ones((1, 4)), **options)
