"""The bird's-eye map, balance and one token's map show what the results hold, and say ids, never row numbers."""

import numpy as np
import pytest
import xarray as xr

from moescope import analysis, figures
from moescope.errors import MoescopeError
from moescope.figures import grids
from tests.analysis.made_stores import random_truth, write
from tests.figures.tooltips import told


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """Two routers in layer 2 (5 and 3 experts) and one in layer 4; expert 4 of the first is never selected."""
    prefer = np.zeros((40, 3, 5))
    prefer[::2, 0, 1] = 3
    made = random_truth(np.random.default_rng(0), 40, [4, 3, 5], [2, 1, 2], longest=40, prefer=prefer)
    labels = {"domain": ["<b>law", "code"] * 20}
    maxima = np.random.default_rng(1).random((3, 5)) * 100 + 0.1
    keys = ["L002", "L002b", "L004"]
    folder = tmp_path_factory.mktemp("grids") / "s"
    return write(folder, made, [5, 3, 5], labels, layers=[2, 2, 4], keys=keys, maxima=maxima, hidden=[1.0] * 5)


def heat(figure):
    return next(trace for trace in figure.data if trace.type == "heatmap")


def test_load_map_shows_shares_ids_and_what_is_not_there(store):
    result = analysis.load(store)
    figure = figures.layer_expert_grid(result, chosen=("L002b", 1))
    cells = heat(figure)
    relative = result["relative_load"].values
    np.testing.assert_allclose(np.exp2(cells.z)[np.isfinite(cells.z)], relative[relative > 0])
    assert cells.customdata.shape == (3, 5, 3)
    assert [cells.customdata[row, 2].tolist() for row in range(3)] == [["L002", 2, 2], ["L002b", 2, 2], ["L004", 4, 2]]
    (cross,) = (trace for trace in figure.data if trace.type == "scatter")
    assert [list(ids) for ids in cross.customdata] == [["L002", 2, 4]]  # selected by none, and no expert 3 of L002b
    (absent,) = (trace for trace in figure.data if trace.type == "bar")
    assert (list(absent.y), list(absent.base), list(absent.x)) == (["L002b"], [2.5], [2])
    for shape in figure.layout.shapes:
        assert (shape.x0, shape.x1, shape.y0, shape.y1) == (0.5, 1.5, 0.5, 1.5)  # the middle of three rows
    assert len(figure.layout.shapes) == 2


def test_chosen_cells_that_do_not_exist_are_refused(store):
    result = analysis.load(store)
    for chosen in ((3, 0), ("L002b", 3), (4, 5)):
        with pytest.raises(MoescopeError, match="no expert"):
            figures.layer_expert_grid(result, chosen=chosen)
    assert len(figures.layer_expert_grid(result, chosen=(2, 1)).layout.shapes) == 4  # both routers of layer 2
    with pytest.raises(MoescopeError, match="no 'reap'"):
        figures.layer_expert_grid(result, "reap")


def test_npmi_map_keeps_what_stands_and_names_its_label(store):
    result = analysis.npmi(store, by="domain", permutations=499)
    cells = heat(figures.layer_expert_grid(result))
    guessed = figures.layer_expert_grid(analysis.npmi(store, permutations=0))
    assert np.isnan(heat(guessed).z).all()
    assert "not tested, so no label is named" in [note.text for note in guessed.layout.annotations]
    empty = next(trace for trace in guessed.data[1:] if trace.type == "heatmap")
    assert told(empty, 0, 1) == "layer 2, expert 1  not tested "
    stands = (result["q"].values <= 0.05) & (result["npmi"].values > 0)
    best = np.where(stands, result["npmi"].values, -np.inf).max(axis=2)
    np.testing.assert_array_equal(np.isfinite(cells.z), np.isfinite(best))
    np.testing.assert_allclose(cells.z[np.isfinite(cells.z)], best[np.isfinite(best)])
    assert "prefers &lt;b&gt;law" in cells.text[0, 1]  # planted, and its label does nothing to the page
    assert stands.any()
    assert not stands.any(axis=2).all()


