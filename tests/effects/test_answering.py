"""Problems solved under a recipe, against answers generated one at a time."""

from __future__ import annotations

import numpy as np
import pytest

import moescope as ms
from moescope.decoding import Problem, generate
from moescope.edits import Recipe, Scale, Zero
from moescope.effects import matched, solving
from tests.capturing.texts import model

PROMPTS = ["sun moon river", "stone bird tree wind", "rain fire snow", "leaf road sun", "moon wind fire stone"]
RECIPE = Recipe([Scale(layer=1, expert=[3, 5], factor=9.0)])


def first_line(text: str) -> str:
    return (text.strip().splitlines() or ["nothing"])[0].strip().rstrip(".")


def test_counts_are_those_of_answers_one_at_a_time() -> None:
    made = model()
    plain = [first_line(one.text) for one in generate(made, PROMPTS, max_new_tokens=4)]
    asked = [Problem(prompt, answer) for prompt, answer in zip(PROMPTS, plain, strict=True)]
    asked[0] = Problem(PROMPTS[0], "not this")
    result = solving(made, asked, RECIPE, factors=[1.0, 30.0], controls=2, max_new_tokens=4)
    assert result["solved"].sel(routing="plain").values == pytest.approx([0.8, 0.8])
    assert result["lost"].sel(factor=1.0).values.tolist() == [0, 0, 0]  # a factor of 1 changes nothing
    rng = np.random.default_rng(0)
    others = [matched(RECIPE, made, rng) for _ in range(2)]
    for routing, recipes in (("recipe", [RECIPE]), ("random experts", others)):
        right = []
        for recipe in recipes:
            edits = [edit.model_copy(update={"factor": 30.0}) for edit in recipe.edits]
            texts = generate(made, PROMPTS, recipe=Recipe(edits), max_new_tokens=4)
            right += [
                first_line(text.text) == problem.answer and bool(text.text.strip())
                for text, problem in zip(texts, asked, strict=True)
            ]
        row = result.sel(factor=30.0, routing=routing)
        assert row["solved"].item() == pytest.approx(np.mean(right))
        assert row["gained"].item() - row["lost"].item() == pytest.approx(sum(right) / len(recipes) - 4)
        # Two recipes answer each problem twice, and these answers are not independent: no exact test of them.
        assert np.isnan(row["p"].item()) == (routing == "random experts")
        assert row["low"].item() <= row["solved"].item() <= row["high"].item()
    as_given = solving(made, asked, RECIPE, controls=0, max_new_tokens=4)
    assert list(as_given["routing"].values) == ["plain", "recipe"]
    assert np.isnan(as_given["factor"].values).all()


def test_mistakes_are_said() -> None:
    for call, words in [
        (lambda: solving(model(), [], RECIPE), "no problems"),
        (lambda: solving(model(), [Problem("sun", "x")], Recipe([Zero(layer=1, expert=3)]), factors=[2.0]), "scale"),
        (lambda: solving(model(), [Problem("sun", "x")], RECIPE, factors=[-1.0]), "0 or more"),
    ]:
        with pytest.raises(ms.MoescopeError, match=words):
            call()
