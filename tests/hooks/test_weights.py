"""Expert matrices: they compute what the slow reference computes from each family's raw weights, or are refused."""

from __future__ import annotations

import functools
from dataclasses import replace

import numpy as np
import pytest
import torch

from moescope.errors import MoescopeError, RefusedError
from moescope.hooks import Model, wrap
from moescope.hooks.weights import ExpertWeights, expert_weights
from tests.zoo import ZOO, build, shared
from tests.zoo.reference_experts import ACTIVATIONS, _gate, expert, rms_norm

PLAIN = ["qwen2_moe", "mixtral", "deepseek_v3", "zaya", "gemma4", "inkling2", "deepseek_v4", "minimax_m3_vl", "step3p7"]
TURNED = ["gpt_oss", "openai_privacy_filter", "aria", "llama4"]
OTHER = ["nemotron_h", "muse_spark", "dbrx", "doge", "longcat_flash", "switch_transformers", "nllb_moe"]
APART = ["old_mixtral", "old_qwen2_moe", "old_deepseek_v3", "old_deepseek_v2"]


@functools.cache
def wrapped(name: str) -> Model:
    return wrap(shared(name), name=name)


def recomputed(name: str, weights: ExpertWeights, index: int, x: torch.Tensor, module, config) -> torch.Tensor:
    """One expert on one vector, from the arrays alone, by the family's published arithmetic."""
    math = ZOO[name].experts
    arrays = {
        part: None if (values := getattr(weights, part)) is None else torch.from_numpy(values[index]).double()
        for part in ("gate", "up", "down", "gate_bias", "up_bias", "down_bias")
    }
    up = arrays["up"] @ x + (0 if arrays["up_bias"] is None else arrays["up_bias"])
    if arrays["gate"] is None:
        hidden = ACTIVATIONS[math.activation](up)
    else:
        gate = arrays["gate"] @ x + (0 if arrays["gate_bias"] is None else arrays["gate_bias"])
        hidden = _gate(replace(math, interleaved=False), torch.cat([gate, up]), module, config)
    out = arrays["down"] @ hidden + (0 if arrays["down_bias"] is None else arrays["down_bias"])
    if math.post_norm:
        out = rms_norm(out * (1 + module.post_expert_norm.weight.double()), None, config.post_norm_eps)
    return out


@pytest.mark.parametrize("name", [*PLAIN, *TURNED, *OTHER, *APART])
def test_matrices_compute_what_the_reference_computes(name: str) -> None:
    model = wrapped(name)
    config = model.hf.config.get_text_config()
    # The reference of a list of modules is asked through the block that holds it.
    for site in (model.sites[0], model.sites[-1]):
        weights = expert_weights(model, site.key)
        in_block = ZOO[name].experts.kind in ("module_list", "packed")
        module = model.hf.get_submodule(site.block if in_block else site.experts)
        width = weights.up.shape[2]
        assert weights.down.shape == (site.n_experts, width, weights.up.shape[1])
        assert weights.error < 1e-4
        draw = torch.Generator().manual_seed(3)
        for index in range(site.n_experts - site.zero_experts):
            x = torch.randn(width, generator=draw, dtype=torch.float64)
            want = expert(ZOO[name].experts, module, index, config)(x)
            got = recomputed(name, weights, index, x, module, config)
            torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)
            assert want.norm() > 0


@pytest.mark.parametrize("name", ["qwen2_moe", "gpt_oss", "deepseek_v3", "llama4", "old_qwen2_moe", "dbrx"])
def test_router_rows_give_the_logits(name: str) -> None:
    model = wrapped(name)
    site = model.sites[0]
    weights = expert_weights(model, site.key)
    router, seen = model.hf.get_submodule(site.router), {}
    hook = router.register_forward_hook(lambda module, args, out: seen.update(x=args[0], out=out))
    batch = model.check_batch()
    with torch.no_grad():
        model.forward(batch, torch.ones_like(batch))
    hook.remove()
    x = seen["x"].reshape(-1, weights.router.shape[1]).numpy()
    got = x @ weights.router.T + (0 if weights.router_bias is None else weights.router_bias)
    family = ZOO[name].routing
    raw = router.get_parameter(family.weight if name != "old_qwen2_moe" else "weight").numpy()
    want = x @ raw.T + (router.get_parameter(family.logit_bias).numpy() if family.logit_bias else 0)
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)


