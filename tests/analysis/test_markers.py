"""Markers: found as one would by eye, counted by brute force, held against the same places of other texts."""

import numpy as np
import pytest
import xarray as xr
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from moescope import analysis
from moescope.analysis.association import q_values, score
from moescope.analysis.counts import labelling
from moescope.analysis.markers import marker_rows
from moescope.analysis.matched_places import place_null, places_of
from moescope.edits import Recipe
from moescope.errors import MoescopeError
from tests.analysis.made_stores import Made, random_truth, write

WORDS = {0: "<", 1: "think", 2: ">", 3: "<think>", 4: "a", 5: " b", 6: "th", 7: "ink", 8: ">\n", 9: "</think>"}


def laid_out(rng, lengths, experts, k, layers=1, vocabulary=4):
    """Documents of one context each, random ids from `vocabulary` on, and scores [T, layer, expert] to shift."""
    document = np.repeat(np.arange(len(lengths)), lengths)
    position = np.concatenate([np.arange(n) for n in lengths])
    scores = rng.gumbel(size=(document.size, layers, experts))
    token = rng.integers(vocabulary, vocabulary + 2, document.size)
    return document, position, token, scores


def made_of(document, position, token, scores, k):
    chosen = [np.argsort(-scores[:, layer], axis=1)[:, :k] for layer in range(scores.shape[1])]
    ones = [np.ones(c.shape, np.float32) for c in chosen]
    return Made(document, document, position, token, chosen, ones, [np.ones(c.shape, bool) for c in chosen])


@given(st.integers(0, 10**6), st.sampled_from(["all", "first", "last"]), st.floats(0, 0.3))
@settings(max_examples=5, deadline=None)
def test_markers_are_found_and_counted_as_by_eye(tmp_path_factory, seed, at, missing):
    rng = np.random.default_rng(seed)
    made = random_truth(rng, 12, [5, 1], [2, 1], longest=60, context=25, vocabulary=10, missing=missing)
    texts = ["".join(WORDS[i] for i in made.token_id[made.sequence == s]) for s in np.unique(made.sequence)]
    assume(all(any(text in one for one in texts) for text in ("<think", "a b", "</think>")))
    same = made.sequence[1:] == made.sequence[:-1]
    assume(((made.token_id[:-1] == 0) & (made.token_id[1:] == 1) & same).any())
    path = tmp_path_factory.mktemp("markers") / "s"
    store = write(path, made, [5, 1], {}, cuts=3, slots_can_miss=missing > 0, vocabulary=WORDS)
    result = analysis.npmi_markers(store, ["<think>", "a b", 9, [0, 1]], at=at, permutations=5, resamples=5)
    for name in result["label"].values[:-1]:
        has = np.zeros(made.token_id.size, bool)
        for sequence in np.unique(made.sequence):
            rows = np.flatnonzero(made.sequence == sequence)
            has[_by_eye(rows, made.token_id[rows], str(name), at)] = True
        cell = result.sel(label=name)
        assert cell["tokens"] == has.sum()
        assert cell["documents"] == np.unique(made.document[has]).size
        for row, width in enumerate([5, 1]):
            chosen = np.where(made.valid[row], made.expert[row], -1) if missing > 0 else made.expert[row]
            for e in range(width):
                active = (chosen == e).any(axis=1)
                expected = score(float((active & has).sum()), float(has.sum()), float(active.sum()), float(has.size))
                np.testing.assert_allclose(cell["npmi"].values[row, e], expected)


def _by_eye(rows, ids, name, at):
    """Rows of one sequence that belong to the marker: its own token, a run of ids, or tokens that spell it."""
    found = []
    texts = [WORDS[i] for i in ids]
    for first in range(len(ids)):
        for last in range(first, min(first + 4, len(ids))):
            piece = "".join(texts[first : last + 1])
            own = name in WORDS.values() and texts[first] == name and first == last
            run = name == "<think" and ids[first : last + 1].tolist() == [0, 1]
            inside = piece.find(name)
            tight = inside >= 0 and inside < len(texts[first]) and inside + len(name) > len(piece) - len(texts[last])
            spelled = name == "a b" and tight
            if own or run or spelled:
                found.extend({"all": rows[first : last + 1], "first": [rows[first]], "last": [rows[last]]}[at])
    return np.array(found, dtype=int)


