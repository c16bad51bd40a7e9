"""No way of writing runs a model past the positions that its configuration declares, and all go up to them."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch

from moescope.decoding import Problem, SelfContrast, generate, self_contrast, tune, watched
from moescope.errors import MoescopeError
from moescope.hooks import Model, load
from tests.capturing.texts import model as made
from tests.cli.running import moescope

LIMIT = 384  # of the bundled model's config.json
PROMPT = " the" * 377

WAYS: dict[str, Callable[[Model, str, int], Any]] = {
    "generate": lambda model, prompt, new: generate(model, prompt, max_new_tokens=new),
    "self-contrast": lambda model, prompt, new: self_contrast(model, prompt, max_new_tokens=new),
    "watched": lambda model, prompt, new: watched(model, prompt, lambda ids: None, max_new_tokens=new),
    "watched contrast": lambda model, prompt, new: watched(
        model, prompt, lambda ids: None, contrast=SelfContrast(model), max_new_tokens=new
    ),
    "tune": lambda model, prompt, new: tune(
        model, [Problem("the", "the"), Problem(prompt, "the")], betas=[0.5], max_new_tokens=new
    ),
}


@pytest.fixture(scope="module")
def bundled() -> Model:
    return load("tiny-qwen-moe")


@pytest.fixture
def positions(bundled):
    """Positions that the model is run at meanwhile, the last of each call, counted from 1."""
    seen = []

    def look(module, args, kwargs):
        seen.append(int(kwargs["position_ids"].max()) + 1)

    hook = bundled.hf.register_forward_pre_hook(look, with_kwargs=True)
    yield seen
    hook.remove()


@pytest.mark.parametrize("way", WAYS)
def test_the_last_position_is_written_and_none_beyond_it(bundled, positions, way):
    tokens = len(bundled.tokenizer(PROMPT)["input_ids"])
    room = LIMIT - tokens
    assert 2 <= room <= 8
    words = f"prompt has {tokens} tokens and up to {room + 1} .*made for {LIMIT} positions: ask for {room} new tokens"
    with pytest.raises(MoescopeError, match=words):
        WAYS[way](bundled, PROMPT, room + 1)
    assert positions == []  # nothing was run, not even a shorter prompt beside it
    WAYS[way](bundled, PROMPT, room)
    assert LIMIT - room <= max(positions) <= LIMIT


@pytest.mark.parametrize("way", WAYS)
def test_a_decoder_beside_an_encoder_is_refused(way):
    with pytest.raises(MoescopeError, match="decoder beside its encoder"):
        WAYS[way](made("nllb_moe"), "the", 2)


def test_a_prompt_that_fills_every_position_is_to_be_shortened(bundled, positions):
    with pytest.raises(MoescopeError, match=rf"for {LIMIT} positions: shorten the prompt\.$"):
        generate(bundled, "the " * 500, max_new_tokens=1)
    assert positions == []


def test_the_command_line_says_it_in_one_sentence():
    for more in ((), ("--self-contrast",)):
        done = moescope("generate", PROMPT, "--max-new-tokens", 50, *more)
        assert done.returncode == 2
        assert re.search(r"made for 384 positions: ask for \d new tokens at most, or shorten the prompt", done.stderr)
        assert len(done.stderr.strip().splitlines()) == 1


def test_the_limit_of_a_multimodal_model_is_that_of_its_text():
    model = made("qwen3_vl_moe")
    config = model.hf.config.to_dict()
    assert "max_position_embeddings" not in config
    limit = config["text_config"]["max_position_embeddings"]
    tokens = len(model.tokenizer("sun moon")["input_ids"])
    with pytest.raises(MoescopeError, match=f"made for {limit} positions: ask for {limit - tokens} new tokens"):
        generate(model, "sun moon", max_new_tokens=limit)


def test_a_model_that_declares_no_limit_writes_as_long_as_it_is_asked_to(bundled, positions, monkeypatch):
    monkeypatch.setattr(bundled.hf.config, "max_position_embeddings", 0)
    monkeypatch.setattr(bundled.hf.generation_config, "eos_token_id", None)
    (one,) = generate(bundled, PROMPT, max_new_tokens=12)
    assert len(one.tokens) == 12
    assert max(positions) > LIMIT
    assert torch.tensor(one.tokens).max() < bundled.hf.config.vocab_size
