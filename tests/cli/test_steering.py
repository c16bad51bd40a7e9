"""`moescope steer` as a person meets it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import moescope as ms
from moescope.data import ARITHMETIC, CORPUS
from moescope.edits import Recipe
from tests.cli.running import moescope


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    rows = [json.loads(line) for line in Path(CORPUS).read_text(encoding="utf-8").splitlines()]
    file = tmp_path_factory.mktemp("steer") / "texts.jsonl"
    file.write_text("\n".join(json.dumps(row) for row in rows[::30]), encoding="utf-8")
    return file


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory, texts: Path) -> Path:
    out = tmp_path_factory.mktemp("steer") / "store"
    ms.capture(ms.load("tiny-qwen-moe"), ms.Corpus(texts, ["domain"]), out, ["routing"])
    return out


def test_experts_of_a_store_are_masked_and_measured(store: Path, texts: Path, tmp_path: Path) -> None:
    done = moescope(
        "steer", "--store", store, "--target", "python", "--do", "mask", "--top", 4, "--data", texts,
        "--label", "domain", "--controls", 3, "--save", tmp_path / "r.yaml", "--html", tmp_path / "f.html", "--json",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert {row["label"] for row in found["effect"]["rows"]} >= {"python", "german"}
    assert all(row["divergence"] > 0 and row["control_divergence"] > 0 for row in found["effect"]["rows"])
    assert (tmp_path / "f.html").stat().st_size > 100_000
    recipe = Recipe.load(tmp_path / "r.yaml")
    assert [edit.kind for edit in recipe.edits] == ["mask"] * 4
    swept = moescope(
        "steer", "--recipe", _scale(tmp_path), "--data", texts, "--controls", 1, "--sweep", 1, "--sweep", 4,
        "--html", tmp_path / "s.html",
    )  # fmt: skip
    assert swept.returncode == 0, swept.stderr
    assert "control_divergence" in swept.stdout
    assert (tmp_path / "s.html").stat().st_size > 100_000


def _scale(folder: Path) -> Path:
    return Recipe([ms.Scale(layer=1, expert=3, factor=2.0)]).save(folder / "scale.yaml")


def test_two_sets_of_prompts_answers_and_texts(tmp_path: Path) -> None:
    lines = [json.loads(line) for line in Path(ARITHMETIC).read_text(encoding="utf-8").splitlines()[:8]]
    (tmp_path / "a.txt").write_text("\n".join(line["prompt"].splitlines()[0] for line in lines))
    (tmp_path / "b.txt").write_text("Once upon a time\nThere was a fox\nThe old mill stood by the river")
    (tmp_path / "p.jsonl").write_text("\n".join(json.dumps(line) for line in lines[:3]))
    done = moescope(
        "steer", "--wanted", tmp_path / "a.txt", "--other", tmp_path / "b.txt", "--do", "promote", "--top", 2,
        "--problems", tmp_path / "p.jsonl", "--after", "</think>", "--prompt", "Once upon a time",
        "--max-new-tokens", 40, "--json",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert [row["routing"] for row in found["problems"]["rows"]] == ["plain", "recipe", "random experts"]
    assert all(found["texts"][0][name] for name in ("plain", "edited", "random experts"))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((), "Say where the experts come from"),
        (("--recipe", "x.yaml"), "Say what to measure"),
        (("--recipe", "x.yaml", "--prompt", "a"), "Cannot read the recipe"),
        (("--wanted", "nowhere.txt", "--prompt", "a"), "needs --other"),
    ],
)
def test_mistakes_are_one_sentence(arguments: tuple[object, ...], words: str) -> None:
    done = moescope("steer", *arguments)
    assert done.returncode == 2
    assert words in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


def test_a_store_needs_a_target(store: Path) -> None:
    done = moescope("steer", "--store", store, "--prompt", "a")
    assert "Name the label value with --target: one of arithmetic" in done.stderr
