"""nnsight and the native backend give the same store; names inside a trace are what the taps read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("nnsight", reason="the nnsight extra is not installed")

from nnsight import NNsight

import moescope as ms
from moescope.hooks import Tap, Want, wrap
from moescope.hooks import nnsight as ns
from moescope.store import Store
from tests.capturing.texts import rows, tokenizer
from tests.zoo import CAPTURED, build, inputs

FAMILIES = [name for name in CAPTURED if "+" not in name and "decoder_input_ids" not in inputs(name)]
NAMED = ["qwen3_moe", "qwen2_moe", "gpt_oss", "deepseek_v3", "mixtral", "dbrx", "step3p7", "longcat_flash", "gemma4"]


def captured(model: ms.Model, out: Path) -> Store:
    tiers = ["routing", "logits", "experts", "outliers"]
    return ms.capture(model, ms.Corpus(rows(4), ["kind"]), out, tiers, batch_tokens=64)


@pytest.mark.parametrize("name", FAMILIES)
def test_stores_are_equal(name: str, tmp_path: Path) -> None:
    native = captured(wrap(build(name), tokenizer(), name=name), tmp_path / "native")
    traced = captured(ns.wrap(NNsight(build(name)), tokenizer(), name=name), tmp_path / "traced")
    assert native.tokens().equals(traced.tokens())
    assert native.outliers().equals(traced.outliers())
    for a, b in zip(native.sites, traced.sites, strict=True):
        assert a == b
        assert np.array_equal(native.routing(a.key).expert, traced.routing(a.key).expert)
        assert np.array_equal(native.routing(a.key).weight, traced.routing(a.key).weight)
        assert np.array_equal(native.logits(a.key), traced.logits(a.key))
        assert np.array_equal(native.experts(a.key).norm, traced.experts(a.key).norm, equal_nan=True)


@pytest.mark.parametrize("name", NAMED)
def test_names_inside_a_trace_are_what_the_taps_read(name: str) -> None:
    hf: Any = build(name)
    model, batch = wrap(hf), inputs(name)
    site = model.sites[0]
    everything = Want(logits=True, vectors=frozenset(s.key for s in model.sites))
    with torch.no_grad(), Tap(hf, model.sites, model.semantics, everything) as tap:
        tap.begin(batch["input_ids"].numel())
        plain = hf(**batch).logits
        want = tap.take().sites[site.key]
    lm: Any = NNsight(hf)
    with torch.no_grad(), lm.trace(**batch):
        here = ns.routed(lm, model, site.key)
        logits = here.logits.save()
        ids = here.ids.save()
        weights = here.weights.save()
        outputs = here.expert_outputs.save()
        answer = lm.output.logits.save()
    assert torch.equal(answer, plain)
    order = ids.argsort(-1)
    assert torch.equal(ids.gather(1, order), want.expert.sort(-1).values)
    mine, theirs = weights.gather(1, order), want.weight.gather(1, want.expert.argsort(-1))
    assert torch.equal(mine, theirs)
    rows = torch.arange(len(ids)).unsqueeze(-1)
    observed = outputs[rows, order], want.vectors[rows, want.expert.argsort(-1)]
    assert torch.equal(*(values.nan_to_num() for values in observed))
    assert outputs.isfinite().any()
    if model.semantics[site.key].logits_from == "output":
        assert torch.equal(logits, want.logits)


@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss", "deepseek_v3"])
def test_scaling_inside_a_trace_equals_a_plain_hook(name: str) -> None:
    hf: Any = build(name)
    model, batch = wrap(hf), inputs(name)
    site = model.sites[1]

    def scaled(module: Any, args: Any) -> Any:
        hidden, ids, weights = args
        return hidden, ids, torch.where(ids == 3, weights * 0.0, weights)

    undo = hf.get_submodule(site.experts).register_forward_pre_hook(scaled)
    with torch.no_grad():
        want = hf(**batch).logits
    undo.remove()
    lm: Any = NNsight(hf)
    with torch.no_grad(), lm.trace(**batch):
        ns.routed(lm, model, site.key).scale(expert=3, factor=0.0)
        got = lm.output.logits.save()
    assert torch.equal(got, want)
    with torch.no_grad():
        assert not torch.equal(hf(**batch).logits, want)


def test_what_has_no_names_is_refused() -> None:
    hf: Any = build("llama4")
    with pytest.raises(ms.RefusedError, match="no names inside a trace"):
        ns.routed(NNsight(hf), wrap(hf), 1)
    with pytest.raises(ms.RefusedError, match="runs remotely"):
        ns.wrap(NNsight(hf), remote=True)
    with pytest.raises(ms.MoescopeError, match="No single MoE layer 7"):
        ns.routed(NNsight(hf), wrap(hf), 7)
