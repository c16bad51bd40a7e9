"""Stores at the edge: a layer without a slot, one expert, layers of unlike width, a label with one document."""

import warnings

import numpy as np
import pytest

from moescope import analysis, figures
from tests.analysis.made_stores import random_truth
from tests.analysis.paired_stores import write_tiers

WIDTHS, K = [5, 1, 3], [2, 1, 1]


@pytest.fixture(scope="module")
def odd(tmp_path_factory):
    """Layers of 5, 1 and 3 experts, the last without any filled slot; one label has a single document."""
    made = random_truth(np.random.default_rng(2), 9, WIDTHS, K, missing=0.2)
    made.valid[2][:] = False
    labels = {"domain": ["b" if d == 4 else "a" for d in range(9)], "same": ["x"] * 9}
    loss = np.random.default_rng(0).random(made.document.size)
    folder = tmp_path_factory.mktemp("odd")
    return [
        write_tiers(folder / str(cuts), made, WIDTHS, labels, cuts=cuts, loss=loss, slots_can_miss=True)
        for cuts in (1, 3)
    ]


def asked(odd):
    one, other = odd
    for by in ("domain", "same", None):
        yield "what_if", analysis.what_if(one, by=by, resamples=20)
        yield "compare", analysis.compare(one, other, by=by, permutations=9, resamples=20)
        yield "fluctuation", analysis.fluctuation([other, one], by=by, resamples=20)
    yield "bits", analysis.bits(one, draws=9)
    yield "bits", analysis.bits(one, draws=9, scope="model")
    yield "placement", analysis.placement(one, 2, uneven=True, draws=9, time_limit=2)
    yield "affinity", analysis.affinity(one, "all", permutations=5)


def test_every_answer_is_defined_and_drawn(odd):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for name, result in asked(odd):
            assert result.attrs["analysis"] == name
            assert len(analysis.table(result))
            assert figures.draw(result).data


def test_what_is_not_there_is_nan_and_never_zero(odd):
    one, other = odd
    fewer = analysis.what_if(one, by="domain", resamples=20)
    assert np.isnan(fewer["experts"].values[2]).all()
    np.testing.assert_allclose(fewer["missing_share"].values[2], 1)
    assert (fewer["experts"].values[1] == 1).all()
    assert np.isnan(fewer["experts_low"].sel(label="b")).all()  # one document shows no spread
    pair = analysis.compare(one, other, by="domain", permutations=9, resamples=20)
    for column in ("overlap", "top1", "jsd", "share"):
        assert np.isnan(pair[column].values[2]).all()
    assert (pair["overlap"].values[:2] == 1).all()
    placed = analysis.placement(one, 2, uneven=True, draws=9, time_limit=2)
    assert placed["tokens"].values[1] == 0
    assert np.isnan(placed["crossings"].values[1]).all()
    np.testing.assert_allclose(placed["crossings_per_step"], placed["crossings"].values[0])
    linked = analysis.affinity(one, permutations=5)
    assert np.isnan(linked["mi"].values[1])
    assert np.isnan(linked["p_mi"].values[0])
