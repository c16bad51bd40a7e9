"""Mean margins, weights and entropies by expert, against a loop over all slots; intervals against planted ones."""

import numpy as np
import pytest

from moescope import analysis
from moescope.store import Store, StoreWriter
from tests.store.made import a_manifest, a_site, made_batches


def written(path, change=None, documents=30):
    sites = [a_site(1, 6, 2), a_site(3, 4, 3, slots_can_miss=True)]
    manifest = a_manifest(sites, ["routing"], settings={"shard_tokens": 100})
    with StoreWriter.create(path, manifest) as writer:
        for number, batch in enumerate(made_batches(manifest, documents)):
            if change:
                change(number, batch)
            writer.append(batch)
    return Store.open(path)


def undefined(number, batch):
    """Every third margin of layer 1, and every entropy of layer 3, are not defined; expert 5 is not selected."""
    batch.sites["L001"].margin[::3] = np.nan
    batch.sites["L003"].entropy[:] = np.nan
    batch.sites["L001"].expert[batch.sites["L001"].expert == 5] = 0


def brute(store, key, phase=None):
    """expert -> [margins], [weights], [entropies] of the tokens that select it."""
    routing, phases = store.routing(key), store.tokens(["phase"])["phase"].to_pylist()
    found = [([], [], []) for _ in range(store.site(key).n_experts)]
    for row, ids in enumerate(routing.expert):
        for rank, expert in enumerate(ids):
            if (routing.valid is None or routing.valid[row, rank]) and phase in (None, phases[row]):
                found[expert][0].append(routing.margin[row])
                found[expert][1].append(routing.weight[row, rank])
                found[expert][2].append(routing.entropy[row])
    return found


def mean(values):
    values = np.array(values, dtype=float)
    values = values[~np.isnan(values)]
    return values.mean() if values.size else np.nan


@pytest.mark.parametrize("phase", [None, "decode"])
def test_means_are_those_of_a_loop_over_all_slots(tmp_path, phase):
    store = written(tmp_path / "s", undefined)
    result = analysis.margins(store, phase=phase, resamples=0)
    again = analysis.margins(Store.open(store.path), phase=phase, resamples=0)
    for place, key in enumerate(("L001", "L003")):
        truth = brute(store, key, phase)
        for column, name in enumerate(("margin", "mean_weight", "token_entropy")):
            expect = [mean(each[column]) for each in truth]
            for found in (result, again):
                np.testing.assert_allclose(found[name].values[place, : len(expect)], expect, rtol=1e-6)
                assert np.isnan(found[name].values[place, len(expect) :]).all()
            whole = mean([value for each in truth for value in each[column]])
            np.testing.assert_allclose(result[f"layer_{name}"].values[place], whole, rtol=1e-6)
        assert result["count"].values[place, : len(truth)].tolist() == [len(each[1]) for each in truth]
    assert np.isnan(result["margin"].values[0, 5])
    assert np.isnan(result["token_entropy"].values[1]).all()
    assert np.isnan(result["margin_low"].values).all()


def test_intervals_widen_where_documents_differ_and_close_where_they_agree(tmp_path):
    def planted(number, batch):
        # Layer 1: one margin in all documents; layer 3: a margin of each document's own.
        batch.sites["L001"].margin[:] = 0.25
        batch.sites["L003"].margin[:] = number % 2

    result = analysis.margins(written(tmp_path / "s", planted), resamples=200)
    np.testing.assert_allclose(result["margin_low"].values[0], 0.25)
    np.testing.assert_allclose(result["margin_high"].values[0], 0.25)
    low, high = result["margin_low"].values[1, :4], result["margin_high"].values[1, :4]
    # Of 30 documents, half at 0 and half at 1: about 0.5 ± 2 sqrt(0.25 / 30), tokens apart would say ± 0.06.
    assert ((high - low > 0.25) & (high - low < 0.6)).all()
    assert ((low < result["margin"].values[1, :4]) & (high > result["margin"].values[1, :4])).all()
