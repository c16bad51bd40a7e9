"""`moescope generate` and `moescope apply` as a person meets them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from moescope.edits import Mask, Recipe, Scale
from tests.capturing.texts import model, tokenizer
from tests.cli.running import moescope


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint")
    model().hf.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


def test_apply_writes_and_proves(checkpoint: Path, tmp_path: Path) -> None:
    recipe = Recipe([Scale(layer=1, expert=3, factor=2.0)]).save(tmp_path / "r.yaml")
    plan = moescope("apply", recipe, "--from", checkpoint, "--dry-run")
    assert "experts.3.down_proj.weight × 2" in plan.stdout
    assert "nothing was written" in plan.stdout
    done = moescope("apply", recipe, "--from", checkpoint, "--to", tmp_path / "out", "--json")
    assert done.returncode == 0, done.stderr
    proof = json.loads(done.stdout)["proof"]
    assert proof["largest"] < 1e-4 < proof["changed"]
    again = moescope("apply", recipe, "--from", checkpoint, "--to", tmp_path / "out")
    assert again.returncode == 2
    assert "already exists" in again.stderr
    masked = Recipe([Mask(layer=1, expert=3)]).save(tmp_path / "m.json")
    refused = moescope("apply", masked, "--from", checkpoint, "--to", tmp_path / "m")
    assert refused.returncode == 2
    assert len(refused.stderr.strip().splitlines()) == 1
    assert "no selection bias" in refused.stderr
    assert not (tmp_path / "m").exists()
    assert "Name the new folder" in moescope("apply", recipe, "--from", checkpoint).stderr


def test_generate_plainly_edited_and_by_self_contrast(tmp_path: Path) -> None:
    prompt = "Question: What is 8 + 3?\nAnswer:"
    plain = moescope("generate", prompt, "--max-new-tokens", 20)
    assert "<think>" in plain.stdout
    recipe = Recipe([Scale(layer=layer, expert=range(16), factor=0.2) for layer in range(6)]).save(tmp_path / "r.yaml")
    edited = moescope("generate", prompt, "--recipe", recipe, "--max-new-tokens", 20)
    assert edited.returncode == 0, edited.stderr
    assert edited.stdout != plain.stdout
    contrast = moescope("generate", prompt, "--self-contrast", "--max-new-tokens", 20, "--json")
    found = json.loads(contrast.stdout)
    assert len(found["steps"]) >= len(found["tokens"]) > 0
    shown = moescope("generate", prompt, "--self-contrast", "--steps", "--max-new-tokens", 5)
    assert "likeliest, weak" in shown.stdout
    problems = tmp_path / "p.jsonl"
    problems.write_text(json.dumps({"prompt": prompt, "answer": "11"}))
    tuned = moescope("generate", "--tune", problems, "--betas", 0.0, "--after", "</think>", "--json")
    assert json.loads(tuned.stdout)["rows"][0]["beta"] == 0.0


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((), "Give a prompt"),
        (("a", "--weak-rank", 0, "--self-contrast"), "Ranks count from 1"),
        (("a", "--self-contrast", "--alpha", 0), "alpha must lie"),
        (("a", "--recipe", "nowhere.yaml"), "Cannot read the recipe"),
        (("--tune", "nowhere.jsonl"), "Cannot read nowhere.jsonl"),
    ],
)
def test_mistakes_are_one_sentence(arguments: tuple[object, ...], words: str) -> None:
    done = moescope("generate", *arguments)
    assert done.returncode == 2
    assert words in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
