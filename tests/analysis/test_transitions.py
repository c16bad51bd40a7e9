"""Transitions and affinity against plain Python, a planted affinity, and independence."""

import itertools

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from moescope.analysis.transitions import transition_counts, transition_tables
from moescope.errors import MoescopeError, StoreError
from tests.analysis.made_stores import random_truth, write

cases = settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
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
