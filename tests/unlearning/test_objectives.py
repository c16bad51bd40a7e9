"""Each objective is its formula, and its gradient, through the model into the trained parts, a finite difference."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch.overrides import TorchFunctionMode

import moescope as ms
from moescope.hooks.parts import expert_parts, router_parts
from moescope.unlearning import Settings, objectives
from moescope.unlearning.examples import Tokens
from moescope.unlearning.objective import Objective
from moescope.unlearning.trained import Trained
from moescope.unlearning.watching import Watch
from tests.zoo import build

EXPERT = 1


class InDouble(TorchFunctionMode):
    """Norms and routers that insist on single precision work in double all the same: else differences are noise."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.Tensor.float:
            return args[0].double()
        wide = {torch.float32: torch.float64}
        args = tuple(wide.get(a, a) if isinstance(a, torch.dtype) else a for a in args)
        kwargs = {k: wide.get(a, a) if isinstance(a, torch.dtype) else a for k, a in (kwargs or {}).items()}
        return func(*args, **kwargs)


def in_double(name: str) -> ms.Model:
    hf: Any = build(name)
    if hasattr(hf, "set_experts_implementation"):
        hf.set_experts_implementation("eager")  # the grouped products have no double precision
    model = ms.wrap(hf, None)
    hf.double()
    return model


def tokens(n: int, length: int, seed: int) -> list[Tokens]:
    draw = np.random.default_rng(seed)
    return [Tokens(tuple(draw.integers(3, 90, length + row).tolist()), 1 + 2 * row) for row in range(n)]


@pytest.mark.parametrize("name", ["qwen2_moe", "old_mixtral", "deepseek_v3"])
@pytest.mark.parametrize(
    "changes",
    [
        {"method": "ga", "anchor": 0.0},
        {"method": "ga", "anchor": 0.7, "definition": "paper"},
        {"method": "ga", "anchor": 3.0, "definition": "code"},
        {"method": "gd", "retention": "loss"},
        {"method": "gd", "retention": "kl"},
        {"method": "npo", "beta": 0.7, "retention": "kl"},
        {"method": "rmu", "steering": 2.0},
        {"method": "npo", "scope": "model"},
    ],
    ids=lambda changes: "-".join(map(str, changes.values())),
)
def test_gradients_are_finite_differences(name: str, changes: dict[str, Any]) -> None:
    model = in_double(name)
    site = model.sites[0]
    settings = Settings(**({"anchor": 0.5, "definition": "paper"} | changes))
    parts = [*expert_parts(model.hf, site, EXPERT), *router_parts(model.hf, site)]
    forget, retain = tokens(2, 6, 0), tokens(2, 7, 1)
    routers = [site] if settings.anchors else []
    draw = torch.Generator().manual_seed(0)
    with InDouble(), Trained(model.hf, parts, [site.experts]) as trained, Watch(model, routers, [site]) as watch:
        objective = Objective(model, settings, [(site, EXPERT)], trained, forget, retain, watch)
        for leaf in trained.leaves.values():  # away from the frozen copy, where KL and steadiness have gradient 0
            leaf.data += 1e-3 * torch.randn(leaf.shape, generator=draw, dtype=torch.float64)
        trained.write_back()

        def total() -> torch.Tensor:
            value = settings.retain_weight * objective.retain_term([0, 1])[1] if settings.retains else 0.0
            _, terms = objective.forget_terms([0, 1])
            return value + terms["forget"] + settings.anchor * terms.get("anchor", torch.zeros(()))

        total().backward()
        gradients = {key: leaf.grad for key, leaf in trained.leaves.items()}
        assert all(parameter.grad is None for parameter in model.hf.parameters())
        for key, leaf in trained.leaves.items():
            direction = torch.randn(leaf.shape, generator=draw, dtype=torch.float64)
            direction /= direction.norm()
            step, start = 1e-5, leaf.detach().clone()
            ends = []
            for sign in (1, -1):
                leaf.data = start + sign * step * direction
                trained.write_back()
                ends.append(float(total().detach()))
            leaf.data = start
            trained.write_back()
            gradient = gradients[key]
            want = (ends[0] - ends[1]) / (2 * step)
            got = 0.0 if gradient is None else float((gradient * direction).sum())
            assert got == pytest.approx(want, rel=1e-5, abs=1e-9)
        assert any(gradient is not None and bool(gradient.any()) for gradient in gradients.values())


