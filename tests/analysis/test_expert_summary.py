"""One expert in words: the numbers are the results' own, and a verdict follows its null."""

import numpy as np
import pytest
import xarray as xr
from scipy.stats import binomtest

from moescope import analysis, figures
from moescope.analysis import expert_summary
from moescope.analysis.loads import uniform_p
from moescope.analysis.outlier_summary import massive_finding, rule_of, sink_finding
from moescope.analysis.selection_margins import SUMS, _means
from moescope.errors import MoescopeError
from tests.analysis.made_stores import random_truth, write

SITE = "L002"


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """Expert 1 of layer 2 is busy in law, expert 4 of it is never selected; layer 4 has an outlier."""
    prefer = np.zeros((40, 2, 5))
    prefer[::2, 0, 1] = 3
    prefer[:, 0, 4] = -1e9
    made = random_truth(np.random.default_rng(0), 40, [5, 5], [2, 1], longest=60, prefer=prefer)
    maxima = np.array([[1, 2, 3, 2, np.nan], [5.0, 4, 6, 5, 900]])
    labels = {"domain": ["law", "code"] * 20}
    folder = tmp_path_factory.mktemp("summary") / "s"
    return write(folder, made, [5, 5], labels, layers=[2, 4], maxima=maxima, hidden=[1.0, 1.0, 50.0, 60.0, 60.0])


def test_work_is_the_share_and_its_rank(store):
    result = analysis.load(store)
    counts = result["count"].values[0]
    for expert in range(4):
        found = expert_summary.work_finding(result, SITE, expert)
        share = counts[expert] / counts.sum() * 5
        assert found.headline == f"Does {share:.2f} times its fair share of the work."
        assert found.values["rank"] == sorted(-counts).index(-counts[expert]) + 1
        n = int(counts.sum())
        ends = [binomtest(int(counts[expert]), n, 1 / 5, alternative=side).pvalue for side in ("less", "greater")]
        assert found.holds is bool(10 * min(ends) <= 0.05)
        assert f"{counts[expert]:,.0f} of its layer's {counts.sum():,.0f}" in found.detail
    assert expert_summary.work_finding(result, SITE, 4).headline == "It is never selected."


def test_a_preference_is_named_only_where_it_stands(store):
    result = analysis.npmi(store, by="domain", permutations=499)
    planted = expert_summary.preference_finding(result, SITE, 1)
    assert planted.holds
    assert planted.headline == "Prefers “law”."
    assert f"{result['npmi'].sel(label='law').values[0, 1]:.2f}" in planted.detail
    for site, row in ((SITE, 0), ("L004", 1)):
        for expert in range(5):
            found = expert_summary.preference_finding(result, site, expert)
            part = result.isel(layer=row, expert=expert)
            stands = bool(((part["q"] <= 0.05) & (part["npmi"] > 0)).any())
            never = bool(np.isnan(part["npmi"]).all())
            assert found.holds is (None if never else stands)
    alone = analysis.npmi(store, by="domain", permutations=0)
    assert expert_summary.preference_finding(alone, SITE, 1).holds is None


def test_outliers_need_the_rule_the_ratio_and_the_null(store):
    result = analysis.super_experts(store, depth=4)
    solid = expert_summary.outlier_of_expert(result, "L004", 4)
    assert solid.holds
    assert solid.headline == "Is a super expert."
    assert f"{900 / 5:.1f} times its layer's median" in solid.detail
    assert expert_summary.outlier_of_expert(result, SITE, 2).headline == "Is no super expert."
    assert expert_summary.outlier_of_expert(result, SITE, 4).holds is None
    rule = rule_of(result)
    assert (rule.named, rule.believed) == ((("4", 4),), (("4", 4),))
    assert rule.pooled == 9
    early = analysis.super_experts(store, depth=2)  # pools layer 2 alone, whose largest is no outlier
    assert expert_summary.outlier_of_expert(early, SITE, 2).headline.startswith("Named by the super expert rule, but")
    assert rule_of(early).named == (("2", 2),)
    assert rule_of(early).believed == ()


