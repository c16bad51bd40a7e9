"""Counts of stores against brute force over the same tokens, however the store is cut."""

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from moescope.analysis import counts, pairs
from moescope.errors import MoescopeError, StoreError
from tests.analysis.made_stores import random_truth, write

cases = settings(
    max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)


def brute_force(made, layer, group, width):
    """[group, expert] counts and weights by a plain loop."""
    count = np.zeros((int(group.max()) + 1, width), dtype=int)
    weight = np.zeros(count.shape)
    for row in range(group.size):
        for slot in range(made.expert[layer].shape[1]):
            if made.valid[layer][row, slot]:
                count[group[row], made.expert[layer][row, slot]] += 1
                weight[group[row], made.expert[layer][row, slot]] += made.weight[layer][row, slot]
    return count, weight


def dense(pairs, rows):
    out = np.zeros((rows, pairs.n_experts), dtype=int)
    out[pairs.group, pairs.expert] = pairs.count
    return out


@cases
@given(seed=st.integers(0, 10**6), cuts=st.integers(1, 4), missing=st.sampled_from([0.0, 0.3]))
def test_document_and_token_counts_agree_with_brute_force(tmp_path_factory, seed, cuts, missing):
    rng = np.random.default_rng(seed)
    width, k = [9, 4], [3, 1]
    made = random_truth(rng, documents=int(rng.integers(1, 9)), n_experts=width, top_k=k, missing=missing)
    labels = {"domain": [str(d % 2) for d in range(made.document.max() + 1)]}
    store = write(
        tmp_path_factory.mktemp("s") / "store",
        made,
        width,
        labels,
        layers=[2, 5],
        cuts=cuts,
        slots_can_miss=missing > 0,
    )
    for layer, site in enumerate(store.sites):
        for group, count_pairs in ((made.document, counts.document_counts), (made.token_id, counts.token_counts)):
            expected, _ = brute_force(made, layer, group, width[layer])
            found = count_pairs(store, site)
            np.testing.assert_array_equal(dense(found, expected.shape[0]), expected)
            assert (found.count > 0).all()
        expected, weight = brute_force(made, layer, made.document, width[layer])
        found = counts.document_counts(store, site.layer, weighted=True)
        np.testing.assert_allclose(found.weight, weight[found.group, found.expert], rtol=1e-6)
        again = counts.document_counts(store, site.key, weighted=True)  # from the aggregate on disk
        np.testing.assert_array_equal(again.weight, found.weight)
    document, tokens = counts.document_tokens(store)
    np.testing.assert_array_equal(tokens, np.bincount(made.document)[document])


def test_missing_slots_are_nobody_not_expert_0(tmp_path):
    made = random_truth(np.random.default_rng(0), 3, [4], [2])
    made.valid[0][:] = False
    store = write(tmp_path / "s", made, [4], {}, slots_can_miss=True)
    assert counts.document_counts(store, 0).count.size == 0


def test_merging_does_not_depend_on_the_cut():
    rng = np.random.default_rng(1)
    group, expert = rng.integers(0, 6, 200), rng.integers(0, 5, 200).astype(np.int32)
    one = np.ones(200, dtype=np.int64)

    def part(rows):
        return pairs.PairCounts(group[rows], expert[rows], one[rows], one[rows] / 3, 5)

    whole = pairs.merge_pairs([part(slice(None))], 5)
    for cut in (1, 7, 199):
        merged = pairs.merge_pairs([part(slice(0, cut)), part(slice(cut, None))], 5)
        for name in ("group", "expert", "count"):
            np.testing.assert_array_equal(getattr(merged, name), getattr(whole, name))
        np.testing.assert_allclose(merged.weight, whole.weight)
    table = np.zeros((6, 5))
    np.add.at(table, (group, expert), 1)
    np.testing.assert_array_equal(dense(whole, 6), table)
    assert pairs.merge_pairs([], 5).count.size == 0


