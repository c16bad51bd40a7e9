"""A router's rule is found where there is one, left open where two fit, and never claimed where none does."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from moescope.hooks.readings import rank_and_summarise
from moescope.hooks.semantics import SCORES, Semantics, infer, within_groups
from moescope.hooks.sites import Site

E, K, T = 16, 4, 256
SITE = Site("L000", 0, 0, "layers.0", "layers.0.mlp", "layers.0.mlp.gate", "layers.0.mlp.experts", (), 0, E, K)


def route(
    score: str,
    *,
    spread: float = 1.0,
    renormalised: bool = False,
    scaling: float = 1.0,
    bias: torch.Tensor | None = None,
    groups: tuple[int, int, str] | None = None,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> Semantics:
    """What `infer` says of a router that follows exactly this rule."""
    generator = torch.Generator().manual_seed(seed)
    logits = (torch.randn(T, E, generator=generator) * spread).to(dtype)
    scores = SCORES[score](logits.float())
    chooser = scores if bias is None else scores + bias
    ids = (within_groups(chooser, groups) if groups else chooser).topk(K, sorted=False).indices
    weights = scores.gather(-1, ids)
    if renormalised:
        weights = weights / weights.sum(-1, keepdim=True)
    weights = (weights * scaling).to(dtype)
    block = nn.Module()
    if bias is not None:
        block.register_buffer("e_score_correction_bias", bias)
    if groups is not None:
        block.n_group, block.topk_group = groups[:2]
    return infer(SITE, block, output=logits, linear=logits, ids=ids, weights=weights)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("renormalised", [False, True])
@pytest.mark.parametrize("score", SCORES)
def test_planted_rules_are_found(score: str, renormalised: bool, dtype: torch.dtype) -> None:
    found = route(score, renormalised=renormalised, scaling=2.5, dtype=dtype)
    assert (found.score_function, found.renormalised, found.selection) == (score, renormalised, "score")
    assert found.scaling == pytest.approx(2.5, rel=0.01)
    assert found.bias is None


@given(st.sampled_from(sorted(SCORES)), st.booleans(), st.floats(0.005, 3), st.sampled_from(["fp32", "bf16"]))
def test_a_score_function_is_right_or_left_open(score: str, renormalised: bool, spread: float, dtype: str) -> None:
    """Where logits hardly differ, rounding hides the rule: then it must be None, never another one."""
    precision = torch.float32 if dtype == "fp32" else torch.bfloat16
    found = route(score, renormalised=renormalised, spread=spread, dtype=precision)
    assert found.score_function in (score, None)


def test_a_bias_too_small_to_matter_in_the_batch_is_still_taken() -> None:
    bias = 1e-6 * torch.randn(E, generator=torch.Generator().manual_seed(3))
    assert route("sigmoid", bias=bias).bias == "e_score_correction_bias"


@pytest.mark.parametrize("how", ["max", "top-2 sum"])
def test_groups_are_found(how: str) -> None:
    bias = 0.3 * torch.randn(E, generator=torch.Generator().manual_seed(1))
    found = route("sigmoid", bias=bias, groups=(4, 2, how))
    assert found.groups == (4, 2, how)
    assert found.bias == "e_score_correction_bias"


def test_no_rule_is_claimed_for_random_ids_and_weights() -> None:
    ids = torch.rand(T, E).topk(K).indices
    found = infer(SITE, nn.Module(), output=torch.randn(T, E), linear=None, ids=ids, weights=torch.rand(T, K))
    assert (found.score_function, found.selection, found.scaling) == (None, None, None)
    assert found.rank_by == "weight"


def test_probabilities_without_a_linear_are_not_logits() -> None:
    probabilities = torch.randn(T, E).softmax(-1)
    top = probabilities.topk(K)
    found = infer(SITE, nn.Module(), output=probabilities, linear=None, ids=top.indices, weights=top.values)
    assert (found.router_output, found.logits_from) == ("probabilities", "none")


def test_a_token_with_zero_weights_is_no_crash() -> None:
    weights = torch.rand(T, K)
    weights[0] = 0
    ids = torch.rand(T, E).topk(K).indices
    assert (
        infer(SITE, nn.Module(), output=torch.randn(T, E), linear=None, ids=ids, weights=weights).score_function is None
    )


@given(st.integers(0, 1000), st.sampled_from(sorted(SCORES)))
def test_ranks_entropy_and_margin_by_brute_force(seed: int, score: str) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits, bias = torch.randn(9, E, generator=generator), torch.randn(E, generator=generator)
    scores = SCORES[score](logits)
    ids = (scores + bias).topk(K, sorted=False).indices
    rule = Semantics(K, "output", "logits", score, True, 1.0, "score", "bias", selection_bias=bias)
    order, summaries = rank_and_summarise(rule, ids, torch.rand(9, K, generator=generator), logits)
    for row in range(9):
        chosen = sorted(((scores[row] + bias)[e].item(), e) for e in ids[row].tolist())[::-1]
        assert ids[row].gather(0, order[row]).tolist() == [expert for _, expert in chosen]
        rest = max((scores[row] + bias)[e].item() for e in range(E) if e not in ids[row].tolist())
        assert summaries["margin"][row].item() == pytest.approx(chosen[-1][0] - rest, abs=1e-5)
        shares = scores[row].double() / scores[row].double().sum()
        assert summaries["entropy"][row].item() == pytest.approx(-(shares * shares.log()).sum().item(), rel=1e-4)
        assert summaries["logsumexp"][row].item() == pytest.approx(logits[row].exp().sum().log().item(), rel=1e-4)


def test_a_row_outside_the_proven_rule_has_no_margin_and_is_ranked_by_weight() -> None:
    logits = torch.arange(E, dtype=torch.float32).repeat(2, 1)
    ids = torch.tensor([[15, 14, 13, 12], [15, 14, 13, 2]])  # the second row skips experts that beat 2
    weights = torch.tensor([[0.4, 0.3, 0.2, 0.1], [0.1, 0.2, 0.3, 0.4]])
    rule = Semantics(K, "output", "logits", "softmax", True, 1.0, "score")
    order, summaries = rank_and_summarise(rule, ids, weights, logits)
    assert order.tolist() == [[0, 1, 2, 3], [3, 2, 1, 0]]
    assert summaries["margin"][0] > 0
    assert torch.isnan(summaries["margin"][1])


def test_without_logits_nothing_is_made_up() -> None:
    rule = Semantics(2, "none", "probabilities")
    order, summaries = rank_and_summarise(rule, torch.tensor([[3, 5]]), torch.tensor([[0.2, 0.8]]), None)
    assert order.tolist() == [[1, 0]]
    assert all(torch.isnan(values).all() for values in summaries.values())


def test_a_hash_layer_is_told_from_an_unproven_rule() -> None:
    from tests.hooks.test_families import wrapped

    found = wrapped("deepseek_v4").semantics
    assert [rule.hashed for rule in found.values()] == [rule.selection is None for rule in found.values()]
    assert any(rule.hashed for rule in found.values())
    assert not any(rule.hashed for rule in wrapped("phimoe").semantics.values())
