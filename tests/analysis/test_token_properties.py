"""Token classes and token ids: brute force over tokens, the bound against sign patterns, 200 seeds, planted ones."""

import itertools
import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.sparse import csr_array

from moescope import analysis
from moescope.analysis.association import score
from moescope.analysis.pairs import PairCounts
from moescope.analysis.token_classes import CLASSES, class_ids
from moescope.analysis.within_documents import within_documents
from moescope.edits import Recipe
from moescope.errors import MoescopeError
from tests.analysis.made_stores import random_truth, write
from tests.analysis.token_truth import made_properties

WORDS = {
    0: " the", 1: "ing", 2: " The", 3: "7", 4: " 42", 5: ",", 6: "\n", 7: "  ", 8: "é", 9: " мир", 10: "<|bos|>",
    11: "(", 12: " ==", 13: "USA", 14: "\ufffd", 15: "日本", 16: "</think>", 17: "a", 18: "x1", 19: "",
}  # fmt: skip


def sorted_into(name):
    return {WORDS[i] for i in class_ids(WORDS)[0].get(name, [])}


def test_the_classes_take_what_they_say():
    assert sorted_into("whitespace") == {"\n", "  "}
    assert sorted_into("line break") == {"\n"}
    assert sorted_into("word start") == {" the", " The", " мир"}
    assert sorted_into("word continuation") == {"ing", "é", "USA", "日本", "a", "x1"}
    assert sorted_into("capitalised") == {" The", "USA"}
    assert sorted_into("all capitals") == {"USA"}
    assert sorted_into("digits") == {"7", " 42"}
    assert sorted_into("punctuation") == {",", "(", " =="}
    assert sorted_into("brackets") == {"("}
    assert sorted_into("special") == {"<|bos|>", "</think>"}
    assert sorted_into("piece of a character") == {"\ufffd"}
    assert sorted_into("Latin beyond ASCII") == {"é"}
    assert sorted_into("Cyrillic") == {" мир"}
    assert sorted_into("CJK") == {"日本"}
    without = {i: text.strip() or "x" for i, text in WORDS.items()}
    found, notes = class_ids(without)
    assert "word start" not in found
    assert "begins with a space" in notes[0]


def test_classes_of_ones_own():
    mine = {"short": "..?", "both": ["7", 5], "long": lambda text: len(text) > 5}
    found, _ = class_ids(WORDS, mine)
    assert found == {
        "short": [i for i, text in WORDS.items() if re.fullmatch("..?", text, re.DOTALL)],
        "both": [3, 5],
        "long": [10, 16],
    }
    assert set(class_ids(WORDS, ["digits", "Cyrillic", "vowel=[aeiou]"])[0]) == {"digits", "Cyrillic", "vowel"}
    wrong = [(["digit"], "no token class 'digit'"), (["x=("], "no regular expression"), ("digits", "a list")]
    for classes, words in wrong:
        with pytest.raises(MoescopeError, match=words):
            class_ids(WORDS, classes)


@given(st.integers(0, 10**6), st.floats(0, 0.4))
@settings(max_examples=6, deadline=None)
def test_counts_are_those_of_the_tokens(tmp_path_factory, seed, missing):
    rng = np.random.default_rng(seed)
    widths, ks = [int(rng.integers(3, 9)), 1], [3, 1]
    made = random_truth(rng, 9, widths, ks, missing=missing)
    keep = ["ab"[d % 2] for d in range(9)]
    path = tmp_path_factory.mktemp("classes") / "s"
    store = write(path, made, widths, {"keep": keep}, cuts=3, slots_can_miss=missing > 0, vocabulary=WORDS)
    by_class = analysis.npmi_classes(store, where={"keep": "a"}, resamples=0)
    by_token = analysis.npmi_tokens(store, least=1, where={"keep": "a"})
    there = np.array([keep[d] == "a" for d in made.document])
    sets = {f"class {name}": class_ids(WORDS)[0][name] for name in by_class["label"].values}
    sets |= {f"token {i}": [i] for i in by_token["token_id"].values.tolist()}
    for place, (name, ids) in enumerate(sets.items()):
        result = by_class if name.startswith("class") else by_token
        cell = result.isel(label=place - (0 if name.startswith("class") else by_class.sizes["label"]))
        has = np.isin(made.token_id, ids) & there
        assert cell["tokens"] == has.sum()
        assert cell["documents"] == np.unique(made.document[has]).size
        for row, width in enumerate(widths):
            chosen = np.where(made.valid[row], made.expert[row], -1) if missing > 0 else made.expert[row]
            for e in range(width):
                active = (chosen == e).any(axis=1) & there
                joint = (active & has).sum()
                assert cell["count"].values[row, e] == joint
                expected = score(float(joint), float(has.sum()), float(active.sum()), float(there.sum()))
                np.testing.assert_allclose(cell["npmi"].values[row, e], expected)
    assert set(by_token["token_id"].values) == set(made.token_id[there])


