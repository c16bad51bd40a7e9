"""A filter on a store gives what a capture of the filtered corpus gives, with its documents numbered anew."""

import numpy as np
import pytest

from moescope import analysis
from tests.analysis.made_stores import Made, random_truth
from tests.analysis.paired_stores import changed, write_tiers

WIDTHS, K = [6, 4, 5], [2, 1, 3]
WHERE = {"label": {"domain": "a"}, "documents": {"document": list(range(0, 18, 3))}}


@pytest.fixture(scope="module")
def stores(tmp_path_factory):
    """(before, after) of a whole corpus, and of its documents of the label a alone, cut into other shards."""
    rng, folder = np.random.default_rng(0), tmp_path_factory.mktemp("filtered")
    made = random_truth(rng, 18, WIDTHS, K, missing=0.1)
    picks = [(ids + rng.integers(0, 2, (len(ids), 1))) % width for ids, width in zip(made.expert, WIDTHS, strict=True)]
    kept = made.document % 3 == 0
    whole, part = [], []
    for name, truth in (("before", made), ("after", changed(made, expert=picks))):
        domain = {"domain": ["a" if d % 3 == 0 else "b" for d in range(18)]}
        whole.append(write_tiers(folder / name, truth, WIDTHS, domain, cuts=3, slots_can_miss=True))
        fields = {n: getattr(truth, n)[kept] for n in ("sequence", "position", "token_id")}
        fields |= {n: [of[kept] for of in getattr(truth, n)] for n in ("expert", "weight", "valid")}
        alone = Made(document=truth.document[kept] // 3, **fields)
        fewer = {"domain": ["a"] * 6}
        part.append(write_tiers(folder / f"{name}-a", alone, WIDTHS, fewer, cuts=2, slots_can_miss=True))
    return whole, part


ASKED = {
    "what_if": lambda pair, where: analysis.what_if(pair[0], where=where, resamples=30),
    "bits": lambda pair, where: analysis.bits(pair[0], where=where, draws=9),
    "compare": lambda pair, where: analysis.compare(*pair, where=where, permutations=19, resamples=30),
    "fluctuation": lambda pair, where: analysis.fluctuation(pair, where=where, resamples=30),
    "coactivation": lambda pair, where: analysis.coactivation(pair[0], where=where, groups=3),
    "affinity": lambda pair, where: analysis.affinity(pair[0], "all", where=where, permutations=0),
    "paths": lambda pair, where: analysis.paths(pair[0], where=where, draws=0),
    "load": lambda pair, where: analysis.load(pair[0], where=where),
    "npmi_tokens": lambda pair, where: analysis.npmi_tokens(pair[0], least=1, where=where),
    "vocabulary": lambda pair, where: analysis.vocabulary_specialisation(pair[0], least=2, where=where),
    "caches": lambda pair, where: analysis.caches(pair[0], [4], where=where, draws=0, resamples=0),
    "consistency": lambda pair, where: analysis.consistency(pair[0], where=where, draws=0, resamples=0),
    "placement": lambda pair, where: analysis.placement(pair[0], 2, "eplb", where=where, uneven=True, draws=5),
}
DRAWN = ("seconds", "control_overlap", "control_top1")
"""Where the clock, or the number of a document, decides: the controls rotate each sequence by a hash of both."""


@pytest.mark.parametrize("by", WHERE)
@pytest.mark.parametrize("name", ASKED)
def test_a_filter_gives_what_the_filtered_corpus_gives(stores, name, by):
    whole, part = stores
    ASKED[name](whole, {"document": [1, 2, 3, 4, 5]})  # what other documents gave must not be given again
    filtered, captured = ASKED[name](whole, WHERE[by]), ASKED[name](part, None)
    for variable in set(filtered.data_vars) - set(DRAWN):
        np.testing.assert_allclose(
            filtered[variable].values.astype(float), captured[variable].values.astype(float), err_msg=str(variable)
        )
