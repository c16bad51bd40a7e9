"""Prompts whose next words are known, and the number that an intervention is judged by."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch

from moescope.capturing.run import token_losses
from moescope.decoding.problems import read_objects
from moescope.errors import MoescopeError
from moescope.hooks import Model

Metric = Literal["loss", "difference"]
Align = Literal["same", "start", "end", "tokens"]
UNIT = {"loss": "nats per answer token", "difference": "logit, answer minus wrong"}


@dataclass(frozen=True)
class Case:
    """One prompt and what should follow it.

    Attributes:
        prompt: the text that the model reads.
        answer: what should follow, with its leading space.
        wrong: what should not: `metric="difference"` compares their first tokens.
        source: another prompt, whose routing is patched in.
    """

    prompt: str
    answer: str
    wrong: str | None = None
    source: str | None = None


def read_cases(path: str | Path) -> list[Case]:
    """Cases of a JSONL file: ``prompt``, ``answer``, and where wanted ``wrong`` and ``source``.

    Raises:
        CorpusError: no such file, or a line that is none, with its number.
    """
    return read_objects(
        path, "cases", lambda row: Case(row["prompt"], row["answer"], row.get("wrong"), row.get("source"))
    )


@dataclass(frozen=True)
class Prepared:
    """A case in tokens.

    Attributes:
        ids: [S] what is run: the prompt, and behind it the answer if its loss is the metric.
        n_prompt: how many of them are the prompt.
        right, wrong: first token of the answer, and of what should not follow (-1: none).
        source_ids: [S'] the same of the source prompt; None without one.
        pairs: [n, 2] prompt positions and the source positions they are aligned with, ascending.
        words: the prompt's tokens, written out.
    """

    ids: torch.Tensor
    n_prompt: int
    right: int
    wrong: int
    source_ids: torch.Tensor | None
    pairs: np.ndarray
    words: tuple[str, ...]

    def measure(self, logits: torch.Tensor, metric: Metric, *, of_source: bool = False) -> np.ndarray:
        """[B] the metric from logits [B, S, V]."""
        if metric == "difference":
            last = logits[:, -1].double()
            return (last[:, self.right] - last[:, self.wrong]).cpu().numpy()
        ids = self.source_ids if of_source and self.source_ids is not None else self.ids
        n_answer = len(self.ids) - self.n_prompt
        losses = token_losses(logits, ids.expand(len(logits), -1))
        return losses[:, -n_answer:].double().mean(-1).cpu().numpy()


def prepared(model: Model, case: Case, metric: Metric, align: Align) -> Prepared:
    """A case in tokens, its source aligned.

    Raises:
        MoescopeError: words that the tokenizer joins across the end of the prompt, no wrong answer where one is
            needed, or prompts of different lengths that are to be aligned as they stand.
    """
    if model.tokenizer is None:
        raise MoescopeError("This model was wrapped without a tokenizer; pass one: moescope.wrap(hf_model, tokenizer).")
    prompt = _ids(model, case.prompt)
    answer = _continuation(model, case.prompt, prompt, case.answer)
    wrong = -1
    if metric == "difference":
        if case.wrong is None:
            raise MoescopeError("A logit difference needs what should not follow: give `wrong` beside `answer`.")
        wrong = _continuation(model, case.prompt, prompt, case.wrong)[0]
        if wrong == answer[0]:
            raise MoescopeError(f"{case.answer!r} and {case.wrong!r} begin with the same token: no difference to see.")
    behind = [] if metric == "difference" else answer
    source, pairs = None, np.zeros((0, 2), dtype=np.int64)
    if case.source is not None:
        source = _ids(model, case.source)
        pairs = aligned(prompt, source, align)
    words = tuple(model.tokenizer.decode([token]) for token in prompt)
    device = model.device
    return Prepared(
        torch.tensor(prompt + behind, device=device), len(prompt), answer[0], wrong,
        None if source is None else torch.tensor(source + behind, device=device), pairs, words,
    )  # fmt: skip


def aligned(own: Sequence[int], source: Sequence[int], align: Align) -> np.ndarray:
    """[n, 2] positions of two prompts that belong together.

    Args:
        own, source: token ids.
        align: "same" (equal lengths, position by position), "start" or "end" (counted from there, as far as both go),
            "tokens" (runs of equal tokens, and runs of as many others between them).
    """
    n, m = len(own), len(source)
    if align == "same":
        if n != m:
            raise MoescopeError(
                f"The prompt has {n} tokens and its source {m}; align them by start, end or tokens instead of the same "
                "positions."
            )
        return np.stack([np.arange(n)] * 2, axis=-1)
    if align in ("start", "end"):
        both = np.arange(min(n, m))
        shift = (0, 0) if align == "start" else (n - len(both), m - len(both))
        return np.stack([both + shift[0], both + shift[1]], axis=-1)
    pairs = [
        (a + step, b + step)
        for _, a, a_end, b, b_end in difflib.SequenceMatcher(None, own, source, autojunk=False).get_opcodes()
        if a_end - a == b_end - b
        for step in range(a_end - a)
    ]
    return np.array(pairs, dtype=np.int64).reshape(-1, 2)


def _ids(model: Model, text: str) -> list[int]:
    ids = list(model.tokenizer(text)["input_ids"])
    if not ids:
        raise MoescopeError("A prompt has no tokens.")
    return ids


def _continuation(model: Model, prompt: str, ids: list[int], answer: str) -> list[int]:
    whole = _ids(model, prompt + answer)
    if whole[: len(ids)] != ids or len(whole) == len(ids):
        raise MoescopeError(
            f"{answer!r} does not begin with a token of its own behind the prompt; move its leading space or line "
            "break from the one to the other."
        )
    return whole[len(ids) :]
