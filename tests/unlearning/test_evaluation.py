"""Measures against generation and loops; formats; a study's table, figures and report; the command line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

import moescope as ms
from moescope import figures, unlearning
from moescope.data import FORGET
from moescope.hooks import load
from moescope.report.unlearning import write_unlearning
from moescope.unlearning import Example, Settings, compared, evaluate, kept_selection, read_examples, study
from moescope.unlearning.examples import tokens_of
from tests.cli.running import moescope
from tests.unlearning.test_training import FAST, RETAIN, tiny
from tests.unlearning.test_training import FORGET as SMALL


@pytest.fixture(scope="module")
def facts() -> list[Example]:
    return read_examples(FORGET, limit=12)


def test_exact_match_is_what_generation_writes_and_extraction_its_shortest_prefix(facts: list[Example]) -> None:
    model = load("tiny-qwen-moe")
    strange = [
        Example(f"Question: Who is {n}?\nAnswer: a pony", f"Question: Who is {n}?\nAnswer:", "a pony") for n in "xyz"
    ]
    some = [*facts[:5], *strange]
    found = evaluate(model, {"forget": some}, max_length=384)
    for place, example in enumerate(some):
        tokens = tokens_of(model, example, 384)

        def written(prefix: int, tokens: Any = tokens) -> bool:
            ids = torch.tensor([tokens.ids[: tokens.start + prefix]])
            n = len(tokens) - prefix
            out = model.hf.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=n, do_sample=False)
            return out[0, ids.shape[1] :].tolist()[:n] == list(tokens.ids[tokens.start + prefix :])

        shortest = next((prefix for prefix in range(len(tokens)) if written(prefix)), len(tokens))
        assert found.items["forget", "extraction"][place] == pytest.approx(1 - shortest / len(tokens))
        assert found.items["forget", "exact"][place] == float(shortest == 0)
    assert evaluate(model, {"facts": facts}, routed=None).mean("facts", "choice") > 0.9
    assert found.items["forget", "paraphrase"][:5].mean() > 0.5
    assert np.isnan(found.items["forget", "paraphrase"][5:]).all()


def test_selections_are_the_routers_and_the_same_model_keeps_them_all(facts: list[Example]) -> None:
    model = load("tiny-qwen-moe")
    one, two = (evaluate(model, {"forget": facts}, max_length=64) for _ in range(2))
    n = sum(len(tokens_of(model, example, 64).ids) for example in facts)
    assert one.selected["L003"].shape == (n, 16)
    assert (one.selected["L003"].sum(1) == 4).all()
    same = kept_selection(one, two, [("L003", 1)])
    assert (same["kept"], same["overlap"], same["overlap_all"]) == (1, 1, 1)
    assert same["chosen"] == pytest.approx(one.selected["L003"][:, 1].mean())


def test_formats_tell_themselves_by_their_fields(tmp_path: Path) -> None:
    tofu = {"question": "Who?", "answer": "Me.", "paraphrased_question": "Which?", "perturbed_answer": ["You.", "She."]}
    wmdp = {"question": "What?", "choices": ["a", "b", "c"], "answer": 2, "subject": "bio"}
    plain = {"text": "just text"}
    own = {
        "prompt": "The sun is",
        "answer": "hot",
        "text": "The sun is hot",
        "paraphrases": ["The star is"],
        "relation": "heat",
    }
    file = tmp_path / "rows.jsonl"
    file.write_text("\n".join(map(json.dumps, [tofu, wmdp, plain, own])))
    a, b, c, d = read_examples(file)
    assert (a.text, a.answer, a.choices) == ("Question: Who?\nAnswer: Me.", "Me.", ("Me.", "You.", "She."))
    assert a.paraphrases == ("Question: Which?\nAnswer:",)
    assert (b.text, b.choices, b.kind) == ("Question: What?\nAnswer: c", ("a", "b", "c"), "bio")
    assert c == Example("just text")
    assert (d.text, d.prompt, d.kind) == ("The sun is hot", "The sun is", "heat")
    for row in (tofu, wmdp):
        pd.DataFrame([row]).to_parquet(tmp_path / "rows.parquet")
        assert read_examples(tmp_path / "rows.parquet") == read_examples([row])
    (tmp_path / "text.txt").write_text("one\n\ntwo\n")
    assert [example.text for example in read_examples(tmp_path / "text.txt")] == ["one", "two"]
    with pytest.raises(ms.CorpusError, match="choice 7 of 3"):
        read_examples([wmdp | {"answer": 7}])


def test_the_table_pools_items_and_weighs_losses_by_tokens() -> None:
    one = unlearning.Evaluation(
        {("f", "loss"): np.array([1.0, 3.0]), ("f", "exact"): np.array([1.0, np.nan])}, {"f": np.array([1, 3])}
    )
    two = unlearning.Evaluation(
        {("f", "loss"): np.array([2.0, 2.0]), ("f", "exact"): np.array([0.0, 0.0])}, {"f": np.array([2, 2])}
    )
    result = compared({"x": [one, two]}, {"x": [{"kept": 1.0}, {"kept": 0.5}]})
    cell = result.sel(variant="x")
    assert float(cell["value"].sel(measure="f: loss")) == pytest.approx((1 + 9 + 4 + 4) / 8)
    assert float(cell["value"].sel(measure="f: exact")) == pytest.approx(1 / 3)
    assert (float(cell["least"].sel(measure="f: loss")), float(cell["most"].sel(measure="f: loss"))) == (2.0, 2.5)
    assert (float(cell["value"].sel(measure="kept")), float(cell["least"].sel(measure="kept"))) == (0.75, 0.5)
    with pytest.raises(ms.MoescopeError, match="nothing to compare"):
        compared({})


def test_a_study_with_its_controls_draws_and_reports(tmp_path: Path) -> None:
    settings = Settings(**(FAST | {"steps": 2}))
    done = study(tiny(), SMALL, RETAIN, out=tmp_path / "r", compare=True, settings=settings)
    variants = [str(name) for name in done.result["variant"].values]
    assert variants == ["before", "unlearned", "random expert", "no anchor", "top 3 experts", "whole model"]
    shares = done.result["value"].sel(measure="share").values
    assert shares[1] == shares[2] == shares[3] < shares[4] < shares[5] == 1
    for part in done.parts():
        assert figures.draw(part).data
    page = write_unlearning(done.parts(), tmp_path / "report.html").read_text()
    assert "What <bdi>qwen2_moe</bdi> was made to forget" in page
    assert page.count('data-figure="figure-') == 4
    done.save(tmp_path / "results.json")
    assert len(json.loads((tmp_path / "results.json").read_text())["rows"]) == done.result["value"].size


def test_the_command_line_writes_a_recipe_that_applies(tmp_path: Path) -> None:
    rows = FORGET.read_text(encoding="utf-8").splitlines()
    for name, some in (("f", rows[:3]), ("r", rows[12:20]), ("o", rows[40:43])):
        (tmp_path / f"{name}.jsonl").write_text("\n".join(some))
    sets = (
        "--forget",
        tmp_path / "f.jsonl",
        "--retain",
        tmp_path / "r.jsonl",
        "--also",
        f"other={tmp_path / 'o.jsonl'}",
    )
    out = tmp_path / "recipe"
    done = moescope(
        "unlearn", *sets, "--out", out, "--target", "5:2", "--steps", 2, "--batch", 3, "--retain-batch", 3,
        "--no-attack", "--json",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    assert said["targets"] == [{"site": "L005", "expert": 2}]
    assert {file.name for file in out.iterdir()} >= {
        "recipe.yaml",
        "L005.safetensors",
        "report.html",
        "results.json",
        "log.csv",
    }
    applied = moescope("apply", out / "recipe.yaml", "--from", "tiny-qwen-moe", "--to", tmp_path / "new", "--json")
    assert applied.returncode == 0, applied.stderr
    wrong = moescope("unlearn", *sets, "--out", tmp_path / "x", "--target", "5")
    assert wrong.returncode == 2
    assert "layer:expert" in wrong.stderr
