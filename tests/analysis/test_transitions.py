"""Transitions and affinity against plain Python, a planted affinity, and independence."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from moescope.analysis import affinities, affinity_null
from moescope.analysis.affinities import affinity, affinity_from_counts
from moescope.analysis.information import mutual_information
from moescope.analysis.transition_kernels import count_reordered, reorder_runs
from moescope.analysis.transitions import transition_counts, transition_tables
from moescope.errors import MoescopeError, StoreError
from tests.analysis.made_stores import Made, random_truth, write

cases = settings(
    max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)
WIDTH, K = [9, 4, 1, 6], [3, 2, 1, 4]


def brute_force(made, source, target, ranks="top1", keep=lambda row: True):
    """[E, E] counts by a plain loop over tokens, ranks and ranks."""
    count = np.zeros((WIDTH[source], WIDTH[target]), dtype=int)
    for row in range(made.document.size):
        for a, b in itertools.product(range(K[source]), range(K[target])):
            if not (made.valid[source][row, a] and made.valid[target][row, b] and keep(row)):
                continue
            if ranks == "top1" and (a or b):
                continue
            worth = (K[source] - a) * (K[target] - b) if ranks == "weighted" else 1
            count[made.expert[source][row, a], made.expert[target][row, b]] += worth
    return count


@cases
@given(
    seed=st.integers(0, 10**6),
    cuts=st.integers(1, 4),
    missing=st.sampled_from([0.0, 0.3]),
    ranks=st.sampled_from(["top1", "all", "weighted"]),
)
def test_transitions_agree_with_brute_force(tmp_path_factory, seed, cuts, missing, ranks):
    rng = np.random.default_rng(seed)
    made = random_truth(rng, int(rng.integers(1, 9)), WIDTH, K, missing=missing)
    path = tmp_path_factory.mktemp("s") / "store"
    store = write(path, made, WIDTH, {}, layers=[2, 3, 7, 8], cuts=cuts, slots_can_miss=missing > 0)
    pairs = [(0, 1), (1, 2), (3, 0), (1, 1)]
    numbers = [2, 3, 7, 8]
    expected = [brute_force(made, a, b, ranks) for a, b in pairs]
    found = transition_tables(store, [(numbers[a], numbers[b]) for a, b in pairs], ranks)
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == np.int64
        np.testing.assert_array_equal(one, other)
    for _ in range(2):  # the second time from the aggregate on disk
        np.testing.assert_array_equal(transition_counts(store, store.sites[3], "L002", ranks), expected[2])
    some = rng.permutation(int(made.document.max()) + 1)[: max(1, made.document.max() // 2)]
    np.testing.assert_array_equal(
        transition_counts(store, 2, 3, ranks, documents=some),
        brute_force(made, 0, 1, ranks, keep=lambda row: made.document[row] in some),
    )
    neighbours = transition_tables(store, ranks=ranks)
    assert [table.shape for table in neighbours] == [(9, 4), (4, 1), (1, 6)]
    np.testing.assert_array_equal(neighbours[1], brute_force(made, 1, 2, ranks))


def test_phases_are_told_apart(tmp_path):
    made = random_truth(np.random.default_rng(4), 6, WIDTH, K)
    phase = np.where(made.position < 6, "prefill", "decode").astype(object)
    store = write(tmp_path / "s", made, WIDTH, {}, cuts=2, phase=phase)
    for name in ("prefill", "decode"):
        expected = brute_force(made, 0, 3, keep=lambda row, name=name: phase[row] == name)
        np.testing.assert_array_equal(transition_counts(store, 0, 3, phase=name), expected)
        kept = np.arange(3)
        both = brute_force(
            made, 0, 3, keep=lambda row, name=name: phase[row] == name and made.document[row] in (0, 1, 2)
        )
        np.testing.assert_array_equal(transition_counts(store, 0, 3, documents=kept, phase=name), both)


def test_an_id_beyond_the_layer_is_damage(tmp_path):
    store = write(tmp_path / "s", random_truth(np.random.default_rng(0), 3, WIDTH, K), WIDTH, {})
    store.manifest.sites[1].n_experts = 2
    with pytest.raises(StoreError, match="beyond the 2 it has"):
        transition_counts(store, 0, 1)


def test_mistakes_are_named(tmp_path):
    store = write(tmp_path / "s", random_truth(np.random.default_rng(0), 3, WIDTH, K), WIDTH, {})
    with pytest.raises(MoescopeError, match="`ranks` is"):
        transition_counts(store, 0, 1, ranks="top2")
    with pytest.raises(MoescopeError, match="no MoE layer 9"):
        transition_counts(store, 0, 9)


def plain_information(count):
    """Mutual information by the textbook's double sum."""
    total = count.sum()
    return sum(
        count[i, j] / total * math.log(count[i, j] * total / (count[i].sum() * count[:, j].sum()))
        for i, j in zip(*np.nonzero(count), strict=True)
    )


