"""Selection scores had again from a store equal the reference's, bias, groups and fill included."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

import moescope as ms
from tests.capturing.texts import model, rows, tokenizer
from tests.zoo import reference


@pytest.mark.parametrize(
    "name", ["qwen3_moe", "deepseek_v3", "deepseek_v2", "mistral4", "axk2", "ernie4_5_moe", "afmoe", "lfm2_moe"]
)
def test_stored_rules_give_the_scores_that_selected(name: str, tmp_path: Path) -> None:
    texts = rows(1, longest=12)
    store = ms.capture(model(name), ms.Corpus(texts), tmp_path / "store", ["routing", "logits"])
    ids = torch.tensor([tokenizer()(texts[0]["text"])["input_ids"]])
    truth = reference(model(name).hf, name, {"input_ids": ids, "attention_mask": torch.ones_like(ids)})
    for site, want in zip(store.sites, truth.values(), strict=True):
        scores, routing = store.selection_scores(site.key), store.routing(site.key)
        # Where all scores are positive, a lost group filled with 0 cannot be told from one filled with -inf.
        true, kept = want.selection.numpy(), np.isfinite(scores)
        np.testing.assert_allclose(scores[kept], true[kept], rtol=1e-3, atol=1e-5)
        assert np.isin(true[~kept], (0, -np.inf)).all()
        ranked = np.argsort(-scores, axis=1, kind="stable")[:, : site.top_k]
        assert (ranked == routing.expert).all()
        best = np.sort(scores, axis=1)[:, ::-1]
        gap = best[:, site.top_k - 1] - best[:, site.top_k]
        there = np.isfinite(gap)
        np.testing.assert_allclose(routing.margin[there], gap[there], rtol=1e-2, atol=1e-5)
        assert np.isnan(routing.margin[~there]).all()


@pytest.mark.parametrize(("name", "sentence"), [("nllb_moe", "was not proven"), ("zaya", "scores skipping an expert")])
def test_where_scores_cannot_be_had_it_is_said(name: str, sentence: str, tmp_path: Path) -> None:
    store = ms.capture(model(name), ms.Corpus(rows(1)), tmp_path / "store", ["routing", "logits"])
    with pytest.raises(ms.StoreError, match=sentence):
        store.selection_scores(store.sites[0].key)
