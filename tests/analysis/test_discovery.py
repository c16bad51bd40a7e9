"""False discovery: what too few draws of a null can and cannot show, against Benjamini and Hochberg's own rule."""

import re

import numpy as np
import pytest
from scipy.stats import false_discovery_control

from moescope import figures
from moescope.analysis import affinities
from moescope.analysis.atlas_table import atlas
from moescope.analysis.cards import absent
from moescope.analysis.discovery import adjusted, too_few
from moescope.analysis.domains import domain_specialisation_from_documents
from moescope.analysis.expert_summary import preference_finding
from moescope.analysis.risk import risk_difference_from_documents
from moescope.analysis.specialisation import npmi_from_documents
from moescope.analysis.summary import specialisation_finding
from tests.analysis.made_stores import write
from tests.analysis.test_pathways import routed


@pytest.mark.parametrize("correction", ["bh", "by"])
@pytest.mark.parametrize(("draws", "sides", "tests", "small"), [(249, 1, 200, 6), (999, 2, 5000, 40), (150, 1, 50, 2)])
def test_the_numbers_of_too_few_draws_are_those_of_the_rule(draws, sides, tests, small, correction):
    p = np.full(tests, 0.7)
    p[:small] = sides / (draws + 1)
    q = false_discovery_control(p, method=correction)
    words = too_few(p, q, draws, tests, "tests", sides, correction).replace(",", "")
    needed = int(re.search(r"at least (\d+) discoveries", words)[1])
    enough = int(re.search(r"to (\d+) or more", words)[1])
    assert f"and {small} have that p" in words
    for stand, many in ((True, needed), (False, needed - 1)):
        tried = np.full(tests, 1.0)
        tried[:many] = sides / (draws + 1)
        assert (false_discovery_control(tried, method=correction).min() <= 0.05) is np.bool_(stand)
    for stand, more in ((True, enough), (False, enough - 1)):
        tried = np.full(tests, 1.0)
        tried[:small] = sides / (more + 1)
        assert (false_discovery_control(tried, method=correction).min() <= 0.05 + 1e-12) is np.bool_(stand)


def test_what_no_number_of_discoveries_could_reach_is_said_to_be_out_of_reach():
    p = np.array([0.1, 0.1, 0.8, 0.9])
    assert "q <= 0.05 cannot be reached among the 4 tests, and 2 have that p" in too_few(p, adjusted(p), 9, 4, "tests")


def test_draws_for_one_side_are_judged_by_that_side():
    """Experts of the second set say nothing of whether those of the first could have stood."""
    counts, first = np.random.default_rng(0).poisson(20, (40, 1, 30)).astype(float), np.arange(40) < 20
    counts[:20, 0, 0] += 40
    counts[20:, 0, 1:6] += 40
    tokens = np.full(40, 1500)
    result = risk_difference_from_documents(counts, tokens, first, permutations=99, alternative="greater")
    p = result["p"].values.ravel()
    np.testing.assert_allclose(result["q"].values.ravel(), false_discovery_control(p))
    low = int((p <= 0.01).sum())
    assert 0 < low < 6
    assert f"among the 30 tests, and {low} have that p" in result.attrs["floor"]
    assert "floor" not in risk_difference_from_documents(counts, tokens, first, permutations=2000).attrs


def test_nothing_is_said_where_draws_are_not_what_lacks():
    p = np.array([0.05, 0.05, np.nan])
    assert too_few(p, adjusted(p), 19, 2, "tests") == ""  # all stand
    p = np.full(100, 0.4)
    assert too_few(p, adjusted(p), 19, 100, "tests") == ""  # none is near
    assert too_few(np.full(3, np.nan), np.full(3, np.nan), 19, 0, "tests") == ""


def test_links_that_no_draw_could_show_are_not_said_to_be_chance(tmp_path, monkeypatch):
    made, widths = routed(np.random.default_rng(0), 0.3)
    store = write(tmp_path / "s", made, widths, {})
    enough = atlas(store)
    assert np.isfinite(enough["successor"]).any()
    assert "predecessor, successor" not in absent(enough)
    monkeypatch.setattr(affinities, "enough_draws", lambda *_: 19)
    few = atlas(store)
    assert np.isnan(few["successor"]).all()
    assert absent(few)["predecessor, successor"].startswith("too few draws for single links: with 19 permutations")
    result = affinities.affinity(store)
    for figure in (figures.affinity_map(result), figures.affinity(result)):
        assert "19 draws are too few for any link" in str([note.text for note in figure.layout.annotations])
    result = affinities.affinity(store, permutations=2000)
    figure = figures.affinity_map(result)
    assert "too few" not in str([note.text for note in figure.layout.annotations])


def test_preferences_that_no_dealing_could_show_are_not_said_to_be_chance():
    rng = np.random.default_rng(0)
    counts, labels = rng.poisson(5, (40, 2, 8)), ["a", "b"] * 20
    counts[::2, 1, 3] += 20  # expert 3 of the second layer is busy in a
    tokens = counts[:, 0].sum(axis=1)
    counts[:, 1] = [rng.multinomial(n, row / row.sum()) for n, row in zip(tokens, counts[:, 1], strict=True)]
    few, enough = (npmi_from_documents(counts, tokens, labels, permutations=n) for n in (30, 2000))
    assert specialisation_finding(enough).holds
    assert few.attrs["floor"] in few.attrs["notes"]
    shares = domain_specialisation_from_documents(counts, tokens, labels, permutations=30)
    assert shares.attrs["floor"] in shares.attrs["notes"]
    told = specialisation_finding(few)
    assert told.holds is None
    assert "With 30 permutations no p is below" in told.detail
    site = str(few["site"].values[1])
    planted = preference_finding(few, site, 3)
    assert planted.holds is None
    assert planted.headline == "Too few permutations to tell whether it prefers a label."
    plain = [expert for expert in range(8) if few["p"].values[1, expert].min() > 1 / 31]
    assert plain
    assert all(preference_finding(few, site, expert).holds is False for expert in plain)


def test_a_headline_and_its_numbers_are_about_one_label():
    """The largest nPMI may be that of a rare label, which does not stand."""
    rng = np.random.default_rng(0)
    counts, labels = rng.poisson(5, (40, 2, 8)), ["a", "b"] * 20
    result = npmi_from_documents(counts, counts.sum(axis=2).max(axis=1), labels, permutations=200)
    result["npmi"][1, 3], result["q"][1, 3] = [0.1, 0.3], [0.01, 0.4]
    found = preference_finding(result, str(result["site"].values[1]), 3)
    assert (found.headline, found.values["label"]) == ("Prefers “a”.", "a")
    assert found.detail.startswith("“a”: nPMI 0.10")