@cases
@given(seed=st.integers(0, 10**6), missing=st.sampled_from([0.0, 0.4]), ranks=st.sampled_from(["top1", "all"]))
def test_affinity_agrees_with_plain_sums(tmp_path_factory, seed, missing, ranks):
    rng = np.random.default_rng(seed)
    made = random_truth(rng, int(rng.integers(4, 9)), WIDTH, K, missing=missing)
    store = write(tmp_path_factory.mktemp("s") / "store", made, WIDTH, {}, slots_can_miss=missing > 0)
    result = affinity(store, ranks, pairs=["0-1", (3, 0), (1, 2)], permutations=3)
    assert list(result["pair"].values) == ["0-1", "3-0", "1-2"]
    for index, (source, target) in enumerate([(0, 1), (3, 0), (1, 2)]):
        count = brute_force(made, source, target, ranks)
        part = result.isel(pair=index, source_expert=slice(WIDTH[source]), target_expert=slice(WIDTH[target]))
        rest = result.isel(pair=index)["count"].values.copy()
        np.testing.assert_array_equal(part["count"], count)
        rest[: WIDTH[source], : WIDTH[target]] = np.nan
        assert np.isnan(rest).all()
        assert int(result["exists"].isel(pair=index).sum()) == count.size
        assert float(part["mi"]) == pytest.approx(plain_information(count), abs=1e-12)
        assert float(part["total"]) == count.sum()
        for i, j in itertools.product(range(WIDTH[source]), range(WIDTH[target])):
            cell = part.isel(source_expert=i, target_expert=j)
            if not count[i].sum():
                assert np.isnan(cell["conditional"])
                assert np.isnan(cell["p"])
                continue
            assert float(cell["conditional"]) == pytest.approx(count[i, j] / count[i].sum())
            if count[:, j].sum():
                lift = count[i, j] * count.sum() / count[i].sum() / count[:, j].sum()
                assert float(cell["lift"]) == pytest.approx(lift)
        shares = count.sum(axis=0) / count.sum()
        entropy = -sum(x * math.log(x) for x in shares if x)
        assert float(part["entropy_target"]) == pytest.approx(entropy)
        assert float(part["conditional_entropy"]) == pytest.approx(entropy - plain_information(count), abs=1e-12)
    one_expert = result.isel(pair=2)
    assert abs(float(one_expert["mi"])) < 1e-12
    assert np.isnan(one_expert["p_mi"])
    assert np.isnan(one_expert["normalised"])


