"""Comparing stores: against loops in plain Python, on identical stores, and with changes planted in one layer."""

import numpy as np
import pytest
from scipy.sparse import csr_array
from scipy.spatial.distance import jensenshannon

from moescope.analysis.comparing import _moved, compare, divergence, overlap_of
from moescope.analysis.series import fluctuation
from moescope.errors import MoescopeError
from tests.analysis.made_stores import random_truth
from tests.analysis.paired_stores import changed, write_tiers

WIDTHS, K = [7, 5, 1], [3, 1, 1]


def two(seed, missing=0.0, documents=9):
    rng = np.random.default_rng(seed)
    made = random_truth(rng, documents, WIDTHS, K, missing=missing)
    n = made.document.size
    picks = [np.argsort(rng.random((n, width)), axis=1)[:, :k] for width, k in zip(WIDTHS, K, strict=True)]
    stay = rng.random(n) < 0.5
    for layer in range(3):
        picks[layer][stay] = made.expert[layer][stay]
    valid = [rng.random((n, k)) >= missing for k in K]
    return made, changed(made, expert=picks, valid=valid)


def shuffled(rng, made):
    return rng.permutation(np.unique(made.sequence).size)


@pytest.mark.parametrize("missing", [0.0, 0.3])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_agreement_is_what_a_loop_says_however_the_stores_are_cut(tmp_path, seed, missing):
    made, other = two(seed, missing)
    rng = np.random.default_rng(seed)
    labels = {"domain": [None if d == 4 else "ab"[d % 2] for d in range(9)]}
    loss = [rng.random(made.document.size), rng.random(made.document.size)]
    loss[0][::5], loss[1][1::7] = np.nan, np.nan
    miss = missing > 0
    a = write_tiers(tmp_path / "a", made, WIDTHS, labels, shuffled(rng, made), 3, loss[0], slots_can_miss=miss)
    b = write_tiers(tmp_path / "b", other, WIDTHS, labels, shuffled(rng, made), 4, loss[1], slots_can_miss=miss)
    found = compare(a, b, by="domain", permutations=19, resamples=50)
    for layer in range(3):
        for code, label in enumerate("ab"):
            overlap, same, n_same = [], 0, 0
            loads = np.zeros((2, WIDTHS[layer]))
            for t in range(made.document.size):
                d = made.document[t]
                if d == 4 or "ab"[d % 2] != label:
                    continue
                sides = []
                for side, truth in enumerate((made, other)):
                    ids = [
                        int(e) if ok or not miss else None
                        for e, ok in zip(truth.expert[layer][t], truth.valid[layer][t], strict=True)
                    ]
                    sides.append(ids)
                    for e in ids:
                        if e is not None:
                            loads[side, e] += 1
                sets = [{e for e in ids if e is not None} for ids in sides]
                if all(sets):
                    overlap.append(len(sets[0] & sets[1]) / max(map(len, sets)))
                if sides[0][0] is not None and sides[1][0] is not None:
                    n_same += 1
                    same += sides[0][0] == sides[1][0]
            cell = found.isel(layer=layer, label=code)
            assert cell["overlap"].item() == pytest.approx(np.mean(overlap))
            assert cell["overlap_tokens"].item() == len(overlap)
            assert cell["top1"].item() == pytest.approx(same / n_same)
            assert cell["overlap_low"] <= cell["overlap"] + 1e-12
            assert cell["overlap"] <= cell["overlap_high"] + 1e-12
            np.testing.assert_allclose(cell["share"][: WIDTHS[layer]], loads[0] / loads[0].sum())
            np.testing.assert_allclose(cell["other_share"][: WIDTHS[layer]], loads[1] / loads[1].sum())
            assert np.isnan(cell["share"][WIDTHS[layer] :]).all()
            expected = jensenshannon(loads[0], loads[1], base=2) ** 2
            assert cell["jsd"].item() == pytest.approx(np.nan_to_num(expected), abs=1e-9)
    np.testing.assert_allclose(found["mean_overlap"], found["overlap"].mean("layer"))
    for code in range(2):
        mine = (made.document % 2 == code) & (made.document != 4) & ~np.isnan(loss[0]) & ~np.isnan(loss[1])
        cell = found.isel(label=code)
        assert cell["nll_tokens"] == mine.sum()
        assert cell["nll_change"].item() == pytest.approx((loss[1] - loss[0])[mine].mean(), rel=1e-5, abs=1e-7)
        assert cell["nll_change_low"] <= cell["nll_change"] <= cell["nll_change_high"]
    p, q = np.sort(found["nll_p"].values), np.sort(found["nll_q"].values)
    np.testing.assert_allclose(q, [min(2 * p[0], p[1]), p[1]])  # Benjamini and Hochberg of two
    # The other way round, nothing but the signs changes.
    back = compare(b, a, by="domain", permutations=19, resamples=0)
    np.testing.assert_allclose(back["overlap"], found["overlap"])
    np.testing.assert_allclose(back["jsd"], found["jsd"], atol=1e-12)
    np.testing.assert_allclose(back["share_change"], -found["share_change"], atol=1e-12)
    np.testing.assert_allclose(back["nll_change"], -found["nll_change"])


