"""What-if on the store alone: against loops in plain Python over made logits, weights and missing slots."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from moescope.analysis.whatif import experts_for, slot_shares, what_if
from moescope.errors import MoescopeError
from tests.analysis.made_stores import random_truth
from tests.analysis.paired_stores import changed, write_tiers

WIDTHS, K = [7, 5, 1], [3, 2, 1]


@given(
    arrays(np.float64, st.tuples(st.integers(1, 4), st.integers(1, 6)), elements=st.integers(1, 100).map(float)),
    st.lists(st.sampled_from([0.1, 0.25, 0.5, 0.77, 0.9, 0.99]), min_size=1, max_size=4),
)
@settings(deadline=None, max_examples=60)
def test_the_smallest_number_that_reaches_the_threshold(raw, thresholds):
    p = raw / raw.sum(axis=1, keepdims=True)
    found = experts_for(p, thresholds)
    for token in range(len(p)):
        for place, threshold in enumerate(thresholds):
            total, n = 0.0, 0
            for value in sorted(p[token], reverse=True):
                total += value
                n += 1
                if total >= threshold - 1e-9:
                    break
            assert found[token, place] == n
    assert np.isnan(experts_for(np.zeros((1, 3)), thresholds)).all()


def brute(made, logits, layer, mine, threshold, missing):
    """Mean experts for a threshold, kept mass and overlap of each rank, by loops."""
    k, experts, kept, same, top = K[layer], [], [], [], []
    for t in mine:
        score = np.exp(logits[layer][t].astype(np.float32).astype(float))
        p = score / score.sum()
        order = sorted(range(WIDTHS[layer]), key=lambda e: -p[e])
        n, total = 0, 0.0
        while total < threshold:
            total += p[order[n]]
            n += 1
        experts.append(n)
        weight = [
            float(w) if ok or not missing else 0.0
            for w, ok in zip(made.weight[layer][t], made.valid[layer][t], strict=True)
        ]
        ids = [
            int(e) if ok or not missing else None
            for e, ok in zip(made.expert[layer][t], made.valid[layer][t], strict=True)
        ]
        if sum(weight) > 0:
            kept.append([sum(weight[: r + 1]) / sum(weight) for r in range(k)])
        same.append([len(set(order[: r + 1]) & set(ids[: r + 1])) / (r + 1) for r in range(k)])
        top.append([sum(p[e] for e in order[: r + 1]) for r in range(k)])
    return np.mean(experts), np.mean(kept, axis=0), np.mean(same, axis=0), np.mean(top, axis=0)


@pytest.mark.parametrize("missing", [0.0, 0.3])
def test_every_number_is_what_a_loop_says(tmp_path, missing):
    rng = np.random.default_rng(2)
    made = random_truth(rng, 8, WIDTHS, K, missing=missing)
    n = made.document.size
    logits = [rng.normal(size=(n, width)) * 2 for width in WIDTHS]
    labels = {"domain": ["ab"[d % 2] for d in range(8)]}
    store = write_tiers(
        tmp_path / "s", made, WIDTHS, labels, rng.permutation(np.unique(made.sequence).size), 3,
        logits=logits, slots_can_miss=missing > 0, zero_experts=1,
    )  # fmt: skip
    thresholds = [0.4, 0.8]
    found = what_if(store, thresholds, by="domain", resamples=60)
    for layer in range(3):
        for code in range(2):
            mine = np.flatnonzero(made.document % 2 == code)
            cell = found.isel(layer=layer, label=code)
            for place, threshold in enumerate(thresholds):
                experts, kept, same, top = brute(made, logits, layer, mine, threshold, missing > 0)
                assert cell["experts"][place].item() == pytest.approx(experts)
                assert cell["experts_low"][place] <= experts + 1e-9
                assert cell["experts_high"][place] >= experts - 1e-9
            k = K[layer]
            np.testing.assert_allclose(cell["kept_mass"][:k], kept, rtol=1e-6)
            np.testing.assert_allclose(cell["top_overlap"][:k], same)
            np.testing.assert_allclose(cell["top_mass"][:k], top, rtol=1e-6)
            for name in ("kept_mass", "top_overlap", "top_mass"):
                assert np.isnan(cell[name][k:]).all()
            valid = made.valid[layer][mine] if missing else np.ones((mine.size, k), bool)
            zero = (made.expert[layer][mine] == WIDTHS[layer] - 1) & valid
            assert cell["zero_share"].item() == pytest.approx(zero.sum() / valid.size)
            assert cell["missing_share"].item() == pytest.approx((~valid).sum() / valid.size)
            assert cell["computed"].item() == pytest.approx((valid.sum() - zero.sum()) / mine.size)
            assert cell["tokens"] == mine.size


def test_without_logits_the_weights_of_the_selected_are_what_there_is(tmp_path):
    rng = np.random.default_rng(0)
    made = random_truth(rng, 6, [8], [4])
    store = write_tiers(tmp_path / "s", made, [8])
    found = what_if(store, [0.5, 0.9])
    assert found.attrs["scores"] == "weights"
    assert "top_mass" not in found
    weight = made.weight[0].astype(float)
    share = np.sort(weight / weight.sum(axis=1, keepdims=True), axis=1)[:, ::-1]
    for place, threshold in enumerate((0.5, 0.9)):
        needed = [next(n for n in range(1, 5) if row[:n].sum() >= threshold) for row in share]
        assert found["experts"][0, place].item() == pytest.approx(np.mean(needed))
    assert found["kept_mass"][0, -1].item() == pytest.approx(1)
    with pytest.raises(MoescopeError, match="no logits tier"):
        what_if(store, scores="logits")
    with pytest.raises(MoescopeError, match="above 0 and below 1"):
        what_if(store, [0.5, 1.0])


def test_harder_labels_take_more_experts(tmp_path):
    """Planted: label b's router is undecided, label a's is sure."""
    rng = np.random.default_rng(1)
    made = random_truth(rng, 30, [8], [2])
    logits = rng.normal(size=(made.document.size, 8)) * np.where(made.document % 2, 0.2, 6.0)[:, None]
    made = changed(made, expert=[np.argsort(-logits, axis=1)[:, :2]])
    store = write_tiers(tmp_path / "s", made, [8], {"domain": ["ab"[d % 2] for d in range(30)]}, logits=[logits])
    found = what_if(store, [0.7], by="domain")
    assert found["experts_high"][0, 0, 0] < 2 < 5 < found["experts_low"][0, 0, 1]
    np.testing.assert_allclose(found["top_overlap"], 1)  # the selected are the largest


def test_a_sigmoid_router_is_divided_by_its_sum(tmp_path):
    rng = np.random.default_rng(0)
    made = random_truth(rng, 4, [6], [2])
    logits = rng.normal(size=(made.document.size, 6)).astype(np.float32)
    store = write_tiers(tmp_path / "s", made, [6], logits=[logits], score_function="sigmoid")
    p = 1 / (1 + np.exp(-logits.astype(float)))
    p = -np.sort(-p / p.sum(axis=1, keepdims=True), axis=1)
    expected = np.mean([next(n for n in range(1, 7) if row[:n].sum() >= 0.6) for row in p])
    assert what_if(store, [0.6])["experts"].item() == pytest.approx(expected)


def test_weights_that_are_missing_or_not_numbers_are_no_share():
    weight = np.array([[0.5, np.nan, 0.5], [0.2, 0.3, -1.0], [np.nan] * 3], dtype=np.float32)
    np.testing.assert_allclose(slot_shares(weight, None), [[0.5, 0, 0.5], [0.4, 0.6, 0], [0, 0, 0]], rtol=1e-6)
    valid = np.array([[True, True, False]] * 3)
    np.testing.assert_allclose(slot_shares(weight, valid)[0], [1, 0, 0])
