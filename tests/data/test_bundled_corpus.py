"""The corpus: deterministic, well formed, honest about what is held out, and shipped as generated."""

import ast
import csv
import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from moescope import data
from moescope.data import generate
from moescope.data.grammars import arithmetic, facts

SHIPPED = {"demo.jsonl": data.CORPUS, "facts.jsonl": data.FORGET, "retain.jsonl": data.RETAIN}
SHIPPED["arithmetic.jsonl"] = data.ARITHMETIC


def rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_command_writes_the_shipped_bytes_whatever_the_hash_seed(tmp_path):
    command = [sys.executable, "-m", "moescope.data.generate", "--out", str(tmp_path)]
    done = subprocess.run(command, env={**os.environ, "PYTHONHASHSEED": "12345"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for name, path in SHIPPED.items():
        assert (tmp_path / name).read_bytes() == path.read_bytes(), name
        assert str(tmp_path / name) in done.stdout


def test_demo_corpus_has_the_promised_domains_and_size():
    corpus = rows(data.CORPUS)
    domains = {row["domain"] for row in corpus}
    assert {"stories", "german", "python", "records", "arithmetic", "facts"} <= domains
    assert all(sum(row["domain"] == name for row in corpus) >= 36 for name in domains)
    assert len({row["id"] for row in corpus}) == len(corpus)
    assert data.CORPUS.stat().st_size < 1_000_000


def test_heldout_documents_are_not_trained_on():
    trained = {d.text for name in generate.DOMAINS for d in generate.documents(name, "train", 1000)}
    heldout = [row for path in (data.CORPUS, data.RETAIN) for row in rows(path) if row["domain"] != "facts"]
    assert not [row["id"] for row in heldout if row["text"] in trained]
    assert not {row["text"] for row in rows(data.RETAIN)} & {row["text"] for row in rows(data.CORPUS)}


def expressions(text: str) -> list[str]:
    """Expressions asked for as such (not as a story)."""
    return re.findall(r"(\d+(?: [-+*] \d+)+)[?.]\nAnswer", text)


def test_no_heldout_expression_is_ever_trained_on():
    held = {row["expression"] for row in rows(data.ARITHMETIC)}
    trained = [d.text for d in generate.documents("arithmetic", "train", 4000)]
    asked = {e for text in trained for e in expressions(text)}
    assert len(asked) > 2000
    assert not asked & held
    assert all(arithmetic.is_heldout(e) for e in held)
    assert not any(arithmetic.is_heldout(e) for e in asked)


def test_arithmetic_is_right():
    for row in rows(data.ARITHMETIC):
        assert eval(compile(ast.parse(row["expression"], mode="eval"), "", "eval")) == int(row["answer"])  # noqa: S307
        match = re.fullmatch(r" <think> (.+) </think> (\d+)", row["text"].removeprefix(row["prompt"]))
        assert match is not None
        assert match[2] == row["answer"]
        steps = match[1].split("; ")
        assert len(steps) == row["steps"]
        for step in steps:
            left, right = step.split(" = ")
            assert eval(compile(ast.parse(left, mode="eval"), "", "eval")) == int(right)  # noqa: S307
        assert steps[-1].endswith(f"= {row['answer']}")


def test_stories_in_arithmetic_tell_their_expression():
    told = [row for row in rows(data.ARITHMETIC) if "How many" in row["prompt"]]
    assert len(told) > 20
    words = {"bags": "*", "finds": "+", "loses": "-"}
    for row in told:
        assert re.findall(r"\d+", row["prompt"]) == re.findall(r"\d+", row["expression"])
        signs = [words[w] for w in re.findall(r"bags|finds|loses", row["prompt"])]
        assert signs == re.findall(r"[-+*]", row["expression"])


def test_python_documents_compile():
    for row in rows(data.CORPUS):
        if row["domain"] == "python":
            compile(row["text"], row["id"], "exec")


def test_records_parse():
    shapes = dict.fromkeys(("json", "lines", "yaml", "csv"), 0)
    for row in rows(data.CORPUS):
        if row["domain"] != "records":
            continue
        text = row["text"]
        if text.startswith("{\n"):
            shapes["json"] += 1
            assert json.loads(text)["count"] in (1, 2)
        elif text.startswith("{"):
            shapes["lines"] += 1
            assert len([json.loads(line) for line in text.splitlines()]) >= 2
        elif text.startswith("version"):
            shapes["yaml"] += 1
            assert len(yaml.safe_load(text)) == 2
        else:
            shapes["csv"] += 1
            table = list(csv.reader(io.StringIO(text)))
            assert len({len(line) for line in table}) == 1
    assert min(shapes.values()) > 5


def test_facts_cover_fifty_people_in_trained_and_untrained_wordings():
    shipped = rows(data.FORGET)
    assert len({row["person"] for row in shipped}) == 50
    assert len({(row["person"], row["relation"]) for row in shipped}) == len(shipped) == 300
    trained = "\n".join(d.text for d in generate.documents("facts", "train", 6000))
    missing = [row["text"] for row in shipped if row["prompt"] not in trained]
    assert not missing
    for row in shipped:
        assert row["prompt"].startswith("Question: ")
        assert row["prompt"].endswith("\nAnswer:")
        assert row["text"] == f"{row['prompt']} {row['answer']}"
        assert row["answer"] in facts.VALUES[row["relation"]]
        assert not [prompt for prompt in row["paraphrases"] if prompt in trained]


@pytest.mark.parametrize("domain", ["german", "spanish"])
def test_articles_agree_with_their_nouns(domain):
    """No noun stands behind an article of another gender, checked on the surface of the text."""
    from moescope.data.grammars import german, spanish

    text = " ".join(row["text"] for row in rows(data.CORPUS) if row["domain"] == domain)
    if domain == "spanish":
        wrong = [f"{a} {n}" for n in spanish.MASCULINE for a in ("la", "una")]
        wrong += [f"{a} {n}" for n in spanish.FEMININE for a in ("el", "un", "del")]
        wrong += ["de el ", "a el "]
    else:
        wrong = [f"{a} {n}" for n in german.NOUNS["der"] for a in ("die", "das", "eine", "einer")]
        wrong += [f"{a} {n}" for n in german.NOUNS["die"] for a in ("das", "dem", "den", "ein", "einen", "einem")]
        wrong += [f"{a} {n}" for n in german.NOUNS["das"] for a in ("die", "den", "eine", "einen", "einer")]
    assert not [phrase for phrase in wrong if re.search(rf"\b{phrase}\b", text, re.IGNORECASE)]