def test_mean_and_deviation_by_hand_and_p_above_every_sign_pattern():
    for seed in range(6):
        joint, held, selections, tokens = made_properties(np.random.default_rng(seed), documents=9, experts=4)
        pairs = PairCounts.of_dense(np.moveaxis(joint[:, 0], 1, 2).reshape(-1, 4))
        found = within_documents(pairs, csr_array(held.astype(float)), selections[:, 0].astype(float), tokens)
        rate = selections[:, 0] / tokens[:, None]
        for e in range(4):
            for kind in range(held.shape[1]):
                u = joint[:, 0, e, kind] - held[:, kind] * rate[:, e]
                spread = held[:, kind] * (tokens - held[:, kind]) / np.maximum(tokens - 1, 1)
                variance = max((u**2).sum(), (spread * rate[:, e] * (1 - rate[:, e])).sum())
                assert found.joint[e, kind] - found.mean[e, kind] == pytest.approx(u.sum(), abs=1e-9)
                assert found.deviation[e, kind] == pytest.approx(np.sqrt(variance), abs=1e-6)
                signs = np.array(list(itertools.product([-1, 1], repeat=9)))
                exact = ((signs @ u) >= u.sum() - 1e-9).mean()
                if u.sum() > 1e-9:
                    assert found.p_value("greater")[e, kind] >= exact
                both = (np.abs(signs @ u) >= abs(u.sum()) - 1e-9).mean()
                assert found.p_value("two-sided")[e, kind] >= both or variance < 1e-9


@pytest.mark.parametrize("busy", [0.0, 4.0], ids=["even", "one expert nearly always on"])
def test_false_discoveries_stay_at_their_level(busy):
    seeds, false, small, tests = 200, np.zeros(2), np.zeros(2), 0
    for seed in range(seeds):
        made = made_properties(np.random.default_rng(seed), documents=25, busy=busy)
        for place, alternative in enumerate(("greater", "two-sided")):
            result = analysis.npmi_from_properties(*made, alternative=alternative, resamples=0)
            false[place] += bool((result["q"] <= 0.1).any())
            small[place] += int((result["p"] <= 0.05).sum())
        tests += int(result["p"].notnull().sum())
    assert (false / seeds <= 0.1 + 3 * np.sqrt(0.1 * 0.9 / seeds)).all()
    assert (small / tests <= 0.05).all()


def test_a_planted_specialist_is_found_exactly():
    for seed in range(5):
        made = made_properties(np.random.default_rng(seed), documents=60, layers=2, planted=(1, 5, 2))
        result = analysis.npmi_from_properties(*made, layers=[3, 8], labels=list("wxyz"), resamples=200)
        found = np.argwhere((result["q"].values <= 0.05) & (result["npmi"].values > 0))
        assert np.ravel_multi_index((1, 5, 2), (2, 8, 4)) == np.nanargmax(result["npmi"].values)
        assert [1, 5, 2] in found.tolist()
        # Nothing in the other layer, and no other expert for the planted kind.
        assert [cell for cell in found.tolist() if cell[0] == 0 or (cell[2] == 2 and cell[1] != 5)] == []
        cell = result.sel(layer=8, expert=5, label="y")
        assert cell["npmi_low"] <= cell["npmi"] <= cell["npmi_high"]
        assert cell["npmi_low"] > cell["null_p99"]
        (edit,) = Recipe.from_npmi(result, "y", top=1).edits
        assert (edit.layer, edit.expert) == (8, (5,))


