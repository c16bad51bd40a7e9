"""The README's table is the committed results file, to the digit; and the benchmark's parts do what they claim."""

from __future__ import annotations

import json

from tests.benchmarks.capture import BEGIN, END, README, RESULTS, alternate, mixed_lengths, table


def test_readme_shows_the_results_file() -> None:
    shown = README.read_text(encoding="utf-8").split(BEGIN)[1].split(END)[0].strip()
    assert shown == table(json.loads(RESULTS.read_text(encoding="utf-8")))


def test_contestants_take_turns_and_the_first_turn_does_not_count() -> None:
    order: list[str] = []
    seconds = alternate({"a": lambda: order.append("a"), "b": lambda: order.append("b")}, 2)
    assert order == ["a", "b"] * 3
    assert [len(values) for values in seconds.values()] == [2, 2]


def test_texts_have_very_different_lengths_and_are_the_same_every_time() -> None:
    texts = mixed_lengths(50)
    assert texts == mixed_lengths(50)
    lengths = sorted(map(len, texts))
    assert lengths[-1] > 5 * lengths[0]
