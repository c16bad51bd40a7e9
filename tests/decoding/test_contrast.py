"""Self-contrast is what two separate forward passes give; without contrast it is plain decoding."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

import moescope as ms
from moescope.decoding import Problem, SelfContrast, generate, read_problems, self_contrast, solved, tune
from moescope.decoding.contrast import weak_routing
from moescope.edits import Recipe, Scale
from moescope.hooks import Model, load
from tests.capturing.texts import model as made

FAMILIES = ["qwen2_moe", "mixtral", "gpt_oss", "deepseek_v3", "olmoe"]
PROMPTS = ["sun moon", "river stone bird tree wind"]


@pytest.fixture(scope="module")
def bundled() -> Model:
    return load("tiny-qwen-moe")


def by_hand(model: Model, prompt: str, steps: int, alpha: float, beta: float, weak: Recipe) -> list[int]:
    """Greedy self-contrast from two forward passes over the whole text at each step, without a cache."""
    ids = model.tokenizer(prompt, return_tensors="pt")["input_ids"]
    start = ids.shape[1]
    for _ in range(steps):
        with torch.no_grad():
            strong = model.forward(ids)[0, -1].float()
            with model.edited(weak, check=False):
                other = model.forward(ids)[0, -1].float()
        z = (1 + beta) * strong - beta * other
        z[strong < math.log(alpha) + strong.max()] = -torch.inf
        ids = torch.cat([ids, z.argmax().view(1, 1)], -1)
        if int(ids[0, -1]) == model.hf.generation_config.eos_token_id:
            break
    return ids[0, start:].tolist()


@pytest.mark.parametrize("prompt", PROMPTS)
@pytest.mark.parametrize("name", FAMILIES)
def test_it_equals_two_separate_forwards(name: str, prompt: str) -> None:
    model = made(name)
    (got,) = self_contrast(model, prompt, alpha=0.05, beta=1.5, max_new_tokens=10)
    want = by_hand(model, prompt, 10, 0.05, 1.5, weak_routing(model))
    assert got.tokens == [token for token in want if token != model.hf.generation_config.eos_token_id]


@pytest.mark.parametrize("name", FAMILIES)
def test_logits_of_both_streams_are_those_of_separate_forwards(name: str) -> None:
    model = made(name)
    contrast = SelfContrast(model)
    ids = model.check_batch()[:2, :20]
    with torch.no_grad():
        with contrast.streams(2):
            both = model.forward(torch.cat([ids, ids]))
        strong = model.forward(ids)
        with model.edited(weak_routing(model)):
            weak = model.forward(ids)
    torch.testing.assert_close(both[:2], strong, atol=2e-5, rtol=1e-4)
    torch.testing.assert_close(both[2:], weak, atol=2e-5, rtol=1e-4)
    assert not torch.allclose(strong, weak, atol=1e-3)


def test_without_contrast_it_is_plain_decoding(bundled: Model) -> None:
    prompts = ["Question: What is 8 + 3 * 9?\nAnswer:", "Once upon a time"]
    plain = generate(bundled, prompts, max_new_tokens=24)
    got = self_contrast(bundled, prompts, beta=0.0, max_new_tokens=24)
    assert [one.tokens for one in got] == [one.tokens for one in plain]
    assert not any(p.tokens == c.tokens for p, c in zip(
        plain, self_contrast(bundled, prompts, beta=4.0, alpha=0.001, max_new_tokens=24), strict=True
    ))  # fmt: skip


def test_it_runs_as_custom_generate_with_padding(bundled: Model) -> None:
    prompts = ["Question: What is 8 + 3 * 9?\nAnswer:", "Question: What is 4 + 5?\nAnswer:"]
    contrast = SelfContrast(bundled, beta=0.5)
    bundled.tokenizer.padding_side = "left"
    batch = bundled.tokenizer(prompts, return_tensors="pt", padding=True)
    ids = bundled.hf.generate(**batch, custom_generate=contrast, max_new_tokens=12, do_sample=False)
    assert ids.shape[0] == 2
    assert torch.equal(ids[:, : batch["input_ids"].shape[1]], batch["input_ids"])
    alone = self_contrast(bundled, prompts, beta=0.5, max_new_tokens=12)
    for row, one in zip(ids[:, batch["input_ids"].shape[1] :].tolist(), alone, strict=True):
        assert row[: len(one.tokens)] == one.tokens


def test_sampling_follows_the_contrastive_distribution(bundled: Model) -> None:
    prompt = "Once upon a time"
    drawn = [
        self_contrast(bundled, prompt, do_sample=True, seed=seed, max_new_tokens=1, alpha=0.02)[0]
        for seed in range(300)
    ]
    expected = {token: p for token, p in drawn[0].steps[0].top_contrast if p > 0}
    for token, p in expected.items():
        share = sum(one.steps[0].token == token for one in drawn) / len(drawn)
        assert abs(share - p) < 4 * math.sqrt(p * (1 - p) / len(drawn)) + 1e-9
    again = self_contrast(bundled, prompt, do_sample=True, seed=3, max_new_tokens=8)[0]
    assert again == self_contrast(bundled, prompt, do_sample=True, seed=3, max_new_tokens=8)[0]


def test_steps_show_both_distributions(bundled: Model) -> None:
    (one,) = self_contrast(bundled, "Once upon a time", max_new_tokens=6)
    assert [step.token for step in one.steps][: len(one.tokens)] == one.tokens
    ids = bundled.tokenizer("Once upon a time", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        strong = bundled.forward(ids)[0, -1].softmax(-1)
    first = one.steps[0]
    assert first.strong == pytest.approx(float(strong[first.token]), abs=1e-5)
    assert [token for token, _ in first.top_strong] == strong.topk(5).indices.tolist()


def test_a_strong_recipe_acts_on_its_own_half_alone(bundled: Model) -> None:
    strong = Recipe([Scale(layer=bundled.sites[0].layer, expert=range(16), factor=0.5)])
    prompt = "Once upon a time"
    got = self_contrast(bundled, prompt, beta=0.0, strong=strong, max_new_tokens=12)[0]
    assert got.tokens == generate(bundled, prompt, recipe=strong, max_new_tokens=12)[0].tokens


def test_numbers_out_of_range_are_refused(bundled: Model) -> None:
    for bad in ({"alpha": 0.0}, {"alpha": 1.5}, {"beta": -1.0}, {"beta": math.nan}):
        with pytest.raises(ms.MoescopeError, match="alpha must lie"):
            SelfContrast(bundled, **bad)
    with pytest.raises(ms.MoescopeError, match="no rank 9"):
        weak_routing(bundled, 9)
    with pytest.raises(ms.MoescopeError, match="num_beams"):
        bundled.hf.generate(torch.tensor([[1, 5]]), custom_generate=SelfContrast(bundled), num_beams=2)


def test_problems_and_tuning(bundled: Model, tmp_path: Path) -> None:
    from moescope.data import ARITHMETIC

    problems = read_problems(ARITHMETIC, limit=6)
    result = tune(bundled, problems, betas=[0.0, 0.5], after="</think>", max_new_tokens=60)
    assert result["solved"].sel(beta=0.0).item() == result["plain"].item()
    assert result["gained"].sel(beta=0.0).item() == result["lost"].sel(beta=0.0).item() == 0
    assert (result["low"] <= result["solved"]).all()
    assert (result["solved"] <= result["high"]).all()
    assert solved("<think> 1 </think> 47\nQuestion", "47", "</think>")
    assert not solved("<think> 47 </think> 48", "47", "</think>")
    assert not solved("", "47")
    assert not solved("47", "47", "</think>")
    assert solved("</think> 47\n\n</think> 48", "47", "</think>")
    bad = tmp_path / "bad.jsonl"
    bad.write_text(json.dumps({"prompt": "a", "answer": "b"}) + "\n{}\n")
    with pytest.raises(ms.CorpusError, match="line 2"):
        read_problems(bad)
    with pytest.raises(ms.MoescopeError, match="no problems"):
        tune(bundled, [])
    assert Problem("a", "b") == read_problems_of(bad)


def test_a_problem_may_hold_any_line_separator_that_json_may(tmp_path: Path) -> None:
    want = [Problem("a\u2028b\x85c", "\u2029"), Problem("d", "e")]
    file = tmp_path / "p.jsonl"
    lines = [json.dumps({"prompt": one.prompt, "answer": one.answer}, ensure_ascii=False) for one in want]
    file.write_bytes("\r\n".join([*lines, "", ""]).encode())
    assert read_problems(file) == want
    assert read_problems(file, limit=1) == want[:1]


def read_problems_of(path: Any) -> Problem:
    first = path.with_name("first.jsonl")
    first.write_text(path.read_text().splitlines()[0])
    return read_problems(first)[0]
