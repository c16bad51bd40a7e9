"""Vocabulary specialisation: shares by brute force, tails by simulation, nothing found where nothing is."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moescope import analysis
from moescope.analysis.vocabulary import chance_of_share, share_by_chance
from moescope.errors import MoescopeError
from tests.analysis.made_stores import random_truth, write


def made_vocabulary(rng, documents=30, tokens=6, experts=5, planted=None):
    """Top-1 counts [d, token, layer, e] whose documents differ in taste; `planted` (token, expert) go together."""
    joint = np.zeros((documents, tokens, 1, experts), dtype=int)
    for d in range(documents):
        taste = rng.dirichlet(np.full(experts, 2.0))
        for token in range(tokens):
            n = rng.poisson(1.5)
            if planted is not None and token == planted[0]:
                joint[d, token, 0, planted[1]] += n
            else:
                joint[d, token, 0] += rng.multinomial(n, taste)
        joint[d, 0, 0, rng.integers(experts)] += 1  # no document is empty
    return joint, joint.sum(axis=1)


@given(st.integers(0, 10**6), st.booleans())
@settings(max_examples=6, deadline=None)
def test_shares_are_those_of_the_tokens(tmp_path_factory, seed, missing):
    rng = np.random.default_rng(seed)
    widths = [6, 1]
    made = random_truth(rng, 10, widths, [2, 1], vocabulary=6, missing=0.2 if missing else 0.0)
    domain = ["ab"[d % 2] for d in range(9)] + [None]
    path = tmp_path_factory.mktemp("vocabulary") / "s"
    store = write(path, made, widths, {"domain": domain}, cuts=2, slots_can_miss=missing)
    whole = analysis.vocabulary_specialisation(store, least=2)
    parts = analysis.vocabulary_specialisation(store, by="domain", least=2)
    of_token = np.array([domain[d] or "-" for d in made.document])
    for row in range(2):
        first = np.where(made.valid[row][:, 0], made.expert[row][:, 0], -1) if missing else made.expert[row][:, 0]
        for place, token in enumerate(whole["token_id"].values):
            for found, inside in [
                (whole.isel(layer=row, token=place), np.ones(of_token.size, bool)),
                *[(parts.isel(layer=row, token=place).sel(label=name), of_token == name) for name in "ab"],
            ]:
                experts = first[(made.token_id == token) & inside & (first >= 0)]
                if experts.size < 2:
                    assert np.isnan(found["share"])
                    continue
                counts = np.bincount(experts, minlength=widths[row])
                assert found["share"] == pytest.approx(counts.max() / experts.size)
                assert found["favourite"] == counts.argmax()
                assert found["count"] == experts.size
                _, per_document = np.unique(
                    made.document[(made.token_id == token) & inside & (first >= 0)], return_counts=True
                )
                assert found["effective"] == pytest.approx(experts.size**2 / (per_document**2).sum())
    np.testing.assert_allclose(whole["share"].isel(layer=1).dropna("token"), 1)
    np.testing.assert_allclose(whole["p"].isel(layer=1).dropna("token"), 1)


def test_tails_bound_what_simulation_gives():
    rng = np.random.default_rng(0)
    mix = rng.dirichlet(np.ones(5), size=8)
    draws = np.array([1, 2, 5, 9, 20, 40, 80, 200])
    highest = rng.multinomial(draws, mix, size=(20_000, 8)).max(axis=2) / draws
    for share in (0.3, 0.5, 0.8, 1.0):
        exact = (highest >= share - 1e-9).mean(axis=0)
        bound = chance_of_share(np.full(8, share), draws.astype(float), mix)
        assert (bound >= exact - 0.012).all()
        assert (bound <= np.maximum(5 * exact, 0.02) + 0.02).all() or share < 0.5
    limit = share_by_chance(draws.astype(float), mix)
    assert ((highest > limit + 1e-9).mean(axis=0) <= 0.013).all()


def test_false_discoveries_stay_at_their_level_and_the_planted_token_is_found():
    seeds, false, small, tests, hits = 200, 0, 0, 0, 0
    for seed in range(seeds):
        result = analysis.vocabulary_from_counts(*made_vocabulary(np.random.default_rng(seed)), seed=seed)
        false += bool((result["q"] <= 0.1).any())
        small += int((result["p"] <= 0.05).sum())
        tests += int(result["p"].notnull().sum())
        if seed < 20:
            made = made_vocabulary(np.random.default_rng(seed), planted=(3, 4))
            found = analysis.vocabulary_from_counts(*made, layers=[7])
            hits += np.argwhere(found["q"].values <= 0.05).tolist() == [[0, 3]] and found["favourite"][0, 3] == 4
    assert false / seeds <= 0.1 + 3 * np.sqrt(0.1 * 0.9 / seeds)
    assert small / tests <= 0.055
    assert hits >= 19


def test_filters_and_mistakes(tmp_path):
    made = random_truth(np.random.default_rng(5), 18, [6, 3], [2, 1], vocabulary=8)
    origin = ["web" if d < 12 else "book" for d in range(18)]
    whole = write(tmp_path / "whole", made, [6, 3], {"origin": origin}, cuts=4)
    alone = write(tmp_path / "web", made.part(made.document < 12), [6, 3], {"origin": origin})
    one = analysis.vocabulary_specialisation(whole, least=5, where={"origin": "web"})
    two = analysis.vocabulary_specialisation(alone, least=5)
    for name in one.data_vars:
        np.testing.assert_allclose(one[name], two[name], err_msg=str(name))
    with pytest.raises(MoescopeError, match="No token occurs 999 times"):
        analysis.vocabulary_specialisation(whole, least=999)
    with pytest.raises(MoescopeError, match="at least 1"):
        analysis.vocabulary_specialisation(whole, least=0)
    with pytest.raises(MoescopeError, match="no label 'genre'"):
        analysis.vocabulary_specialisation(whole, by="genre")


def test_labels_counted_a_few_at_a_time_are_the_same(tmp_path, monkeypatch):
    made = random_truth(np.random.default_rng(3), 20, [6, 3], [2, 1], vocabulary=6, missing=0.2)
    kind = [None if d == 4 else "abcd"[d % 4] for d in range(20)]
    store = write(tmp_path / "s", made, [6, 3], {"kind": kind}, cuts=3, slots_can_miss=True)
    whole = analysis.vocabulary_specialisation(store, by="kind", least=2)
    monkeypatch.setattr("moescope.analysis.token_tops.CELLS", 1)
    one_by_one = analysis.vocabulary_specialisation(store, by="kind", least=2)
    assert one_by_one["share"].notnull().any()
    for name in whole.data_vars:
        np.testing.assert_array_equal(whole[name], one_by_one[name], err_msg=str(name))
