"""The figure of importance shows the ranks and correlations of its result, and nothing else."""

from __future__ import annotations

import numpy as np
import pytest

from moescope import analysis, figures
from tests.analysis.function_stores import random_truth, write


@pytest.mark.parametrize("by", [None, "domain"])
def test_ranks_and_correlations_are_those_of_the_result(tmp_path, by):
    truth = random_truth(np.random.default_rng(0), 20, (6, 5), 2)
    store = write(tmp_path / "s", truth, labels=["ab"[d % 2] for d in range(20)])
    result = analysis.importance(store, by=by, extra={"mine": np.arange(12.0).reshape(2, 6)}, permutations=49)
    figure = figures.draw(result)
    maps = [trace for trace in figure.data if trace.type == "heatmap"]
    assert len(maps) == result.sizes["criterion"] + 1
    for place, trace in enumerate(maps[:-1]):
        assert np.array_equal(trace.z, result["rank"].values[..., place], equal_nan=True)
    assert [trace.visible for trace in maps[:-1]].count(True) == 1
    shown = maps[-1].z
    off = ~np.eye(len(shown), dtype=bool)
    assert np.array_equal(shown[off], result["spearman_within"].values[off], equal_nan=True)
    halves = np.diag(result["split_half_within"].values)
    assert np.array_equal(np.diag(shown), halves, equal_nan=True)
    texts = [trace for trace in figure.data if trace.type == "scatter"]
    assert sum(len(trace.text) for trace in texts) == (~np.isnan(shown)).sum()
    assert "mine" in maps[-1].x
