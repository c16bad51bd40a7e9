"""The gradient of one expert's place in a fused parameter, against autograd's gradient of the whole parameter."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import moescope as ms
from moescope.hooks.parts import Part, expert_parts, parameter_of
from moescope.unlearning.trained import Trained
from moescope.unlearning.watching import checkpointing
from tests.zoo import build

IDS = torch.arange(3, 63).reshape(2, 30)


class Largest(TorchDispatchMode):
    """The most numbers that any tensor made inside has."""

    numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor) and not func.is_view:
            self.numel = max(self.numel, result.numel())
        return result


def gradients(
    model: ms.Model, parts: list[Part], experts: list[str], again: bool = False
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Logits, and every part's gradient of something that hangs on all of them; two backwards, as in a step."""
    undo = checkpointing(model.hf, model.sites[:1]) if again else []
    with Trained(model.hf, parts, experts) as trained:
        for word in (5, 7):
            logits = model.forward(IDS)
            logits.float().log_softmax(-1)[..., word].sum().backward()
        trained.complete()
        assert all(parameter.grad is None for parameter in model.hf.parameters())
        found = {name: leaf.grad.clone() for name, leaf in trained.leaves.items() if leaf.grad is not None}
    for back in undo:
        back()
    return logits.detach(), found


@pytest.mark.parametrize(
    ("name", "how"),
    [
        ("qwen2_moe", ""),
        ("qwen2_moe", "eager"),
        ("qwen2_moe", "batched_mm"),  # gathers every token's matrices: falls back to the whole
        ("qwen2_moe", "bfloat16"),
        ("qwen2_moe", "checkpointing"),
        ("gpt_oss", ""),  # the other way round, with biases
        ("dbrx", ""),  # rows of one matrix
        ("llama4", ""),  # every token through every expert
        ("granitemoe", ""),
        ("jetmoe", ""),  # attention's experts run outside any forward: the whole again
    ],
)
def test_a_places_gradient_is_that_of_the_whole_to_the_bit(name: str, how: str) -> None:
    hf: Any = build(name, torch.bfloat16 if how == "bfloat16" else torch.float32)
    if how in ("eager", "batched_mm"):
        hf.set_experts_implementation(how)
    model = ms.wrap(hf, None)
    sites = model.sites[-2:]
    parts = [part for site in sites for expert in (1, 2) for part in expert_parts(hf, site, expert)]
    whole, want = gradients(model, parts, [])
    sliced, got = gradients(model, parts, [site.experts for site in sites], again=how == "checkpointing")
    assert torch.equal(whole, sliced)
    assert got.keys() == want.keys() == {str(part) for part in parts}
    assert any(bool(tensor.any()) for tensor in want.values())
    assert all(torch.equal(got[key], want[key]) for key in want)


@pytest.mark.parametrize("sliced", [True, False])
def test_nothing_as_large_as_all_experts_is_made_for_one(sliced: bool) -> None:
    hf: Any = build("qwen2_moe")
    model = ms.wrap(hf, None)
    site = model.sites[0]
    parts = expert_parts(hf, site, 1)
    largest = min(parameter_of(hf, part.path).numel() for part in parts)
    with Trained(hf, parts, [site.experts] if sliced else []):
        loss = model.forward(IDS[:1, :4]).float().logsumexp(-1).sum()
        with Largest() as seen:
            loss.backward()
    assert (seen.numel < largest) is sliced
