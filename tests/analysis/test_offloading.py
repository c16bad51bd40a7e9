"""Offloading: loads counted by a naive cache, bytes and times by hand, and bytes of an expert never made up."""

import numpy as np
import pytest

from moescope.analysis.offloading import offload
from moescope.errors import MoescopeError
from tests.analysis.made_stores import random_truth, write
from tests.analysis.test_caching import simulate, tokens_of
from tests.analysis.test_local_routing import memory_store

WIDTHS, K = [7, 4, 1], [3, 2, 1]


def test_loads_are_counted_and_priced(tmp_path):
    made = random_truth(np.random.default_rng(5), 8, WIDTHS, K, missing=0.2)
    store = write(tmp_path / "s", made, WIDTHS, {}, slots_can_miss=True)
    found = offload(store, 2e6, bandwidth=4.0, latency_us=30, compute_ms=1.5, sizes=[2, 3, 5], draws=1)
    tokens, selections = made.document.size, sum(valid.sum() for valid in made.valid)
    assert found["selections"].item() == pytest.approx(selections / tokens)
    for policy in ("lru", "lfu", "sch-16", "belady"):
        assert np.isnan(found["loads"].sel(policy=policy, size=2))
        for size in (3, 5):
            loads, empty = 0, 0
            for layer in range(3):
                mine = 0
                for number in np.unique(made.sequence):
                    rows = made.sequence == number
                    lists = tokens_of(made.expert[layer][rows], made.valid[layer][rows])
                    hits, cold = simulate(policy, lists, size)
                    mine += sum(map(len, lists)) - hits - cold
                    empty += sum(map(len, lists)) - hits
                cell = found["layer_loads"].sel(policy=policy, size=size)[layer].item()
                assert cell == pytest.approx(mine / tokens)
                loads += mine
            cell = found.sel(policy=policy, size=size)
            assert cell["loads"].item() == pytest.approx(loads / tokens)
            assert cell["loads_empty"].item() == pytest.approx(empty / tokens)
            assert cell["hit_rate"].item() == pytest.approx(1 - loads / selections)
            assert cell["loads_low"] <= cell["loads"] <= cell["loads_high"]
            assert cell["bytes_per_token"].item() == pytest.approx(2e6 * loads / tokens)
            # 2 MB at 4 GB/s are half a millisecond.
            assert cell["ms_per_token"].item() == pytest.approx(1.5 + loads / tokens * (0.030 + 0.5))
            assert cell["ms_per_token_empty"].item() == pytest.approx(1.5 + empty / tokens * 0.53)
            assert cell["tokens_per_second"].item() == pytest.approx(1000 / cell["ms_per_token"].item())
    np.testing.assert_allclose(found["memory"], [2e6 * 5, 2e6 * 7, 2e6 * 10])  # no cache is larger than its layer
    np.testing.assert_allclose(found["share_held"], np.array([5, 7, 10]) / 12)
    assert found["bytes_all"] == 12 * 2e6
    assert found["ms_uncached"].item() == pytest.approx(1.5 + selections / tokens * 0.53)


def test_bytes_of_an_expert_are_given_or_known_or_unknown(tmp_path):
    made = random_truth(np.random.default_rng(0), 4, [4, 4], [2, 2])
    store = write(tmp_path / "s", made, [4, 4], {})
    model = store.manifest.model
    model.n_parameters, model.n_active_parameters = 1_000_400, 1_000_000
    found = offload(store)  # 400 parameters in 2 x (4 - 2) experts, four bytes each
    assert found.attrs["bytes_per_expert"] == 400
    assert found.attrs["bytes_source"].startswith("the manifest: 100 parameters an expert, in float32")
    model.dtype = "bfloat16"
    assert offload(store).attrs["bytes_per_expert"] == 200
    assert offload(store, 77).attrs["bytes_source"] == "given"
    for field, value in (("dtype", "int4"), ("n_active_parameters", None), ("n_active_parameters", 1_000_001)):
        kept = getattr(model, field)
        setattr(model, field, value)
        found = offload(store)
        assert found.attrs["bytes_source"].startswith("unknown: ")
        assert np.isnan(found["bytes_per_token"]).all()
        assert np.isnan(found["ms_per_token"]).all()
        assert not np.isnan(found["loads"]).any()
        setattr(model, field, kept)
    uneven = write(tmp_path / "t", random_truth(np.random.default_rng(0), 4, [4, 3], [2, 2]), [4, 3], {})
    assert "not alike" in offload(uneven).attrs["bytes_source"]


def test_memory_saves_loads(tmp_path):
    _, sticky = memory_store(tmp_path / "sticky", stick=0.95)
    found = offload(sticky, 1e6, sizes=[3, 4])
    assert (found["loads_high"] < 0.8 * found["loads_shuffled"]).all()
    assert (found["loads"].sel(policy="belady") <= found["loads"]).all()
    assert (found["loads"] < found["selections"]).all()
    _, plain = memory_store(tmp_path / "plain", stick=0.0)
    found = offload(plain, 1e6, sizes=[3, 4])
    np.testing.assert_allclose(found["loads"], found["loads_shuffled"], rtol=0.08)


def test_mistakes(tmp_path):
    store = write(tmp_path / "s", random_truth(np.random.default_rng(0), 3, [4], [2]), [4], {})
    for wrong in ({"bandwidth": 0}, {"latency_us": -1}, {"compute_ms": -1}):
        with pytest.raises(MoescopeError, match="`bandwidth` must be above 0"):
            offload(store, **wrong)
    with pytest.raises(MoescopeError, match="`bytes_per_expert` must be above 0"):
        offload(store, 0)
    assert np.isnan(offload(store, 1e6, sizes=[4])["tokens_per_second"]).all()  # nothing is loaded, nothing computed
    with pytest.raises(MoescopeError, match="at least the 2"):
        offload(store, sizes=[1])
