"""Layouts: the same for the same seed, groups that are there stand together, and noise is said to be noise."""

import builtins

import numpy as np
import pytest

from moescope.analysis.layouts import _ALONE, lay_out
from moescope.analysis.watching import watched
from moescope.errors import CancelledError, MoescopeError

pytest.importorskip("umap")


def groups(rng, each=12, n=4, width=10):
    centres = 8 * rng.normal(size=(n, width))
    return np.repeat(centres, each, axis=0) + rng.normal(size=(n * each, width))


def same_group_nearest(points, group):
    distance = np.linalg.norm(points[:, None] - points[None], axis=2)
    np.fill_diagonal(distance, np.inf)
    return float((group[distance.argmin(axis=1)] == group).mean())


def trustworthiness_by_hand(features, points, k):
    """Venna & Kaski's definition, point by point."""
    n, penalty = len(features), 0
    far = np.linalg.norm(features[:, None] - features[None], axis=2)
    near = np.linalg.norm(points[:, None] - points[None], axis=2)
    for i in range(n):
        rank = {int(j): r for r, j in enumerate(np.argsort(np.where(np.arange(n) == i, -1, far[i]), kind="stable"))}
        shown = [j for j in np.argsort(near[i], kind="stable") if j != i][:k]
        penalty += sum(max(0, rank[int(j)] - k) for j in shown)
    return 1 - 2 / (n * k * (2 * n - 3 * k - 1)) * penalty


def test_groups_stand_together_and_the_quality_is_its_definition():
    features = groups(np.random.default_rng(0))
    group = np.repeat(np.arange(4), 12)
    layout = lay_out(features, neighbours=8, seed=1)
    assert same_group_nearest(layout.points, group) == 1
    assert layout.trustworthiness == pytest.approx(trustworthiness_by_hand(features, layout.points, 8))
    assert layout.trustworthiness > 0.9
    assert layout.chance < 0.65
    assert layout.chance < layout.pca


def test_the_same_seed_gives_the_same_map():
    features = groups(np.random.default_rng(1), each=8)
    first, again, other = (lay_out(features, seed=seed) for seed in (3, 3, 4))
    np.testing.assert_array_equal(first.points, again.points)
    assert not np.array_equal(first.points, other.points)


def test_a_map_of_noise_is_hardly_trustworthy():
    noise = np.random.default_rng(2).normal(size=(80, 60))
    assert lay_out(noise).trustworthiness < lay_out(groups(np.random.default_rng(2), each=20)).trustworthiness - 0.15


def test_what_cannot_be_laid_out_is_said():
    with pytest.raises(MoescopeError, match="at least 6 points"):
        lay_out(np.random.default_rng(0).normal(size=(4, 3)))
    with pytest.raises(MoescopeError, match="same features"):
        lay_out(np.ones((9, 3)))
    with pytest.raises(MoescopeError, match="finite"):
        lay_out(np.full((9, 3), np.nan))
    assert lay_out(np.random.default_rng(0).normal(size=(6, 1))).points.shape == (6, 2)


def test_without_the_library_the_extra_is_named(monkeypatch):
    load = builtins.__import__

    def refuse(name, *args, **kwargs):
        if name.startswith("umap"):
            raise ImportError(name)
        return load(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(MoescopeError, match=r"moescope\[maps\]"):
        lay_out(np.random.default_rng(0).normal(size=(9, 3)))


def test_who_waits_for_another_map_can_be_stopped():
    features, waited = groups(np.random.default_rng(0)), []

    def tired(*_):
        waited.append(1)
        raise CancelledError("enough")

    with _ALONE, watched(tired), pytest.raises(CancelledError, match="enough"):
        lay_out(features)
    assert waited
    assert np.isfinite(lay_out(features).points).all()  # nobody holds the others up afterwards