def test_the_null_moves_rows_within_their_run_only():
    edge, document, sequence = np.array([0, 5, 6, 20]), np.array([3, 3, 8]), np.array([0, 1, 2])
    seen = set()
    for shuffle, draw in itertools.product((False, True), range(40)):
        order = np.empty(20, dtype=np.int64)
        reorder_runs(edge, document, sequence, 7, draw, shuffle, order)
        for start, stop in itertools.pairwise(edge):
            here = order[start:stop]
            assert sorted(here) == list(range(start, stop))
            if not shuffle:
                assert len({(row - at) % (stop - start) for at, row in enumerate(here.tolist())}) == 1
        if not shuffle:
            seen.add((int(order[0]), int(order[6]) - 6))
    assert len({first for first, _ in seen}) == 5  # every rotation, also none
    assert len({second for _, second in seen}) > 8
    again = np.empty(15, dtype=np.int64)  # the same sequence in a shard of its own, elsewhere
    reorder_runs(np.array([0, 1, 15]), np.array([9, 8]), np.array([9, 2]), 7, 39, True, again)
    np.testing.assert_array_equal(again[1:] - 1, order[6:] - 6)


@pytest.mark.parametrize("shuffle", [False, True], ids=["rotate", "shuffle"])
def test_every_reordering_is_equally_likely(shuffle):
    one = np.ones(1, dtype=np.int64)
    ids = np.arange(4, dtype=np.int16)[:, None]
    count = np.zeros((4000, 4, 4), dtype=np.int64)
    where = np.zeros(1, dtype=np.int64)
    count_reordered(ids, ids, one, one, np.array([0, 4]), where, where, 1, 0, shuffle, count)
    assert (count.sum(axis=2) == 1).all()
    np.testing.assert_allclose(count.mean(axis=0), 0.25, atol=0.035)  # five standard errors
    kinds = np.unique(count.reshape(4000, -1), axis=0)
    assert len(kinds) == (24 if shuffle else 4)


@pytest.mark.parametrize("cuts", [1, 4])
def test_the_draws_do_not_depend_on_the_cut_or_on_the_blocks(tmp_path, monkeypatch, cuts):
    made = random_truth(np.random.default_rng(3), 12, WIDTH, K)
    store = write(tmp_path / "s", made, WIDTH, {}, cuts=cuts)
    result = affinity(store, "all", pairs="all", permutations=30, seed=5)
    assert result.sizes["pair"] == 6
    monkeypatch.setattr(affinity_null, "BLOCK_CELLS", 100)
    whole = affinity(write(tmp_path / "t", made, WIDTH, {}), "all", pairs=["all"], permutations=30, seed=5)
    for name in ("p", "expected", "mi_null", "p_mi", "mi", "count"):
        np.testing.assert_array_equal(result[name], whole[name])
    scores = affinity(store, "all", pairs="all", permutations=30, seed=5, cells=False)
    assert "count" not in scores
    for name in scores.data_vars:
        np.testing.assert_array_equal(scores[name], result[name])
    other = affinity(store, "all", pairs="all", permutations=30, seed=6)
    assert (other["mi_null"].values[0] != result["mi_null"].values[0]).all()


def planted(rng, follow, documents=20, tokens=60, widths=(8, 8, 6)):
    """Top-1 routing in which layer 1 follows layer 0 by a map at a share of the tokens, and layer 2 nothing."""
    n = documents * tokens
    document = np.repeat(np.arange(documents), tokens)
    first = rng.integers(0, widths[0], n)
    to = rng.permutation(widths[1])
    second = np.where(rng.random(n) < follow, to[first], rng.integers(0, widths[1], n))
    third = rng.integers(0, widths[2], n)
    experts = [ids[:, None] for ids in (first, second, third)]
    ones = [np.ones((n, 1), np.float32)] * 3
    valid = [np.ones((n, 1), bool)] * 3
    made = Made(document, document, np.tile(np.arange(tokens), documents), np.zeros(n, int), experts, ones, valid)
    return made, to, list(widths)


