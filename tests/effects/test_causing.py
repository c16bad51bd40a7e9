"""One expert masked on the texts of a store: against losses worked out one text at a time, and what is refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy

import moescope as ms
from moescope import figures
from moescope.analysis.effect_summary import effect_finding
from moescope.edits import Mask, Recipe
from moescope.effects import causal_effect
from moescope.effects.recipes import p_beside, p_over_labels
from tests.analysis.made_stores import random_truth, write
from tests.capturing.texts import model, rows

TEXTS = rows(40, longest=20)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> ms.Store:
    return ms.capture(model(), ms.Corpus(TEXTS, ["kind"]), tmp_path_factory.mktemp("causing") / "s", max_length=16)


def by_hand(text: str, expert: int | None, longest: int) -> tuple[float, int]:
    """Summed loss and predicted tokens of the beginning of one text alone."""
    ids = model().tokenizer(text, return_tensors="pt")["input_ids"][:, :longest]
    with torch.no_grad():
        if expert is None:
            logits = model().forward(ids)[0]
        else:
            with model().edited(Recipe([Mask(layer=2, expert=expert)])):
                logits = model().forward(ids)[0]
    return float(cross_entropy(logits[:-1], ids[0, 1:], reduction="sum")), ids.shape[1] - 1


def test_it_is_the_loss_of_the_stores_own_texts_with_the_expert_masked(store: ms.Store) -> None:
    told: list[tuple[int, int]] = []
    result = causal_effect(
        model(), store, 2, 3, by="kind", documents=99, on_progress=lambda done, total: told.append((done, total))
    )
    assert result["control"].values.tolist() == [0, 1, 2, 4, 5, 6, 7]
    for kind in ("short", "long"):
        here = [row["text"] for row in TEXTS if row["kind"] == kind]
        row = result.sel(label=kind)
        assert int(row["documents"]) == len(here)
        for expert, got in ((None, row["plain"]), (3, row["edited"]), (5, row["plain"] + row["control_change"][4])):
            parts = [by_hand(text, expert, 16) for text in here]
            want = sum(nats for nats, _ in parts) / sum(tokens for _, tokens in parts)
            assert float(got) == pytest.approx(want, rel=2e-5)
    assert int(result["tokens"].sum()) == sum(by_hand(row["text"], None, 16)[1] for row in TEXTS)
    assert told[0][0] == 0
    assert len({total for _, total in told}) == 1
    assert told[-1][0] < told[-1][1] == 9 * sum(by_hand(row["text"], None, 16)[1] + 1 for row in TEXTS)
    bars, *ticks = figures.draw(result).data
    assert np.array_equal(bars.x, result["change"].values)
    assert list(ticks[1].text) == [f"expert {other}" for other in result["control"].values]


def test_every_expert_is_held_to_the_same_few_documents(store: ms.Store) -> None:
    first, second = (causal_effect(model(), store, 2, e, by="kind", documents=3, controls=4) for e in (1, 6))
    assert first["plain"].values.tolist() == second["plain"].values.tolist()
    assert first["documents"].values.tolist() == [3, 3]
    assert first.sizes["control"] == 4
    assert 1 not in first["control"].values
    again = causal_effect(model(), store, 2, 1, by="kind", documents=3, controls=4)
    assert again.identical(first)
    other = causal_effect(model(), store, 2, 1, by="kind", documents=3, controls=4, seed=1)
    assert not np.array_equal(other["plain"].values, first["plain"].values)
    some = causal_effect(model(), store, 2, 1, where={"kind": ["long"]}, documents=99, controls=0)
    assert some["label"].values.tolist() == ["all"]
    assert int(some["documents"][0]) == sum(row["kind"] == "long" for row in TEXTS)
    assert effect_finding(some).holds is None


def test_conversations_are_read_as_they_were_captured(tmp_path: Path) -> None:
    """The template's own special tokens stand in the stored text: they must not be written twice."""
    plain = ms.capture(model(), ms.Corpus(TEXTS[:6]), tmp_path / "plain")
    manifest = tmp_path / "plain" / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"chat_template": false', '"chat_template": true'))
    chat = ms.open(tmp_path / "plain")
    assert chat.manifest.corpus.chat_template
    tokens = [int(causal_effect(model(), one, 2, 1, controls=0)["tokens"].sum()) for one in (plain, chat)]
    assert tokens[0] - tokens[1] == sum(len(model().tokenizer(row["text"])["input_ids"]) > 1 for row in TEXTS[:6])


def test_mistakes_are_one_sentence(store: ms.Store, tmp_path: Path) -> None:
    with pytest.raises(ms.MoescopeError, match="experts 0 to 7"):
        causal_effect(model(), store, 2, 8)
    with pytest.raises(ms.MoescopeError, match="no label 'colour'"):
        causal_effect(model(), store, 2, 1, by="colour")
    with pytest.raises(ms.MoescopeError, match="at least one document"):
        causal_effect(model(), store, 2, 1, documents=0)
    with pytest.raises(ms.MoescopeError, match="not the model that this store was captured from"):
        causal_effect(model("mixtral"), store, 2, 1)
    layers = [site.layer for site in model().sites]
    for widths, words in (([8] * len(layers), "no texts"), ([4] * len(layers), "its experts are others")):
        made = random_truth(np.random.default_rng(0), 6, widths, [2] * len(layers))
        written = write(tmp_path / words, made, widths, {}, layers, name=model().name, texts=[" "] * 6)
        with pytest.raises(ms.MoescopeError, match=words):
            causal_effect(model(), written, layers[0], 1)


def test_p_over_labels_holds_its_level_whatever_the_labels_sizes() -> None:
    rng = np.random.default_rng(0)
    scale = np.array([1e-4, 1.0, 30.0, 1.0])
    draws = rng.normal(0.3, 1, (3000, 20, 1)) * scale * 0.3 + rng.standard_t(3, (3000, 20, 4)) * scale
    p = np.array([p_over_labels(row[0], row[1:]) for row in draws])
    assert [(p.min(axis=1) <= level).mean() for level in (0.05, 0.25)] == pytest.approx([0.05, 0.25], abs=0.025)
    one = np.array([p_over_labels(row[0, :1], row[1:, :1]) for row in draws[:200]])
    assert one[:, 0].tolist() == [p_beside(row[0, 0], row[1:, 0]) for row in draws[:200]]
    assert np.isnan(p_over_labels(np.ones(3), np.zeros((0, 3)))).all()
    assert p_over_labels(np.array([9.0, 0.0]), np.zeros((19, 2))).tolist() == [0.05, 1.0]
