"""Effects against losses worked out one text at a time; random controls; runs that are killed and go on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy

import moescope as ms
from moescope.data import CORPUS
from moescope.edits import Mask, Recipe, Route, Scale, Zero
from moescope.effects import document_losses, effect, expert_effects, matched, sweep
from moescope.effects import tracing as tracing_module
from moescope.effects.recipes import p_beside
from moescope.hooks import Model, load
from tests.capturing.texts import model, rows

TEXTS = rows(10, longest=12)


def corpus() -> ms.Corpus:
    return ms.Corpus(TEXTS, ["kind"])


def by_hand(text: str, recipe: Recipe | None) -> tuple[float, int, torch.Tensor]:
    """Summed loss, predicted tokens and log-probabilities of one text alone."""
    ids = model().tokenizer(text, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        if recipe is None:
            logits = model().forward(ids)[0]
        else:
            with model().edited(recipe):
                logits = model().forward(ids)[0]
    loss = cross_entropy(logits[:-1], ids[0, 1:], reduction="sum")
    return float(loss), ids.shape[1] - 1, logits[:-1].log_softmax(-1)


def test_losses_are_those_of_each_text_alone() -> None:
    recipe = Recipe([Mask(layer=1, expert=[0, 3]), Scale(layer=2, expert=5, factor=4.0)])
    found = document_losses(model(), corpus(), [None, recipe], batch_tokens=40)
    for place, document in enumerate(found.documents):
        plain, tokens, p = by_hand(document.text, None)
        edited, _, q = by_hand(document.text, recipe)
        assert found.tokens[place] == tokens
        assert found.nats[:, place] == pytest.approx([plain, edited], rel=1e-4)
        assert found.divergence[0, place] == 0
        assert found.divergence[1, place] == pytest.approx(float((p.exp() * (p - q)).sum()), rel=1e-3, abs=1e-5)


def test_effects_are_means_over_the_tokens_of_a_label() -> None:
    recipe = Recipe([Zero(layer=1, expert=[0, 3])])
    result = effect(model(), corpus(), recipe, by="kind", controls=3)
    for kind in ("short", "long"):
        here = [row["text"] for row in TEXTS if row["kind"] == kind]
        plain, edited = (
            sum(by_hand(t, r)[0] for t in here) / sum(by_hand(t, r)[1] for t in here) for r in (None, recipe)
        )
        row = result.sel(label=kind)
        assert row["plain"].item() == pytest.approx(plain, rel=1e-4)
        assert row["change"].item() == pytest.approx(edited - plain, abs=1e-4)
        assert row["low"] <= row["change"] <= row["high"]
        assert row["p"].item() in {0.25, 0.5, 0.75, 1.0}
    assert result["control_change"].shape == (3, 2)


def test_p_holds_its_level_and_sees_either_side() -> None:
    draws = np.random.default_rng(0).normal(0.3, 1, (4000, 20))
    p = np.array([p_beside(row[0], row[1:]) for row in draws])  # the recipe's experts are as random as the controls
    assert [(p <= level).mean() for level in (0.05, 0.1, 0.5)] == pytest.approx([0.05, 0.1, 0.5], abs=0.025)
    raised = np.linspace(0.5, 1.5, 19)
    assert p_beside(9.0, raised) == p_beside(-2.0, raised) == 0.05
    assert p_beside(1.0, raised) == p_beside(0.3, np.array([0.1])) == 1


def test_controls_are_as_many_random_experts_of_the_same_layers() -> None:
    recipe = Recipe([Mask(layer=1, expert=[0, 3]), Scale(layer=1, expert=3, factor=2.0), Zero(layer=2, expert=7)])
    seen = set()
    for seed in range(200):
        first, second, third = matched(recipe, model(), np.random.default_rng(seed)).edits
        assert not {*first.expert} & {0, 3}
        assert len({*first.expert}) == 2
        assert second.expert[0] in first.expert  # the same expert stays the same expert
        assert third.expert[0] != 7
        seen |= {(1, expert) for expert in first.expert} | {(2, third.expert[0])}
    assert len(seen) == 6 + 7
    with pytest.raises(ms.MoescopeError, match="without naming experts"):
        matched(Recipe([Route(layer=1, top_k=1)]), model(), np.random.default_rng(0))
    with pytest.raises(ms.MoescopeError, match="too few to stand for"):
        matched(Recipe([Zero(layer=1, expert=range(5))]), model(), np.random.default_rng(0))


def test_a_sweep_repeats_the_effect_at_each_strength() -> None:
    recipe = Recipe([Scale(layer=1, expert=3, factor=9.0)])
    whole = sweep(model(), corpus(), recipe, [0.0, 1.0, 3.0], by="kind")
    assert whole["change"].sel(factor=1.0).values == pytest.approx([0, 0], abs=1e-6)
    alone = effect(model(), corpus(), Recipe([Scale(layer=1, expert=3, factor=3.0)]), by="kind", controls=0)
    assert whole["change"].sel(factor=3.0).values == pytest.approx(alone["change"].values, abs=1e-7)
    with pytest.raises(ms.MoescopeError, match="scale edits"):
        sweep(model(), corpus(), Recipe([Zero(layer=1, expert=3)]), [1.0])


@pytest.mark.parametrize("kind", ["mask", "zero"])
def test_every_expert_alone_equals_its_recipe(kind: Any) -> None:
    result = expert_effects(model(), corpus(), by="kind", kind=kind, layers=[1, 2], rows=5)
    assert result.sizes == {"layer": 2, "expert": 8, "label": 2}
    for layer, expert in [(1, 0), (1, 7), (2, 4)]:
        edit = {"mask": Mask, "zero": Zero}[kind](layer=layer, expert=expert)
        want = effect(model(), corpus(), Recipe([edit]), by="kind", controls=0)
        got = result["effect"].sel(layer=layer, expert=expert)
        assert got.values == pytest.approx(want["change"].sel(label=got["label"].values).values, abs=2e-5)


def test_a_killed_run_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    want = expert_effects(model(), corpus(), layers=[1])
    real, runs = tracing_module._of_text, []

    def dies(*args: Any) -> Any:
        runs.append(args)
        if len(runs) == 5:
            raise KeyboardInterrupt
        return real(*args)

    monkeypatch.setattr(tracing_module, "_of_text", dies)
    monkeypatch.setattr(tracing_module, "KEPT_TOGETHER", 2)
    with pytest.raises(KeyboardInterrupt):
        expert_effects(model(), corpus(), layers=[1], out=tmp_path / "e")
    runs.clear()
    monkeypatch.setattr(tracing_module, "_of_text", lambda *args: runs.append(args) or real(*args))
    got = expert_effects(model(), corpus(), layers=[1], out=tmp_path / "e")
    assert len(runs) == len(TEXTS) - 4
    assert got.equals(want)
    with pytest.raises(ms.MoescopeError, match="another question"):
        expert_effects(model(), corpus(), layers=[2], out=tmp_path / "e")
    edited = model().edited(Recipe([Mask(layer=2, expert=0)]))
    with edited, pytest.raises(ms.MoescopeError, match="another question"):
        expert_effects(model(), corpus(), layers=[1], out=tmp_path / "e")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "x").touch()
    with pytest.raises(ms.MoescopeError, match="not empty"):
        expert_effects(model(), corpus(), layers=[1], out=tmp_path / "other")


def test_mistakes_are_said_at_once() -> None:
    with pytest.raises(ms.MoescopeError, match="no MoE layer 9"):
        expert_effects(model(), corpus(), layers=[9])
    with pytest.raises(ms.MoescopeError, match="label 'colour'"):
        effect(model(), corpus(), Recipe([Zero(layer=1, expert=3)]), by="colour", controls=0)
    with pytest.raises(ms.RefusedError, match="cannot share a batch"):
        expert_effects(model("doge"), corpus())
    with pytest.raises(ms.RefusedError, match="never handed ids"):
        expert_effects(model("llama4"), corpus(), kind="zero")


@pytest.fixture(scope="module")
def bundled() -> Model:
    return load("tiny-qwen-moe")


def test_masking_a_domains_experts_raises_its_loss_more_than_random_ones_do(bundled: Model, tmp_path: Path) -> None:
    """On the bundled model, for experts found on other documents than those the loss is measured on."""
    documents = [{"text": d.text, "domain": d.labels["domain"]} for d in ms.Corpus(CORPUS, ["domain"])]
    store = ms.capture(bundled, ms.Corpus(documents[::8], ["domain"]), tmp_path / "s", ["routing"])
    npmi = ms.analysis.npmi(store, by="domain", permutations=0)
    for domain in ("spanish", "stories"):
        best = (-npmi["npmi"].sel(label=domain)).argsort(axis=-1)
        edits = [Mask(layer=int(layer), expert=best.sel(layer=layer).values[:3].tolist()) for layer in best["layer"]]
        some = [row for row in documents[1::4] if row["domain"] == domain][:4]
        result = effect(bundled, ms.Corpus(some, ["domain"]), Recipe(edits), by="domain", controls=39)
        assert result["p"].item() < 0.03, (domain, result["change"].item(), result["control_mean"].item())
        assert result["low"].item() > 0