def test_a_filter_is_the_store_of_the_filtered_corpus(tmp_path):
    made = random_truth(np.random.default_rng(5), 18, [6, 3], [2, 1])
    origin = ["web" if d < 12 else "book" for d in range(18)]
    whole = write(tmp_path / "whole", made, [6, 3], {"origin": origin}, vocabulary=WORDS, cuts=4)
    alone = write(tmp_path / "web", made.part(made.document < 12), [6, 3], {"origin": origin}, vocabulary=WORDS)
    for run, more in ((analysis.npmi_classes, {}), (analysis.npmi_tokens, {"least": 3})):
        one, two = run(whole, where={"origin": "web"}, **more), run(alone, **more)
        assert one["label"].values.tolist() == two["label"].values.tolist()
        for name in one.data_vars:
            np.testing.assert_allclose(one[name], two[name], err_msg=f"{run.__name__} {name}", atol=1e-12)


class TestCornerCases:
    def test_one_document_one_expert_and_a_class_that_fills_documents(self):
        held = np.array([[3, 4], [5, 0]])
        tokens = np.array([7, 5])
        selections = np.stack([tokens, tokens], axis=0).T[:, :, None] * np.ones((1, 1, 1))
        joint = np.repeat(held[:, None, None, :], 2, axis=1)
        result = analysis.npmi_from_properties(joint, held, selections, tokens, resamples=10)
        np.testing.assert_allclose(result["npmi"], 0, atol=1e-12)
        np.testing.assert_allclose(result["p"], 1)
        assert result["npmi_low"].isel(label=1).isnull().all()  # one document holds it
        alone = analysis.npmi_from_properties(joint[:1], held[:1], selections[:1], tokens[:1], resamples=10)
        np.testing.assert_allclose(alone["p"], 1)

    def test_never_selected_and_never_there(self):
        joint, held, selections, tokens = made_properties(np.random.default_rng(0))
        joint[:, 0, 3], selections[:, 0, 3] = 0, 0
        held = np.concatenate([held, np.zeros((len(held), 1), int)], axis=1)
        joint = np.concatenate([joint, np.zeros((*joint.shape[:3], 1), int)], axis=3)
        result = analysis.npmi_from_properties(joint, held, selections, tokens, resamples=5)
        assert result["q"].sel(expert=3).isnull().all()
        assert result["npmi"].isel(label=4).isnull().all()
        assert result["q"].sel(expert=2).isel(label=[0, 1, 2, 3]).notnull().all()

    def test_mistakes_are_named(self, tmp_path):
        joint, held, selections, tokens = made_properties(np.random.default_rng(0))
        with pytest.raises(MoescopeError, match="`held`"):
            analysis.npmi_from_properties(joint, held[:, :2], selections, tokens)
        with pytest.raises(MoescopeError, match="more tokens with a property"):
            analysis.npmi_from_properties(joint + 1, held, selections, tokens)
        store = write(tmp_path / "s", random_truth(np.random.default_rng(0), 3, [4], [2]), [4], {}, vocabulary=WORDS)
        with pytest.raises(MoescopeError, match="'zebra' does not occur"):
            analysis.npmi_tokens(store, tokens=["zebra"])
        with pytest.raises(MoescopeError, match="No token occurs 999 times"):
            analysis.npmi_tokens(store, least=999)
        with pytest.raises(MoescopeError, match="of any of these classes"):
            analysis.npmi_classes(store, {"none": "zebra"})

    def test_every_class_says_what_it_takes(self):
        assert all(words and callable(test) for words, test in CLASSES.values())