def test_the_same_result_in_any_sharding_and_order(tmp_path):
    made, other = two(5)
    rng = np.random.default_rng(0)
    once = compare(write_tiers(tmp_path / "a", made, WIDTHS), write_tiers(tmp_path / "b", other, WIDTHS))
    cut = compare(
        write_tiers(tmp_path / "c", made, WIDTHS, order=shuffled(rng, made), cuts=5),
        write_tiers(tmp_path / "d", other, WIDTHS, order=shuffled(rng, made), cuts=2),
    )
    for name in once.data_vars:
        np.testing.assert_allclose(once[name], cut[name], err_msg=str(name))


def test_identical_stores_differ_in_nothing(tmp_path):
    made, _ = two(1)
    loss = np.random.default_rng(0).random(made.document.size)
    a = write_tiers(tmp_path / "a", made, WIDTHS, loss=loss)
    b = write_tiers(tmp_path / "b", made, WIDTHS, cuts=3, loss=loss)
    found = compare(a, b, permutations=50)
    for name in ("overlap", "top1", "overlap_low", "overlap_high", "jsd_p", "share_p", "nll_p"):
        values = found[name].values
        assert (values[~np.isnan(values)] == 1).all(), name
    for name in ("jsd", "share_change", "nll_change"):
        np.testing.assert_allclose(np.nan_to_num(found[name]), 0, atol=1e-12)
    assert found["control_overlap"].values[0, 0] < 0.8
    assert found["control_overlap"].values[2, 0] == 1  # one expert: there is nothing else to choose


def test_a_change_is_found_in_its_layer_and_label_alone(tmp_path):
    rng = np.random.default_rng(3)
    widths, documents = [6, 6, 6], 40
    made = random_truth(rng, documents, widths, [2, 2, 2])
    labels = {"domain": ["ab"[d % 2] for d in range(documents)]}
    picks = [ids.copy() for ids in made.expert]
    touched = (made.document % 2 == 1) & (rng.random(made.document.size) < 0.6)
    picks[1][touched] = [4, 5]  # layer 1 collapses on b, experts 4 and 5
    found = compare(
        write_tiers(tmp_path / "a", made, widths, labels),
        write_tiers(tmp_path / "b", changed(made, expert=picks), widths, labels),
        by="domain",
    )
    moved = found["jsd_q"].values < 0.05
    np.testing.assert_array_equal(moved, [[False, False], [False, True], [False, False]])
    np.testing.assert_array_equal(found["overlap"].values < 1, moved)
    assert (found["share_q"].values[1, 4:, 1] < 0.05).all()
    assert (found["share_change"].values[1, 4:, 1] > 0).all()


def test_the_null_of_the_divergence_holds_its_level(tmp_path):
    """Two random draws of the same documents' preferences: exchangeable, so that p is not small too often."""
    rng = np.random.default_rng(8)
    small = 0
    for trial in range(40):
        prefer = rng.normal(size=(12, 1, 5))
        made = random_truth(rng, 12, [5], [2], prefer=prefer)
        scores = rng.gumbel(size=(made.document.size, 5)) + prefer[made.document, 0]
        other = changed(made, expert=[np.argsort(-scores, axis=1)[:, :2]])
        a = write_tiers(tmp_path / f"a{trial}", made, [5])
        p = compare(a, write_tiers(tmp_path / f"b{trial}", other, [5]), permutations=99, resamples=0)["jsd_p"].item()
        small += p <= 0.1
    assert small <= 11  # of 40 at level 0.1: beyond it once in 1500


def test_exchanges_that_empty_a_store_are_no_evidence():
    """Of the four ways to exchange two documents two leave a side empty, and two are as far apart as what is seen."""
    before, after = csr_array([[9.0, 0], [0, 0]]), csr_array([[0, 0], [0, 9.0]])
    found = _moved(before, after, 2, 400, [0])
    assert (found["jsd"], found["jsd_p"]) == (1, 1)
    np.testing.assert_array_equal(found["share_p"], 1)


def test_divergence_of_known_loads():
    assert divergence(np.array([1.0, 0]), np.array([0, 3.0])) == 1
    assert divergence(np.array([2.0, 2]), np.array([3.0, 3])) == 0
    assert np.isnan(divergence(np.zeros(2), np.array([3.0, 3])))
    # 0.5 (log2(1/0.75)) + 0.5 (0.5 log2(0.5/0.75) + 0.5 log2(0.5/0.25)), by hand.
    assert divergence(np.array([1.0, 0]), np.array([1.0, 1])) == pytest.approx(0.311278, abs=1e-6)


