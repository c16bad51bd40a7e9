"""Shares of attention on the first token, against the weights that eager attention returns; what runs is unchanged."""

import pytest
import torch
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from moescope.hooks.sinks import SinkWatch
from moescope.hooks.sites import discover
from tests.zoo import build, inputs

FAMILIES = ["qwen2_moe", "qwen3_moe", "mixtral", "olmoe", "gpt_oss", "deepseek_v3", "glm4_moe", "phimoe", "granitemoe"]


def watched(model, given, real):
    layers = {number: f"model.layers.{number}" for number in range(len(model.model.layers))}
    with torch.no_grad(), SinkWatch(model, layers) as watch:
        watch.begin(real)
        logits = model(**given, use_cache=False).logits
        return logits, watch.take()


@pytest.mark.parametrize("padding", [None, "left", "right"])
@pytest.mark.parametrize("name", FAMILIES)
def test_shares_equal_those_of_returned_weights(name, padding):
    model, given = build(name), inputs(name, batch=3, length=11, padding=padding)
    real = given["attention_mask"].bool()
    with torch.no_grad():
        plain = model(**given, use_cache=False).logits
    logits, shares = watched(model, given, real)
    assert torch.equal(logits, plain)
    assert set(shares) == set(range(len(model.model.layers)))
    model.set_attn_implementation("eager")
    with torch.no_grad():
        weights = model(**given, use_cache=False, output_attentions=True).attentions
    for number, share in shares.items():
        mass, n = torch.zeros(weights[number].shape[1]), 0
        for row, mask in enumerate(real):
            places = mask.nonzero().flatten().tolist()
            for query in places[1:]:
                mass += weights[number][row, :, query, places[0]]
                n += 1
        assert int(share.queries) == n
        assert share.proven(torch.float32)
        torch.testing.assert_close(share.mass / n, mass / n, atol=2e-5, rtol=1e-4)


def test_only_the_first_sequences_are_looked_at():
    model, given = build("qwen2_moe"), inputs("qwen2_moe", batch=3, length=8)
    _, some = watched(model, given, given["attention_mask"][:1])
    one = {name: value[:1] for name, value in given.items()}
    _, alone = watched(model, one, one["attention_mask"])
    assert int(some[0].queries) == 7
    torch.testing.assert_close(some[0].mass, alone[0].mass, atol=1e-5, rtol=1e-4)


def test_the_interface_is_as_before_afterwards():
    model, given = build("qwen2_moe"), inputs("qwen2_moe")
    watched(model, given, given["attention_mask"])
    assert "get_interface" not in vars(ALL_ATTENTION_FUNCTIONS)


def test_attention_that_is_not_what_it_says_shows_in_the_error():
    model, given = build("qwen2_moe"), inputs("qwen2_moe")
    plain = ALL_ATTENTION_FUNCTIONS["sdpa"]

    def shrunk(module, query, key, value, attention_mask, scaling=None, **more):
        return plain(module, query * 0.2, key, value, attention_mask, scaling=scaling, **more)

    ALL_ATTENTION_FUNCTIONS["sdpa"] = shrunk
    try:
        _, shares = watched(model, given, given["attention_mask"])
    finally:
        del ALL_ATTENTION_FUNCTIONS["sdpa"]
    assert not any(share.proven(torch.float32) for share in shares.values())


def test_sinks_of_each_query_are_part_of_the_softmax():
    model, given = build("inkling2"), inputs("inkling2", batch=2, length=9)
    stack = discover(model)[0].layer_path.rpartition(".")[0]
    with torch.no_grad(), SinkWatch(model, {0: f"{stack}.0"}) as watch:
        watch.begin(given["attention_mask"])
        model(**given)
        shares = watch.take()
    assert shares[0].proven(torch.float32)