def test_a_text_that_tokens_spell_across_their_edges(tmp_path):
    token = np.array([4, 0, 6, 7, 8, 5, 0, 1])
    sequence = np.array([0, 0, 0, 0, 0, 0, 0, 1])
    chosen = [np.zeros((8, 1), int)]
    words = {i: text for i, text in WORDS.items() if i != 3}
    made = Made(sequence * 0, sequence, np.array([0, 1, 2, 3, 4, 5, 6, 0]), token, chosen, chosen, chosen)
    made.weight = [np.ones((8, 1), np.float32)]
    store = write(tmp_path / "s", made, [2], {}, vocabulary=words)
    for at, rows in [("all", 4), ("first", 1), ("last", 1)]:
        result = analysis.npmi_markers(store, ["<think>"], at=at, permutations=0, resamples=0)
        assert result["tokens"].values.tolist() == [rows]
    assert "spell" in result.attrs["found_by"]


def test_position_explains_what_is_the_places_and_not_what_is_the_markers(tmp_path):
    """Expert 1 likes position 6 in every text; expert 2 likes the marker, which stands there in half of them."""
    rng = np.random.default_rng(0)
    document, position, token, scores = laid_out(rng, rng.integers(10, 20, 60), 8, 2)
    marked = (document % 2 == 0) & (position == 6)
    token[marked] = 3
    scores[position == 6, 0, 1] += 6
    scores[marked, 0, 2] += 6
    store = write(tmp_path / "s", made_of(document, position, token, scores, 2), [8], {}, vocabulary=WORDS)
    by_place = analysis.npmi_markers(store, ["<think>"], resamples=100).isel(layer=0, label=0)
    by_text = analysis.npmi_markers(store, ["<think>"], matched="document").isel(layer=0, label=0)
    assert by_place["npmi"].values[1] > 0.3
    assert by_place["npmi"].values[2] > 0.3
    assert np.flatnonzero(by_place["q"].values <= 0.05).tolist() == [2]
    assert np.flatnonzero(by_text["q"].values <= 0.05).tolist() == [1, 2]
    assert by_place["null_mean"].values[1] > 0.3
    assert int(by_place["matched_documents"]) == int(by_place["documents"]) == 30
    result = analysis.npmi_markers(store, ["<think>"], permutations=100, resamples=0)
    assert {expert for _, expert, _ in analysis.cognitive_experts(result)} == {1, 2}
    twice = xr.concat([result, result * 0], "layer", data_vars="all")  # as if layer 0 had two routers
    twice = twice.assign_coords(site=("layer", ["L000-mlp", "L000-attention"])).assign_attrs(result.attrs)
    named = analysis.cognitive_experts(twice)
    assert [layer for layer, _, _ in named] == ["L000-mlp"] * 2
    recipe = Recipe.from_cognitive_experts(result)
    assert {edit.expert for edit in recipe.edits} == {(1,), (2,)}
    assert {edit.factor for edit in recipe.edits} == {64.0}
    assert recipe.suggested_by["recipe"] == "from_cognitive_experts"
    with pytest.raises(MoescopeError, match="npmi_markers"):
        Recipe.from_cognitive_experts(analysis.npmi_classes(store, ["x=a"]))


def test_a_marker_at_one_place_of_every_text_has_no_p_value(tmp_path):
    rng = np.random.default_rng(0)
    document, position, token, scores = laid_out(rng, rng.integers(4, 9, 20), 4, 1)
    token[position == 0] = 3
    store = write(tmp_path / "s", made_of(document, position, token, scores, 1), [4], {}, vocabulary=WORDS)
    result = analysis.npmi_markers(store, ["<think>"], permutations=50, resamples=10)
    assert result["matched_documents"].values.tolist() == [0]
    assert result["p"].isnull().all()
    assert result["q"].isnull().all()
    assert "cannot be told apart" in result.attrs["undefined"]
    assert result["npmi"].notnull().all()


