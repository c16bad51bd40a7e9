"""Blocks whose experts are separate modules: whatever way rows take, who ran for whom with what weight is found."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from moescope.errors import RefusedError
from moescope.hooks import discover
from moescope.hooks.facts import Facts, Gather
from moescope.hooks.readers import READERS

B, S, D, E, K = 2, 5, 6, 4, 2
Style = Callable[["Block", Tensor, Tensor, Tensor], Tensor]


def one_expert_at_a_time(block: Block, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
    out = torch.zeros_like(x)
    mask = nn.functional.one_hot(ids, E).permute(2, 1, 0)
    for number, expert in enumerate(block.experts):
        slot, token = torch.where(mask[number])
        rows = x[None, token].reshape(-1, D)
        out.index_add_(0, token, (expert(rows) * weights[token, slot, None]).to(x.dtype))
    return out


def sorted_and_put_back(block: Block, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
    counts = torch.bincount(ids.view(-1), minlength=E).tolist()
    order = ids.view(-1).argsort()
    rows, outputs, start = x[order // K], [], 0
    for expert, count in zip(block.experts, counts, strict=True):
        if count:
            outputs.append(expert(rows[start : start + count]))
            start += count
    outs = torch.cat(outputs, dim=0)
    new = torch.empty_like(outs)
    new[order] = outs
    return new.view(*ids.shape, -1).type(weights.dtype).mul_(weights.unsqueeze(dim=-1)).sum(dim=1).type(new.dtype)


def repeated_for_each_slot(block: Block, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
    rows, flat_ids = x.repeat_interleave(K, dim=0), ids.view(-1)
    out = torch.empty_like(rows)
    for number, expert in enumerate(block.experts):
        out[flat_ids == number] = expert(rows[flat_ids == number])
    return (out.view(*weights.shape, -1) * weights.unsqueeze(-1)).sum(dim=1)


def on_every_token(block: Block, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
    """Experts run on all tokens; a token's other experts have weight zero."""
    dense = torch.zeros(len(x), E).scatter(1, ids, weights)
    return sum((expert(x) * dense[:, number, None] for number, expert in enumerate(block.experts)), torch.zeros(()))


STYLES: list[Style] = [one_expert_at_a_time, sorted_and_put_back, repeated_for_each_slot]


class Block(nn.Module):
    def __init__(self, style: Style) -> None:
        super().__init__()
        self.style = style
        self.gate = nn.Linear(D, E, bias=False)
        self.experts = nn.ModuleList(nn.Sequential(nn.Linear(D, 8), nn.SiLU(), nn.Linear(8, D)) for _ in range(E))

    def forward(self, hidden: Tensor) -> Tensor:
        flat = hidden.view(-1, D)
        weights, ids = self.gate(flat).softmax(-1).topk(K)
        return self.style(self, flat, ids, weights).reshape(hidden.shape)


class Model(nn.Module):
    def __init__(self, style: Style) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList([Block(style)])

    def forward(self, hidden: Tensor) -> Tensor:
        return self.layers[0](hidden)


def facts_of(style: Style, hidden: Tensor, top_k: int | None = None) -> tuple[Facts, Model]:
    model = Model(style)
    (site,) = discover(model)
    seen: list[Facts] = []
    gather = Gather(output=True, vectors=True, magnitudes=True, returned=True)
    undo = READERS[site.reader](model, site, gather, seen.append, top_k).install()
    with torch.no_grad():
        plain = Model(style)(hidden)
        watched = model(hidden)
    for remove in undo:
        remove()
    assert torch.equal(plain, watched)
    assert type(watched) is Tensor
    assert len(seen) == 1
    return seen[0], model


@pytest.mark.parametrize("style", STYLES)
def test_ids_weights_and_outputs_are_those_that_ran(style: Style) -> None:
    hidden = torch.randn(B, S, D)
    facts, model = facts_of(style, hidden)
    block, flat = model.layers[0], hidden.view(-1, D)
    assert isinstance(block, Block)
    logits = block.gate(flat)
    weights, ids = logits.softmax(-1).topk(K)
    assert facts.output is not None
    assert torch.equal(facts.output, logits)
    assert facts.missing is None
    for token in range(B * S):
        true = dict(zip(ids[token].tolist(), weights[token].tolist(), strict=True))
        assert dict(zip(facts.ids[token].tolist(), facts.weights[token].tolist(), strict=True)) == true
        for slot, expert in enumerate(facts.ids[token].tolist()):
            output = block.experts[expert](flat[token])
            torch.testing.assert_close(facts.slots["vectors"][token * K + slot], output)
            torch.testing.assert_close(facts.slots["norm"][token * K + slot], output.norm())
    torch.testing.assert_close(facts.returned, Model(style)(hidden).view(-1, D))


def test_a_token_sent_nowhere_has_missing_slots() -> None:
    def capacity_one(block: Block, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for number, expert in enumerate(block.experts):
            token = (ids[:, 0] == number).nonzero().view(-1)[:1]
            out[token] = expert(x[token]) * weights[token, 0, None]
        return out

    hidden = torch.randn(1, 9, D)
    facts, model = facts_of(capacity_one, hidden, top_k=1)
    assert facts.missing is not None
    first = model.layers[0].gate(hidden.view(-1, D)).argmax(-1).tolist()  # type: ignore[operator]
    kept = [expert not in first[:token] for token, expert in enumerate(first)]
    assert (~facts.missing).squeeze(-1).tolist() == kept
    assert torch.isnan(facts.slots["norm"][facts.missing.view(-1)]).all()


def test_rows_that_are_no_tokens_are_refused() -> None:
    def mixed(block: Block, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        return one_expert_at_a_time(block, x.flip(0) + x, ids, weights)

    with pytest.raises(RefusedError, match="cannot be followed"):
        facts_of(mixed, torch.randn(B, S, D))


def test_what_is_no_weight_is_refused() -> None:
    def by_channel(block: Block, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        return block.experts[0](x) * torch.rand(D)

    with pytest.raises(RefusedError, match="not a weight"):
        facts_of(by_channel, torch.randn(B, S, D))


def test_outputs_that_meet_no_weight_are_refused() -> None:
    def unweighted(block: Block, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        return block.experts[0](x) + block.experts[1](x)

    with pytest.raises(RefusedError, match="one weight"):
        facts_of(unweighted, torch.randn(B, S, D))


def test_more_experts_for_a_token_than_were_checked_are_refused() -> None:
    with pytest.raises(RefusedError, match="where its check saw 1"):
        facts_of(one_expert_at_a_time, torch.randn(B, S, D), top_k=1)


def test_experts_run_on_every_token_show_their_zero_weights() -> None:
    facts, _ = facts_of(on_every_token, torch.randn(B, S, D))
    assert facts.ids.shape == (B * S, E)
    assert ((facts.weights > 0).sum(-1) == K).all()
