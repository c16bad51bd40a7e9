"""Attribution against a loop over tokens, its resamples, and what is said where it cannot be had."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import moescope as ms
from moescope import analysis, figures
from moescope.store import Store
from tests.capturing.texts import model, rows


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


def test_what_cannot_be_had_is_told(store: Store, tmp_path: Path) -> None:
    with pytest.raises(ms.MoescopeError, match="has no value 'x'"):
        analysis.attribution(store, label="x")
    plain = ms.capture(model(), ms.Corpus(rows(4), ["kind"]), tmp_path / "s", ["routing"])
    with pytest.raises(ms.MoescopeError, match="no logits tier"):
        analysis.attribution(plain, label="short", score="score")
    with pytest.raises(ms.MoescopeError, match="nothing to attribute"):
        analysis.attribution_from_documents(np.zeros((2, 1, 2)), np.array([0, 0]))
