"""`moescope trace` as a person meets it."""

from __future__ import annotations

import json
from pathlib import Path

import pandas as pd
import pytest

from tests.cli.running import moescope

PROMPT, SOURCE = "Question: What is 8 + 3 + 9?\nAnswer: <think>", "Question: What is 6 + 2 - 5?\nAnswer: <think>"


def test_positions_patched_from_another_prompt(tmp_path: Path) -> None:
    done = moescope(
        "trace", PROMPT, "--answer", " 8", "--wrong", " 6", "--source", SOURCE, "--what", "positions", "--layer", 0,
        "--layer", 4, "--csv", tmp_path / "t.csv", "--html", tmp_path / "t.html", "--keep", tmp_path / "k", "--json",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["attrs"]["kind"] == "patch"
    assert found["attrs"]["metric"] == "difference"
    assert {row["layer"] for row in found["rows"]} == {0, 4}
    written = pd.read_csv(tmp_path / "t.csv")
    assert len(written) == len(found["rows"])
    assert written["effect"].to_numpy() == pytest.approx([row["effect"] for row in found["rows"]], nan_ok=True)
    assert (tmp_path / "t.html").stat().st_size > 100_000
    assert list((tmp_path / "k").glob("part-*.parquet"))


def test_experts_of_cases_and_paths(tmp_path: Path) -> None:
    file = tmp_path / "c.jsonl"
    file.write_text("\n".join(json.dumps({"prompt": p, "answer": " 8"}) for p in (PROMPT, SOURCE)))
    done = moescope("trace", "--cases", file, "--layer", 0)
    assert done.returncode == 0, done.stderr
    assert "over 2 cases" in done.stdout
    assert "p: share of the experts" in done.stdout
    done = moescope("trace", PROMPT, "--answer", " 8", "--what", "paths", "--path", "0:3,1:2", "--controls", 2)
    assert "L0E3 → L1E2" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((), "Give a prompt"),
        (("a",), "--answer"),
        (("a", "--answer", " b", "--path", "0:1"), "belongs to --what paths"),
        (("a", "--answer", " b", "--do", "patch"), "give each case a `source`"),
        (("--cases", "nowhere.jsonl"), "Cannot read"),
    ],
)
def test_mistakes_are_one_sentence(arguments: tuple[object, ...], words: str) -> None:
    done = moescope("trace", *arguments)
    assert done.returncode == 2
    assert words in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
