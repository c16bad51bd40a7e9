"""Attribution against a loop over tokens, its resamples, and what is said where it cannot be had."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest
import xarray as xr

import moescope as ms
from moescope import analysis, figures
from moescope.store import Store
from tests.capturing.texts import model, rows
from tests.figures.tooltips import told


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    some = [row | {"set": "forget" if number % 3 == 0 else "retain"} for number, row in enumerate(rows(18))]
    out = tmp_path_factory.mktemp("attribution") / "store"
    return ms.capture(model("deepseek_v3"), ms.Corpus(some, ["set"]), out, ["routing", "logits"])


@pytest.mark.parametrize("score", ["score", "weight"])
def test_it_is_the_mean_over_texts_of_the_mean_over_tokens(store: Store, score: str) -> None:
    result = analysis.attribution(store, score=score, resamples=50)
    document = store.tokens(["document"])["document"].to_numpy()
    labels = dict(
        zip(
            store.documents(["document"])["document"].to_pylist(),
            store.documents(["set"])["set"].to_pylist(),
            strict=True,
        )
    )
    for row, site in enumerate(store.sites):
        routing, logits = store.routing(site.key), store.logits(site.key).astype(float)
        scores = 1 / (1 + np.exp(-logits))
        sums: dict[int, np.ndarray] = {}
        for token, number in enumerate(document):
            g = np.zeros(site.n_experts)
            for slot, expert in enumerate(routing.expert[token]):
                g[expert] = scores[token, expert] if score == "score" else routing.weight[token, slot]
            sums.setdefault(int(number), []).append(g)  # type: ignore[arg-type, attr-defined]
        means = {number: np.mean(values, axis=0) for number, values in sums.items()}
        forget = np.mean([mean for number, mean in means.items() if labels[number] == "forget"], axis=0)
        rest = np.mean([mean for number, mean in means.items() if labels[number] != "forget"], axis=0)
        np.testing.assert_allclose(result["attribution"].values[row, : site.n_experts], forget, rtol=1e-5)
        np.testing.assert_allclose(result["rest"].values[row, : site.n_experts], rest, rtol=1e-5)
        overlap = np.minimum(forget / forget.sum(), rest / rest.sum()).sum()
        assert result["shared"].values[row] == pytest.approx(overlap)
    assert result.attrs["score"] == score
    of_forget = sum(labels[int(number)] == "forget" for number in document)
    assert (int(result["tokens"]), int(result["rest_tokens"])) == (of_forget, len(document) - of_forget)
    flat = result["attribution"].values
    assert np.unravel_index(np.nanargmax(flat), flat.shape) == tuple(np.argwhere(result["rank"].values == 1)[0])
    assert result["first"].sum() == pytest.approx(1)
    assert (result["low"] <= result["attribution"] + 1e-12).all()


def test_one_text_has_no_interval_and_a_clear_winner_is_always_first() -> None:
    means = np.full((6, 2, 3), 0.1)
    means[:3, 1, 2] = 0.5
    result = analysis.attribution_from_documents(means, np.array([1, 1, 1, 0, 0, 0]))
    assert result["first"].values[1, 2] == 1
    assert result["contrast"].values[1, 2] == pytest.approx(0.4)
    alone = analysis.attribution_from_documents(means[:1], np.array([1]))
    assert np.isnan(alone["low"].values).all()
    assert np.isnan(alone["contrast"].values).all()
    assert int(alone["rank"].values[1, 2]) == 1
    for drawn in (figures.draw(result), figures.draw(alone)):
        assert drawn.data


def test_the_null_is_that_of_all_ways_to_deal_the_label() -> None:
    draw = np.random.default_rng(0)
    means = draw.random((8, 2, 3))
    means[:3, 1, 2] += 1.5
    here = np.array([True] * 3 + [False] * 5)
    result = analysis.attribution_from_documents(means, here, permutations=4000)
    table, sets = means.reshape(8, -1), list(itertools.combinations(range(8), 3))

    def scores(some: tuple[int, ...]) -> tuple[np.ndarray, float]:
        of_set, rest = table[list(some)].mean(0), np.delete(table, some, axis=0).mean(0)
        return of_set - rest, float((of_set - rest)[of_set.argmax()])

    contrasts, targets = (np.array(values) for values in zip(*map(scores, sets), strict=True))
    observed, target = scores((0, 1, 2))
    np.testing.assert_allclose(result["contrast"].values.ravel(), observed)
    above, below = (contrasts >= observed - 1e-9).mean(0), (contrasts <= observed + 1e-9).mean(0)
    np.testing.assert_allclose(result["p"].values.ravel(), np.minimum(1, 2 * np.minimum(above, below)), atol=0.04)
    assert float(result["target_p"]) == pytest.approx((targets >= target - 1e-9).mean(), abs=0.02)
    low, high = np.quantile([table[list(some)].mean(0) for some in sets], [0.025, 0.975], axis=0)
    np.testing.assert_allclose(result["null_low"].values.ravel(), low, atol=0.08)
    np.testing.assert_allclose(result["null_high"].values.ravel(), high, atol=0.08)
    assert (result["q"] >= result["p"] - 1e-12).all()
    untested = analysis.attribution_from_documents(means, here, permutations=0)
    assert np.isnan(untested["q"].values).all()
    assert np.isnan(float(untested["target_p"]))
    xr.testing.assert_equal(untested["first"], result["first"])


def test_what_cannot_be_had_is_told(store: Store, tmp_path: Path) -> None:
    with pytest.raises(ms.MoescopeError, match="has no value 'x'"):
        analysis.attribution(store, label="x")
    plain = ms.capture(model(), ms.Corpus(rows(4), ["kind"]), tmp_path / "s", ["routing"])
    with pytest.raises(ms.MoescopeError, match="no logits tier"):
        analysis.attribution(plain, label="short", score="score")
    with pytest.raises(ms.MoescopeError, match="nothing to attribute"):
        analysis.attribution_from_documents(np.zeros((2, 1, 2)), np.array([0, 0]))


def test_both_maps_say_which_number_the_interval_is_of() -> None:
    rng = np.random.default_rng(0)
    means, here = rng.random((30, 2, 4)), np.arange(30) < 10
    means[here, 1, 2] += 1
    result = analysis.attribution_from_documents(means, here, layers=[3, 5], permutations=500)
    left, pale, full = (trace for trace in figures.draw(result).data if trace.type == "heatmap")
    np.testing.assert_array_equal(left.z, result["attribution"])
    np.testing.assert_array_equal(np.where(np.isnan(full.z), pale.z, full.z), result["contrast"])
    np.testing.assert_array_equal(np.isfinite(full.z), result["q"] <= 0.05)
    for row, expert in ((1, 2), (0, 3)):
        cell = {str(name): float(result[name][row, expert]) for name in result.data_vars if result[name].ndim == 2}
        of_set = f"{cell['attribution']:.4f} on the set  (95 %: {cell['low']:.4f} to {cell['high']:.4f})"
        others = f"{cell['attribution'] - cell['rest']:+.4f} beyond the other texts"
        for trace in (left, full if np.isfinite(full.z[row, expert]) else pale):
            text = told(trace, row, expert)
            assert f"layer {(3, 5)[row]}, expert {expert} " in text
            assert of_set in text
            assert f"texts {cell['rest']:.4f}" in text
            assert f"texts at random {cell['null_low']:.4f} to {cell['null_high']:.4f}, q {cell['q']:.3g}" in text
            assert f"rank {cell['rank']}, first in {cell['first']:.0%}" in text
            assert (others in text) is (trace is not left)
