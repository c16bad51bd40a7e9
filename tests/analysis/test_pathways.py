"""Paths and co-activation against plain Python, planted paths, and controls that find nothing where nothing is."""

import itertools
import math
from collections import Counter

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from moescope.analysis.coactive import coactivation, coactivation_from_counts, expected_together
from moescope.analysis.path_counting import Walk
from moescope.analysis.pathways import paths
from moescope.errors import MoescopeError
from tests.analysis.made_stores import Made, random_truth, write

cases = settings(
    max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)
WIDTH, K = [4, 3, 1, 6], [3, 2, 1, 4]


def entropy(counts):
    total = sum(counts)
    return -sum(n / total * math.log(n / total) for n in counts if n)


def plain_paths(made, layers, keep=lambda row: True):
    found = Counter()
    for row in range(made.document.size):
        if keep(row) and all(made.valid[layer][row, 0] for layer in layers):
            found[tuple(int(made.expert[layer][row, 0]) for layer in layers)] += 1
    return found


@cases
@given(
    seed=st.integers(0, 10**6),
    cuts=st.integers(1, 4),
    missing=st.sampled_from([0.0, 0.3]),
    capacity=st.sampled_from([2_000_000, 60, 8]),
)
def test_paths_agree_with_a_plain_count(tmp_path_factory, seed, cuts, missing, capacity):
    rng = np.random.default_rng(seed)
    made = random_truth(rng, int(rng.integers(3, 12)), WIDTH, K, missing=missing)
    folder = tmp_path_factory.mktemp("s") / "store"
    store = write(folder, made, WIDTH, {}, layers=[1, 2, 5, 6], cuts=cuts, slots_can_miss=missing > 0)
    truth = plain_paths(made, [0, 1, 3])
    result = paths(store, layers=[1, 2, "L006"], top=6, draws=2, capacity=capacity)
    found = {tuple(route): int(n) for route, n in zip(result["expert"].values, result["count"].values, strict=True)}
    assert all(truth[route] == n for route, n in found.items())
    assert list(result["count"].values) == sorted(result["count"].values, reverse=True)
    missed = result.attrs["missed_at_most"]
    assert all(n <= max(min(found.values()), missed) for route, n in truth.items() if route not in found)
    total = sum(truth.values())
    assert int(result["tokens"]) == total
    assert int(result["tokens_missing"]) == made.document.size - total
    np.testing.assert_allclose(result["share"], result["count"] / total)
    if capacity > 1000:
        assert missed == 0
        assert list(result["count"].values) == sorted(truth.values(), reverse=True)[:6]
        assert float(result["path_entropy"]) == pytest.approx(entropy(truth.values()))
        assert int(result["distinct_paths"]) == len(truth)
    elif missed:
        assert np.isnan(result["path_entropy"])
    steps = [Counter(), Counter()]
    for route, n in truth.items():
        for step in (0, 1):
            steps[step][route[step : step + 2]] += n
    chain = 0.0
    for step, counts in enumerate(steps):
        sources = Counter()
        for (source, _), n in counts.items():
            sources[source] += n
        known = entropy(counts.values()) - entropy(sources.values())
        assert float(result["conditional_entropy"][step]) == pytest.approx(known, abs=1e-12)
        chain += known + (entropy(sources.values()) if step == 0 else 0)
        shown = [
            (int(a), int(b), int(n))
            for a, b, n in zip(*(result[v].values[step] for v in ("source", "target", "link_count")), strict=True)
            if n
        ]
        assert {(a, b): n for a, b, n in shown} == dict(counts)
    assert float(result["markov_entropy"]) == pytest.approx(chain)
    for index, route in enumerate(result["expert"].values):
        first = sum(n for (a, _), n in steps[0].items() if a == route[0])
        middle = sum(n for (a, _), n in steps[1].items() if a == route[1])
        markov = first * steps[0][route[0], route[1]] / first * steps[1][route[1], route[2]] / middle
        assert float(result["markov"][index]) == pytest.approx(markov)


def routed(rng, follow, layers=4, documents=30, tokens=40, width=6):
    """A share `follow` of the tokens keep to one of two planted paths; the rest go anywhere."""
    n = documents * tokens
    ids = rng.integers(0, width, (n, layers))
    on = rng.random(n) < follow
    planted = np.array([[1, 4, 2, 0], [3, 3, 5, 1]])[:, :layers]
    ids[on] = planted[rng.integers(0, 2, on.sum())]
    document = np.repeat(np.arange(documents), tokens)
    columns = [ids[:, layer, None] for layer in range(layers)]
    ones, valid = [np.ones((n, 1), np.float32)] * layers, [np.ones((n, 1), bool)] * layers
    made = Made(document, document, np.tile(np.arange(tokens), documents), np.zeros(n, int), columns, ones, valid)
    return made, [width] * layers


