"""Models that run out of the ordinary are captured when the check passes, and refused by name otherwise."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from transformers.integrations.finegrained_fp8 import FP8Experts

from moescope.errors import RefusedError
from moescope.hooks import Tap, Want, wrap
from tests.zoo import build, inputs


@pytest.fixture
def hf() -> Any:
    return build("qwen3_moe")


def compiled_whole(hf: nn.Module) -> Any:
    return torch.compile(hf, backend="eager")


def compiled_in_place(hf: nn.Module) -> Any:
    hf.compile(backend="eager")
    return hf


def compiled_in_one_graph(hf: nn.Module) -> Any:
    hf.compile(backend="eager", fullgraph=True)
    return hf


def compiled_layers(hf: Any) -> Any:
    for layer in hf.model.layers:
        layer.compile(backend="eager")
    return hf


@pytest.mark.parametrize("compile", [compiled_whole, compiled_in_place, compiled_layers, compiled_in_one_graph])
def test_compiled_models_read_as_the_plain_one(hf: Any, compile: Any) -> None:
    def read(model: Any, hf: Any) -> tuple[torch.Tensor, dict[str, Any]]:
        batch = inputs("qwen3_moe")
        with torch.no_grad(), Tap(model.hf, model.sites, model.semantics, Want(logits=True, experts=True)) as tap:
            tap.begin(batch["input_ids"].numel())
            logits = hf(**batch).logits
            return logits, tap.take().sites

    plain = wrap(hf)
    logits, want = read(plain, hf)
    fast = compile(hf)
    with torch.no_grad():
        fast(**inputs("qwen3_moe"))  # compiled before anybody looks
    model = wrap(fast)
    assert any("torch.compile" in words for words in model.execution)
    assert torch.equal(read(model, fast)[0], logits)
    for (key, got), true in zip(read(model, fast)[1].items(), want.values(), strict=True):
        assert torch.equal(got.expert, true.expert), key
        assert torch.equal(got.weight, true.weight)
        assert torch.equal(got.norm, true.norm)


def test_a_compiler_that_fails_is_one_sentence(hf: Any) -> None:
    def backend(graph: Any, example: Any) -> Any:
        raise NotImplementedError("no such kernel")

    hf.compile(backend=backend)
    with pytest.raises(RefusedError, match="compiled model cannot be watched") as caught:
        wrap(hf)
    assert "\n" not in str(caught.value)


def test_one_kernel_for_router_and_experts_is_refused_by_name() -> None:
    hf: Any = build("gpt_oss")

    class Mxfp4GptOssMLP(nn.Module):
        """Calls neither its router nor its experts as modules, as the MXFP4 block of transformers 5.23."""

        def __init__(self, block: Any) -> None:
            super().__init__()
            self.router, self.experts = block.router, block.experts

        def forward(self, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            flat = hidden.reshape(-1, hidden.shape[-1])
            logits, weights, ids = self.router.forward(flat)
            return self.experts.forward(flat, ids, weights).view(hidden.shape), logits

    for layer in hf.model.layers:
        layer.mlp = Mxfp4GptOssMLP(layer.mlp)
    with pytest.raises(RefusedError, match=r"one MXFP4 kernel; load it with Mxfp4Config\(dequantize=True\)"):
        wrap(hf)


def test_a_refusal_of_a_quantised_model_names_the_method(hf: Any) -> None:
    hf.config.quantization_config = SimpleNamespace(quant_method="fp8")
    assert wrap(hf).execution == ["is quantised (fp8)"]  # captured, since the check passes
    hf.model.layers[0].mlp.experts.register_forward_hook(lambda module, args, output: output * 1.1)
    with pytest.raises(RefusedError, match=r"misses the experts' real output .* is quantised \(fp8\)"):
        wrap(hf)


def test_packed_weights_are_named_without_a_configuration(hf: Any) -> None:
    hf.model.layers[0].packed = nn.Parameter(torch.zeros(2, dtype=torch.int8), requires_grad=False)
    assert wrap(hf).execution == ["is quantised (int8)"]


def test_fp8_experts_take_the_same_call() -> None:
    """What discovery and reading rest on, where no FP8 kernel can run: the signature of transformers' FP8 experts."""
    import inspect

    assert list(inspect.signature(FP8Experts.forward).parameters)[1:4] == [
        "hidden_states", "top_k_index", "top_k_weights",
    ]  # fmt: skip


def test_expert_parallel_is_refused_by_name(hf: Any) -> None:
    hf.model.layers[0].mlp.experts._is_expert_parallel = True
    with pytest.raises(RefusedError, match="is expert parallel"):
        wrap(hf)


def test_offloaded_weights_are_refused_by_name(hf: Any) -> None:
    hf.lm_head.weight = nn.Parameter(hf.lm_head.weight.to("meta"), requires_grad=False)
    with pytest.raises(RefusedError, match="offloaded"):
        wrap(hf)


def test_sharded_weights_are_refused_by_name(hf: Any) -> None:
    hf.lm_head.weight.device_mesh = "mesh"
    with pytest.raises(RefusedError, match="sharded"):
        wrap(hf)
