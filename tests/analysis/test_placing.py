"""Placement on plain counts: brute force over all balanced placements, planted communities, bounds."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moescope.analysis.placement_programs import balanced_clusters, exflow, moetuner
from moescope.analysis.placing import (
    align,
    best_layer,
    contiguous,
    crossings,
    gathered,
    local_search,
    random_plan,
    refine,
    room,
    round_robin,
    step_bound,
)
from moescope.errors import MoescopeError

seeds = st.integers(0, 10**6)
few = settings(max_examples=25, deadline=None)


def layouts(n_experts, devices):
    """Every way to put experts on devices so that these differ by at most one expert."""
    fewest, most = n_experts // devices, -(-n_experts // devices)
    for layout in itertools.product(range(devices), repeat=n_experts):
        sizes = [layout.count(device) for device in range(devices)]
        if fewest <= min(sizes) and max(sizes) <= most:
            yield np.array(layout)


def crossed(table, source, target):
    """Tokens that change device, one transition at a time."""
    return sum(table[a, b] for a in range(table.shape[0]) for b in range(table.shape[1]) if source[a] != target[b])


def fewest_crossings(counts, devices):
    """The optimum over all balanced placements, by dynamic programming over layers of all layouts of each."""
    widths = [counts[0].shape[0], *(table.shape[1] for table in counts)]
    reached = {tuple(layout): 0 for layout in layouts(widths[0], devices)}
    for table, width in zip(counts, widths[1:], strict=True):
        reached = {
            tuple(layout): min(value + crossed(table, before, layout) for before, value in reached.items())
            for layout in layouts(width, devices)
        }
    return min(reached.values())


def random_counts(rng, widths, dead=True):
    tables = [rng.integers(0, 30, (a, b)) * rng.integers(0, 2, (a, b)) for a, b in itertools.pairwise(widths)]
    if dead:
        tables[0][rng.integers(widths[0])] = 0
    return tables


def communities(rng, widths, devices, noise, tokens=4000):
    """Counts of tokens that stay in their community, but for a share `noise`; and the communities."""
    home = [rng.permutation(np.arange(width) % devices) for width in widths]
    tables = []
    for source, target in itertools.pairwise(home):
        usual = np.outer(rng.dirichlet(np.full(source.size, 3.0)), rng.dirichlet(np.full(target.size, 3.0)))
        inside = usual * (source[:, None] == target)
        p = (1 - noise) * inside / inside.sum() + noise * usual
        tables.append(rng.multinomial(tokens, (p / p.sum()).ravel()).reshape(p.shape))
    return tables, home


@few
@given(seed=seeds, shape=st.sampled_from([((4, 4), 2), ((4, 4, 4), 2), ((6, 6), 3), ((4, 2, 4), 2), ((4, 4), 4)]))
def test_the_program_finds_the_optimum_of_all_balanced_placements(seed, shape):
    widths, devices = shape
    counts = random_counts(np.random.default_rng(seed), widths)
    truth = fewest_crossings(counts, devices)
    found = exflow(counts, devices, time_limit=60)
    assert found.status == "optimal"
    assert found.objective == truth
    assert found.bound == pytest.approx(truth)
    assert found.gap == pytest.approx(0)
    assert sum(crossed(t, a, b) for t, a, b in zip(counts, found.plan[:-1], found.plan[1:], strict=True)) == truth
    for layer, width in zip(found.plan, widths, strict=True):
        assert np.bincount(layer, minlength=devices).tolist() == [width // devices] * devices


@pytest.mark.parametrize("seed", range(6))
def test_the_program_itself_finds_the_optimum_when_the_heuristic_is_poor(seed, monkeypatch):
    counts = random_counts(np.random.default_rng(seed), (6, 6, 6))
    truth = fewest_crossings(counts, 2)
    monkeypatch.setattr(
        "moescope.analysis.placement_programs.local_search", lambda tables, devices, *_, **__: round_robin([6] * 3, 2)
    )
    found = exflow(counts, 2, time_limit=60)
    assert (found.status, found.objective, found.bound) == ("optimal", truth, truth)
    assert found.improved == (crossings(counts, round_robin([6] * 3, 2)).sum() > truth)


@pytest.mark.parametrize("widths", [(5, 4), (5, 5, 3), (1, 3, 2)])
def test_uneven_layers_agree_with_brute_force(widths):
    for seed in range(4):
        counts = random_counts(np.random.default_rng(seed), widths, dead=False)
        found = exflow(counts, 3, uneven=True, time_limit=60)
        assert (found.status, found.objective) == ("optimal", fewest_crossings(counts, 3))
        for layer in found.plan:
            sizes = np.bincount(layer, minlength=3)
            assert sizes.max() - sizes.min() <= 1
        assert sum(step_bound(table, 3, uneven=True) for table in counts) <= found.objective


@few
@given(seed=seeds)
def test_weighted_counts_are_solved_too(seed):
    counts = [table + np.random.default_rng(seed).random(table.shape) for table in communities_of(seed)]
    found = exflow(counts, 2, time_limit=60)
    assert found.status == "optimal"
    assert found.objective == pytest.approx(fewest_crossings(counts, 2))
    assert found.bound <= found.objective + 1e-9


def communities_of(seed):
    return communities(np.random.default_rng(seed), [4, 4, 4], 2, 0.5, tokens=60)[0]


@few
@given(
    seed=seeds,
    shape=st.sampled_from([((8, 8, 8), 4), ((16, 16, 16, 16, 16), 4), ((12, 6, 12), 3), ((32, 32), 8)]),
)
def test_planted_communities_are_recovered_without_a_crossing(seed, shape):
    widths, devices = shape
    counts, home = communities(np.random.default_rng(seed), widths, devices, noise=0.0)
    assert crossings(counts, home).sum() == 0
    found = exflow(counts, devices, time_limit=30)
    assert (found.objective, found.bound, found.status) == (0, 0, "optimal")
    assert crossings(counts, found.plan).sum() == 0
    name = {}
    for layer, planted, used in zip(found.plan, home, _used(counts), strict=True):
        for device, community in zip(layer[used], planted[used], strict=True):
            assert name.setdefault(community, device) == device


def _used(counts):
    loads = [counts[0].sum(axis=1), *(table.sum(axis=0) for table in counts)]
    return [load > 0 for load in loads]


def test_noisy_communities_at_the_size_of_a_model_come_with_a_close_bound():
    counts, home = communities(np.random.default_rng(0), [64] * 8, 8, noise=0.4, tokens=100_000)
    found = exflow(counts, 8, time_limit=30)
    assert found.status == "not started: too large"
    assert found.objective <= crossings(counts, home).sum()
    assert found.bound > 0.9 * found.objective
    assert found.gap == pytest.approx(1 - found.bound / found.objective)


@few
@given(seed=seeds, shape=st.sampled_from([((4, 4), 2, False), ((6, 3), 3, False), ((5, 3), 2, True)]))
def test_no_placement_crosses_less_than_the_bound(seed, shape):
    widths, devices, uneven = shape
    table = random_counts(np.random.default_rng(seed), widths)[0]
    bound = step_bound(table, devices, uneven)
    assert 0 <= bound <= fewest_crossings([table], devices)


def test_the_bound_is_tight_where_it_can_be():
    # Independent layers of even load: nothing beats chance, and the bound says so.
    assert step_bound(np.full((4, 4), 10), 2) == 80
    assert step_bound(np.diag([7, 7, 7, 7]), 2) == 0


@few
@given(seed=seeds)
def test_each_layer_is_placed_best_given_its_neighbours(seed):
    gain = np.random.default_rng(seed).random((5, 2))
    found = best_layer(gain, *room(5, 2, True))
    value = gain[np.arange(5), found].sum()
    assert value == pytest.approx(max(gain[np.arange(5), layout].sum() for layout in layouts(5, 2)))


@few
@given(seed=seeds)
def test_clusters_are_named_best(seed):
    rng = np.random.default_rng(seed)
    counts, plan = random_counts(rng, (6, 6, 6)), random_plan([6] * 3, 3, rng)
    names = list(itertools.permutations(range(3)))
    best = min(
        crossings(counts, [plan[0], np.array(one)[plan[1]], np.array(two)[plan[2]]]).sum()
        for one in names
        for two in names
    )
    assert crossings(counts, align(counts, plan, 3)).sum() == best


@few
@given(seed=seeds)
def test_refining_never_makes_worse_and_keeps_balance(seed):
    rng = np.random.default_rng(seed)
    counts, plan = random_counts(rng, (8, 4, 8)), random_plan([8, 4, 8], 4, rng)
    found = refine(counts, plan, 4)
    assert crossings(counts, found).sum() <= crossings(counts, plan).sum()
    assert [np.bincount(layer, minlength=4).tolist() for layer in found] == [[2] * 4, [1] * 4, [2] * 4]


def test_the_same_seed_gives_the_same_plan():
    counts = communities(np.random.default_rng(5), [16] * 4, 4, 0.8)[0]
    one, other = (local_search(counts, 4, seed=3) for _ in range(2))
    for a, b in zip(one, other, strict=True):
        np.testing.assert_array_equal(a, b)


@few
@given(seed=seeds)
def test_balanced_clusters_agree_with_brute_force(seed):
    load = np.random.default_rng(seed).integers(0, 1000, 8).astype(float)
    truth = min(np.bincount(layout, load, 2).max() for layout in layouts(8, 2))
    found = balanced_clusters(load, 2, time_limit=20)
    assert found.objective == np.bincount(found.plan[0], load, 2).max()
    assert truth <= found.objective <= truth * 1.0011
    assert found.bound <= truth + 1e-6
    assert np.bincount(found.plan[0]).tolist() == [4, 4]


def test_moetuner_evens_load_first_and_then_follows_tokens():
    # Two heavy experts a layer must part; which light one goes with them is free, so that tokens decide the device.
    counts = [np.array([[90, 0, 0, 0], [0, 90, 0, 0], [0, 0, 5, 0], [0, 0, 0, 5]])[:, [1, 0, 2, 3]]]
    loads = [counts[0].sum(axis=1), counts[0].sum(axis=0)]
    found = moetuner(counts, loads, 2)
    for load, layer in zip(loads, found.plan, strict=True):
        np.testing.assert_array_equal(np.bincount(layer, load), [95, 95])
    assert found.plan[0][0] == found.plan[1][1]
    assert crossings(counts, found.plan).sum() in (0, 10)
    assert (found.objective, found.bound, found.status) == (190, 190, "optimal")


def test_regular_and_random_placements():
    assert round_robin([4], 2)[0].tolist() == [0, 1, 0, 1]
    assert contiguous([4, 5], 2)[1].tolist() == [0, 0, 0, 1, 1]
    rng = np.random.default_rng(0)
    counts = random_counts(rng, (6, 6, 4))
    for widths, devices in (((6, 6, 4), 2), ((6, 6, 4), 4)):
        drawn = np.array([crossings(counts, random_plan(widths, devices, rng)) for _ in range(4000)])
        expected = (devices - 1) / devices * np.array([table.sum() for table in counts])
        error = drawn.std(axis=0) / np.sqrt(len(drawn))
        assert (np.abs(drawn.mean(axis=0) - expected) < 4 * error).all()


def test_devices_that_talk_are_gathered_in_a_node():
    rng = np.random.default_rng(2)
    counts, home = communities(rng, [8, 8], 8, noise=0.0)
    # Device d also sends to its partner d + 4: partners belong together.
    partner = np.argsort(home[1])
    for expert, device in enumerate(home[0]):
        counts[0][expert, partner[(device + 4) % 8]] += 1000
    found = gathered(counts, home, 8, 2)
    node = [layer // 2 for layer in found]
    for expert in range(8):
        assert node[0][expert] == node[1][partner[(home[0][expert] + 4) % 8]]
    assert crossings(counts, found).sum() == crossings(counts, home).sum()
    assert gathered(counts, home, 8, 8) is home


def test_mistakes_are_named():
    with pytest.raises(MoescopeError, match="6 experts do not divide over 4 devices"):
        exflow([np.ones((6, 6))], 4)
    with pytest.raises(MoescopeError, match="two MoE layers"):
        exflow([], 2)
    with pytest.raises(MoescopeError, match="from the layer before"):
        exflow([np.ones((4, 4)), np.ones((2, 4))], 2)
    with pytest.raises(MoescopeError, match="0 or more"):
        exflow([np.full((4, 4), -1)], 2)