def test_a_planted_affinity_is_found_and_nothing_else(tmp_path):
    made, to, widths = planted(np.random.default_rng(0), follow=0.5)
    result = affinity(write(tmp_path / "s", made, widths, {}), permutations=999)
    found, other = result.isel(pair=0), result.isel(pair=1)
    hits = list(zip(*np.nonzero((found["q"].values <= 0.05) & (found["lift"].values > 2)), strict=True))
    assert hits == [(i, to[i]) for i in range(8)]
    assert int((other["q"] <= 0.05).sum()) == 0
    # P = 0.5 + 0.5 / 8 on the map, 0.5 / 8 elsewhere, against a uniform target
    p = np.where(np.arange(8) == 0, 0.5 + 0.5 / 8, 0.5 / 8)
    truth = math.log(8) + (p * np.log(p)).sum()
    assert float(found["mi_corrected"]) == pytest.approx(truth, abs=0.06)
    assert float(found["p_mi"]) == 0.001
    assert abs(float(other["mi_corrected"])) < 0.01
    assert float(other["p_mi"]) > 0.01
    np.testing.assert_allclose(np.diag(found["conditional"].values[:, to]), 0.5 + 0.5 / 8, atol=0.16)


def test_one_expert_deciding_the_next_is_1(tmp_path):
    made, _, widths = planted(np.random.default_rng(0), follow=1.0)
    result = affinity(write(tmp_path / "s", made, widths, {}), pairs=[(0, 1)], permutations=50)
    assert float(result["normalised"][0]) == pytest.approx(1, abs=1e-9)
    assert float(result["conditional_entropy"][0]) == pytest.approx(0, abs=1e-9)


def levels(tmp_path, null, seeds, sticky):
    """Shares of independent stores with p <= 0.05 and 0.2; topics and (if sticky) runs, but no link between layers."""
    p, corrected, raw = [], [], []
    for seed in range(seeds):
        rng = np.random.default_rng(seed)
        documents, tokens, width = 6, 40, 5
        n = documents * tokens
        document = np.repeat(np.arange(documents), tokens)
        columns = []
        for _ in range(2):
            topic = rng.normal(0, 1.5, (documents, width))
            ids = np.argmax(topic[document] + rng.gumbel(size=(n, width)), axis=1)
            for row in range(1, n):
                if sticky and document[row] == document[row - 1] and rng.random() < 0.85:
                    ids[row] = ids[row - 1]
            columns.append(ids[:, None])
        ones, valid = [np.ones((n, 1), np.float32)] * 2, [np.ones((n, 1), bool)] * 2
        place = np.tile(np.arange(tokens), documents)
        made = Made(document, document, place, np.zeros(n, int), columns, ones, valid)
        store = write(tmp_path / f"{null}{sticky}{seed}", made, [width, width], {})
        result = affinity(store, null=null, permutations=79, seed=seed)
        p.append(float(result["p_mi"][0]))
        corrected.append(float(result["mi_corrected"][0]))
        raw.append(float(result["mi"][0] - result["mi_bias"][0]))
    return np.array(p), np.array(corrected), np.array(raw)


def test_independent_layers_are_found_at_the_level_of_the_test(tmp_path):
    p, corrected, raw = levels(tmp_path, "rotate", 200, sticky=False)
    # Binomial(200, 0.05): 18 or more has a probability of 0.02 %; and the test is not empty either.
    assert (p <= 0.05).sum() <= 18
    assert 20 <= (p <= 0.2).sum() <= 62
    assert abs(corrected.mean()) < 4 * corrected.std() / math.sqrt(200)
    assert raw.mean() > 10 * abs(corrected.mean())  # topics alone; the analytic bias does not know them


def test_runs_do_not_pass_for_affinity(tmp_path):
    p, corrected, _ = levels(tmp_path, "rotate", 80, sticky=True)
    assert (p <= 0.05).sum() <= 12
    assert abs(corrected.mean()) < 4 * corrected.std() / math.sqrt(80)
    loose, _, _ = levels(tmp_path, "shuffle", 80, sticky=True)
    assert (loose <= 0.05).sum() > 30  # why rotation is the default


