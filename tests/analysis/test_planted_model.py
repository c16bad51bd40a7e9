"""A model with known structure is captured, and the analyses find it; a model without it, and they find nothing.

Planted in a Qwen3-MoE whose attention writes nothing: layer 0's experts 3 and 5 fire for the two halves of the
vocabulary, layer 1's expert 6 fires where layer 0's expert 2 did, layer 2's expert 1 writes an outlier, and its experts
4 and 7 are one and the same. Everything else is random, and no two layers share a random channel of the embedding.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen3MoeConfig, Qwen3MoeForCausalLM

import moescope as ms
from moescope import analysis
from moescope.analysis.pairwise import redundant_pairs
from moescope.hooks.weights import expert_weights

VOCABULARY, HIDDEN, EXPERTS = 32768, 64, 8
DOMAIN, ONE, LINK, OUTLIER = 0, 1, 2, 3  # channels with a meaning; the rest is noise, 20 channels for each layer


def build(planted: bool) -> ms.Model:
    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        vocab_size=VOCABULARY,
        hidden_size=HIDDEN,
        num_hidden_layers=3,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        moe_intermediate_size=16,
        intermediate_size=16,
        num_experts=EXPERTS,
        num_experts_per_tok=2,
        norm_topk_prob=True,
        max_position_embeddings=128,
        tie_word_embeddings=False,
    )
    model = Qwen3MoeForCausalLM(config).eval()
    with torch.no_grad():
        embedding = model.model.embed_tokens.weight
        embedding.normal_()
        embedding[VOCABULARY // 2 :] = embedding[: VOCABULARY // 2]  # the halves differ in nothing but their channel
        embedding[:, : OUTLIER + 1] = 0
        embedding[:, ONE] = 2.0
        embedding[: VOCABULARY // 2, DOMAIN], embedding[VOCABULARY // 2 :, DOMAIN] = 3.0, -3.0
        for number, layer in enumerate(model.model.layers):
            layer.self_attn.o_proj.weight.zero_()
            gate, own = layer.mlp.gate.weight, slice(4 + 20 * number, 24 + 20 * number)
            gate.zero_()
            gate[:, own] = torch.randn(EXPERTS, 20) * 0.1
            for part in (layer.mlp.experts.gate_up_proj, layer.mlp.experts.down_proj):
                part.normal_(0, 0.02)
        if planted:
            plant(model)
    words = {f"w{i}": i for i in range(VOCABULARY)}
    backend = Tokenizer(models.WordLevel(words, unk_token="w0"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="w0", unk_token="w0")
    return ms.wrap(model, tokenizer, name="planted" if planted else "plain")


def plant(model: Qwen3MoeForCausalLM) -> None:
    first, second, third = (layer.mlp for layer in model.model.layers)
    first.gate.weight[3, DOMAIN], first.gate.weight[5, DOMAIN] = 1.0, -1.0
    constant(first.experts, 2, LINK, 20.0)
    second.gate.weight[6].zero_()
    second.gate.weight[6, LINK], second.gate.weight[6, ONE] = 20.0, -12.0
    constant(third.experts, 1, OUTLIER, 500.0)
    third.gate.weight[7] = third.gate.weight[4]
    for part in (third.experts.gate_up_proj, third.experts.down_proj):
        part[7] = part[4]


def constant(experts: torch.nn.Module, expert: int, channel: int, size: float) -> None:
    """One neuron of an expert reads the channel that is the same for all tokens, and writes into another."""
    gate_up, down = experts.gate_up_proj[expert], experts.down_proj[expert]
    for row in (0, gate_up.shape[0] // 2):  # the neuron's gate and its up projection
        gate_up[row].zero_()
        gate_up[row, ONE] = 1.0
    down[:, 0].zero_()
    down[channel, 0] = size


@pytest.fixture(scope="module", params=[True, False], ids=["planted", "plain"])
def captured(request, tmp_path_factory):
    model = build(request.param)
    draw = np.random.default_rng(0)
    texts = []
    for number in range(120):
        start = VOCABULARY // 2 * (number % 2)
        tokens = draw.integers(start, start + VOCABULARY // 2, 48)
        texts.append({"text": " ".join(f"w{token}" for token in tokens), "domain": "ab"[number % 2]})
    out = tmp_path_factory.mktemp("planted") / "store"
    tiers = ["routing", "logits", "experts", "outliers"]
    return request.param, model, ms.capture(model, ms.Corpus(texts, labels=["domain"]), out, tiers)


def test_specialists(captured):
    planted, _, store = captured
    found = analysis.npmi(store, by="domain")
    stands = {
        (int(layer), int(expert), "ab"[label])
        for layer, expert, label in np.argwhere((found["q"].values <= 0.05) & (found["npmi"].values > 0))
    }
    assert stands == ({(0, 3, "a"), (0, 5, "b")} if planted else set())
    if planted:
        assert found["p_active"].sel(layer=0, expert=3, label="a").item() == 1


def test_affinity(captured):
    planted, _, store = captured
    found = analysis.affinity(store, ranks="all")
    known = found["q_mi"].values <= 0.05
    assert known.tolist() == [planted, False]
    if planted:
        lift = found["lift"].isel(pair=0).values
        assert np.unravel_index(np.nanargmax(lift), lift.shape) == (2, 6)
        assert lift[2, 6] > 2
        assert found["q"].isel(pair=0).values[2, 6] <= 0.05
        assert np.sort(lift.ravel())[-2] < 1.5


def test_super_expert(captured):
    planted, _, store = captured
    found = analysis.super_experts(store, depth=2)
    solid = found["by_ratio"].values & (found["robust_z"].values > found["z_null_p99"].values[:, None])
    assert [tuple(place) for place in np.argwhere(solid)] == ([(0, 2), (2, 1)] if planted else [])
    if planted:
        assert bool(found["super"].sel(layer=2, expert=1))


def test_redundant_pair(captured):
    planted, model, store = captured
    weights = {site.layer: expert_weights(model, site.key) for site in model.sites}
    for found in (analysis.weight_similarity(weights), analysis.logit_similarity(store)):
        pairs = redundant_pairs(found)
        named = set(zip(*(pairs[f"pair_{part}"].values.tolist() for part in ("layer", "expert", "other")), strict=True))
        assert ((2, 4, 7) in named) == planted
        if found.attrs["analysis"] == "weight_similarity":
            assert named <= {(2, 4, 7)}
