"""The figures of causal tests show the numbers of their results."""

from __future__ import annotations

import numpy as np

from moescope import figures
from moescope.effects import criteria_effects, super_expert_effects
from tests.capturing.texts import model
from tests.effects.test_criteria import corpus, table
from tests.effects.test_silencing import found_in


def test_rows_of_criteria_beside_random_experts() -> None:
    rng = np.random.default_rng(0)
    result = criteria_effects(
        model(), corpus(), table(a=rng.random((3, 8)), b=rng.random((3, 8))), by="kind", controls=4
    )
    figure = figures.draw(result)
    each = len(figure.data) // result.sizes["label"]
    order = np.argsort(result["gap"].values[:, 0], kind="stable")[::-1]
    for place in range(result.sizes["label"]):
        band, ticks, _, lowest, highest = figure.data[each * place : each * (place + 1)]
        part = result.isel(label=place)
        assert list(band.x[:2]) == [part["control_low"].item(), part["control_high"].item()]
        assert np.array_equal(ticks.x, part["control_change"].values)
        for trace, end in ((lowest, "lowest"), (highest, "highest")):
            assert np.array_equal(trace.x, part["change"].sel(end=end).values[order])
            filled = np.array(trace.marker.color) != "#ffffff"
            assert np.array_equal(filled, part["p"].sel(end=end).values[order] <= 0.05)
    assert [trace.visible for trace in figure.data] == [True] * each + [False] * 2 * each


def test_silenced_super_experts_beside_random_ones(tmp_path) -> None:
    result = super_expert_effects(model(), corpus(), found_in(model(), tmp_path / "s"), by="kind", controls=3)
    figure = figures.draw(result)
    bars, ticks, controls, decay, massive, before, after = figure.data
    assert np.array_equal(bars.x, result["change"].values)
    assert sorted(ticks.x) == sorted(result["control_change"].values.ravel())
    assert np.array_equal(controls.y, result["decay_control"].values.ravel())
    assert np.array_equal(decay.y, result["decay"].values)
    assert np.array_equal(massive.y, result["massive_control"].values.ravel())
    assert np.array_equal(before.y, result["massive_before"].values)
    assert np.array_equal(after.y, result["massive_after"].values)
