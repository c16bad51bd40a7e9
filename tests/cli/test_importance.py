"""`moescope importance` and `moescope super-experts` as a person meets them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import moescope as ms
from moescope.data import CORPUS
from tests.cli.running import moescope


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store of some documents, and others to measure on."""
    folder = tmp_path_factory.mktemp("importance")
    lines = Path(CORPUS).read_text(encoding="utf-8").splitlines()
    (folder / "seen.jsonl").write_text("\n".join(lines[::120]), encoding="utf-8")
    (folder / "other.jsonl").write_text("\n".join(lines[30::144]), encoding="utf-8")
    seen = ms.Corpus(folder / "seen.jsonl", ["domain"])
    ms.capture(ms.load("tiny-qwen-moe"), seen, folder / "store", ["routing", "experts", "outliers"])
    return folder


def test_the_table_takes_in_what_needs_the_model(work: Path) -> None:
    done = moescope(
        "importance", "--store", work / "store", "--table", "--calibration", work / "other.jsonl", "--limit", 3,
        "--heapr", "--csv", work / "i.csv", "--html", work / "i.html", "--json",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["attrs"]["criteria"].endswith("msan, heapr, heapr_total")
    assert len(found["rows"]) == 6 * 16
    assert found["rows"][0]["heapr"] > 0
    assert "heapr" in (work / "i.csv").read_text().splitlines()[0]
    assert "HEAPr" in (work / "i.html").read_text(encoding="utf-8")


def test_criteria_are_tested_by_masking(work: Path) -> None:
    done = moescope(
        "importance", "--store", work / "store", "--data", work / "other.jsonl", "--label", "domain", "--criterion",
        "reap", "--criterion", "frequency", "--n", 2, "--controls", 4, "--html", work / "c.html", "--json",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    rows = json.loads(done.stdout)["rows"]
    assert {row["criterion"] for row in rows} == {"reap", "frequency"}
    assert {row["label"] for row in rows} >= {"all", "spanish"}
    assert all(row["p"] in {0.2, 0.4, 0.6, 0.8, 1.0} for row in rows)
    assert (work / "c.html").stat().st_size > 100_000


def test_super_experts_are_silenced(work: Path) -> None:
    done = moescope(
        "super-experts", "--store", work / "store", "--data", work / "other.jsonl", "--controls", 2,
        "--html", work / "s.html",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "silenced: layer" in done.stdout
    assert "decay" in done.stdout
    assert (work / "s.html").stat().st_size > 100_000


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("importance", "--store", "s"), "Say what to measure the loss on"),
        (("importance", "--store", "s", "--table", "--heapr"), "name them with --calibration"),
        (("super-experts", "--store", "nowhere", "--data", "x"), "nowhere"),
    ],
)
def test_mistakes_are_one_sentence(arguments: tuple[str, ...], words: str) -> None:
    done = moescope(*arguments)
    assert done.returncode == 2
    assert words in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
