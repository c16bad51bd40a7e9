"""TCESS: both definitions worked by hand, sums by brute force over tokens, its null, filters, mistakes."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moescope import analysis
from moescope.analysis.tcess_scores import rule_of
from moescope.errors import MoescopeError
from tests.analysis import function_stores

LOGITS = np.array([[2.0, 1.0, 0.0, -1.0], [-3.0, -1.0, -2.0, -4.0]])


def test_a_worked_example():
    e = np.exp
    paper = analysis.token_scores(LOGITS, 2, rule_of("paper"))
    np.testing.assert_allclose(paper[0], [e(2) / (e(2) + e(1)), e(1) / (e(2) + e(1)), 0, 0])
    np.testing.assert_allclose(paper[1], [0, e(-1) / (e(-1) + e(-2)), e(-2) / (e(-1) + e(-2)), 0])
    code = analysis.token_scores(LOGITS, 1, rule_of("code"))
    np.testing.assert_allclose(code, [[2, 0, 0, 0], [0, -1, 0, 0]])
    above = analysis.token_scores(LOGITS, 2, rule_of("paper", r=0.5))
    np.testing.assert_allclose(above[0], [e(2) / (e(2) + e(1)), 0, 0, 0])
    raw = analysis.token_scores(LOGITS, 2, rule_of("code", k=2, r=0.2))
    np.testing.assert_allclose(raw, [[2, 1, 0, 0], [0, -1, -2, 0]])
    everywhere = analysis.token_scores(LOGITS, 2, rule_of("paper", norm="global"))
    np.testing.assert_allclose(everywhere[0, :2], e(LOGITS[0, :2]) / e(LOGITS[0]).sum())


@given(st.integers(0, 10**6), st.sampled_from(["paper", "code"]), st.sampled_from([None, 0.3]))
@settings(max_examples=6, deadline=None)
def test_it_is_the_mean_over_the_tasks_tokens(tmp_path_factory, seed, definition, r):
    truth = function_stores.random_truth(np.random.default_rng(seed), 8, (5, 3), k=2, longest=20)
    store = function_stores.write(tmp_path_factory.mktemp("tcess") / "s", truth, cuts=2, labels=list("abbabaab"))
    by = "domain"
    result = analysis.tcess(store, definition=definition, r=r, permutations=10, resamples=10)
    label = dict(zip(*(store.documents(["document", by])[name].to_pylist() for name in ("document", by)), strict=True))
    of_token = np.array([label[d] for d in store.tokens(["document"])["document"].to_pylist()])
    for row, site in enumerate(store.sites):
        k = site.top_k if definition == "paper" else 1
        scores = np.zeros((of_token.size, site.n_experts))
        for t, logits in enumerate(store.logits(site.key).astype(float)):
            top = sorted(range(site.n_experts), key=lambda i: (-logits[i], i))[:k]
            share = np.exp(logits[top]) / np.exp(logits[top]).sum()
            for i, p in zip(top, share, strict=True):
                if r is None or p >= r:
                    scores[t, i] = p if definition == "paper" else logits[i]
        for name in result["label"].values:
            mean = scores[of_token == name].mean(axis=0)
            np.testing.assert_allclose(result["tcess"].sel(label=name)[row, : site.n_experts], mean, atol=1e-6)
    if definition == "paper" and r is None:
        np.testing.assert_allclose(result["tcess"].sum("expert"), 1, atol=1e-6)


def test_the_null_holds_its_level_and_a_planted_task_expert_is_found():
    seeds, false = 200, 0
    for seed in range(seeds):
        rng = np.random.default_rng(seed)
        tokens, labels = rng.integers(5, 40, 24), np.arange(24) % 3
        sums = rng.dirichlet(np.ones(6), size=(24, 1)) * tokens[:, None, None]
        result = analysis.tcess_from_documents(sums, tokens, labels, permutations=300, seed=seed, resamples=0)
        false += bool((result["q"] <= 0.1).any())
        if seed < 5:
            sums[labels == 1, 0, 4] += 2 * tokens[labels == 1]
            found = analysis.tcess_from_documents(sums, tokens, labels, permutations=2000, seed=seed)
            assert np.argwhere((found["q"].values <= 0.05) & (found["p_max"].values <= 0.05)).tolist() == [[0, 4, 1]]
            cell = found.isel(layer=0).sel(expert=4, label="1")
            assert cell["tcess_low"] <= cell["tcess"] <= cell["tcess_high"]
    assert false / seeds <= 0.1 + 3 * np.sqrt(0.1 * 0.9 / seeds)


def test_a_filter_keeps_the_documents_it_names_and_no_others(tmp_path):
    truth = function_stores.random_truth(np.random.default_rng(3), 9, (5, 3), k=2, longest=20)
    store = function_stores.write(tmp_path / "s", truth, cuts=3, labels=list("abcabcabc"))
    whole = analysis.tcess(store, permutations=20, resamples=0)
    some = analysis.tcess(store, where={"domain": ["a", "c"]}, permutations=20, resamples=0)
    np.testing.assert_array_equal(some["tcess"], whole["tcess"].sel(label=["a", "c"]))
    assert some.attrs["documents_filtered"] == 3
    mean = (some["tcess"] * some["tokens"]).sum("label") / some["tokens"].sum()
    np.testing.assert_allclose(some["overall"].where(some["exists"], 0), mean, atol=1e-12)


def test_a_filter_gives_what_the_store_of_these_documents_alone_gives(tmp_path):
    truth = function_stores.random_truth(np.random.default_rng(3), 9, (5, 3), k=2, longest=20)
    whole = function_stores.write(tmp_path / "whole", truth, cuts=3, labels=list("abcabcabc"))
    rows = np.flatnonzero(truth.document % 3 != 1)
    values = {name: [each[rows] for each in of] for name, of in vars(truth).items() if isinstance(of, list)}
    number = np.cumsum(np.arange(9) % 3 != 1) - 1  # documents numbered anew, cut into other shards
    kept = function_stores.Truth(document=number[truth.document[rows]], position=truth.position[rows], **values)
    alone = function_stores.write(tmp_path / "alone", kept, cuts=2, labels=list("acacac"))
    some = analysis.tcess(whole, where={"domain": ["a", "c"]}, permutations=50, resamples=30)
    only = analysis.tcess(alone, permutations=50, resamples=30)
    for name in set(some.data_vars) - {"seconds"}:
        np.testing.assert_allclose(some[name].values.astype(float), only[name].values.astype(float), atol=1e-12)


def test_mistakes_are_named(tmp_path):
    truth = function_stores.random_truth(np.random.default_rng(0), 6, (4, 3), k=2, longest=9)
    store = function_stores.write(tmp_path / "s", truth, labels=list("ababab"))
    for wrong, words in [
        ({"definition": "blog"}, "definition"),
        ({"k": 9}, "has 4 experts"),
        ({"k": 0}, "at least 1"),
        ({"r": 1.5}, "a probability"),
        ({"value": "loss"}, "`value`"),
        ({"by": "genre"}, "no label 'genre'"),
    ]:
        with pytest.raises(MoescopeError, match=words):
            analysis.tcess(store, **wrong)
    with pytest.raises(MoescopeError, match="one label"):
        analysis.tcess_from_documents(np.ones((3, 1, 2)), np.ones(3), ["a"])


def test_a_masked_experts_logit_is_no_score(tmp_path):
    truth = function_stores.random_truth(np.random.default_rng(0), 6, (4, 3), k=2, longest=9)
    truth.logits[1][:, 1:] = -np.inf  # one of three experts is left, and two are asked for
    store = function_stores.write(tmp_path / "s", truth, labels=list("ababab"))
    share = analysis.tcess(store, permutations=0, resamples=0)["tcess"].isel(layer=1)
    assert np.isfinite(share.values[:3]).all()
    with pytest.raises(MoescopeError, match="not finite"):
        analysis.tcess(store, value="logit", permutations=0, resamples=0)