@pytest.mark.parametrize("cells", [10**6, 7], ids=["dense, all layers at once", "sparse, a layer at a time"])
def test_tables_do_not_depend_on_what_fits_in_memory(tmp_path, monkeypatch, cells):
    made = random_truth(np.random.default_rng(8), 20, [6, 3], [2, 2], missing=0.2)
    store = write(tmp_path / "s", made, [6, 3], {}, cuts=6, slots_can_miss=True)
    monkeypatch.setattr(counts, "CELLS", cells)
    monkeypatch.setattr(pairs, "CELLS", cells)
    tables = counts.token_tables(store, store.sites) + counts.document_tables(store, store.sites, weighted=True)
    groups = [made.token_id] * 2 + [made.document] * 2
    for place, (table, group) in enumerate(zip(tables, groups, strict=True)):
        layer = place % 2
        valid, size = made.valid[layer], int(group.max()) + 1
        expected, weight = np.zeros((size, (6, 3)[layer])), np.zeros((size, (6, 3)[layer]))
        where = (np.repeat(group, 2)[valid.ravel()], made.expert[layer][valid])
        np.add.at(expected, where, 1)
        np.add.at(weight, where, made.weight[layer][valid])
        np.testing.assert_array_equal(dense(table, size), expected)
        assert (np.diff(table.group * 10 + table.expert) > 0).all()
        if table.weight is not None:
            np.testing.assert_allclose(table.weight, weight[table.group, table.expert])


def test_an_id_beyond_the_layer_is_damage(tmp_path):
    made = random_truth(np.random.default_rng(0), 3, [4], [2])
    store = write(tmp_path / "s", made, [4], {})
    store.manifest.sites[0].n_experts = 2
    with pytest.raises(StoreError, match="beyond the 2 it has"):
        counts.document_counts(store, 0)


def test_phases_are_told_apart(tmp_path):
    made = random_truth(np.random.default_rng(4), 6, [4], [2])
    phase = np.where(made.position < 6, "prefill", "decode").astype(object)
    store = write(tmp_path / "s", made, [4], {}, cuts=2, phase=phase)
    sizes = {name: counts.document_tokens(store, name)[1].sum() for name in ("prefill", "decode")}
    assert sizes == {"prefill": (phase == "prefill").sum(), "decode": (phase == "decode").sum()}
    decoded = counts.document_counts(store, 0, phase="decode")
    assert decoded.count.sum() == 2 * sizes["decode"]


def test_filters_and_missing_labels(tmp_path):
    made = random_truth(np.random.default_rng(2), 8, [4], [2])
    labels = {"domain": ["a", "b", None, "a"] * 2, "language": ["x"] * 4 + ["y"] * 4}
    store = write(tmp_path / "s", made, [4], labels, cuts=3)
    chosen = counts.labelling(store, "domain", {"language": "y"})
    assert chosen.labels == ("a", "b")
    assert chosen.documents.tolist() == [4, 5, 7]
    assert (chosen.unlabelled, chosen.filtered) == (1, 4)
    np.testing.assert_array_equal(chosen.tokens, np.bincount(made.document)[[4, 5, 7]])


@pytest.mark.parametrize(
    ("ask", "says"),
    [
        (lambda store: counts.labelling(store, "topic"), "no label 'topic': its labels are domain"),
        (lambda store: counts.labelling(store, "domain", {"domain": "zzz"}), "No document .* after the filters"),
        (lambda store: counts.sites_of(store, [7]), "no MoE layer 7; it has 0"),
    ],
    ids=["unknown label", "nothing left", "unknown layer"],
)
def test_mistakes_are_named(tmp_path, ask, says):
    store = write(tmp_path / "s", random_truth(np.random.default_rng(0), 2, [4], [1]), [4], {"domain": ["a", "b"]})
    with pytest.raises(MoescopeError, match=says):
        ask(store)
