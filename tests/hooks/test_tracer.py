"""The tracer finds each expert's output and its slot, whatever shape the weights take on their way to the product."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from moescope.hooks.tracer import TracedWeights, trace_weights

T, K, D = 6, 3, 5
PERMUTATION = torch.tensor([4, 0, 17, 9, 2, 11, 1, 3, 5, 6, 7, 8, 10, 12, 13, 14, 15, 16])


def sorted_product(outputs: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """As grouped matrix products do it: flat, permuted, multiplied, put back."""
    weighted = outputs[PERMUTATION] * weights.reshape(-1)[PERMUTATION].unsqueeze(-1)
    return weighted[PERMUTATION.argsort()].view(T, K, D).sum(1)


def batched_product(outputs: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    return (outputs.view(T, K, D) * weights.to(torch.float64).unsqueeze(-1).float()).sum(1)


def expert_by_expert(outputs: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    total = torch.zeros(T, D)
    for slot in range(K):
        tokens = torch.arange(T)
        total.index_add_(0, tokens, outputs.view(T, K, D)[tokens, slot] * weights[tokens, slot, None])
    return total


def in_place(outputs: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    return outputs.clone().mul_(weights.flatten()[:, None]).view(T, K, D).sum(1)


@pytest.mark.parametrize("compute", [sorted_product, batched_product, expert_by_expert, in_place])
def test_outputs_meet_their_slots_and_nothing_changes(compute: Callable[..., torch.Tensor]) -> None:
    outputs, weights = torch.randn(T * K, D), torch.rand(T, K)
    seen = torch.full((T * K, D), torch.nan)

    def observe(rows: torch.Tensor, slots: torch.Tensor) -> None:
        seen[slots] = rows

    result = compute(outputs, trace_weights(weights, observe))
    assert torch.equal(result, compute(outputs, weights))
    assert type(result) is torch.Tensor
    assert torch.equal(seen, outputs)


def test_what_is_not_an_output_is_not_observed() -> None:
    traced = trace_weights(torch.rand(T, K), lambda rows, slots: pytest.fail("no expert output was multiplied"))
    assert type(traced * 2.0) is torch.Tensor
    assert type(traced.sum(-1)) is torch.Tensor
    assert type(torch.cat([traced, traced])) is torch.Tensor
    assert isinstance(traced.reshape(-1), TracedWeights)
    assert traced.shape == (T, K)


def test_gradients_still_reach_the_weights() -> None:
    weights = torch.rand(T, K, requires_grad=True)
    expected = torch.rand(T, K, requires_grad=True)
    outputs = torch.randn(T * K, D)
    expected.data.copy_(weights.data)
    sorted_product(outputs, trace_weights(weights, lambda rows, slots: None)).square().sum().backward()
    sorted_product(outputs, expected).square().sum().backward()
    assert weights.grad is not None
    assert expected.grad is not None
    assert torch.equal(weights.grad, expected.grad)