def test_planted_paths_lead_and_lower_the_entropy(tmp_path):
    made, widths = routed(np.random.default_rng(0), 0.3)
    result = paths(write(tmp_path / "s", made, widths, {}), draws=39)
    assert {tuple(route) for route in result["expert"].values[:2]} == {(1, 4, 2, 0), (3, 3, 5, 1)}
    assert (result["p"].values[:2] == 1 / 40).all()
    assert (result["count"].values[:2] > 5 * result["control"].values[:2]).all()
    assert float(result["p_entropy"]) == 1 / 40
    assert float(result["path_entropy"]) < float(result["control_entropy"]) - 0.3
    assert (result["conditional_entropy"] < result["control_conditional_entropy"] - 0.05).all()
    assert str(result["path"].values[0]) in ("1-4-2-0", "3-3-5-1")


def test_unlinked_layers_are_at_their_control(tmp_path):
    p, gaps = [], []
    for seed in range(100):
        made, widths = routed(np.random.default_rng(seed), 0.0, layers=3, documents=5, tokens=30, width=4)
        result = paths(write(tmp_path / str(seed), made, widths, {}), draws=19, seed=seed)
        p.append(float(result["p_entropy"]))
        gaps.append(float(result["path_entropy"] - result["control_entropy"]))
    assert (np.array(p) <= 0.05).sum() <= 13  # binomial(100, 0.05): 0.05 %
    assert (np.array(p) <= 0.5).sum() >= 30
    assert abs(np.mean(gaps)) < 4 * np.std(gaps) / 10
    independent = float(result["independent_entropy"])
    assert independent == pytest.approx(3 * math.log(4), abs=0.1)


def test_the_most_used_of_unlinked_paths_do_not_look_linked(tmp_path):
    """Hundreds of equally likely paths: the most used are so by chance, and lie far above their own controls."""
    found, alone = [], []
    for seed in range(12):
        made, widths = routed(np.random.default_rng(seed), 0.0, layers=3, documents=6, tokens=30, width=6)
        result = paths(write(tmp_path / str(seed), made, widths, {}), top=20, draws=19, seed=seed)
        found.append(result["p"].values <= 0.05)
        alone.append((result["count"] > 1.5 * result["control"]).values)
    assert np.mean(alone) > 0.9  # the trap is there
    assert np.mean(found) <= 0.05


@pytest.mark.parametrize("capacity", [2_000_000, 9])
def test_paths_meet_the_same_rank_of_each_control(tmp_path, monkeypatch, capacity):
    made = random_truth(np.random.default_rng(5), 12, WIDTH, K)
    store = write(tmp_path / "s", made, WIDTH, {}, cuts=3)
    controls = []
    for draw in range(3):  # a control as the observation: plain counts of all its paths
        count, count_of = Walk.count, Walk.count_of
        with monkeypatch.context() as patch:
            patch.setattr(Walk, "count", lambda self, _, most, draw=draw, count=count: count(self, draw, most))
            patch.setattr(Walk, "count_of", lambda self, of, _, draw=draw, real=count_of: real(self, of, draw))
            mixed = paths(store, top=100, draws=0)
        routes = mixed["path"].values.tolist()
        controls.append(dict(zip(routes, mixed["count"].values.tolist(), strict=True)))
    result = paths(store, top=12, draws=3, capacity=capacity)
    ranked = [sorted(counts.values(), reverse=True) + [0] * 12 for counts in controls]
    for rank, (path, count) in enumerate(zip(result["path"].values, result["count"].values, strict=True)):
        own = [counts.get(path, 0) for counts in controls]
        assert float(result["control"][rank]) == pytest.approx(np.mean(own))
        reached = sum(max(mine, order[rank]) >= count for mine, order in zip(own, ranked, strict=True))
        if capacity > 1000:
            assert float(result["control_rank"][rank]) == pytest.approx(np.mean([order[rank] for order in ranked]))
            assert float(result["p"][rank]) == (1 + reached) / 4
        else:
            assert float(result["p"][rank]) >= (1 + reached) / 4
    assert capacity > 1000 or result.attrs["missed_at_most"] > 0