def test_experts_that_compute_nothing_have_no_matrices() -> None:
    model = wrapped("longcat_flash")
    weights = expert_weights(model, model.sites[0].key)
    assert model.sites[0].zero_experts == 4
    assert np.isnan(weights.down[-4:]).all()
    assert np.isnan(weights.up[-4:]).all()
    assert not np.isnan(weights.down[:-4]).any()
    assert weights.router is not None
    assert not np.isnan(weights.router).any()  # they are routed to all the same


def test_matrices_put_neurons_first() -> None:
    weights = expert_weights(wrapped("gpt_oss"), 0)
    found = weights.matrices()
    assert list(found) == ["gate", "up", "down"]
    assert {part.shape for part in found.values()} == {weights.up.shape}
    np.testing.assert_array_equal(found["down"][2, 5], weights.down[2, :, 5])
    assert list(expert_weights(wrapped("nemotron_h"), model_layer("nemotron_h")).matrices()) == ["up", "down"]


def model_layer(name: str) -> str:
    return wrapped(name).sites[0].key


def test_low_precision_is_widened_exactly() -> None:
    model = wrap(shared("qwen2_moe", torch.bfloat16), name="qwen2_moe")
    weights = expert_weights(model, 0)
    stored = model.hf.get_submodule(model.sites[0].experts).down_proj
    assert weights.down.dtype == np.float32
    np.testing.assert_array_equal(weights.down, stored.float().numpy())


def test_square_matrices_are_oriented_by_what_they_compute() -> None:
    """A down projection as wide as it is high: no shape tells [out, in] from [in, out]."""
    import transformers

    config = ZOO["gpt_oss"].config | {"intermediate_size": 32}
    for name, extra, turned in (("qwen2_moe", {"moe_intermediate_size": 32}, False), ("gpt_oss", config, True)):
        family = ZOO[name]
        hf_class = getattr(transformers, family.model)
        torch.manual_seed(0)
        hf = hf_class._from_config(hf_class.config_class(**(family.config | extra))).eval()
        with torch.no_grad():
            for parameter in hf.parameters():
                parameter.normal_(std=0.2)
        model = wrap(hf)
        stored = hf.get_submodule(model.sites[0].experts).down_proj
        assert stored.shape[1] == stored.shape[2]
        weights = expert_weights(model, 0)
        want = stored.transpose(1, 2) if turned else stored
        np.testing.assert_array_equal(weights.down, want.detach().numpy())


def test_reading_leaves_the_model_as_it_was() -> None:
    model = wrap(build("old_mixtral"))
    before = model._check_forward(model.check_batch())
    expert_weights(model, 0)
    assert torch.equal(before, model._check_forward(model.check_batch()))
    assert not any(
        module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module) for module in model.hf.modules()
    )


def test_what_cannot_be_proven_is_refused_with_the_reason() -> None:
    with pytest.raises(RefusedError, match="no activation"):
        expert_weights(wrapped("jetmoe"), "L000-self_attention")
    assert expert_weights(wrapped("jetmoe"), "L000-mlp").error < 1e-4


def test_a_gate_that_is_not_a_gate_is_refused() -> None:
    model = wrap(build("qwen2_moe"))
    for site in model.sites:
        model.hf.get_submodule(site.experts).act_fn = torch.nn.Identity()
    with pytest.raises(RefusedError, match="as curved in one argument as in the other"):
        expert_weights(model, 0)


def test_matrices_that_are_not_what_runs_are_refused() -> None:
    """A residual added to each expert's output: the stored matrices no longer say what an expert computes."""
    model = wrap(build("old_mixtral"))
    for site in model.sites:
        for part in model.hf.get_submodule(site.experts):
            part.register_forward_hook(lambda module, args, out: out + 0.1 * args[0])
    with pytest.raises(RefusedError, match="misses the experts' real outputs"):
        expert_weights(model, 0)


def test_layers_are_named_by_number_or_key() -> None:
    with pytest.raises(MoescopeError, match="No MoE layer 17"):
        expert_weights(wrapped("qwen2_moe"), 17)
    with pytest.raises(MoescopeError, match="several sites"):
        expert_weights(wrapped("jetmoe"), 0)
    assert expert_weights(wrapped("qwen2_moe"), "L002").layer == 2
