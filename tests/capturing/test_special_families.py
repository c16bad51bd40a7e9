"""Families that follow no contract, from text to disk: what is stored is what a plain forward of each text shows."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

import moescope as ms
from tests.capturing.texts import model, rows, tokenizer
from tests.zoo import inputs, reference

SPECIAL = [
    "dbrx", "doge", "jetmoe", "llama4", "longcat_flash", "nllb_moe", "nllb_moe+drop", "step3p7", "switch_transformers",
    "diffusion_gemma",
    "old_mixtral", "old_qwen2_moe", "old_deepseek_v3", "old_deepseek_v2",
]  # fmt: skip


@pytest.mark.parametrize("name", SPECIAL)
def test_a_store_equals_the_reference_of_each_text_alone(name: str, tmp_path: Path) -> None:
    texts = rows(5, longest=8)
    store = ms.capture(
        model(name), ms.Corpus(texts, ["kind"]), tmp_path / "store",
        ["routing", "logits", "experts", "outliers"], batch_tokens=64,
    )  # fmt: skip
    document = store.tokens(["document"])["document"].to_numpy()
    for number, row in enumerate(texts):
        ids = torch.tensor([tokenizer()(row["text"])["input_ids"]])
        batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        if "decoder_input_ids" in inputs(name):  # both halves of the model get the text
            batch["decoder_input_ids"] = ids
        truth = reference(model(name).hf, name, batch)
        mine = np.flatnonzero(document == number)
        for site in store.sites:
            want = next((layer for path, layer in truth.items() if f"{site.path}.".startswith(f"{path}.")), None)
            if want is None:
                assert "self_attention" in site.path  # JetMoE's second mixture, which the reference leaves alone
                continue
            got, norms = store.routing(site.key), store.experts(site.key).norm[mine]
            present = np.ones_like(got.expert[mine], bool) if got.valid is None else got.valid[mine]
            assert (present.sum(1) == (want.ids >= 0).sum(1).numpy()).all()
            for token in range(len(mine)):
                true = want.by_expert(token)
                stored = dict(zip(got.expert[mine][token][present[token]], got.weight[mine][token], strict=False))
                assert stored.keys() == true.keys()
                for expert, weight in true.items():
                    assert stored[expert] == pytest.approx(weight, rel=1e-3, abs=1e-5)
            assert np.sort(norms[present]) == pytest.approx(np.sort(want.norm[want.ids >= 0]), rel=1e-3)


def test_what_kind_of_weight_and_expert_is_said(tmp_path: Path) -> None:
    for name, field, value in [("llama4", "weight_on", "input"), ("longcat_flash", "zero_experts", 4)]:
        store = ms.capture(model(name), ms.Corpus(rows(2)), tmp_path / name, ["routing"])
        assert {getattr(site, field) for site in store.sites} == {value}


def test_a_dropped_token_is_null_everywhere(tmp_path: Path) -> None:
    texts = [{"text": "sun " * 20, "kind": "same"}]  # one expert's capacity of two runs out at once
    store = ms.capture(model("switch_transformers"), ms.Corpus(texts), tmp_path / "store", ["routing", "experts"])
    gone = 0
    for site in store.sites:
        routing, experts = store.routing(site.key), store.experts(site.key)
        assert site.slots_can_miss
        assert routing.valid is not None
        gone += int((~routing.valid).sum())
        assert np.isnan(experts.norm[~routing.valid]).all()
        assert np.isnan(routing.margin[~routing.valid.all(1)]).all()
    assert gone > 0