def test_paths_do_not_depend_on_the_cut(tmp_path):
    made = random_truth(np.random.default_rng(5), 12, WIDTH, K)
    labels = {"domain": ["a", "b", "b"] * 4}
    one, other = (write(tmp_path / str(cuts), made, WIDTH, labels, cuts=cuts) for cuts in (1, 5))
    for where in (None, {"domain": "b"}):
        first, second = paths(one, seed=3, where=where, draws=4), paths(other, seed=3, where=where, draws=4)
        assert first.drop_attrs().equals(second.drop_attrs())
    truth = plain_paths(made, range(4), keep=lambda row: made.document[row] % 3 > 0)
    assert list(first["count"].values) == sorted(truth.values(), reverse=True)[:50]


def test_mistakes_of_paths_are_named(tmp_path):
    store = write(tmp_path / "s", random_truth(np.random.default_rng(0), 3, WIDTH, K), WIDTH, {})
    for says, ask in {
        "two MoE layers; this window has 1": {"layers": [2]},
        "no MoE layer 9": {"layers": [0, 9]},
        "`top`, `links`": {"top": 0},
    }.items():
        with pytest.raises(MoescopeError, match=says):
            paths(store, **ask)
    nothing = random_truth(np.random.default_rng(0), 2, WIDTH, K)
    nothing.valid[1][:, 0] = False
    with pytest.raises(MoescopeError, match="No token with a first-ranked expert in every layer"):
        paths(write(tmp_path / "u", nothing, WIDTH, {}, slots_can_miss=True))


def plain_coactivation(made, layer, definition, keep=lambda row: True):
    width, k = WIDTH[layer], K[layer]
    both, active = np.zeros((width, width)), np.zeros(width)
    for row in range(made.document.size):
        if not keep(row):
            continue
        filled = [(rank, int(made.expert[layer][row, rank])) for rank in range(k) if made.valid[layer][row, rank]]
        for _, expert in filled:
            active[expert] += 1
        for (a, i), (b, j) in itertools.permutations(filled, 2):
            both[i, j] += definition == "paper" or abs(a - b) == 1
    return both, active


@cases
@given(
    seed=st.integers(0, 10**6),
    cuts=st.integers(1, 4),
    missing=st.sampled_from([0.0, 0.3]),
    definition=st.sampled_from(["paper", "code"]),
)
def test_coactivation_agrees_with_brute_force(tmp_path_factory, seed, cuts, missing, definition):
    rng = np.random.default_rng(seed)
    made = random_truth(rng, int(rng.integers(2, 9)), WIDTH, K, missing=missing)
    labels = {"domain": ["a", "b"] * 5}
    folder = tmp_path_factory.mktemp("s") / "store"
    store = write(folder, made, WIDTH, labels, layers=[1, 2, 5, 6], cuts=cuts, slots_can_miss=missing > 0)
    for where in (None, None, {"domain": "a"}):  # scanned, kept, filtered
        result = coactivation(store, definition, groups=3, where=where)
        for layer in range(4):
            both, active = plain_coactivation(
                made, layer, definition, keep=lambda row, where=where: where is None or made.document[row] % 2 == 0
            )
            part = result.isel(layer=layer, expert=slice(WIDTH[layer]), other=slice(WIDTH[layer]))
            off = ~np.eye(WIDTH[layer], dtype=bool)
            np.testing.assert_array_equal(part["active"], active)
            np.testing.assert_array_equal(part["count"].values[off], both[off])
            with np.errstate(invalid="ignore"):
                np.testing.assert_allclose(part["conditional"].values[off], (both / active[:, None])[off])
            assert np.isnan(np.diagonal(part["conditional"])).all()
    assert np.isnan(result["lift"].isel(layer=2)).all()  # one expert
    assert result.attrs["definition"] == definition


@pytest.mark.parametrize("size", [[0, 0, 0, 50], [5, 10, 15, 20]], ids=["always three", "some missing"])
def test_expected_coactivation_is_that_of_all_subsets(size):
    odds = np.array([0.3, 2.0, 1.0, 0.0, 0.7, 5.0])
    share = np.array(size) / sum(size)
    joint = np.zeros((6, 6))
    for m in range(1, 4):
        sets = list(itertools.combinations(range(6), m))
        weight = np.array([np.prod(odds[list(chosen)]) for chosen in sets])
        for chosen, p in zip(sets, weight / weight.sum(), strict=True):
            for i, j in itertools.product(chosen, chosen):
                joint[i, j] += share[m] * p
    fitted, found = expected_together(np.diagonal(joint) * sum(size), np.array(size))
    np.testing.assert_allclose(found, joint, atol=1e-7)
    np.testing.assert_allclose(fitted / fitted[0], odds / odds[0], rtol=1e-5, atol=1e-9)


