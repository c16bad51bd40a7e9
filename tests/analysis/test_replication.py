"""EPLB against its published example, hand-worked packings and the properties it promises."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moescope.analysis.replication import eplb, pack, replicate
from moescope.errors import MoescopeError

PUBLISHED = np.array(
    [
        [90, 132, 40, 61, 104, 165, 39, 4, 73, 56, 183, 86],
        [20, 107, 104, 64, 19, 197, 187, 157, 172, 86, 16, 27],
    ]
)


def test_the_published_example():
    """The example of the EPLB release: 12 experts, 4 replicas more, 4 groups on 2 nodes of 4 devices."""
    found = eplb(PUBLISHED, devices=8, redundant=4, groups=4, nodes=2)
    assert found.hierarchical
    expected = [
        [5, 6, 5, 7, 8, 4, 3, 4, 10, 9, 10, 2, 0, 1, 11, 1],
        [7, 10, 6, 8, 6, 11, 8, 9, 2, 4, 5, 1, 5, 0, 3, 1],
    ]
    np.testing.assert_array_equal(found.expert.reshape(2, 16), expected)
    np.testing.assert_array_equal(found.replicas[0], np.bincount(expected[0], minlength=12))


def test_packing_by_hand():
    # 9 -> pack 0; 7 -> pack 1; 6 -> pack 1 (7 < 9); 4 -> pack 0 (9 < 13); 3 -> 0 (13 = 13, the first); 1 -> 1.
    assert pack(np.array([4.0, 9, 7, 1, 6, 3]), 2) == [[1, 0, 5], [2, 4, 3]]
    # The lightest pack may be full: 10 alone on one side, then 1, 1 fill the other, and the last 1 must join the 10.
    assert pack(np.array([10.0, 1, 1, 1]), 2) == [[0, 3], [1, 2]]
    assert pack(np.array([5.0, 4, 3]), 2) == [[0], [1, 2]]
    assert pack(np.array([1.0]), 3) == [[0], [], []]


def test_replication_by_hand():
    # 12, 6, 5: 12 -> two of 6; then 6 and 6 tie, the first expert gets the next -> 4 each; then 6 -> 3; then 5.
    np.testing.assert_array_equal(replicate(np.array([12.0, 6, 5]), 4), [0, 1, 2, 0, 0, 1, 2])


@given(seed=st.integers(0, 10**6), devices=st.integers(1, 6), per=st.integers(1, 4), redundant=st.integers(0, 5))
@settings(deadline=None)
def test_every_expert_is_held_and_devices_hold_equally_many(seed, devices, per, redundant):
    redundant = min(redundant, devices * per - 1)
    load = np.random.default_rng(seed).integers(0, 100, (2, devices * per - redundant)).astype(float)
    found = eplb(load, devices, redundant)
    assert found.expert.shape == (2, devices, per)
    for layer in range(2):
        held = np.bincount(found.expert[layer].ravel(), minlength=load.shape[1])
        np.testing.assert_array_equal(held, found.replicas[layer])
        assert held.min() >= 1
        hosts = found.hosts(layer)
        np.testing.assert_allclose(hosts.sum(axis=1), 1)
        for device, expert in itertools.product(range(devices), range(load.shape[1])):
            there = (found.expert[layer, device] == expert).sum()
            assert hosts[expert, device] == pytest.approx(there / held[expert])
        # No single expert could be given one replica more and one of another's less to lower the largest piece.
        piece = load[layer] / held
        for other in np.flatnonzero(held > 1):
            assert load[layer, other] / (held[other] - 1) >= piece.max() - 1e-9


def test_nodes_keep_groups_together_or_are_ignored():
    load = np.random.default_rng(0).integers(1, 50, (3, 16)).astype(float)
    found = eplb(load, devices=4, redundant=4, groups=4, nodes=2)
    node_of = [[set(np.flatnonzero(found.hosts(layer)[e]) // 2) for e in range(16)] for layer in range(3)]
    for layer, group in itertools.product(range(3), range(4)):
        assert len(set().union(*node_of[layer][4 * group : 4 * group + 4])) == 1
    assert not eplb(load, devices=4, groups=3, nodes=2).hierarchical


def test_uneven_devices_differ_by_one():
    found = eplb(np.arange(1.0, 8)[None], devices=3, uneven=True)
    assert sorted((found.expert[0] >= 0).sum(axis=1)) == [2, 2, 3]


def test_mistakes_are_named():
    with pytest.raises(MoescopeError, match="7 experts and replicas do not divide over 3"):
        eplb(np.ones((1, 6)), 3, redundant=1)
    with pytest.raises(MoescopeError, match="none missing"):
        eplb(np.array([[1.0, np.nan]]), 2)
    with pytest.raises(MoescopeError, match="must divide into the groups"):
        eplb(np.ones((1, 6)), 2, groups=4, nodes=2)
    with pytest.raises(MoescopeError, match="1 or more"):
        eplb(np.ones((1, 6)), 0)
