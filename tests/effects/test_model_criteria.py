"""HEAPr against finite differences in float64, NAEE against every set by hand, router rows against arithmetic."""

from __future__ import annotations

import functools
import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch
from torch.overrides import TorchFunctionMode

import moescope as ms
from moescope.effects import heapr, naee, router_change
from moescope.effects.atoms import output_gradients
from moescope.hooks import Model, wrap
from tests.capturing.texts import model, rows, tokenizer
from tests.zoo import build


class Wide(TorchFunctionMode):
    """Keeps float64 where transformers asks for float32 (norms, the router's softmax): differences need its digits."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if kwargs.get("dtype") is torch.float32:
            kwargs["dtype"] = torch.float64
        if func is torch.Tensor.to and args[0].dtype is torch.float64:
            args = tuple(torch.float64 if given is torch.float32 else given for given in args)
        return func(*args, **kwargs)


@functools.cache
def exact() -> Model:
    """A tiny Qwen2-MoE in float64, which grouped_mm does not take."""
    hf = build("qwen2_moe").double()
    hf.set_experts_implementation("batched_mm")
    plain = hf.forward

    @functools.wraps(plain)
    def forward(*args: Any, **kwargs: Any) -> Any:
        with Wide():
            return plain(*args, **kwargs)

    hf.forward = forward
    return wrap(hf, tokenizer(), name="exact")


class Shifted:
    """Experts of one layer in plain loops, the output of one (token, expert) moved before its routing weight."""

    def __init__(self, experts: torch.nn.Module, slot: tuple[int, int] | None = None, by: torch.Tensor | None = None):
        self.experts, self.slot, self.by = experts, slot, by
        self.seen: dict[tuple[int, int], torch.Tensor] = {}

    def __call__(self, hidden: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        out = torch.zeros_like(hidden)
        for t in range(len(hidden)):
            for r, e in enumerate(ids[t].tolist()):
                gate, up = (self.experts.gate_up_proj[e] @ hidden[t]).chunk(2)
                x = torch.nn.functional.silu(gate) * up
                self.seen[t, e] = x
                f = self.experts.down_proj[e] @ x
                if self.slot == (t, e):
                    f = f + self.by
                out[t] += weights[t, r] * f
        return out


def loss_of(loaded: Model, layer: int, ids: torch.Tensor, shifted: Shifted) -> float:
    experts = loaded.hf.get_submodule(loaded.sites[layer].experts)
    experts.forward = shifted
    try:
        with torch.no_grad():
            logits = loaded.forward(ids)
    finally:
        del experts.forward
    return float(torch.nn.functional.cross_entropy(logits[0, :-1], ids[0, 1:], reduction="sum"))


def gradient_of(loaded: Model, layer: int, ids: torch.Tensor, slot: tuple[int, int], step: float = 1e-5) -> np.ndarray:
    """dL/df of one (token, expert) by central differences."""
    experts = loaded.hf.get_submodule(loaded.sites[layer].experts)
    found = []
    for by in step * torch.eye(experts.down_proj.shape[1], dtype=torch.float64):
        up, down = (loss_of(loaded, layer, ids, Shifted(experts, slot, sign * by)) for sign in (1, -1))
        found.append((up - down) / (2 * step))
    return np.array(found)


def test_heapr_is_that_of_finite_differences() -> None:
    loaded, layer = exact(), 1
    texts = ["sun", "rain"]
    experts = loaded.hf.get_submodule(loaded.sites[layer].experts)
    gradients: dict[int, list[np.ndarray]] = {}
    neurons: dict[int, list[np.ndarray]] = {}
    for text in texts:
        ids = loaded.tokenizer(text, return_tensors="pt")["input_ids"]
        plain = Shifted(experts)
        loss_of(loaded, layer, ids, plain)
        for (t, e), x in plain.seen.items():
            gradients.setdefault(e, []).append(gradient_of(loaded, layer, ids, (t, e)))
            neurons.setdefault(e, []).append(x.numpy())
    found = heapr(loaded, ms.Corpus([{"text": text} for text in texts]), layers=[loaded.sites[layer].layer])
    assert len(gradients) > 2
    for e in range(loaded.sites[layer].n_experts):
        if e not in gradients:
            assert np.isnan(found["heapr"].values[0, e])
            continue
        moment = np.mean([np.outer(g, g) for g in gradients[e]], axis=0)
        w = experts.down_proj[e].numpy()
        want = np.mean(np.square(neurons[e]), axis=0) * np.einsum("dk,dc,ck->k", w, moment, w)
        np.testing.assert_allclose(found["of_neuron"].values[0, e], want, rtol=1e-6, atol=1e-14)
        assert found["heapr"].values[0, e] == pytest.approx(want.sum(), rel=1e-6)
        assert found["tokens"].values[0, e] == len(gradients[e])
        read = sum(map(len, gradients.values())) / loaded.semantics["L001"].top_k
        assert found["heapr_total"].values[0, e] == pytest.approx(want.sum() * len(gradients[e]) / read, rel=1e-6)


def test_gradients_do_not_mind_padding_and_leave_nothing_behind() -> None:
    loaded = model()
    batch = torch.randint(3, 80, (2, 9), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(batch)
    mask[1, 5:] = 0
    whole = output_gradients(loaded, loaded.sites, batch, mask)
    alone = output_gradients(loaded, loaded.sites, batch[1:, :5], mask[1:, :5])
    for key, gradient in whole.items():
        torch.testing.assert_close(gradient[9:14], alone[key], rtol=1e-3, atol=1e-5)
        assert not gradient[14:].any()
    assert all(p.grad is None and not p.requires_grad for p in loaded.hf.parameters())
    assert not any(loaded.hf.get_submodule(site.experts)._forward_hooks for site in loaded.sites)


def test_heapr_of_batches_is_that_of_texts_alone() -> None:
    corpus = ms.Corpus(rows(40, longest=9))
    whole, alone = (heapr(model(), corpus, batch_tokens=size) for size in (256, 1))
    np.testing.assert_allclose(whole["of_neuron"], alone["of_neuron"], rtol=2e-3, atol=1e-9)
    sure = ~np.isnan(whole["heapr_low"].values)
    assert sure.any()
    assert (whole["heapr_low"].values <= whole["heapr"].values)[sure].all()
    assert (whole["heapr"].values <= whole["heapr_high"].values)[sure].all()
    assert (abs(whole["split_half"]) <= 1).all()


def test_naee_is_the_best_of_all_sets() -> None:
    loaded, corpus = model(), ms.Corpus(rows(6, longest=9))
    layer = loaded.sites[1].layer
    found = naee(loaded, corpus, drop=2, layers=[layer], controls=10)
    assert found.attrs["search"] == "exact"
    assert found["sets"].item() == math.comb(8, 2)
    blocks, sizes = {}, 0.0
    for experts in itertools.combinations(range(8), 2):
        total = 0.0
        for row in rows(6, longest=9):
            ids = loaded.tokenizer(row["text"], return_tensors="pt")["input_ids"]
            given: list[torch.Tensor] = []
            block = loaded.hf.get_submodule(loaded.sites[1].block)
            undo = block.register_forward_pre_hook(lambda module, args, given=given: given.append(args[0].clone()))
            with torch.no_grad():
                loaded.forward(ids)
            undo.remove()
            total += float((pruned(block, given[0], experts) - pruned(block, given[0], ())).square().sum())
            sizes += 0 if blocks else float(pruned(block, given[0], ()).square().sum())
        blocks[experts] = total
    loss = {experts: math.sqrt(total / sizes) for experts, total in blocks.items()}
    best = min(loss, key=lambda experts: loss[experts])
    assert found["loss"].item() == pytest.approx(loss[best], rel=1e-4)
    assert set(np.flatnonzero(found["dropped"].values[0])) == set(best)
    for e in range(8):
        want = np.mean([value for experts, value in loss.items() if e in experts])
        assert found["naee"].values[0, e] == pytest.approx(want, rel=1e-4)
    assert (found["naee_low"] <= found["naee"]).all()
    assert set(np.round(found["random_loss"].values[0], 5)) <= {round(value, 5) for value in loss.values()}


def test_contexts_of_one_document_are_one_unit() -> None:
    """An interval over documents cannot be had from one, however many contexts it is cut into."""
    one = ms.Corpus([{"text": " ".join(row["text"] for row in rows(6, longest=9))}])
    found = naee(model(), one, layers=[model().sites[1].layer], controls=0, max_length=8)
    assert found["naee"].notnull().all()
    assert found["naee_low"].isnull().all()


def pruned(block: torch.nn.Module, hidden: torch.Tensor, gone: tuple[int, ...]) -> torch.Tensor:
    """A Qwen2-MoE block whose router never had these experts, in plain loops."""
    kept = [e for e in range(block.experts.num_experts) if e not in gone]
    with torch.no_grad():
        x = hidden.reshape(-1, hidden.shape[-1])
        p = (x @ block.gate.weight[kept].T).softmax(-1)
        weight, place = p.topk(block.gate.top_k, dim=-1)
        if block.gate.norm_topk_prob:
            weight = weight / weight.sum(-1, keepdim=True)
        out = torch.sigmoid(x @ block.shared_expert_gate.weight.T) * block.shared_expert(x)
        for t in range(len(x)):
            for w, i in zip(weight[t], place[t].tolist(), strict=True):
                gate, up = (block.experts.gate_up_proj[kept[i]] @ x[t]).chunk(2)
                out[t] += w * (block.experts.down_proj[kept[i]] @ (torch.nn.functional.silu(gate) * up))
    return out


def test_a_greedy_search_drops_one_after_the_other() -> None:
    loaded, corpus = model(), ms.Corpus(rows(6, longest=9))
    options = {"layers": [loaded.sites[0].layer], "controls": 5}
    alone = naee(loaded, corpus, drop=1, **options)
    greedy = naee(loaded, corpus, drop=3, search="greedy", **options)
    exact_ = naee(loaded, corpus, drop=3, **options)
    sampled = naee(loaded, corpus, drop=3, search="sampled", most=12, **options)
    np.testing.assert_allclose(greedy["naee"], alone["naee"])
    assert greedy["sets"].item() == 8 + 7 + 6
    assert sorted(greedy["order"].values[0][greedy["dropped"].values[0]]) == [1, 2, 3]
    assert greedy["order"].values[0].tolist().index(1.0) == int(alone["naee"].values[0].argmin())
    assert exact_["loss"] <= greedy["loss"] + 1e-9
    assert exact_["loss"] <= sampled["loss"] + 1e-9
    assert sampled["sets"].item() <= 12
    with pytest.raises(ms.MoescopeError, match="1 to 6 can go"):
        naee(loaded, corpus, drop=7)


def test_router_rows_that_moved() -> None:
    before, after = model(), wrap(build("qwen2_moe"), tokenizer(), name="after")
    gate = after.hf.get_submodule(after.sites[1].router)
    with torch.no_grad():
        gate.weight[3] *= 1.5
        gate.weight[5] *= -1
    found = router_change(before, after)
    norm = found["norm_before"].values
    want = np.zeros_like(norm)
    want[1, 3] = norm[1, 3] / 2
    np.testing.assert_allclose(found["router_change"], want, atol=1e-6)
    np.testing.assert_allclose(found["distance"].values[1, 5], 2 * norm[1, 5], rtol=1e-6)
    np.testing.assert_allclose(found["cosine"].values[1, 5], -1, rtol=1e-6)
    with pytest.raises(ms.MoescopeError, match="same MoE layers"):
        router_change(before, model("mixtral+top1") if len(model("mixtral+top1").sites) != 3 else model("deepseek_v3"))


def test_what_cannot_be_told_is_refused() -> None:
    with pytest.raises(ms.RefusedError, match="not called once"):
        heapr(model("llama4"), ms.Corpus(rows(2)))
    with pytest.raises(ms.MoescopeError, match="no MoE layer 9"):
        naee(model(), ms.Corpus(rows(2)), layers=[9])