def test_an_expert_that_is_always_active_and_many_experts():
    both, active, size = np.ones((1, 3, 3)) * 10, np.full((1, 3), 10), np.array([[0, 0, 0, 10]])
    values = coactivation_from_counts(both, active, size)
    off = ~np.eye(3, dtype=bool)
    np.testing.assert_allclose(values["lift"][off], 1)
    assert np.isnan(values["p"]).all()  # one group has no spread
    rng = np.random.default_rng(0)
    load = rng.dirichlet(np.full(128, 0.5)) * 8
    load = np.minimum(load, 1.0)
    load[0] = 1.0
    load *= 8 / load.sum()
    load = np.minimum(load, 1.0)
    chosen = np.round(load * 10_000)
    total = chosen.sum()
    _, found = expected_together(chosen, np.array([0] * 7 + [10_000 - (total - 70_000), total - 70_000]))
    np.testing.assert_allclose(np.diagonal(found), chosen / 10_000, atol=1e-6)
    # A set of k holds k (k - 1) ordered pairs.
    more = total - 70_000
    pairs = (more * 56 + (10_000 - more) * 42) / 10_000
    assert found.sum() - np.trace(found) == pytest.approx(pairs, rel=1e-6)


def drawn_sets(rng, documents, tokens, width, k, bond):
    """Top-k sets of unequal loads; experts 0 and 1 share a part `bond` of their noise at each token."""
    n = documents * tokens
    noise = rng.gumbel(size=(n, width))
    shared = rng.random(n) < bond
    noise[shared, 1] = noise[shared, 0]
    ids = np.argsort(-(noise + np.linspace(0, 1, width)[::-1]), axis=1)[:, :k]
    document = np.repeat(np.arange(documents), tokens)
    place = np.tile(np.arange(tokens), documents)
    ones, valid = np.ones((n, k), np.float32), np.ones((n, k), bool)
    return Made(document, document, place, np.zeros(n, int), [ids], [ones], [valid])


def test_a_planted_pair_is_found(tmp_path):
    store = write(tmp_path / "s", drawn_sets(np.random.default_rng(0), 40, 50, 8, 3, 0.7), [8], {})
    for definition in ("paper", "code"):
        result = coactivation(store, definition).isel(layer=0)
        assert float(result["lift"][0, 1]) == float(result["lift"].max())
        assert float(result["lift_low"][0, 1]) > 1.2
        assert float(result["q"][0, 1]) < 1e-4
        np.testing.assert_allclose(result["lift"].values, result["lift"].values.T)
        np.testing.assert_allclose(result["q"].values, result["q"].values.T)


def test_sets_drawn_with_loads_alone_have_no_coactivation():
    rng = np.random.default_rng(3)
    odds, k = np.array([0.3, 2.0, 1.0, 0.8, 0.7, 4.0]), 2
    sets = list(itertools.combinations(range(6), k))
    weight = np.array([np.prod(odds[list(chosen)]) for chosen in sets])
    p, inside = [], 0
    for _ in range(60):
        which = rng.choice(len(sets), (12, 80), p=weight / weight.sum())
        both, active = np.zeros((12, 6, 6)), np.zeros((12, 6))
        for group in range(12):
            for chosen in which[group]:
                i, j = sets[chosen]
                both[group, i, j] += 1
                both[group, j, i] += 1
                active[group, [i, j]] += 1
        values = coactivation_from_counts(both, active, np.tile([0, 0, 80], (12, 1)))
        upper = np.triu_indices(6, 1)
        p += list(values["p"][upper])
        inside += ((values["lift_low"] <= 1) & (values["lift_high"] >= 1))[upper].sum()
    assert 0.02 <= (np.array(p) <= 0.05).mean() <= 0.09
    assert 0.91 <= inside / len(p) <= 0.98


def test_mistakes_of_coactivation_are_named(tmp_path):
    store = write(tmp_path / "s", random_truth(np.random.default_rng(0), 1, WIDTH, K), WIDTH, {})
    with pytest.raises(MoescopeError, match="`definition` is"):
        coactivation(store, "rank")
    with pytest.raises(MoescopeError, match="`groups` must be 2"):
        coactivation(store, groups=1)
    alone = coactivation(store)  # one document
    assert np.isnan(alone["p"]).all()
    assert np.isnan(alone["lift_low"]).all()
    assert "one document" in alone.attrs["interval"]
