"""The figures of sweeps show the numbers of their results."""

from __future__ import annotations

import numpy as np

import moescope as ms
from moescope import figures
from moescope.decoding import Problem
from moescope.edits import Recipe, Scale
from moescope.effects import solving, sweep
from tests.capturing.texts import model, rows

RECIPE = Recipe([Scale(layer=1, expert=[3, 5], factor=9.0)])


def test_each_label_has_a_panel_with_its_band() -> None:
    result = sweep(model(), ms.Corpus(rows(6, longest=8), ["kind"]), RECIPE, [4.0, 1.0], by="kind", controls=3)
    figure = figures.draw(result)
    lines = [trace for trace in figure.data if trace.mode == "lines+markers"]
    bands = [trace for trace in figure.data if trace.mode == "lines"]
    assert [list(line.x) for line in lines] == [["1", "4"]] * result.sizes["label"]
    for place, line in enumerate(lines):
        part = result.isel(label=place).sortby("factor")
        assert np.array_equal(line.y, part["change"].values)
        assert np.array_equal(bands[2 * place].y, part["control_low"].values)
        assert np.array_equal(bands[2 * place + 1].y, part["control_high"].values)


def test_each_routing_has_a_line() -> None:
    result = solving(model(), [Problem("sun moon", "x"), Problem("rain", "y")], RECIPE, max_new_tokens=2)
    figure = figures.draw(result)
    assert [line.name for line in figure.data] == ["plain", "recipe", "random experts"]
    assert list(figure.data[0].x) == ["as given"]
    for line in figure.data:
        assert np.array_equal(line.y, result["solved"].sel(routing=line.name).values)
