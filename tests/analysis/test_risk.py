"""Risk differences: brute force over tokens, their zero sum, calibration over 200 seeds, a planted one, recipes."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moescope import analysis
from moescope.edits import Recipe
from moescope.errors import MoescopeError
from tests.analysis.made_stores import random_truth, write
from tests.analysis.test_specialisation import made_counts


@given(st.integers(0, 10**6), st.integers(1, 4), st.floats(0, 0.5))
@settings(max_examples=12, deadline=None)
def test_it_is_what_the_tokens_say(tmp_path_factory, seed, k, missing):
    rng = np.random.default_rng(seed)
    widths, ks = [int(rng.integers(k, 9)), 1], [k, 1]
    made = random_truth(rng, 8, widths, ks, missing=missing)
    tone = [["good", "bad", "dull"][d % 3] for d in range(8)]
    path = tmp_path_factory.mktemp("risk") / "s"
    store = write(path, made, widths, {"tone": tone}, cuts=2, slots_can_miss=missing > 0)
    result = analysis.risk_difference(store, "good", "bad", permutations=5, resamples=5)
    of_token = np.array([tone[d] for d in made.document])
    for row, width in enumerate(widths):
        chosen = np.where(made.valid[row], made.expert[row], -1) if missing > 0 else made.expert[row]
        for e in range(width):
            active = (chosen == e).any(axis=1)
            expected = active[of_token == "good"].mean() - active[of_token == "bad"].mean()
            found = result["risk_difference"].values[row, e]
            if active[of_token != "dull"].any():
                assert found == pytest.approx(expected, abs=1e-12)
            else:
                assert np.isnan(found)
    if not missing:
        np.testing.assert_allclose(result["sum"], 0, atol=1e-12)
    swapped = analysis.risk_difference(store, "bad", "good", permutations=5, resamples=5)
    np.testing.assert_allclose(swapped["risk_difference"], -result["risk_difference"])


def test_false_discoveries_stay_at_their_level():
    seeds, false, small, tests = 200, 0, 0, 0
    for seed in range(seeds):
        counts, tokens, labels = made_counts(np.random.default_rng(seed), documents=20, layers=1, spread=1.0)
        result = analysis.risk_difference_from_documents(
            counts, tokens, labels == "0", permutations=300, seed=seed, resamples=0
        )
        false += bool((result["q"] <= 0.1).any())
        small += int((result["p"] <= 0.05).sum())
        tests += int(result["p"].notnull().sum())
    assert false / seeds <= 0.1 + 3 * np.sqrt(0.1 * 0.9 / seeds)
    assert small / tests <= 0.055


def test_a_planted_difference_is_found_and_becomes_a_recipe():
    counts, tokens, labels = made_counts(np.random.default_rng(1), documents=60, spread=50.0, boost=(1, 5, "2"))
    result = analysis.risk_difference_from_documents(counts, tokens, labels == "2", layers=[4, 9])
    best = np.unravel_index(np.nanargmax(result["risk_difference"].values), (2, 8))
    assert best == (1, 5)
    assert result["p_max"].values[1, 5] <= 0.01
    assert result["low"].values[1, 5] > 0
    # In the other layer nothing was planted.
    assert (result["p_max"].values[0] > 0.05).all()
    up = Recipe.from_risk_difference(result, "first", promote=1)
    down = Recipe.from_risk_difference(result, "second", demote=1)
    for recipe, kind in ((up, "promote"), (down, "demote")):
        (edit,) = recipe.edits
        assert (edit.kind, edit.layer, edit.expert) == (kind, 9, (5,))
    with pytest.raises(MoescopeError, match="compares 'first' with 'second'"):
        Recipe.from_risk_difference(result, "third", promote=1)


def test_two_stores_are_two_sets(tmp_path):
    rng = np.random.default_rng(2)
    made = random_truth(rng, 12, [6, 3], [2, 1])
    half = made.document < 6
    parts = [made.part(rows) for rows in (half, ~half)]
    tone = {"tone": ["a"] * 6 + ["b"] * 6}
    whole = write(tmp_path / "whole", made, [6, 3], tone)
    first, second = (write(tmp_path / name, part, [6, 3], tone) for name, part in zip("ab", parts, strict=True))
    one = analysis.risk_difference(whole, "a", permutations=50)
    two = analysis.risk_difference_between(first, second, permutations=50)
    for name in one.data_vars:
        np.testing.assert_array_equal(one[name], two[name], err_msg=str(name))
    again = analysis.risk_difference_between(first, first, permutations=20)
    np.testing.assert_allclose(again["risk_difference"].fillna(0), 0, atol=1e-12)
    assert "documents of the same ids" in again.attrs["notes"]
    other = write(tmp_path / "c", random_truth(rng, 3, [5], [1]), [5], {})
    with pytest.raises(MoescopeError, match="do not match"):
        analysis.risk_difference_between(first, other)


def test_numbers_of_documents_are_those_of_the_first_store(tmp_path):
    made, tone = random_truth(np.random.default_rng(4), 12, [6], [2]), {"tone": ["a"] * 12}
    whole = write(tmp_path / "whole", made, [6], tone)
    late = made.part(made.document >= 6)
    late.document = late.document - 6
    half = write(tmp_path / "half", late, [6], tone, ids=[f"doc-{d}" for d in range(6, 12)])
    nameless = write(tmp_path / "nameless", made, [6], tone, ids=[None] * 12)
    there, here = ({"document": numbers} for numbers in ([7, 9, 10], [1, 3, 4]))
    found = analysis.risk_difference_between(whole, half, where=there, permutations=0)
    assert float(abs(found["risk_difference"]).max()) == 0
    back = analysis.risk_difference_between(half, whole, where=here, permutations=0)
    np.testing.assert_array_equal(back["count_second"], found["count_first"])
    for first, second, where in (
        (whole, half, {"document": [2, 7]}),
        (nameless, whole, there),
        (whole, nameless, there),
    ):
        with pytest.raises(MoescopeError, match="going by their ids"):
            analysis.risk_difference_between(first, second, where=where, permutations=0)


def test_a_filter_is_the_store_of_the_filtered_corpus(tmp_path):
    made = random_truth(np.random.default_rng(5), 18, [6], [2])
    tone = ["ab"[d % 2] for d in range(18)]
    source = ["web" if d < 12 else "book" for d in range(18)]
    whole = write(tmp_path / "whole", made, [6], {"tone": tone, "origin": source})
    alone = write(tmp_path / "web", made.part(made.document < 12), [6], {"tone": tone, "origin": source})
    for run in (analysis.risk_difference, analysis.domain_specialisation, analysis.npmi):
        one = run(whole, by="tone", where={"origin": "web"}, permutations=30, resamples=30)
        two = run(alone, by="tone", permutations=30, resamples=30)
        for name in one.data_vars:
            np.testing.assert_array_equal(one[name], two[name], err_msg=f"{run.__name__} {name}")


class TestCornerCases:
    def test_a_set_of_one_document(self):
        counts, tokens, _ = made_counts(np.random.default_rng(0), documents=20)
        result = analysis.risk_difference_from_documents(counts, tokens, np.arange(20) == 4, permutations=100)
        assert result["low"].isnull().all()
        assert "'first' has 1 document of 20" in result.attrs["notes"]
        assert float(result["p"].min()) > 0.01

    def test_one_expert_and_experts_never_selected(self):
        tokens = np.array([4, 6, 5, 7])
        counts = np.zeros((4, 2, 3))
        counts[:, 0, 0] = counts[:, 1, 1] = tokens
        counts[:, 0, 1:] = np.nan
        result = analysis.risk_difference_from_documents(counts, tokens, [True, False, True, False], permutations=10)
        assert result["risk_difference"].values[0, 0] == 0
        assert result["risk_difference"].isnull().values.tolist() == [[False, True, True], [True, False, True]]
        np.testing.assert_allclose(result["p"].values[0, 0], 1)

    def test_sets_that_are_not_two(self, tmp_path):
        made = random_truth(np.random.default_rng(0), 6, [4], [2])
        store = write(tmp_path / "s", made, [4], {"tone": list("abcabc"), "same": ["x"] * 6})
        for arguments, words in [
            ({}, "Name the first set"),
            ({"first": "z"}, "No document has 'z'"),
            ({"first": "a", "second": "a"}, "needs two sets"),
            ({"by": "same", "first": "x"}, "needs two sets"),
        ]:
            with pytest.raises(MoescopeError, match=words):
                analysis.risk_difference(store, **arguments)
        with pytest.raises(MoescopeError, match="both sets"):
            analysis.risk_difference_from_documents(np.ones((2, 1, 1)), np.ones(2), [True, True])
