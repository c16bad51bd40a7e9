"""Every dispatched family: what the taps read equals a slow reference from raw weights; the model notices nothing."""

from __future__ import annotations

import functools

import numpy as np
import pytest
import torch

from moescope.errors import RefusedError
from moescope.hooks import Model, Tap, Want, wrap
from moescope.hooks.readings import HostCopy, Reading
from tests.zoo import ZOO, LayerReference, inputs, reference, shared

REFUSED = {
    "diffusion_gemma": "Two plain runs",  # samples its canvas inside forward
}
MIXED = "ernie4_5_vl_moe+mm"  # half of its tokens go to a pool of vision experts
DISPATCHED = [name for name, family in ZOO.items() if family.dispatched and name not in (*REFUSED, MIXED)]
UNDISPATCHED = [name for name, family in ZOO.items() if not family.dispatched]
ALL = Want(logits=True, experts=True, outliers=True, vectors=True)


@functools.cache
def wrapped(name: str, dtype: torch.dtype = torch.float32) -> Model:
    return wrap(shared(name, dtype), name=name)


def read(name: str, dtype: torch.dtype = torch.float32, padding: str | None = "left") -> tuple[Reading, np.ndarray]:
    """A reading of the family's model under all taps, and the real rows of its batch."""
    model, batch = wrapped(name, dtype), inputs(name, padding=padding)
    rows = batch["attention_mask"].flatten().nonzero().flatten()
    with torch.no_grad(), Tap(model.hf, model.sites, model.semantics, ALL) as tap:
        tap.begin(batch["attention_mask"].numel(), rows)
        model.hf(**batch)
        return tap.take(), rows.numpy()


@functools.cache
def truth(name: str) -> dict[int, LayerReference]:
    return {layer.layer: layer for layer in reference(shared(name), name, inputs(name, padding="left")).values()}


@pytest.mark.parametrize("name", DISPATCHED)
def test_readings_equal_the_reference(name: str) -> None:
    reading, rows = read(name)
    sites = {site.key: site for site in wrapped(name).sites}
    assert len(reading.sites) == len(truth(name))
    for key, got in reading.sites.items():
        want = truth(name)[sites[key].layer]
        ids = want.ids[rows]
        missing = ids < 0
        assert got.norm is not None
        assert got.absmax is not None
        if got.valid is not None:  # -1 in the reference; only zaya has such slots here, and one slot a token
            assert torch.equal(~got.valid, missing)
            got.expert[missing] = -1
            for values in (got.norm, got.absmax):
                assert torch.isnan(values[missing]).all()
                values[missing] = 0
        assert (got.expert.sort(-1).values == ids.sort(-1).values).all()
        columns = got.expert.argsort(-1).argsort(-1)
        order = ids.argsort(-1)

        def slots(values: torch.Tensor, order: torch.Tensor = order, columns: torch.Tensor = columns) -> torch.Tensor:
            """Reference slots in the order of the reading's."""
            return values.gather(1, order).gather(1, columns)

        assert got.norm is not None
        assert got.absmax is not None
        assert got.vectors is not None
        torch.testing.assert_close(got.weight.double(), slots(want.weights[rows]), rtol=2e-4, atol=1e-6)
        torch.testing.assert_close(got.norm.double(), slots(want.norm[rows]), rtol=2e-4, atol=1e-6)
        torch.testing.assert_close(got.absmax.double(), slots(want.absmax[rows]), rtol=2e-4, atol=1e-6)
        assert got.logits is not None
        logits = want.logits[rows][:, : sites[key].n_experts]  # zaya's last column is its skip class
        torch.testing.assert_close(got.logits.double(), logits, rtol=2e-4, atol=1e-5)


@pytest.mark.parametrize("name", DISPATCHED)
def test_slots_stand_in_rank_order(name: str) -> None:
    reading, rows = read(name)
    for site in wrapped(name).sites:
        got, want = reading.sites[site.key], truth(name)[site.layer]
        if wrapped(name).semantics[site.key].selection is None:  # hash layers: nothing was compared to select
            assert (got.weight.float().diff(dim=-1) <= 0).all()
            continue
        if got.valid is not None:
            continue  # one slot a token: nothing to rank
        chosen = want.selection[rows].gather(1, got.expert)
        assert (chosen.diff(dim=-1) <= 1e-5).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", DISPATCHED)
def test_logits_stay_bit_identical(name: str, dtype: torch.dtype) -> None:
    model, batch = wrapped(name, dtype), inputs(name, padding="right")
    with torch.no_grad():
        before = model.hf(**batch).logits
        with Tap(model.hf, model.sites, model.semantics, ALL) as tap:
            tap.begin(batch["attention_mask"].numel())
            during = model.hf(**batch).logits
            tap.take()
        after = model.hf(**batch).logits
    assert torch.equal(before, during)
    assert torch.equal(before, after)


@pytest.mark.parametrize("implementation", ["eager", "batched_mm", "grouped_mm"])
@pytest.mark.parametrize("name", ["qwen2_moe", "gpt_oss", "nemotron_h", "muse_spark"])
def test_every_experts_implementation_is_read_as_it_runs(name: str, implementation: str) -> None:
    from tests.zoo import build

    hf = build(name)
    hf.set_experts_implementation(implementation)
    model = wrap(hf)
    assert model.experts_implementation == implementation
    assert all(check.rebuild_error is not None and check.rebuild_error < 1e-6 for check in model.check.sites)


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_read_is_refused_with_the_reason(name: str) -> None:
    with pytest.raises(RefusedError, match=REFUSED[name]):
        wrap(shared(name))


@pytest.mark.parametrize("name", UNDISPATCHED)
def test_undispatched_families_are_refused_by_name(name: str) -> None:
    with pytest.raises(RefusedError, match="not dispatched"):
        wrap(shared(name))


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
