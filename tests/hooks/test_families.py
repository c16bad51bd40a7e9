"""Every family and awkward variant: readings equal a slow reference from raw weights, and the model notices nothing."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import pytest
import torch

from moescope.errors import RefusedError
from moescope.hooks import Model, Tap, Want, wrap
from moescope.hooks.readings import HostCopy, Reading
from tests.zoo import CAPTURED, ZOO, LayerReference, build, inputs, reference, shared

MIXED = "ernie4_5_vl_moe+mm"  # half of its tokens go to a pool of vision experts
NAMES = [name for name in CAPTURED if name != MIXED]
ALL = Want(logits=True, experts=True, outliers=True)
HASHED = "deepseek_v4"  # its first layers look experts up by token id
# One token at a time, both sides padded, and longer than every sliding window and attention chunk of the zoo.
SHAPES = {
    "left": {"padding": "left"},
    "right": {"padding": "right"},
    "one": {"batch": 1, "length": 1},
}
LONG = {"batch": 1, "length": 40}
WINDOWED = ["gpt_oss", "llama4", "step3p7", "gemma4", "mixtral+top1", "qwen2_moe", "minimax", "old_deepseek_v3"]


@functools.cache
def wrapped(name: str, dtype: torch.dtype = torch.float32) -> Model:
    return wrap(shared(name, dtype), name=name)


def batch_of(name: str, shape: dict[str, Any]) -> dict[str, torch.Tensor]:
    batch = inputs(name, **shape)
    if "decoder_input_ids" in batch:  # as a capture runs it: one row for each token in encoder and decoder
        batch["decoder_input_ids"] = batch["input_ids"]
    return batch


def read(
    name: str, dtype: torch.dtype = torch.float32, shape: dict[str, Any] | None = None
) -> tuple[Reading, np.ndarray]:
    """A reading of the family's model under all taps, and the real rows of its batch."""
    model, batch = wrapped(name, dtype), batch_of(name, SHAPES["left"] if shape is None else shape)
    rows = batch["attention_mask"].flatten().nonzero().flatten()
    with torch.no_grad(), Tap(model.hf, model.sites, model.semantics, ALL) as tap:
        tap.begin(batch["attention_mask"].numel(), rows)
        model.hf(**batch)
        return tap.take(), rows.numpy()


def truth(name: str, shape: dict[str, Any] | None = None) -> dict[str, LayerReference]:
    """The reference of each site, by key; JetMoE's attention mixtures have a test of their own."""
    layers = _layers(name, tuple((SHAPES["left"] if shape is None else shape).items()))
    found = {}
    for site in wrapped(name).sites:
        for path, layer in layers.items():
            if f"{site.block}.".startswith(f"{path}."):
                found[site.key] = layer
    assert len(found) == len(layers)
    return found


@functools.cache
def _layers(name: str, shape: tuple[tuple[str, Any], ...]) -> dict[str, LayerReference]:
    return reference(shared(name), name, batch_of(name, dict(shape)))


def check_against_reference(name: str, shape: dict[str, Any]) -> None:
    reading, rows = read(name, shape=shape)
    for key, want in truth(name, shape).items():
        got = reading.sites[key]
        assert got.norm is not None
        assert got.absmax is not None
        ids, weights, norm, absmax = (values[rows] for values in (want.ids, want.weights, want.norm, want.absmax))
        missing = ids < 0  # -1 in the reference: skipped (zaya) or dropped (switch_transformers, nllb_moe)
        if got.valid is not None:
            assert torch.equal((~got.valid).sum(-1), missing.sum(-1))
            got.expert[~got.valid] = -1
            for values in (got.norm, got.absmax):
                assert torch.isnan(values[~got.valid]).all()
                values[~got.valid] = 0
        else:
            assert not missing.any()
        # Slots of both in order of expert number, so that those with the same expert meet.
        mine, theirs = got.expert.argsort(dim=-1, stable=True), ids.argsort(dim=-1, stable=True)
        assert torch.equal(got.expert.gather(1, mine), ids.gather(1, theirs))
        for measured, true in ((got.weight, weights), (got.norm, norm), (got.absmax, absmax)):
            torch.testing.assert_close(measured.gather(1, mine).double(), true.gather(1, theirs), rtol=2e-4, atol=1e-6)
        assert got.logits is not None
        logits = want.logits[rows][:, : got.logits.shape[1]]  # zaya's last column is its skip class
        torch.testing.assert_close(got.logits.double(), logits, rtol=2e-4, atol=1e-5)
        routing = ZOO[name].routing
        chosen_by_score = wrapped(name).semantics[key].selection == "score"
        if routing.kind == "standard" and routing.over == "all" and chosen_by_score:
            assert got.margin is not None
            best = want.selection[rows].sort(-1, descending=True).values
            gap = best[:, ids.shape[1] - 1] - best[:, ids.shape[1]]  # infinite where the kept groups hold no other
            torch.testing.assert_close(got.margin.double(), gap.masked_fill(gap.isinf(), torch.nan),
                                       rtol=2e-3, atol=1e-5, equal_nan=True)  # fmt: skip


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", NAMES)
def test_readings_equal_the_reference(name: str, shape: str) -> None:
    check_against_reference(name, SHAPES[shape])


@pytest.mark.parametrize("name", WINDOWED)
def test_readings_past_the_sliding_window_equal_the_reference(name: str) -> None:
    check_against_reference(name, LONG)


