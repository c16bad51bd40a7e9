"""MC-SMoE's groups against their definition, by hand and by brute force; and their figure."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moescope import figures
from moescope.analysis.grouping import dominant_experts, expert_groups, expert_groups_from_usage
from moescope.errors import MoescopeError
from tests.analysis.function_stores import random_truth, write


def test_groups_by_hand() -> None:
    usage = [np.array([10.0, 1, 8, 2]), np.array([100.0, 1, 2])]
    alike = [np.full((4, 4), 0.5), np.full((3, 3), 0.5)]
    alike[0][1, 2] = alike[0][2, 1] = 0.9
    result = expert_groups_from_usage(usage, alike, layers=[3, 5], keep=1.5)
    # Divided by the largest of its layer, 8 of 10 exceeds 2 of 100: layer 3 keeps two, layer 5 one.
    assert result["groups"].values.tolist() == [2, 1]
    assert result["group"].sel(layer=3).values.tolist() == [0, 2, 2, 0]  # a tie goes to the first
    assert result["group"].sel(layer=5).values[:3].tolist() == [0, 0, 0]
    assert np.isnan(result["group"].sel(layer=5, expert=3))
    assert result["similarity"].sel(layer=3, expert=1).item() == 0.9
    assert result["similarity_others"].sel(layer=3, expert=1).item() == 0.5
    assert np.isnan(result["similarity"].sel(layer=3, expert=0))
    np.testing.assert_allclose(result["share"].sel(layer=3), [10 / 12, 1 / 9, 8 / 9, 2 / 12])
    even = expert_groups_from_usage(usage, alike, keep=2, scope="layer")
    assert even["groups"].values.tolist() == [2, 2]


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 10**6), st.integers(1, 4), st.floats(1, 3), st.sampled_from(["model", "layer"]))
def test_groups_are_their_definition(seed: int, n_layers: int, keep: float, scope: str) -> None:
    rng = np.random.default_rng(seed)
    usage = [rng.integers(0, 9, int(rng.integers(3, 8))).astype(float) for _ in range(n_layers)]
    alike = [rng.random((len(u), len(u))) for u in usage]
    result = expert_groups_from_usage(usage, alike, keep=keep, scope=scope)  # pyright: ignore[reportArgumentType]
    total = 0
    for row, (count, matrix) in enumerate(zip(usage, alike, strict=True)):
        part = result.isel(layer=row, expert=slice(len(count)))
        dominant = np.flatnonzero(part["dominant"].values)
        total += dominant.size
        assert dominant.size >= 1
        for e in range(len(count)):
            head = int(part["group"].values[e])
            assert head in dominant
            if e in dominant:
                assert head == e
            else:
                assert matrix[e, head] == max(matrix[e, d] for d in dominant) == part["similarity"].values[e]
                assert count[e] <= min(count[d] for d in dominant)
        for head in dominant:
            assert part["share"].values[part["group"].values == head].sum() == pytest.approx(1)
    assert total == (max(n_layers, round(keep * n_layers)) if scope == "model" else round(keep) * n_layers)


def test_every_layer_keeps_its_most_used_expert_even_when_nothing_was_routed() -> None:
    found = dominant_experts([np.zeros(4), np.array([0.2, 1, 0.9, 0.8])], 2, "model")
    assert [f.tolist() for f in found] == [[True, False, False, False], [False, True, True, True]]


def test_groups_of_a_store_use_its_counts_and_its_logits(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    truth = random_truth(rng, documents=30, n_experts=(6, 4), k=2, longest=40)
    twin = truth.logits[0].copy()
    twin[:, 5] = twin[:, 1] + 0.05 * rng.normal(size=len(twin))
    truth.logits[0] = twin.astype(np.float32)
    truth.expert[0] = np.argsort(-(twin - [0, 0, 0, 0, 0, 0.6]), axis=1)[:, :2]  # the twin is used less
    result = expert_groups(write(tmp_path / "s", truth, 3), keep=3)
    for layer in range(2):
        width = truth.logits[layer].shape[1]
        counts = np.bincount(truth.expert[layer].ravel(), minlength=width)
        np.testing.assert_array_equal(result["selections"].sel(layer=layer).values[:width], counts)
        unit = truth.logits[layer].astype(float)
        unit /= np.linalg.norm(unit, axis=0)
        alike = (unit.T @ unit + 1) / 2
        for e in np.flatnonzero(~result["dominant"].sel(layer=layer).values[:width]):
            head = int(result["group"].sel(layer=layer, expert=e))
            assert result["similarity"].sel(layer=layer, expert=e).item() == pytest.approx(alike[e, head], abs=1e-6)
    assert result["group"].sel(layer=0, expert=5).item() == 1
    assert result["beyond"].sel(layer=0, expert=5).item()
    assert int(result["beyond"].sum()) == 1
    with pytest.raises(MoescopeError, match="`keep` is how many"):
        expert_groups(write(tmp_path / "t", truth), keep=9)


def test_the_figure_has_every_expert_once_behind_its_dominant() -> None:
    rng = np.random.default_rng(1)
    usage = [rng.integers(1, 50, n).astype(float) for n in (8, 5)]
    result = expert_groups_from_usage(usage, [rng.random((len(u), len(u))) for u in usage], layers=[2, 4], keep=2)
    figure = figures.draw(result)
    heat, heads = figure.data[0], figure.data[1]
    shown = [[int(cell[0]) for cell in row if not np.isnan(cell[0])] for row in heat.customdata]
    assert [sorted(row) for row in shown] == [list(range(8)), list(range(5))]
    assert len(heads.x) == int(result["groups"].sum()) == 4
    assert int(np.isfinite(np.asarray(heat.z, dtype=float)).sum()) == 13 - 4
    for row, layer in enumerate((2, 4)):
        for cell in heat.customdata[row]:
            if not np.isnan(cell[0]):
                assert cell[1] == result["group"].sel(layer=layer, expert=int(cell[0])).item()