def test_importance_says_rank_and_what_is_missing(store):
    result = analysis.importance(store, splits=0, permutations=0)
    values = result["mc_moe"].values[0]
    found = expert_summary.importance_of_expert(result, SITE, 1)
    assert found.values["mc_moe_rank"] == int((values > values[1]).sum()) + 1
    assert "capture with the experts tier" in found.detail
    assert expert_summary.importance_of_expert(result, SITE, 4).headline.startswith("It has no rank")


def test_margins_are_held_against_the_layer(store):
    result = analysis.margins(store)
    level = expert_summary.margin_of_expert(result, SITE, 1)  # the made margins are all 0
    assert level.holds is False
    low = result.copy(deep=True)
    low["margin"][0, 1], low["margin_low"][0, 1], low["margin_high"][0, 1] = -2, -3, -1
    assert expert_summary.margin_of_expert(low, SITE, 1).headline.startswith("Is chosen more narrowly")
    low["margin"][0, 1], low["margin_low"][0, 1], low["margin_high"][0, 1] = 2, 1, 3
    assert expert_summary.margin_of_expert(low, SITE, 1).headline.startswith("Is chosen more clearly")
    assert expert_summary.margin_of_expert(result, SITE, 4).holds is None


def test_uniform_work_keeps_the_level_of_its_sign():
    """One false sign in a layer at most once in 20, for experts that do much and for dead ones alike."""
    rng = np.random.default_rng(0)
    for width, selections in ((8, 400), (64, 40), (64, 3000)):
        counts = rng.multinomial(selections, np.full(width, 1 / width), 400)
        p = {n: uniform_p(n, selections, width) for n in np.unique(counts).tolist()}
        signs = [any(p[n] <= 0.05 for n in layer) for layer in counts.tolist()]
        assert np.mean(signs) <= 0.08  # 0.05 and three standard errors
    assert uniform_p(0, 40, 64) == 1
    assert uniform_p(100, 10_000, 64) < 0.001  # far below 156


def test_few_selections_do_not_make_a_dead_expert_remarkable(store):
    result = analysis.load(store)
    few = result.copy(deep=True)
    few["count"][0], few["selections"][0] = [1, 2, 1, 2, 0], 6
    assert expert_summary.work_finding(few, SITE, 4).holds is False
    assert expert_summary.work_finding(result, SITE, 4).holds is True
    lazy = result.copy(deep=True)
    lazy["count"][0] = lazy["count"][0] + float(lazy["selections"][0]) * np.array([0, 1, 1, 1, 0.2])
    lazy["selections"][0] = float(lazy["count"][0].sum())
    lazy["relative_load"][0] = lazy["count"][0] / lazy["selections"][0] * 5
    lazy = lazy.round()
    assert float(lazy["relative_load"][0, 4]) < 1
    assert expert_summary.work_finding(lazy, SITE, 4).holds is True  # too little, and not by chance


def test_margins_of_the_layer_keep_the_level_of_the_sign():
    """Documents with margins of their own, whichever expert is chosen: 64 experts are tested together."""
    rng, any_sign, signs = np.random.default_rng(0), [], []
    for _ in range(20):
        documents, experts = 40, 64
        count = rng.poisson(20, (documents, experts)).astype(float)
        sums = np.zeros((documents, experts, len(SUMS)))
        margin = rng.normal(1, 0.3, (documents, 1)) + rng.normal(0, 0.3, (documents, experts))
        sums[..., 0] = sums[..., 2] = sums[..., 4] = count
        sums[..., 3] = count * margin
        found = _means(sums, 500, rng)
        result = xr.Dataset(
            {
                name: ("layer", [v]) if name.startswith("layer_") else (("layer", "expert"), [v])
                for name, v in found.items()
            },
            coords={"site": ("layer", ["L000"]), "n_experts": ("layer", [experts])},
        )
        holds = expert_summary._margin_q(result.isel(layer=0)) <= 0.05
        signs.append(holds.mean())
        any_sign.append(holds.any())
    result["margin"][0, 5] += 1
    assert expert_summary.margin_of_expert(result, "L000", 5).holds
    assert np.mean(any_sign) <= 0.2
    assert np.mean(signs) <= 0.01


