"""The figures of effects show the numbers of their results."""

from __future__ import annotations

import numpy as np

import moescope as ms
from moescope import figures
from moescope.edits import Recipe, Zero
from moescope.effects import effect, expert_effects
from tests.capturing.texts import model, rows


def corpus() -> ms.Corpus:
    return ms.Corpus(rows(6, longest=8), ["kind"])


def test_the_map_shows_each_experts_effect_and_what_is_sure() -> None:
    result = expert_effects(model(), corpus(), by="kind", layers=[1, 2])
    figure = figures.draw(result)
    maps = [trace for trace in figure.data if trace.type == "heatmap"]
    assert len(maps) == result.sizes["label"]
    for place, trace in enumerate(maps):
        part = result.isel(label=place)
        assert np.array_equal(trace.z, part["effect"].values, equal_nan=True)
        sure = ((part["low"] > 0) | (part["high"] < 0)).values
        dots = figure.data[2 * place + 1]
        assert len(dots.x) == sure.sum()
    assert [trace.visible for trace in maps] == [True, False]


def test_bars_stand_beside_their_controls() -> None:
    result = effect(model(), corpus(), Recipe([Zero(layer=1, expert=[1, 2])]), by="kind", controls=4)
    figure = figures.draw(result)
    assert np.array_equal(figure.data[0].x, result["change"].values)
    assert np.array_equal(figure.data[0].customdata[:, 2], result["p_any"].values)
    unknown = figures.draw(result.assign(low=result["low"] * np.nan, high=result["high"] * np.nan)).data[0].error_x
    assert np.isnan([unknown.array, unknown.arrayminus]).all()
    for place, trace in enumerate(figure.data[1:]):
        assert np.array_equal(trace.x, result["control_change"].isel(label=place).values)
