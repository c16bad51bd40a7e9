"""nPMI: its properties, brute force, the calibration of its null, and a planted specialist found exactly."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moescope import analysis
from moescope.analysis.association import score
from moescope.analysis.label_tests import ONE_LABEL, enough_permutations
from moescope.errors import MoescopeError
from tests.analysis.made_stores import random_truth, write


def made_counts(rng, documents=40, layers=2, experts=8, k=2, boost=None, spread=3.0):
    """Per-document counts whose documents differ in taste (Dirichlet) but, without `boost`, not by label."""
    tokens = rng.integers(5, 60, documents)
    labels = rng.permutation(np.arange(documents) % 3).astype(str)
    counts = np.zeros((documents, layers, experts))
    for d in range(documents):
        for layer in range(layers):
            taste = rng.dirichlet(np.full(experts, spread))
            if boost is not None and labels[d] == boost[2] and layer == boost[0]:
                taste[boost[1]] += 1.5
            scores = np.log(taste) + rng.gumbel(size=(tokens[d], experts))
            counts[d, layer] = np.bincount(np.argsort(-scores, axis=1)[:, :k].ravel(), minlength=experts)
    return counts, tokens, labels


@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=60))
def test_npmi_is_its_definition(rows):
    a, x = (np.array(column, dtype=float) for column in zip(*rows, strict=True))
    value = float(score(np.array((a * x).sum()), x.sum(), a.sum(), float(len(rows))))
    if not a.any() or not x.any():
        assert np.isnan(value)
        return
    assert -1 <= value <= 1
    p_xy, p_x, p_y = (a * x).mean(), x.mean(), a.mean()
    if p_xy == 0:
        assert value == -1
    elif (a == x).all():
        assert value == pytest.approx(1)
    else:
        assert p_xy < 1
        for log in (np.log, np.log2, np.log10):  # independent of the base
            assert value == pytest.approx(log(p_xy / (p_x * p_y)) / -log(p_xy), abs=1e-9)


def test_from_documents_agrees_with_brute_force_over_tokens():
    rng = np.random.default_rng(0)
    counts, tokens, labels = made_counts(rng)
    result = analysis.npmi_from_documents(counts, tokens, labels, top_k=2, permutations=20)
    total = tokens.sum()
    for layer, expert, label in [(0, 0, "0"), (1, 7, "2"), (1, 3, "1")]:
        inside = labels == label
        joint, fired = counts[inside, layer, expert].sum(), counts[:, layer, expert].sum()
        cell = result.sel(layer=layer, expert=expert, label=label)
        pmi = np.log((joint / total) / ((tokens[inside].sum() / total) * (fired / total)))
        assert cell["pmi"].item() == pytest.approx(pmi)
        assert cell["npmi"].item() == pytest.approx(pmi / -np.log(joint / total))
        assert cell["p_active"].item() == pytest.approx(joint / tokens[inside].sum())
        other = (fired - joint) / tokens[~inside].sum()
        assert cell["risk_difference"].item() == pytest.approx(joint / tokens[inside].sum() - other)
    # Every token selects k distinct experts: shares sum to k, differences to 0, and uniform choice is k / E.
    np.testing.assert_allclose(result["p_active"].sum("expert"), 2)
    np.testing.assert_allclose(result["risk_difference"].sum("expert"), 0, atol=1e-12)
    np.testing.assert_allclose(result["uniform"], 2 / 8)


def test_permutation_p_values_agree_with_permuting_by_hand():
    counts, tokens, labels = made_counts(np.random.default_rng(1), documents=12)
    draws = 50
    result = analysis.npmi_from_documents(counts, tokens, labels, permutations=draws, seed=9)
    _, code = np.unique(labels, return_inverse=True)
    dealt = np.random.default_rng(9).permuted(np.tile(code.astype(np.uint8), (draws, 1)), axis=1)
    null = np.zeros((draws, 2, 8, 3))
    for draw in range(draws):
        for label in range(3):
            inside = dealt[draw] == label
            joint, size = counts[inside].sum(axis=0), tokens[inside].sum()
            null[draw, :, :, label] = score(joint, size, counts.sum(axis=0), tokens.sum())
    observed = result["npmi"].values
    above = (null >= observed - 1e-12).sum(axis=0)
    np.testing.assert_allclose(result["p"], (above + 1) / (draws + 1))
    np.testing.assert_allclose(result["null_p99"], np.quantile(null, 0.99, axis=0, method="higher"))
    np.testing.assert_allclose(result["null_mean"], null.mean(axis=0))
    largest = null.max(axis=(1, 2, 3))
    assert result["null_max_p99"].item() == pytest.approx(np.quantile(largest, 0.99, method="higher"))
    by_hand = ((largest[:, None] >= observed.ravel() - 1e-12).sum(axis=0) + 1) / (draws + 1)
    np.testing.assert_allclose(result["p_max"].values.ravel(), by_hand)
    two = analysis.npmi_from_documents(counts, tokens, labels, permutations=draws, seed=9, alternative="two-sided")
    below = (null <= observed + 1e-12).sum(axis=0)
    np.testing.assert_allclose(two["p"], np.minimum(1, 2 * (np.minimum(above, below) + 1) / (draws + 1)))


@pytest.mark.parametrize("alternative", ["greater", "two-sided"])
def test_the_null_holds_its_level_without_specialisation(alternative):
    """Documents differ in taste, labels do not: false discoveries must stay at the level, p-values uniform or above."""
    seeds, false, small, tests = 120, 0, 0, 0
    for seed in range(seeds):
        counts, tokens, labels = made_counts(np.random.default_rng(seed), documents=24, layers=1, spread=1.0)
        result = analysis.npmi_from_documents(
            counts, tokens, labels, permutations=400, seed=seed, alternative=alternative
        )
        false += bool((result["q"] <= 0.1).any())
        small += int((result["p"] <= 0.05).sum())
        tests += int(result["p"].notnull().sum())
    # Three binomial standard deviations above the nominal level.
    assert false / seeds <= 0.1 + 3 * np.sqrt(0.1 * 0.9 / seeds)
    assert small / tests <= 0.055


def test_a_planted_specialist_is_found_and_nothing_else():
    hits = wrong = 0
    for seed in range(10):
        rng = np.random.default_rng(seed)
        counts, tokens, labels = made_counts(rng, documents=60, spread=50.0, boost=(1, 5, "2"))
        result = analysis.npmi_from_documents(counts, tokens, labels, permutations=2000, seed=seed)
        found = np.argwhere((result["q"].values <= 0.05) & (result["p_max"].values <= 0.05)).tolist()
        hits += [1, 5, 2] in found
        # Only rivals of the specialist may join it: label 2 keeps fewer slots for the others in layer 1.
        wrong += sum(cell[0] != 1 for cell in found)
        assert int(np.argmax(result["npmi"].values)) == np.ravel_multi_index((1, 5, 2), (2, 8, 3))
    assert hits == 10
    assert wrong <= 1


def test_a_store_in_any_number_of_shards_says_what_the_counts_say(tmp_path):
    rng = np.random.default_rng(5)
    width = [8, 5]
    made = random_truth(rng, 15, width, [2, 1])
    domain = ["abc"[d % 3] for d in range(15)]
    counts = np.full((15, 2, 8), np.nan)
    for layer in range(2):
        counts[:, layer, : width[layer]] = 0
        for row, d in enumerate(made.document):
            for slot in made.expert[layer][row]:
                counts[d, layer, slot] += 1
    plain = analysis.npmi_from_documents(
        counts, np.bincount(made.document), domain, layers=[3, 4], permutations=50, seed=1
    )
    for cuts in (1, 6):
        store = write(tmp_path / f"{cuts}", made, width, {"domain": domain}, layers=[3, 4], cuts=cuts)
        found = analysis.npmi(store, permutations=50, seed=1)
        for name in plain.data_vars:
            if name != "uniform":
                np.testing.assert_array_equal(found[name], plain[name], err_msg=str(name))
        np.testing.assert_allclose(found["uniform"], [2 / 8, 1 / 5])
    assert found.attrs["by"] == "domain"
    assert np.isnan(found["npmi"].values[1, 5:]).all()


def test_summed_counts_have_values_but_no_null():
    counts, tokens, labels = made_counts(np.random.default_rng(2))
    full = analysis.npmi_from_documents(counts, tokens, labels, permutations=10)
    names = np.unique(labels)
    table = np.stack([counts[labels == name].sum(axis=0) for name in names], axis=-1)
    size = [tokens[labels == name].sum() for name in names]
    summed = analysis.npmi_from_counts(table, np.array(size), labels=list(names))
    np.testing.assert_allclose(summed["npmi"], full["npmi"])
    assert summed["p"].isnull().all()
    assert "lost what could be permuted" in summed.attrs["undefined"]


class TestCornerCases:
    def test_one_label(self):
        counts, tokens, _ = made_counts(np.random.default_rng(0), documents=5)
        result = analysis.npmi_from_documents(counts, tokens, ["only"] * 5, permutations=20)
        assert result["q"].isnull().all()
        assert ONE_LABEL in result.attrs["undefined"]
        np.testing.assert_allclose(result["npmi"], 0, atol=1e-12)

    def test_a_label_with_one_document(self):
        counts, tokens, labels = made_counts(np.random.default_rng(0), documents=20)
        labels = np.where(np.arange(20) == 3, "rare", labels)
        result = analysis.npmi_from_documents(counts, tokens, labels, permutations=200)
        assert int(result["documents"].sel(label="rare")) == 1
        assert "'rare' has 1 document of 20" in result.attrs["notes"]
        # One document among twenty: about one draw in twenty is the observed labelling of this label itself.
        assert float(result["p"].sel(label="rare").min()) > 0.01

    def test_an_expert_never_selected_is_undefined_not_avoided(self):
        counts, tokens, labels = made_counts(np.random.default_rng(0))
        counts[:, 0, 3] = 0
        result = analysis.npmi_from_documents(counts, tokens, labels, permutations=20)
        assert result["npmi"].sel(layer=0, expert=3).isnull().all()
        assert result["q"].sel(layer=0, expert=3).isnull().all()
        assert result["q"].sel(layer=1, expert=3).notnull().all()

    def test_a_layer_of_one_expert(self):
        tokens = np.array([3, 4, 5])
        result = analysis.npmi_from_documents(tokens[:, None, None], tokens, ["a", "b", "a"], permutations=20)
        np.testing.assert_allclose(result["npmi"], 0, atol=1e-12)
        np.testing.assert_allclose(result["p"], 1)

    def test_never_and_always(self):
        counts = np.array([[[4, 0]], [[0, 6]]])
        result = analysis.npmi_from_documents(counts, np.array([4, 6]), ["a", "b"], permutations=5)
        np.testing.assert_allclose(result["npmi"].values[0], [[1, -1], [-1, 1]])

    def test_the_default_lets_one_discovery_stand(self):
        for tests in (48, 672):
            assert tests / (enough_permutations(tests, 1000) + 1) <= 0.05
        assert enough_permutations(43_008, 10**7) == 1000
        counts, tokens, labels = made_counts(np.random.default_rng(0))
        result = analysis.npmi_from_documents(counts, tokens, labels)
        assert result.attrs["permutations"] == enough_permutations(48, 1000)

    def test_too_few_permutations_are_said(self):
        counts, tokens, labels = made_counts(np.random.default_rng(0))
        notes = analysis.npmi_from_documents(counts, tokens, labels, permutations=10).attrs["notes"]
        assert "raise permutations" in notes

    @pytest.mark.parametrize(
        ("change", "says"),
        [
            ({"tokens": np.ones(3)}, "one token total"),
            ({"tokens": np.zeros(40)}, "at least one token"),
            ({"labels": ["a"]}, "one label per document"),
            ({"counts": np.full((40, 2, 8), 0.5)}, "whole numbers"),
            ({"alternative": "less"}, "alternative"),
        ],
        ids=["totals", "empty documents", "labels", "fractions", "alternative"],
    )
    def test_mistakes_are_named(self, change, says):
        counts, tokens, labels = made_counts(np.random.default_rng(0))
        with pytest.raises(MoescopeError, match=says):
            analysis.npmi_from_documents(**({"counts": counts, "tokens": tokens, "labels": labels} | change))

    def test_a_store_without_labels_says_what_to_do(self, tmp_path):
        store = write(tmp_path / "s", random_truth(np.random.default_rng(0), 2, [4], [1]), [4], {})
        with pytest.raises(MoescopeError, match="capture the corpus with label columns"):
            analysis.npmi(store)
