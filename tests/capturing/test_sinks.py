"""Attention sinks from text to disk equal those of eager attention weights."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

import moescope as ms
from moescope.capturing.batches import batches
from moescope.hooks import wrap
from tests.capturing.texts import model, rows, tokenizer
from tests.zoo import build


@pytest.mark.parametrize("name", ["qwen2_moe", "gpt_oss", "deepseek_v3"])
def test_shares_are_those_of_eager_attention(name: str, tmp_path: Path) -> None:
    corpus = ms.Corpus(rows(12))
    store = ms.capture(model(name), corpus, tmp_path / "s", sinks=True, batch_tokens=64, shard_tokens=64)
    assert len(store.shards) > 1
    eager = build(name)
    eager.set_attn_implementation("eager")
    mass: dict[int, np.ndarray] = {}
    queries = 0
    for batch in batches(corpus, tokenizer(), max_length=64, batch_tokens=64):
        ids = torch.from_numpy(batch.sequences[0].ids)[None]  # one sequence of each batch is watched
        with torch.no_grad():
            attentions = eager(ids, output_attentions=True, use_cache=False).attentions
        queries += ids.shape[1] - 1
        for layer, weights in enumerate(attentions):
            mass[layer] = mass.get(layer, 0) + weights[0, :, 1:, 0].double().sum(-1).numpy()
    found = ms.analysis.attention_sinks(store)
    for layer, sums in mass.items():
        np.testing.assert_allclose(found["share"].sel(layer=layer).values, sums / queries, rtol=1e-3)
    lengths = store.tokens(["position"])["position"].to_numpy()
    assert np.isclose(found["uniform"], np.mean([1 / (p + 1) for p in lengths if p > 0]))
    assert ms.figures.draw(found).data
    table = store.attention_sinks().to_pandas()
    assert set(table["layer"]) == set(mass)
    assert set(table["queries"]) == {queries}
    for layer, part in table.groupby("layer"):
        np.testing.assert_allclose(part["share"], mass[layer] / queries, rtol=1e-3)


def test_routing_is_the_same_with_and_without(tmp_path: Path) -> None:
    stores = [
        ms.capture(model(), ms.Corpus(rows(6)), tmp_path / str(sinks), ["routing", "logits"], sinks=sinks)
        for sinks in (False, True)
    ]
    for site in stores[0].sites:
        assert (stores[0].logits(site.key) == stores[1].logits(site.key)).all()
    with pytest.raises(ms.StoreError, match="no attention sinks"):
        stores[0].attention_sinks()
    with pytest.raises(ms.MoescopeError, match="neither attention sinks nor the outliers tier"):
        ms.analysis.attention_sinks(stores[0])


def test_layers_without_attention_have_no_share(tmp_path: Path) -> None:
    loaded = wrap(build("jamba"), tokenizer(), name="jamba")
    store = ms.capture(loaded, ms.Corpus(rows(3)), tmp_path / "s", sinks=True)
    layers = set(store.attention_sinks()["layer"].to_pylist())
    kinds = loaded.hf.config.layers_block_type
    assert layers == {n for n, kind in enumerate(kinds) if kind == "attention"}
