"""The causal test of criteria: numbers by hand, planted silent experts, and no winner where there is none."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import xarray as xr

import moescope as ms
from moescope import analysis
from moescope.capturing.corpus import Document
from moescope.data import CORPUS
from moescope.edits import Mask, Recipe, Zero
from moescope.effects import Losses, criteria_effects, effect
from moescope.effects.criteria import compare
from tests.capturing.texts import model, rows

TEXTS = rows(10, longest=12)


def corpus() -> ms.Corpus:
    return ms.Corpus(TEXTS, ["kind"])


def table(**criteria: Any) -> xr.Dataset:
    """An importance table of the tiny model, with criteria made up."""
    cells = {name: (("layer", "expert"), np.asarray(values, dtype=float)) for name, values in criteria.items()}
    return xr.Dataset(
        cells,
        coords={"layer": [0, 1, 2], "expert": np.arange(8), "site": ("layer", ["L000", "L001", "L002"]),
                "n_experts": ("layer", [8, 8, 8]), "criterion": list(criteria)},
    )  # fmt: skip


@pytest.mark.parametrize(("kind", "edit"), [("mask", Mask), ("zero", Zero)])
def test_changes_are_those_of_the_recipes(kind: Any, edit: Any) -> None:
    up = np.tile(np.arange(8.0), (3, 1))
    gone = up.copy()
    gone[:, 6] = np.nan  # never selected: the lowest of all
    found = criteria_effects(model(), corpus(), table(up=up, gone=gone), n=2, by="kind", kind=kind, controls=4)
    for criterion, end, experts in (
        ("up", "lowest", [0, 1]), ("up", "highest", [6, 7]), ("gone", "lowest", [0, 6]), ("gone", "highest", [5, 7])
    ):  # fmt: skip
        part = found.sel(criterion=criterion, end=end)
        assert part["expert"].values.tolist() == [experts] * 3
        recipe = Recipe([edit(layer=layer, expert=experts) for layer in range(3)])
        want = effect(model(), corpus(), recipe, by="kind", controls=0)
        for label in ("short", "long"):
            got = part["change"].sel(label=label).item()
            assert got == pytest.approx(want["change"].sel(label=label).item(), abs=1e-6)
        whole = effect(model(), corpus(), recipe, controls=0)
        assert part["change"].sel(label="all").item() == pytest.approx(whole["change"].item(), abs=1e-6)
        assert part["low"].sel(label="all") <= part["change"].sel(label="all") <= part["high"].sel(label="all")
    gap = found["change"].sel(end="highest") - found["change"].sel(end="lowest")
    np.testing.assert_allclose(found["gap"], gap)
    np.testing.assert_allclose(found["gap_best"].sum("criterion"), 1)
    np.testing.assert_allclose(found["best"].sum("criterion"), 1)
    assert found.attrs["runs"] == 1 + 4 + 4


def made(changes: np.ndarray, rng: np.random.Generator, documents: int = 12) -> Losses:
    """Losses whose recipes add these changes per token, with noise by document."""
    tokens = rng.integers(5, 50, documents)
    nats = (2 + changes[:, None] + 0.01 * rng.normal(size=(changes.size, documents))) * tokens
    names = [Document(number, str(number), "text", {}, "made") for number in range(documents)]
    return Losses(names, tokens, nats, np.zeros_like(nats))


def test_no_criterion_wins_where_all_are_random() -> None:
    p, gap = [], []
    for seed in range(200):
        rng = np.random.default_rng(seed)
        losses = made(np.concatenate([[0], rng.normal(0.3, 0.1, 2 + 20)]), rng)
        found = compare(losses, ["a"], seed=seed)
        p += found["p"].values.ravel().tolist()
        gap += found["gap_p"].values.ravel().tolist()
    # 5 % and 10 % of 400 (200), with three standard deviations of room.
    assert np.mean(np.array(p) <= 0.05) <= 0.05 + 3 * np.sqrt(0.05 * 0.95 / 400)
    assert np.mean(np.array(gap) <= 0.1) <= 0.1 + 3 * np.sqrt(0.09 / 200)
    assert np.mean(p) == pytest.approx(0.5, abs=0.06)


def test_a_criterion_that_knows_wins() -> None:
    rng = np.random.default_rng(0)
    changes = np.concatenate([[0], [0.05, 0.9, 0.3, 0.31, 0.9, 0.05], rng.normal(0.3, 0.1, 40)])
    found = compare(made(changes, rng), ["right", "blind", "wrong"])
    assert found["gap_best"].values.ravel().tolist() == [1, 0, 0]
    assert found["best"].values[:, :, 0].tolist() == [[1, 1], [0, 0], [0, 0]]
    right, blind, wrong = (found.sel(criterion=name, label="all") for name in ("right", "blind", "wrong"))
    assert right["p"].values.tolist() == [1 / 41, 1 / 41]
    assert right["gap_q"] < 0.08
    assert (blind["p"] > 0.2).all()
    assert (wrong["p"] > 0.9).all()
    assert wrong["gap_p"] == 1


def test_planted_silent_experts_are_found_by_norms_and_not_by_frequency(tmp_path: Path) -> None:
    """Half of every layer's experts give out nothing: to zero them costs nothing, to zero the others the most."""
    loaded = ms.load("tiny-qwen-moe")
    rng = np.random.default_rng(0)
    silent = [sorted(rng.choice(16, 8, replace=False).tolist()) for _ in loaded.sites]
    with torch.no_grad():
        for site, experts in zip(loaded.sites, silent, strict=True):
            loaded.hf.get_submodule(site.experts).down_proj[experts] = 0
    texts = [{"text": d.text} for d in ms.Corpus(CORPUS)][::72]
    store = ms.capture(loaded, ms.Corpus(texts[::2]), tmp_path / "s", ["routing", "experts"])
    importance = analysis.importance(store, permutations=9)
    found = criteria_effects(
        loaded, ms.Corpus(texts[1::2]), importance, ["reap", "frequency"], n=8, kind="zero", controls=10
    ).sel(label="all")
    reap = found.sel(criterion="reap")
    assert reap["expert"].sel(end="lowest").values.tolist() == silent
    assert reap["change"].sel(end="lowest").item() == pytest.approx(0, abs=1e-6)
    assert reap["gap_p"].item() == pytest.approx(1 / 11)
    assert reap["gap_low"] > 0
    assert found["gap_best"].sel(criterion="reap") > 0.99
    assert found["p"].sel(criterion="reap").values.tolist() == pytest.approx([1 / 11, 1 / 11])


def test_mistakes_are_named() -> None:
    flat = np.ones((3, 8))
    for wrong, says in (
        (lambda: criteria_effects(model(), corpus(), table(a=flat), controls=3), "even number"),
        (lambda: criteria_effects(model(), corpus(), table(a=flat), ["b"]), "no criterion 'b'"),
        (lambda: criteria_effects(model(), corpus(), table(a=flat), n=5), "5 lowest and 5 other highest"),
        (lambda: criteria_effects(model(), corpus(), table(a=flat * [[1], [np.nan], [1]]), ["a"]), "says nothing"),
        (lambda: criteria_effects(model(), corpus(), table(a=flat).expand_dims("label")), "by label"),
        (lambda: criteria_effects(model(), corpus(), table(a=flat).assign_attrs(model="x")), "of x, not of"),
    ):
        with pytest.raises(ms.MoescopeError, match=says):
            wrong()