def test_plain_selections():
    overlap, top1 = overlap_of(
        np.array([[0, 1], [2, 3], [-1, 1], [-1, -1]]), np.array([[1, 0], [2, 0], [1, 5], [0, 1]])
    )
    np.testing.assert_allclose(overlap, [1, 0.5, 0.5, np.nan])
    np.testing.assert_allclose(top1, [0, 1, np.nan, np.nan])
    with pytest.raises(MoescopeError, match="same tokens"):
        overlap_of(np.zeros((2, 1)), np.zeros((3, 1)))


def test_stores_that_do_not_pair_are_refused(tmp_path):
    made, _ = two(0)
    a = write_tiers(tmp_path / "a", made, WIDTHS)
    words = made.token_id.copy()
    long = next(d for d in range(9) if (made.document == d).sum() > 2)
    words[np.flatnonzero(made.document == long)[2]] += 1
    cases = {
        f"document {long} differs from its sequence's token 2 on": (changed(made, token_id=words), WIDTHS, {}),
        "different tokenizers": (made, WIDTHS, {"tokenizer": "1"}),
        "Layer L000 selects 3 of 7 experts": (made, [8, 5, 1], {}),
        "has the MoE layer L002": (made, WIDTHS[:2], {}),
    }
    for number, (words_of, (truth, widths, more)) in enumerate(cases.items()):
        with pytest.raises(MoescopeError, match=words_of):
            compare(a, write_tiers(tmp_path / str(number), truth, widths, **more))
    fewer = made.document < 8
    names = ("document", "sequence", "position", "token_id")
    part = changed(
        made,
        **{name: getattr(made, name)[fewer] for name in names},
        **{name: [of[fewer] for of in getattr(made, name)] for name in ("expert", "weight", "valid")},
    )
    with pytest.raises(MoescopeError, match=r"only .*a has document 8"):
        compare(a, write_tiers(tmp_path / "part", part, WIDTHS))
    moved = changed(made, sequence=made.sequence * 2 + (made.position >= 6))
    with pytest.raises(MoescopeError, match="cut into sequences differently"):
        compare(a, write_tiers(tmp_path / "moved", moved, WIDTHS))


@pytest.mark.parametrize("missing", [0.0, 0.25])
def test_fluctuation_is_what_a_loop_says(tmp_path, missing):
    rng = np.random.default_rng(4)
    made = random_truth(rng, 8, WIDTHS, K, missing=missing)
    n, steps, miss = made.document.size, [100, 200, 500, 900], missing > 0
    labels = {"domain": ["ab"[d % 2] for d in range(8)]}
    series = []
    for step in range(4):
        picks = [np.argsort(rng.random((n, width)), axis=1)[:, :k] for width, k in zip(WIDTHS, K, strict=True)]
        stay = rng.random(n) < (0.4 + 0.2 * step)
        for layer in range(3):
            picks[layer][stay] = made.expert[layer][stay]
        valid = [rng.random((n, k)) >= missing for k in K]
        series.append(made if step == 3 else changed(made, expert=picks, valid=valid))
    stores = [
        write_tiers(
            tmp_path / str(i), truth, WIDTHS, labels, shuffled(rng, made), 1 + i, slots_can_miss=miss
        )
        for i, truth in enumerate(series)
    ]  # fmt: skip
    found = fluctuation(stores, steps=steps, by="domain", resamples=40)
    assert found["step"].values.tolist() == steps
    for layer in range(3):
        for code in range(2):
            last = []
            for t in np.flatnonzero(made.document % 2 == code):
                if miss and not all(truth.valid[layer][t, 0] for truth in series):
                    continue
                firsts = [truth.expert[layer][t, 0] for truth in series]
                last.append(max((s for s in range(4) if firsts[s] != firsts[-1]), default=-1))
            last = np.array(last)
            cell = found.isel(layer=layer, label=code)
            assert cell["tokens"] == last.size
            np.testing.assert_allclose(cell["last_change"], [np.mean(last == s) for s in range(4)])
            np.testing.assert_allclose(cell["settled"], [np.mean(last < s) for s in range(4)])
            assert (cell["settled_low"].values <= cell["settled"].values + 1e-12).all()
    for step in range(4):
        pair = compare(stores[3], stores[step], by="domain", permutations=0, resamples=0)
        for name in ("overlap", "top1", "control_overlap", "control_top1"):
            np.testing.assert_allclose(found[name].isel(step=step), pair[name], err_msg=name)


def test_a_series_must_be_one(tmp_path):
    made, _ = two(0)
    store = write_tiers(tmp_path / "a", made, WIDTHS)
    with pytest.raises(MoescopeError, match="two stores or more"):
        fluctuation([store])
    with pytest.raises(MoescopeError, match="ascending"):
        fluctuation([store, store], steps=[2, 1])
    same = fluctuation([store, store])
    assert (same["settled"] == 1).all()
    assert (same["overlap"] == 1).all()
