"""Findings say what the numbers say, and say so when there is nothing to say."""

import numpy as np
import pytest
from scipy.stats import chisquare

from moescope import analysis
from moescope.analysis.expert_summary import outlier_of_expert
from moescope.analysis.summary import balance_finding, small, specialisation_finding
from tests.analysis.made_stores import random_truth, write


def made_store(path, planted=True, labels=("a", "b", "c"), maxima=None, **more):
    rng = np.random.default_rng(0)
    documents = 45
    domain = [labels[d % len(labels)] for d in range(documents)]
    prefer = np.zeros((documents, 2, 8))
    if planted:
        prefer[[name == labels[0] for name in domain], 1, 6] = 3.0
    made = random_truth(rng, documents, [8, 8], [2, 2], prefer=prefer)
    return write(path, made, [8, 8], {"domain": domain}, layers=[1, 2], maxima=maxima, **more)


def by_name(store, **more):
    return {finding.analysis: finding for finding in analysis.findings(store, **more)}


def test_a_planted_specialist_is_named_with_its_null(tmp_path):
    found = by_name(made_store(tmp_path / "s"))
    told = found["npmi"]
    assert told.holds
    assert told.headline.startswith("In layer 2, expert 6 fires for “a”")
    result = analysis.npmi(made_store(tmp_path / "t")).sel(layer=2, expert=6, label="a")
    assert told.values["npmi"] == pytest.approx(result["npmi"].item())
    assert f"nPMI {result['npmi'].item():.2f}" in told.detail
    assert f"reaches {result['null_p99'].item():.2f}" in told.detail
    assert found["load"].values["layer"] == 2
    assert found["super_experts"].holds is None
    assert "outliers tier" in found["super_experts"].detail


def test_the_busiest_of_many_even_layers_is_no_finding():
    """Its sign holds its level over all layers, where each alone passes its own 99th percentile once in 100."""
    rng, holds, alone = np.random.default_rng(0), [], []
    for seed in range(20):
        result = analysis.load_from_counts(rng.multinomial(4000, np.full(16, 1 / 16), 60), seed=seed)
        holds.append(balance_finding(result).holds)
        alone.append(bool((result["max_vio"] > result["null_max_vio_p99"]).any()))
    assert sum(alone) >= 5
    assert sum(holds) <= 4  # of 20 at level 0.05: beyond it once in 300
    busy = rng.multinomial(4000, np.full(16, 1 / 16), 60)
    busy[7, 3] += 400
    found = balance_finding(analysis.load_from_counts(busy))
    assert (found.holds, found.values["layer"], found.values["expert"]) == (True, 7, 3)


def test_work_is_called_even_only_where_no_layer_is_uneven():
    """A wide layer's busiest may be further above its share by chance than a narrow one's that is really uneven."""
    rng = np.random.default_rng(0)
    counts = np.full((2, 256), np.nan)
    counts[0] = rng.multinomial(2000, np.full(256, 1 / 256))
    counts[1, :8] = [400, 200, 250, 250, 250, 250, 200, 200]
    assert chisquare(counts[1, :8]).pvalue < 1e-9 < 0.01 < chisquare(counts[0]).pvalue
    result = analysis.load_from_counts(counts)
    assert result["max_vio"].values[0] > result["max_vio"].values[1]
    found = balance_finding(result)
    assert found.headline == "The busiest expert, L1E0, does 1.6 times its fair share of the work."
    assert (found.holds, found.values["layer"], found.values["expert"]) == (True, 1, 0)


def test_idle_experts_are_uneven_work_too():
    counts = np.full((2, 64), 20.0)
    counts[1, 5:11] = 0
    found = balance_finding(analysis.load_from_counts(counts))
    assert found.holds
    assert found.headline == "The least busy expert, L1E5, does 0.0 times its fair share of the work."
    # Of 128 experts and both ways; an expert is missed by 1,160 uniform choices of 64.
    assert found.values["p"] == pytest.approx(256 * (1 - 1 / 64) ** 1160)
    assert "6 of 128 experts are never selected" in found.detail


def test_nothing_is_said_to_be_found_where_nothing_is(tmp_path):
    found = by_name(made_store(tmp_path / "s", planted=False))
    assert found["npmi"].holds is False
    assert found["npmi"].headline == "No expert specialises in a domain more than chance explains."
    assert "None of 48 tests" in found["npmi"].detail


