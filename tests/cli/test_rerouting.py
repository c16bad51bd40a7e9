"""`moescope reroute` as a person meets it."""

from __future__ import annotations

import json
from pathlib import Path

import pandas as pd
import pytest

from moescope.data import ARITHMETIC
from tests.cli.running import moescope


@pytest.fixture
def lines() -> list[str]:
    return Path(ARITHMETIC).read_text(encoding="utf-8").splitlines()


def test_a_prompt_and_problems_are_rerouted(lines: list[str], tmp_path: Path) -> None:
    references, asked = tmp_path / "r.jsonl", tmp_path / "p.jsonl"
    references.write_text("\n".join(lines[:8]))
    asked.write_text("\n".join(lines[20:22]))
    common = ("--references", references, "--after", "</think>", "--neighbours", 2, "--steps", 2,
              "--max-new-tokens", 44, "--json")  # fmt: skip
    done = moescope("reroute", json.loads(lines[20])["prompt"], *common)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert len(found["losses"]) == 3
    assert sum(one["weight"] for one in found["neighbours"]) == pytest.approx(1)
    assert found["text"].startswith(" <think>")
    done = moescope("reroute", "--problems", asked, *common, "--csv", tmp_path / "t.csv")
    assert done.returncode == 0, done.stderr
    assert [row["decoding"] for row in json.loads(done.stdout)["rows"]] == ["plain", "nearest", "random"]
    assert list(pd.read_csv(tmp_path / "t.csv")["decoding"]) == ["plain", "nearest", "random"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [((), "Give a prompt"), (("a",), "--references"), (("a", "--references", "nowhere.jsonl"), "Cannot read")],
)
def test_mistakes_are_one_sentence(arguments: tuple[object, ...], words: str) -> None:
    done = moescope("reroute", *arguments)
    assert done.returncode == 2
    assert words in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