@pytest.mark.parametrize("name", NAMES)
def test_the_experts_outputs_are_rebuilt_and_nobody_is_idle(name: str) -> None:
    check = wrapped(name).check
    assert check.logits_identical
    assert all(site.rebuild_error is not None and site.rebuild_error < 1e-5 for site in check.sites)
    assert not [path for path in check.idle if "vision" not in path]


@pytest.mark.parametrize("name", NAMES)
def test_slots_stand_in_rank_order(name: str) -> None:
    reading, rows = read(name)
    for key, want in truth(name).items():
        got = reading.sites[key]
        present = torch.ones_like(got.expert, dtype=torch.bool) if got.valid is None else got.valid
        assert (present.int().diff(dim=-1) <= 0).all()  # empty slots come last
        if wrapped(name).semantics[key].selection is None:  # nothing was compared to select, or not what ran
            chosen = got.weight.double()
            assert name.partition("+")[0] in (HASHED, "nllb_moe", "mistral4", "axk2") or "hash" in name
        else:
            chosen = want.selection[rows].gather(1, got.expert)
        chosen = chosen.masked_fill(~present, -torch.inf)
        assert (chosen[:, 1:] <= chosen[:, :-1] + 1e-5).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("name", NAMES)
def test_logits_stay_bit_identical(name: str, dtype: torch.dtype) -> None:
    model, batch = wrapped(name, dtype), batch_of(name, SHAPES["right"])
    with torch.no_grad():
        before = model.hf(**batch).logits
        with Tap(model.hf, model.sites, model.semantics, ALL) as tap:
            tap.begin(batch["attention_mask"].numel())
            during = model.hf(**batch).logits
            tap.take()
        after = model.hf(**batch).logits
    assert torch.equal(before, during)
    assert torch.equal(before, after)


@pytest.mark.parametrize("name", ["qwen2_moe", "llama4", "jetmoe", "nllb_moe", "old_mixtral", "old_qwen2_moe"])
def test_gradients_flow_as_before(name: str) -> None:  # doge's own forward cannot be differentiated
    model, batch = wrap(build(name)), batch_of(name, SHAPES["left"])
    weight = model.hf.get_input_embeddings().weight.requires_grad_()

    def gradient() -> torch.Tensor:
        weight.grad = None
        model.hf(**batch).logits.float().pow(2).sum().backward()
        assert weight.grad is not None
        return weight.grad.clone()

    before = gradient()
    with Tap(model.hf, model.sites, model.semantics, ALL) as tap:
        tap.begin(batch["attention_mask"].numel())
        during = gradient()
        reading = tap.take()
    torch.testing.assert_close(during, before, rtol=1e-5, atol=1e-7)
    assert not any(site.weight.requires_grad for site in reading.sites.values())


def test_jetmoe_attention_is_a_second_mixture_beside_the_first() -> None:
    hf, batch = build("jetmoe"), batch_of("jetmoe", SHAPES["left"])
    model = wrap(hf)
    keys = [site.key for site in model.sites]
    assert set(keys) == {f"L00{layer}-{part}" for layer in (0, 1, 2) for part in ("self_attention", "mlp")}
    mixture = hf.get_submodule("model.layers.1.self_attention.experts")
    seen: dict[str, torch.Tensor] = {}
    mixture.router.register_forward_hook(lambda module, args, out: seen.update(x=args[0].clone(), order=out[0]))
    mixture.output_linear.register_forward_pre_hook(lambda module, args: seen.update(rows=args[0].clone()))
    with torch.no_grad(), Tap(hf, model.sites, model.semantics, ALL) as tap:
        tap.begin(batch["attention_mask"].numel())
        hf(**batch)
        got = tap.take().sites["L001-self_attention"]
    logits = seen["x"].double() @ mixture.router.layer.weight.double().T
    best = logits.topk(2, dim=-1)
    assert torch.equal(got.expert, best.indices)
    torch.testing.assert_close(got.weight.double(), best.values.softmax(-1), rtol=1e-5, atol=1e-7)
    for number, row in zip(seen["order"].tolist(), seen["rows"].double(), strict=True):
        token, slot = divmod(number, 2)
        output = mixture.output_linear.weight[best.indices[token, slot]].double() @ row
        assert got.norm is not None
        assert float(got.norm[token, slot]) == pytest.approx(float(output.norm()), rel=1e-5)


@pytest.mark.parametrize("implementation", ["eager", "batched_mm", "grouped_mm"])
@pytest.mark.parametrize("name", ["qwen2_moe", "gpt_oss", "nemotron_h", "muse_spark"])
def test_every_experts_implementation_is_read_as_it_runs(name: str, implementation: str) -> None:
    hf = build(name)
    hf.set_experts_implementation(implementation)
    model = wrap(hf)
    assert model.experts_implementation == implementation
    assert all(check.rebuild_error is not None and check.rebuild_error < 1e-6 for check in model.check.sites)


def test_rows_that_are_not_one_for_each_token_are_refused() -> None:
    with pytest.raises(RefusedError, match="cannot be matched with tokens"):
        read(MIXED)


def test_one_copy_to_the_host_keeps_every_bit() -> None:
    reading, _ = read("qwen2_moe", torch.bfloat16)
    arrays = HostCopy(reading).arrays()
    site = reading.sites["L000"]
    assert arrays[("site", "L000", "weight")].dtype == np.uint16
    bits = torch.from_numpy(arrays[("site", "L000", "weight")].view(np.int16)).view(torch.bfloat16)
    assert torch.equal(bits, site.weight)
    assert np.array_equal(arrays[("site", "L000", "expert")], site.expert.numpy())