def test_one_label_and_no_label(tmp_path):
    assert by_name(made_store(tmp_path / "s", labels=("only",)))["npmi"].holds is None
    made = random_truth(np.random.default_rng(0), 4, [4], [1])
    told = by_name(write(tmp_path / "t", made, [4], {}))["npmi"]
    assert told.holds is None
    assert "label columns" in told.detail


def test_a_super_expert_that_stands_out(tmp_path):
    maxima = np.exp(np.random.default_rng(0).normal(0, 0.1, (2, 8)))
    maxima[0, 3] = 500.0
    told = by_name(made_store(tmp_path / "s", maxima=maxima, hidden=[1.0, 400.0, 410.0]))["super_experts"]
    assert told.holds
    assert told.headline.startswith("L1E3 is a super expert")
    assert "at most 1 of" in told.detail


def test_outputs_that_are_all_alike_have_no_robust_z(tmp_path):
    store = made_store(tmp_path / "s", maxima=np.ones((2, 8)), hidden=[1.0, 1.0, 1.0])
    told = by_name(store)["super_experts"]
    assert told.holds is False
    assert "names none" in told.detail
    assert "always names" not in told.detail
    one = outlier_of_expert(analysis.super_experts(store), "L001", 3)
    assert all("too equal for a robust z" in found.detail and "nan" not in found.detail for found in (told, one))


def test_every_cell_undefined():
    result = analysis.npmi_from_documents(np.zeros((4, 1, 2)), np.ones(4), list("abab"), permutations=5)
    told = specialisation_finding(result)
    assert told.holds is None
    assert told.values == {}


def test_what_was_not_tested_is_not_said_to_be_chance():
    counts = np.random.default_rng(0).poisson(20, (60, 1, 4)).astype(float)
    counts[0::3, 0, 1] += 60
    result = analysis.npmi_from_documents(counts, counts.sum(axis=2)[:, 0], ["a", "b", "c"] * 20, permutations=0)
    for label in (None, "a"):
        told = specialisation_finding(result, label=label)
        assert told.holds is None
        assert "not tested" in told.headline
        assert "chance" not in told.headline
        assert "nan" not in told.detail
        assert f"nPMI {result['npmi'].max().item():.2f}" in told.detail


def test_one_label_is_told_of_alone():
    rng = np.random.default_rng(0)
    labels = ["a", "b", "c"] * 20
    counts = rng.poisson(20, (60, 1, 4)).astype(float)
    counts[0::3, 0, 1] += 60  # the strongest
    counts[1::3, 0, 2] += 20
    result = analysis.npmi_from_documents(counts, counts.sum(axis=2)[:, 0], labels, permutations=200)
    assert "expert 1 fires for “a”" in specialisation_finding(result).headline
    told = specialisation_finding(result, label="b")
    assert told.holds
    assert "expert 2 fires for “b”" in told.headline
    mine = result.sel(label="b")
    stands = int(((mine["q"] <= 0.05) & (mine["npmi"] > 0)).sum())
    assert f"{stands} of 4 experts prefer “b”" in told.detail
    counts[1::3, 0, 3] = 0  # selected, though never for b
    fewer = analysis.npmi_from_documents(counts, counts.sum(axis=2)[:, 0], labels, permutations=200)
    assert " of 4 experts prefer “b”" in specialisation_finding(fewer, label="b").detail


def test_a_label_far_from_chance_is_not_short_of_dealings():
    """Where another label's p is the smallest there can be, more dealings would help that one alone."""
    rng = np.random.default_rng(0)
    counts = rng.poisson(20, (60, 1, 6)).astype(float)
    counts[0::3, 0, 1] += 60
    result = analysis.npmi_from_documents(counts, np.full(60, 400), ["a", "b", "c"] * 20, permutations=30)
    assert "floor" in result.attrs
    short = {name: result["p"].sel(label=name).min().item() <= 1 / 31 for name in ("a", "b", "c")}
    assert short == {"a": True, "b": False, "c": False}
    for name, lacking in short.items():
        told = specialisation_finding(result, label=name)
        assert told.holds is (None if lacking else False)
        assert told.headline.startswith("Too few" if lacking else "No expert")
        assert "dealings of labels over 60 documents" in told.detail


def test_small_values_are_written_as_such():
    said = ["= 0.500", "= 0.001", "= 3e-04", "= 1e-200", "< 1e-300"]
    assert [small(value) for value in (0.5, 0.0005, 3e-4, 1e-200, 0.0)] == said
