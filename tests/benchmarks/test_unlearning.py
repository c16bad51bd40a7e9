"""The table of unlearning: intervals are of paired items, and a verdict is what the intervals say."""

from __future__ import annotations

import os

import numpy as np
import pytest

from tests.benchmarks.unlearning import LOSS, SHARES, _interval, verdict
from tests.benchmarks.unlearning_memory import run


def runs(exact: list[float | None], loss: list[float]) -> list[dict[str, dict[str, list[float | None]]]]:
    return [{
        "items": {"forget/exact": exact, LOSS: [*loss]},
        "tokens": {"forget": [1] * len(exact), "other domains": list(range(1, len(loss) + 1))},
    }]  # fmt: skip


def test_intervals_are_of_whole_people_and_of_the_same_items() -> None:
    draw = np.random.default_rng(0)
    exact = np.repeat(draw.integers(0, 2, 40), 6).astype(float)  # all six answers of a person alike
    some = runs([*exact], [1.0, 2.0, 3.0])
    value, low, high = _interval(some, None, "forget/exact")
    assert value == pytest.approx(exact.mean())
    assert (high - low) / 3.92 == pytest.approx(
        exact[::6].std() / np.sqrt(40), rel=0.1
    )  # of 40 people, not 240 answers
    assert _interval(some, some, "forget/exact") == (0, 0, 0)
    dearer = runs([*exact], [1.1, 2.2, 3.3])
    assert _interval(dearer, some, LOSS) == pytest.approx((0.1, 0.1, 0.1))
    assert _interval(runs([1.0, None], [1.0]), None, "forget/exact")[0] == 1


@pytest.mark.parametrize(
    ("sure", "words"),
    [
        ({}, "forgets as much, keeps as much"),
        ({"forget/exact": (-0.2, -0.3, -0.1)}, "forgets more, keeps as much"),
        ({"forget/paraphrase": (0.2, 0.1, 0.3), LOSS: (0.02, 0.01, 0.03)}, "forgets less, keeps less"),
        ({LOSS: (0.02, 0.01, 0.03), "other facts/exact": (0.2, 0.1, 0.3)},
         "forgets as much, keeps more in part, less in part"),
    ],
)  # fmt: skip
def test_a_verdict_is_what_the_intervals_say(sure: dict[str, tuple[float, float, float]], words: str) -> None:
    assert verdict(dict.fromkeys((*SHARES, LOSS), (0.0, -0.1, 0.1)) | sure) == words


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="only Linux lets a peak be forgotten")
def test_memory_is_read_of_a_small_model_too() -> None:
    found = run("one expert, first layer", width=64, experts=8)
    assert found["peak"] >= found["the model alone"] > found["model"]
