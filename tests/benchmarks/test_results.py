"""The README's table is the committed results file, to the digit; and the benchmark's parts do what they claim."""

from __future__ import annotations

import json

import torch

from moescope.data import FIGURES
from moescope.hooks import load
from tests.benchmarks import answers
from tests.benchmarks.capture import alternate, mixed_lengths
from tests.benchmarks.decoding import Contestants


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


def test_answers_hold_together_and_plain_is_what_the_training_script_found() -> None:
    found = json.loads(answers.RESULTS.read_text(encoding="utf-8"))
    n, rows = found["problems"], found["solved"]
    plain = rows["plain"]["solved"]
    assert round(plain, 4) == json.loads(FIGURES.read_text(encoding="utf-8"))["arithmetic"]["solved"]
    assert {name.split(",")[0].rstrip(" 0123456789") for name in rows} == {
        "plain", "RICE", "random experts", "self-contrast",
    }  # fmt: skip
    for row in rows.values():
        assert row["low"] < row["solved"] < row["high"]
        assert round(n * (row["solved"] - plain)) == row["gained"] - row["lost"]


def test_every_way_of_decoding_writes_as_much_and_two_forwards_are_self_contrast() -> None:
    model = load("tiny-qwen-moe")
    written = {name: way() for name, way in Contestants(model, 2, 5).ways().items()}
    assert {ids.shape[1] for ids in written.values()} == {written["plain"].shape[1]}
    assert torch.equal(written["idle recipe"], written["plain"])
    assert torch.equal(written["two forwards"], written["self-contrast"])