@pytest.mark.parametrize("k", [1, 3])
def test_the_analytic_bias_is_the_mean_over_independent_tokens(k):
    rng = np.random.default_rng(1)
    tokens, widths, found = 400, (8, 6), []
    for _ in range(300):
        one, other = (
            (np.argsort(rng.gumbel(size=(tokens, width)) + np.linspace(0, 1, width), axis=1)[:, -k:])
            for width in widths
        )
        count = np.zeros(widths)
        for a, b in itertools.product(range(k), range(k)):
            np.add.at(count, (one[:, a], other[:, b]), 1)
        found.append(affinity_from_counts(count, top_k=k))
    mi = np.array([float(result["mi"][0]) for result in found])
    expected = (8 - k) * (6 - k) / (2 * k * k * tokens)
    assert float(found[0]["mi_bias"][0]) == pytest.approx(expected)
    assert mi.mean() == pytest.approx(expected, rel=0.1)
    p = np.array([float(result["p_mi"][0]) for result in found])
    assert np.isnan(p).all() if k > 1 else 3 <= (p <= 0.05).sum() <= 30


def test_from_plain_counts():
    first, second = np.array([[10.0, 0], [0, 10]]), np.array([[5.0, 5, np.nan], [5, 5, np.nan]])
    result = affinity_from_counts([first, second], pairs=[(4, 6), (6, 9)])
    assert list(result["pair"].values) == ["4-6", "6-9"]
    np.testing.assert_allclose(result["mi"], [math.log(2), 0], atol=1e-12)
    np.testing.assert_allclose(result["mi_bias"], 1 / 40)
    np.testing.assert_allclose(result["mi_corrected"], [math.log(2) - 1 / 40, -1 / 40])
    np.testing.assert_allclose(result["lift"].values[0], [[2, 0], [0, 2]])
    assert float(result["p_mi"][0]) < 1e-6
    assert float(result["p_mi"][1]) == pytest.approx(1)
    assert mutual_information(first) == pytest.approx(math.log(2))
    with pytest.raises(MoescopeError, match="2 pairs of layers were named for 1"):
        affinity_from_counts(first, pairs=[(0, 1), (1, 2)])
    with pytest.raises(MoescopeError, match="0 or more"):
        affinity_from_counts(-first)


def test_filters_mistakes_and_what_cannot_be_asked(tmp_path, monkeypatch):
    made = random_truth(np.random.default_rng(0), 6, WIDTH, K)
    store = write(tmp_path / "s", made, WIDTH, {"domain": ["a", "b"] * 3})
    part = affinity(store, where={"domain": "a"}, permutations=2)
    expected = brute_force(made, 0, 1, keep=lambda row: made.document[row] % 2 == 0)
    np.testing.assert_array_equal(part["count"].values[0, :9, :4], expected)
    assert part.attrs["analysis"] == "affinity"
    values = affinity(store, permutations=0)
    for name in ("p", "q", "p_mi", "q_mi", "mi_null", "mi_corrected", "expected"):
        assert np.isnan(values[name]).all()
    for says, ask in {
        "`null` is": {"null": "documents"},
        "0 \\(values without": {"permutations": -1},
        "no pair of layers": {"pairs": ["3"]},
        "no MoE layer 7": {"pairs": ["3-7"]},
        "`ranks` is": {"ranks": "top2"},
    }.items():
        with pytest.raises(MoescopeError, match=says):
            affinity(store, **ask)
    monkeypatch.setattr(affinities, "RESULT_CELLS", 10)
    with pytest.raises(MoescopeError, match="cells=False"):
        affinity(store)
    monkeypatch.undo()
    alone = write(tmp_path / "t", random_truth(np.random.default_rng(0), 2, [4], [1]), [4], {})
    with pytest.raises(MoescopeError, match="two MoE layers; the store has 1"):
        affinity(alone)
    nothing = random_truth(np.random.default_rng(0), 2, [4, 4], [1, 1])
    for valid in nothing.valid:
        valid[:] = False
    with pytest.raises(MoescopeError, match="nothing to count"):
        affinity(write(tmp_path / "u", nothing, [4, 4], {}, slots_can_miss=True))