def test_documents_that_are_all_alike_do_not_judge_a_margin():
    """Without a spread between documents a gap has no p, and certainly not one of 0."""
    sums = np.zeros((3, 3, len(SUMS)))
    sums[..., 0] = sums[..., 2] = 10
    sums[..., 3] = 10 * np.array([[0.5, 0.2, 0.4], [0.5, 0.9, 0.1], [0.5, 0.3, 0.7]])
    found = _means(sums, 200, np.random.default_rng(0))
    dims = {name: "layer" if name.startswith("layer_") else ("layer", "expert") for name in found}
    result = xr.Dataset(
        {name: (dims[name], [values]) for name, values in found.items()},
        coords={"site": ("layer", ["L000"]), "n_experts": ("layer", [3])},
    )
    same, other = (expert_summary.margin_of_expert(result, "L000", expert) for expert in (0, 1))
    assert same.holds is None
    assert same.headline == "Whether it is chosen as clearly as its layer's others was not tested."
    assert "q = nan" not in same.detail
    assert other.holds is False


def test_who_is_not_there_is_refused(store):
    result = analysis.load(store)
    for site, expert in ((SITE, 5), ("L003", 0), (SITE, -1)):
        with pytest.raises(MoescopeError, match="no expert"):
            expert_summary.work_finding(result, site, expert)


def test_massive_activations_and_sinks_in_words(store):
    result = analysis.attention_sinks(store)
    formed = massive_finding(result)
    assert formed.holds
    assert formed.values["formed"] == analysis.super_experts(store).attrs["depth"]  # one rule for both
    assert sink_finding(result).holds is None  # captured without
    assert "in channel 3 at position 0" in formed.detail
    nowhere = result.assign({name: result[name] * 0 - 1 for name in ("token_id", "position", "channel")})
    assert "-1" not in massive_finding(nowhere).detail
    (bar,) = (trace for trace in figures.attention_sinks(nowhere).data if trace.name == "largest value")
    assert bar.hovertext == ("", *(f", {jump:.2g} times the layer before" for jump in result["jump"].values[1:]))
    (bar,) = (trace for trace in figures.attention_sinks(result).data if trace.name == "largest value")
    assert bar.hovertext[0] == "<br>token id 0, position 0, channel 3"
    quiet = result.assign(absmax=result["absmax"] * 0 + 3)
    assert massive_finding(quiet).holds is False
    assert massive_finding(result.assign(absmax=result["absmax"] * np.nan)).holds is None
    heads = result.drop_dims("head").assign_coords(head=[0, 1])
    share = np.full((result.sizes["layer"], 2), 0.1)
    flat = heads.assign(share=(("layer", "head"), share))
    assert sink_finding(flat).holds is False
    share = share.copy()
    share[1, 1] = 0.4
    found = sink_finding(heads.assign(share=(("layer", "head"), share)))
    assert found.headline == "1 head sinks attention into the first token."
    assert "Head 1 of layer 1 puts 40.0%" in found.detail


def test_documents_by_number_are_a_slice_as_labels_are(store):
    even = list(range(0, 40, 2))
    by_number = analysis.load(store, where={"document": even})
    by_label = analysis.load(store, where={"domain": "law"})
    np.testing.assert_array_equal(by_number["count"].values, by_label["count"].values)
    with pytest.raises(MoescopeError, match="left after the filters"):
        analysis.load(store, where={"document": [999]})
