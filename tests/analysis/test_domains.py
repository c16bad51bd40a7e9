"""Domain specialisation: the shares are the tokens', the top-1 share is the first rank's, intervals hold."""

import numpy as np
import pytest

from moescope import analysis
from moescope.errors import MoescopeError
from tests.analysis.made_stores import random_truth, write
from tests.analysis.test_specialisation import made_counts


@pytest.mark.parametrize("ranks", [None, 1, 2])
def test_shares_are_those_of_the_tokens(tmp_path, ranks):
    made = random_truth(np.random.default_rng(0), 14, [8, 5], [3, 2], missing=0.1)
    domain = ["abc"[d % 3] for d in range(13)] + [None]
    store = write(tmp_path / "s", made, [8, 5], {"domain": domain}, layers=[2, 6], cuts=3, slots_can_miss=True)
    result = analysis.domain_specialisation(store, ranks=ranks, permutations=20, resamples=20)
    of_token = np.array([domain[d] or "-" for d in made.document])
    for row, (width, k) in enumerate([(8, 3), (5, 2)]):
        counted = k if ranks is None else ranks
        np.testing.assert_allclose(result["uniform"][row], counted / width)
        for label in "abc":
            inside = of_token == label
            chosen = np.where(made.valid[row], made.expert[row], -1)[inside, :counted]
            for e in range(width):
                share = (chosen == e).any(axis=1).mean()
                assert result["share"].sel(label=label).values[row, e] == pytest.approx(share)
                assert result["excess"].sel(label=label).values[row, e] == pytest.approx(share / (counted / width))
    assert result["share"].isnull().values[1, 5:].all()
    assert result.attrs["documents_unlabelled"] == 1


def test_p_values_are_those_of_dealing_by_hand():
    counts, tokens, labels = made_counts(np.random.default_rng(3), documents=12)
    draws = 40
    result = analysis.domain_specialisation_from_documents(counts, tokens, labels, permutations=draws, seed=4)
    _, code = np.unique(labels, return_inverse=True)
    dealt = np.random.default_rng(4).permuted(np.tile(code.astype(np.uint8), (draws, 1)), axis=1)
    null = np.stack(
        [
            np.stack([counts[row == label].sum(axis=0) / tokens[row == label].sum() for label in range(3)], axis=-1)
            for row in dealt
        ]
    )
    above = (null >= result["share"].values - 1e-12).sum(axis=0)
    np.testing.assert_allclose(result["p"], (above + 1) / (draws + 1))


def test_intervals_hold_what_they_should():
    """Drawn from one law, 95 % intervals of a share hold its true value about 95 times in a hundred."""
    rng, held, seen = np.random.default_rng(0), 0, 0
    true = np.array([0.7, 0.2, 0.1])
    for seed in range(60):
        tokens = rng.integers(20, 40, 60)
        counts = np.stack([rng.multinomial(n, rng.dirichlet(30 * true)) for n in tokens])[:, None]
        labels = np.array(["a", "b"])[np.arange(60) % 2]
        result = analysis.domain_specialisation_from_documents(
            counts, tokens, labels, permutations=0, resamples=300, seed=seed
        )
        inside = (result["share_low"] <= true[:, None]) & (true[:, None] <= result["share_high"])
        held, seen = held + int(inside.sum()), seen + inside.size
    assert 0.88 <= held / seen <= 0.98


def test_mistakes_are_named(tmp_path):
    store = write(tmp_path / "s", random_truth(np.random.default_rng(0), 4, [4], [2]), [4], {"domain": list("abab")})
    with pytest.raises(MoescopeError, match="`ranks` must be from 1 to 2"):
        analysis.domain_specialisation(store, ranks=3)
    with pytest.raises(MoescopeError, match="no label 'genre'"):
        analysis.domain_specialisation(store, by="genre")