def test_other_measures_are_drawn_on_their_own_scales(store):
    outliers = analysis.super_experts(store)
    figure = figures.layer_expert_grid(outliers)
    axis, cells = figure.layout.coloraxis, heat(figure)
    magnitude = outliers["absmax"].values
    seen = np.isfinite(cells.z)
    smallest = np.nanmin(magnitude)
    np.testing.assert_allclose(10 ** cells.z[seen] * smallest, magnitude[seen])
    assert float(axis.colorbar.ticktext[0]) == pytest.approx(smallest, rel=0.01)
    assert axis.cmin == 0  # so that plotly takes sequential colours
    margins = analysis.margins(store, resamples=0)
    weight = heat(figures.layer_expert_grid(margins, "mean_weight"))
    expect = margins["mean_weight"].values / margins["layer_mean_weight"].values[:, None] - 1
    np.testing.assert_allclose(weight.z, expect)
    effect = margins.assign(effect=(("layer", "expert"), np.linspace(-1, 2, 15).reshape(3, 5)))
    axis = figures.layer_expert_grid(effect, "effect").layout.coloraxis
    assert (axis.cmin, axis.cmax) == (-2, 2)
    # The made store's margins are all 0: drawn as what they are, not as missing.
    drawn = heat(figures.margins(margins)).z
    np.testing.assert_array_equal(drawn, np.where(np.isfinite(margins["margin"].values), 0, np.nan))
    silent = outliers.assign(absmax=outliers["absmax"] * 0)
    np.testing.assert_array_equal(
        heat(figures.layer_expert_grid(silent)).z, np.where(np.isfinite(magnitude), 0, np.nan)
    )
    alone = margins.drop_vars([f"layer_{name}" for name in ("margin", "mean_weight", "token_entropy")])
    np.testing.assert_allclose(heat(figures.layer_expert_grid(alone, "mean_weight")).z, margins["mean_weight"])


def test_every_measure_says_how_to_read_it():
    for measure in grids.MEASURES.values():
        assert measure.read.endswith(".")
        assert measure.scale in ("ratio", "layer", "signed", "plain", "powers")


def test_balance_is_the_loads_own(store):
    result = analysis.load(store)
    figure = figures.balance(result)
    even, first, busiest, second = figure.data
    np.testing.assert_allclose(even.x, result["effective_experts"].values / [5, 3, 5])
    np.testing.assert_allclose(busiest.x, result["max_vio"].values + 1)
    np.testing.assert_allclose(first.x, result["null_effective_experts_p01"].values / [5, 3, 5])
    np.testing.assert_allclose(second.x, result["null_max_vio_p99"].values + 1)
    assert list(even.y) == ["2", "L002b", "4"]
    with pytest.raises(MoescopeError, match="one label"):
        figures.balance(analysis.load(store, by="domain"))


def test_a_token_map_names_its_experts_and_draws_none_where_there_is_none(store):
    result = analysis.token_routing(store, 7)
    figure = figures.draw(result)
    cells = heat(figure)
    assert cells.customdata[1, 0].tolist()[:3] == ["L002b", 2, int(result["expert"].values[1, 0])]
    assert np.isnan(cells.z[1, 1])  # its router chooses one expert
    np.testing.assert_allclose(np.nansum(cells.z, axis=1), 1)
    numbers = next(trace for trace in figure.data if trace.name == "numbers")
    assert list(numbers.text) == [str(e) for e in result["expert"].values.ravel() if e >= 0]
    assert "w" in figure.layout.annotations[0].text
    hostile = result.assign_attrs(text="<script>alert(1)</script>")
    assert "<script>" not in figures.token_routing(hostile).layout.annotations[0].text
    small = result.assign(margin=result["margin"] * 0 + 0.0471)
    assert list(figures.token_routing(small).layout.xaxis3.tickvals) == pytest.approx([0, 0.04])  # two stand apart
    sure = result.assign(entropy=result["entropy"] * 0, margin=result["margin"] * 0)
    assert [figures.token_routing(sure).layout[axis].tickvals for axis in ("xaxis2", "xaxis3")] == [(0,), (0,)]
    assert isinstance(result, xr.Dataset)