@pytest.mark.parametrize("targets", [[2], [0, 3]])
def test_the_anchor_is_its_formula(targets: list[int]) -> None:
    scores = torch.rand(5, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).softmax(-1)
    by_hand = []
    for target in targets:
        for row in scores.tolist():
            by_hand.append(sum((s - (1.0 if e == target else 0.0)) ** 2 for e, s in enumerate(row)))
    want = sum(by_hand) / len(by_hand)
    assert float(objectives.router_anchor(scores, targets, "paper")) == pytest.approx(want)
    assert float(objectives.router_anchor(scores, targets, "code")) == pytest.approx(want / 4)
    hot = torch.zeros(3, 4).index_fill(1, torch.tensor([1]), 1.0)
    assert float(objectives.router_anchor(hot, [1])) == 0
    with pytest.raises(ms.MoescopeError, match="experts 0 to 3, no expert 4"):
        objectives.router_anchor(scores, [4])


@pytest.mark.parametrize("name", ["qwen2_moe", "deepseek_v3", "mixtral"])
def test_the_anchored_scores_are_the_routers_own(name: str) -> None:
    """Against what the taps capture: the weights of selected experts follow from the same scores."""
    model = ms.wrap(build(name), None)
    model.hf.requires_grad_(True)
    site = model.sites[-1]
    ids = torch.arange(3, 33).reshape(3, 10)
    real = torch.ones_like(ids, dtype=torch.bool)
    real[1, 7:] = False
    from moescope.hooks.taps import Tap, Want

    with Watch(model, [site]) as watch, Tap(model.hf, [site], model.semantics, Want(logits=True)) as tap:
        tap.begin(30, real.flatten().nonzero().flatten())
        model.forward(ids, real.long())
        reading = tap.take().sites[site.key]
        scores = watch.scores(site.key, real)
    assert scores.requires_grad
    assert reading.logits is not None
    logits = reading.logits.double()
    want = logits.softmax(-1) if model.semantics[site.key].score_function == "softmax" else logits.sigmoid()
    torch.testing.assert_close(scores.double(), want, atol=1e-6, rtol=1e-5)


def test_npo_is_the_published_sum_and_gradient_ascent_at_beta_zero() -> None:
    nats = torch.tensor([1.0, 4.0], dtype=torch.float64, requires_grad=True)
    frozen = torch.tensor([2.0, 1.0], dtype=torch.float64)
    beta = 0.3
    ratios = [math.exp(-a) / math.exp(-b) for a, b in ((1.0, 2.0), (4.0, 1.0))]
    want = sum(2 / beta * math.log(1 + ratio**beta) for ratio in ratios) / 2
    assert float(objectives.negative_preference(nats, frozen, beta)) == pytest.approx(want)
    (small,) = torch.autograd.grad(objectives.negative_preference(nats, frozen, 1e-7), nats)
    torch.testing.assert_close(small, torch.full_like(small, -0.5), atol=1e-5, rtol=1e-5)


def test_losses_count_what_is_counted_alone() -> None:
    logits = torch.randn(2, 5, 7, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    ids = torch.tensor([[1, 2, 3, 4, 5], [6, 5, 4, 0, 0]])
    counted = torch.tensor([[False, False, True, True, True], [True, True, True, False, False]])
    nats, n = objectives.sequence_losses(logits, ids, counted)
    log = logits.log_softmax(-1)
    want = [
        -sum(float(log[0, t - 1, ids[0, t]]) for t in (2, 3, 4)),
        -sum(float(log[1, t - 1, ids[1, t]]) for t in (1, 2)),
    ]
    assert nats.tolist() == pytest.approx(want)
    assert n.tolist() == [3, 2]