def test_draws_are_those_of_the_pools_by_hand(tmp_path):
    """Every document long enough stands in for every other: the mean of the draws is the pools' own mean."""
    rng = np.random.default_rng(3)
    lengths = np.array([5, 8, 8, 9, 12, 12, 3, 12])
    document, position, token, scores = laid_out(rng, lengths, 4, 1)
    places = {1: [2, 7], 3: [8], 6: [1], 4: [11]}
    for d, at in places.items():
        token[(document == d) & np.isin(position, at)] = 3
    made = made_of(document, position, token, scores, 1)
    store = write(tmp_path / "s", made, [4], {}, vocabulary=WORDS, cuts=3)
    expected = np.zeros(4)
    for at in places.values():
        able = [d for d, n in enumerate(lengths) if n > max(at)]
        rows = np.isin(document, able) & np.isin(position, at)
        expected += np.bincount(made.expert[0][rows, 0], minlength=4) / len(able)
    rows, _, _ = marker_rows(store.vocabulary(), ["<think>"])
    documents = labelling(store, None)
    found = places_of(store, rows, documents, 100, 0, None)
    null = place_null(store, store.sites, found, documents, 4000, 0, None)
    (drawn,) = null.counts
    np.testing.assert_array_equal(drawn.sum(axis=2), 5)  # each draw meets one expert at each of the five places
    np.testing.assert_allclose(drawn[:, 0].mean(axis=0), expected, atol=0.08)
    assert null.matched.tolist() == [4]
    one = analysis.npmi_markers(store, ["<think>"], permutations=300, resamples=0, donors=1)
    assert int(one["matched_documents"][0]) == 4


def test_false_discoveries_stay_at_their_level(tmp_path):
    """200 markers that mean nothing, in texts whose experts depend on place and text: 25 stores of 8 markers."""
    false = small = tests = seeds = 0
    words = {i: f"m{i}" for i in range(20)}
    for seed in range(25):
        rng = np.random.default_rng(seed)
        document, position, token, scores = laid_out(rng, rng.integers(12, 24, 24), 6, 2, vocabulary=10)
        scores += 1.5 * rng.normal(size=(24, 1, 6))[document] + 1.5 * rng.normal(size=(24, 1, 6))[position]
        for marker in range(8):
            fixed = marker % 2 == 0  # at one place, or at two anywhere
            for d in rng.permutation(24)[:10]:
                rows = np.flatnonzero((document == d) & (token >= 8))
                near = rows[position[rows] == marker + 3]
                if fixed and near.size:
                    token[near] = marker
                elif not fixed:
                    token[rng.choice(rows, 2, replace=False)] = marker
        made = made_of(document, position, token, scores, 2)
        store = write(tmp_path / f"{seed}", made, [6], {}, vocabulary=words)
        names = [f"m{marker}" for marker in range(8)]
        result = analysis.npmi_markers(store, names, permutations=400, resamples=0, seed=seed)
        for name in names:
            p = result["p"].sel(label=name).values
            false += bool((q_values(p) <= 0.1).any())
            small += int((p <= 0.05).sum())
            tests += int((~np.isnan(p)).sum())
            seeds += 1
    assert seeds == 200
    assert false / seeds <= 0.1 + 3 * np.sqrt(0.1 * 0.9 / seeds)
    assert small / tests <= 0.055


def test_a_filter_is_the_store_of_the_filtered_corpus(tmp_path):
    made = random_truth(np.random.default_rng(5), 18, [6, 3], [2, 1], longest=40, vocabulary=10)
    origin = ["web" if d < 12 else "book" for d in range(18)]
    whole = write(tmp_path / "whole", made, [6, 3], {"origin": origin}, vocabulary=WORDS, cuts=4)
    alone = write(tmp_path / "web", made.part(made.document < 12), [6, 3], {"origin": origin}, vocabulary=WORDS)
    for matched in ("position", "document"):
        one, two = (
            analysis.npmi_markers(store, ["<think>", "a"], matched, permutations=60, where=where)
            for store, where in ((whole, {"origin": "web"}), (alone, None))
        )
        for name in one.data_vars:
            np.testing.assert_allclose(one[name], two[name], err_msg=f"{matched} {name}", atol=1e-12)


def test_mistakes_are_named(tmp_path):
    made = random_truth(np.random.default_rng(0), 4, [4], [2], vocabulary=8)
    store = write(tmp_path / "s", made, [4], {}, vocabulary=WORDS)
    for markers, words in [
        (["</think>"], "'</think>' does not occur"),
        (["zebra"], "'zebra' does not occur"),
        ([77], "the id 77"),
        ([[]], "an empty run"),
        ([""], "an empty text"),
        ([], "from 1 to 8"),
        (["a", 4], "the same"),
    ]:
        with pytest.raises(MoescopeError, match=words):
            analysis.npmi_markers(store, markers)
    for wrong in ({"at": "middle"}, {"matched": "length"}, {"donors": 0}):
        with pytest.raises(MoescopeError, match=next(iter(wrong))):
            analysis.npmi_markers(store, ["a"], **wrong)
