"""Text as it is being written: the same answer as `generate` and `self_contrast` give, seen after every token."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import torch
from transformers import StoppingCriteria

from moescope.decoding.contrast import SelfContrast, Written
from moescope.decoding.problems import end_tokens, written
from moescope.edits import Recipe
from moescope.errors import MoescopeError
from moescope.hooks import Model

BROKEN = "\ufffd"  # what a decoder writes for bytes that are not yet a whole character


def asked(model: Model, prompt: str, chat: bool = False) -> tuple[str, bool]:
    """What the model reads for a prompt, and whether the tokenizer still has to add its special tokens.

    Args:
        model: a model with a tokenizer.
        prompt: a person's words.
        chat: put them through the tokenizer's chat template, as a question to be answered.

    Raises:
        MoescopeError: no chat template, or nothing to read.
    """
    if not prompt:
        raise MoescopeError("The prompt is empty: write something for the model to go on from.")
    if not chat:
        return prompt, True
    if not getattr(model.tokenizer, "chat_template", None):
        raise MoescopeError(f"The tokenizer of {model.name} has no chat template; let it go on from the plain prompt.")
    question = [{"role": "user", "content": prompt}]
    return model.tokenizer.apply_chat_template(question, tokenize=False, add_generation_prompt=True), False


def watched(
    model: Model,
    prompt: str,
    on_tokens: Callable[[list[int]], None],
    *,
    recipe: Recipe | None = None,
    contrast: SelfContrast | None = None,
    chat: bool = False,
    max_new_tokens: int = 64,
    temperature: float | None = None,
    seed: int = 0,
) -> Written:
    """Goes on from one prompt, telling of every token.

    Args:
        model: a model with a tokenizer.
        prompt: the prompt.
        on_tokens: called after each token with all ids written so far, without one that ends the text; what it raises
            ends the writing, and the model is what it was.
        recipe: edits to be live meanwhile.
        contrast: decode by self-contrast instead; its steps are kept in the result if it keeps them.
        chat: put the prompt through the chat template.
        max_new_tokens: at most so many.
        temperature: of sampling; None (or 0) takes the likeliest token.
        seed: of sampling.

    Raises:
        MoescopeError: no tokenizer, no chat template, no room in the model's positions, a recipe beside a contrast, or
            a number out of its range.
    """
    if contrast is not None and recipe is not None:
        raise MoescopeError("Self-contrast takes its edits itself: SelfContrast(model, strong=recipe).")
    text, special = asked(model, prompt, chat)
    sample = temperature is not None and temperature > 0
    options: dict[str, Any] = {"do_sample": sample, "temperature": temperature if sample else None, "seed": seed}
    if contrast is not None:
        options["custom_generate"] = contrast
    with nullcontext() if recipe is None else model.edited(recipe):
        (one,) = written(
            model,
            [text],
            max_new_tokens,
            special=special,
            stopping_criteria=[_Telling(on_tokens, end_tokens(model))],
            **options,
        )
    return replace(one, prompt=prompt, steps=contrast.steps[0] if contrast is not None and contrast.steps else [])


class _Telling(StoppingCriteria):
    """Stops nothing; called by `generate` after each token with all ids so far."""

    def __init__(self, on_tokens: Callable[[list[int]], None], ends: set[int | None]) -> None:
        self._tell, self._ends = on_tokens, ends
        self._prompt: int | None = None

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor, **kwargs: Any) -> torch.BoolTensor:
        if self._prompt is None:  # the first call comes with the first token
            self._prompt = input_ids.shape[1] - 1
        ids = input_ids[0, self._prompt :].tolist()
        self._tell(ids[:-1] if ids[-1] in self._ends else ids)
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)  # pyright: ignore


def pieces(tokenizer: Any, tokens: Sequence[int]) -> list[str]:
    """The text that each token adds; together they are the whole. "" where a character is not yet complete."""
    found, before = [], ""
    for n in range(1, len(tokens) + 1):
        now = tokenizer.decode(tokens[:n], clean_up_tokenization_spaces=False)
        if n < len(tokens) and (now.endswith(BROKEN) or not now.startswith(before)):
            found.append("")
            continue
        found.append(now[len(before) :] if now.startswith(before) else now)
        before = now
    return found
