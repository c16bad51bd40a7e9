"""Examples and preferred tokens against plain loops over the same tokens."""

import numpy as np

from moescope import analysis
from tests.analysis.made_stores import random_truth, write


def test_top_tokens_are_counted_as_they_occur(tmp_path):
    rng = np.random.default_rng(0)
    made = random_truth(rng, 20, [6], [2])
    made.expert[0][made.token_id == 3, 0] = 4  # expert 4 answers to token 3 whenever it occurs
    made.expert[0][made.token_id == 3, 1] = 5
    store = write(tmp_path / "s", made, [6], {}, cuts=3)
    first = analysis.top_tokens(store, 0, [4])[4][0]
    occurrences = int((made.token_id == 3).sum())
    assert (first.token_id, first.text, first.active, first.occurrences) == (3, "w3 ", occurrences, occurrences)
    share = (made.expert[0] == 4).any(axis=1).mean()
    assert np.isclose(first.expected, occurrences * share)
    for token in analysis.top_tokens(store, 0, [4], n=99)[4]:
        here = made.token_id == token.token_id
        assert token.active == ((made.expert[0] == 4).any(axis=1) & here).sum()
        assert token.occurrences == here.sum() >= 5
        assert token.npmi > 0


def test_examples_are_the_busiest_stretches(tmp_path):
    rng = np.random.default_rng(1)
    made = random_truth(rng, 12, [6], [1], longest=40, context=20)
    store = write(tmp_path / "s", made, [6], {}, cuts=4)
    window = 5
    busy = np.where(made.expert[0][:, 0] == 2, 1 + np.clip(made.weight[0][:, 0], 0, 1), 0.0)
    best: dict[int, float] = {}
    for start in range(busy.size):
        stop = start + window
        if stop <= busy.size and made.sequence[start] == made.sequence[stop - 1]:
            document = int(made.document[start])
            best[document] = max(best.get(document, 0), busy[start:stop].sum())
    found = analysis.examples(store, 0, 2, n=3, window=window)
    collected = [sum(1 + token.weight for token in example.tokens if token.weight is not None) for example in found]
    np.testing.assert_allclose(collected, sorted(best.values(), reverse=True)[:3], rtol=1e-6)
    assert len({example.document for example in found}) == 3
    for example in found:
        rows = np.flatnonzero(made.document == example.document)
        texts = [f"w{token} " for token in made.token_id[rows]]
        assert "".join(token.text for token in example.tokens) in "".join(texts)
    only = analysis.examples(store, 0, 2, documents={found[1].document}, n=3, window=window)
    assert only == [found[1]]


def test_an_example_reads_as_its_document_does(tmp_path):
    """Spans drop spaces, and two tokens may share one character: the text must come out whole, once."""
    made = random_truth(np.random.default_rng(0), 1, [2], [1], longest=1)
    text = "ab  cé!"
    start, end = np.array([0, 1, 4, 5, 5, 6]), np.array([1, 2, 5, 6, 6, 7])
    for name, values in {
        "document": np.zeros(6, int),
        "sequence": np.zeros(6, int),
        "position": np.arange(6),
        "token_id": np.arange(6),
    }.items():
        setattr(made, name, values)
    made.expert[0] = np.array([[0], [0], [1], [0], [1], [0]])
    made.weight[0] = np.full((6, 1), 0.5, np.float32)
    made.valid[0] = np.ones((6, 1), bool)
    store = write(tmp_path / "s", made, [2], {}, texts=[text], spans=(start, end))
    (example,) = analysis.examples(store, 0, 1)
    assert "".join(token.text for token in example.tokens) == text
    assert [token.text for token in example.tokens if token.weight is not None] == ["  c", "é"]
    assert not example.cut_before
    assert not example.cut_after


def test_missing_slots_are_no_activity(tmp_path):
    made = random_truth(np.random.default_rng(0), 3, [3], [1])
    made.valid[0][:] = False
    store = write(tmp_path / "s", made, [3], {}, slots_can_miss=True)
    assert analysis.examples(store, 0, 0) == []
    assert analysis.top_tokens(store, 0, [0]) == {0: []}


def test_one_phase_is_weighed_as_if_the_other_selected_nothing(tmp_path):
    made = random_truth(np.random.default_rng(3), 14, [5], [2], longest=40, context=25)
    decode = made.position % 7 > 3
    phase = np.where(decode, "decode", "prefill").astype(object)
    store = write(tmp_path / "s", made, [5], {}, cuts=3, phase=phase)
    window, chosen = 6, (made.expert[0] == 1)
    for name, counts in (("decode", decode), ("prefill", ~decode)):
        busy = np.where(chosen & counts[:, None], 1 + np.clip(made.weight[0], 0, 1), 0.0).sum(axis=1)
        best: dict[int, float] = {}
        for start in range(busy.size):
            same = made.sequence[start : start + window] == made.sequence[start]
            document = int(made.document[start])
            best[document] = max(best.get(document, 0), busy[start : start + window][same].sum())
        found = analysis.examples(store, 0, 1, n=4, window=window, phase=name)
        collected = [sum(1 + t.weight for t in one.tokens if t.weight is not None) for one in found]
        np.testing.assert_allclose(collected, sorted(best.values(), reverse=True)[:4], rtol=1e-6)
        for one in found:
            assert all(counts[one.row + t.offset] for t in one.tokens if t.weight is not None)
        for token in analysis.top_tokens(store, 0, [1], n=99, phase=name)[1]:
            here = (made.token_id == token.token_id) & counts
            assert (token.active, token.occurrences) == ((chosen.any(axis=1) & here).sum(), here.sum())
