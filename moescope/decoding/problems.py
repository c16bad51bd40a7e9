"""Prompts with known answers: generate, score by exact match, and tune self-contrast on them, with intervals."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
import xarray as xr
from scipy.stats import binomtest

from moescope.decoding.contrast import SelfContrast, Written
from moescope.edits import Recipe
from moescope.errors import CorpusError, MoescopeError
from moescope.hooks import Model

T = TypeVar("T")


@dataclass(frozen=True)
class Problem:
    """A prompt and the answer that counts as right."""

    prompt: str
    answer: str


def read_problems(path: str | Path, limit: int | None = None) -> list[Problem]:
    """Problems of a JSONL file with the fields ``prompt`` and ``answer``.

    Raises:
        CorpusError: no such file, or a line that is none, with its number.
    """
    return read_objects(path, "problems", lambda row: Problem(str(row["prompt"]), str(row["answer"])))[:limit]


def read_objects(path: str | Path, what: str, made: Callable[[dict[str, Any]], T]) -> list[T]:
    """What `made` makes of each line of a JSONL file; empty lines are passed over.

    Args:
        path: the file.
        what: what they are, in words.
        made: of an object with `prompt` and `answer`.

    Raises:
        CorpusError: no such file, nothing in it, or a line that is none, with its number.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8").split("\n")  # JSON may hold other line separators
    except (OSError, UnicodeDecodeError) as error:
        raise CorpusError(f"Cannot read {path}: {getattr(error, 'strerror', None) or error}.") from error
    found = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            found.append(made(json.loads(line)))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise CorpusError(f"{path}, line {number}: expected an object with `prompt` and `answer`.") from error
    if not found:
        raise CorpusError(f"{path} has no {what} in it.")
    return found


def solved(text: str, answer: str, after: str = "") -> bool:
    """Whether a text gives the answer: its first line, or what stands behind the first ``after`` up to the line's end.

    A text that never gets to ``after`` gives no answer.
    """
    if after:
        text = text.partition(after)[2]
    said = text.strip().splitlines()
    return bool(said) and said[0].strip().rstrip(".") == answer.strip().rstrip(".")


def generate(
    model: Model,
    prompts: str | Sequence[str],
    *,
    recipe: Recipe | None = None,
    max_new_tokens: int = 64,
    do_sample: bool = False,
    temperature: float = 1.0,
    seed: int = 0,
) -> list[Written]:
    """Go on from each prompt, greedily or by sampling, with a recipe live or without one.

    Raises:
        MoescopeError: no tokenizer, or a prompt that leaves no room for so many tokens in the model's positions.
    """
    texts = [prompts] if isinstance(prompts, str) else list(prompts)
    options = {"do_sample": do_sample, "temperature": temperature if do_sample else None, "seed": seed}
    with nullcontext() if recipe is None else model.edited(recipe):
        return [one for text in texts for one in written(model, [text], max_new_tokens, **options)]


def written(
    model: Model, prompts: Sequence[str], max_new_tokens: int, seed: int = 0, special: bool = True, **options: Any
) -> list[Written]:
    """What `hf.generate` writes after prompts of equal length, up to the end token.

    Without `special` the tokenizer adds no special tokens of its own: a chat template has written them already.

    Raises:
        MoescopeError: the model has no tokenizer, cannot generate, or was made for fewer positions.
    """
    _require_tokenizer(model)
    if not hasattr(model.hf, "generate") or max_new_tokens < 1:
        raise MoescopeError("This model cannot generate, or was asked for no token.")
    batch = model.tokenizer(list(prompts), return_tensors="pt", add_special_tokens=special, verbose=False)
    _require_room(model, batch["input_ids"].shape[1], max_new_tokens)
    batch = batch.to(model.device)
    torch.manual_seed(seed)
    with torch.inference_mode():
        ids = model.hf.generate(
            input_ids=batch["input_ids"],
            attention_mask=batch["attention_mask"],
            max_new_tokens=max_new_tokens,
            pad_token_id=model.pad_id,
            **options,
        )
    ends = end_tokens(model)
    results = []
    for prompt, row in zip(prompts, ids[:, batch["input_ids"].shape[1] :].tolist(), strict=True):
        stop = next((place for place, token in enumerate(row) if token in ends), len(row))
        results.append(Written(prompt, model.tokenizer.decode(row[:stop]), row[:stop]))
    return results


def answered(
    model: Model, prompts: Sequence[str], max_new_tokens: int, *, together: int = 16, **options: Any
) -> list[Written]:
    """What is written after each prompt, in their order; those of equal length in tokens share batches.

    Raises:
        MoescopeError: as `written`, before anything is written.
    """
    by_length: dict[int, list[int]] = {}
    for place, length in enumerate(_lengths(model, prompts)):
        by_length.setdefault(length, []).append(place)
    _require_room(model, max(by_length, default=0), max_new_tokens)
    if model.own_batch is not None:
        together = 1
    found: dict[int, Written] = {}
    for places in by_length.values():
        for start in range(0, len(places), together):
            some = places[start : start + together]
            texts = written(model, [prompts[place] for place in some], max_new_tokens, **options)
            found |= zip(some, texts, strict=True)
    return [found[place] for place in range(len(prompts))]


def _lengths(model: Model, prompts: Sequence[str]) -> list[int]:
    """Tokens of each prompt."""
    _require_tokenizer(model)
    return [len(model.tokenizer(prompt, verbose=False)["input_ids"]) for prompt in prompts]


def _require_tokenizer(model: Model) -> None:
    if model.tokenizer is None:
        raise MoescopeError("This model was wrapped without a tokenizer; pass one: moescope.wrap(hf_model, tokenizer).")


def _require_room(model: Model, tokens: int, new: int) -> None:
    """Refuses a decoder beside an encoder, and what would run past the positions that a model was made for.

    Rotary and most other encodings go on beyond them without an error, and without sense.
    """
    if model.has_encoder:
        raise MoescopeError(
            f"{model.name} has a decoder beside its encoder: what it writes does not go on from the prompt. Name a "
            "model that only decodes."
        )
    limit = model.max_positions
    if limit is None or tokens + new <= limit:
        return
    room = limit - tokens
    fewer = f"ask for {room:,} new tokens at most, or shorten the prompt" if room > 0 else "shorten the prompt"
    raise MoescopeError(
        f"The prompt has {tokens:,} tokens and up to {new:,} are to be written after it, but {model.name} was made "
        f"for {limit:,} positions: {fewer}."
    )


def end_tokens(model: Model) -> set[int | None]:
    """Ids that end a text."""
    found = getattr(model.hf.generation_config, "eos_token_id", None)
    return set(found) if isinstance(found, list) else {found}


def tune(
    model: Model,
    problems: Iterable[Problem],
    *,
    alphas: Sequence[float] = (0.1,),
    betas: Sequence[float] = (0.0, 0.25, 0.5, 1.0),
    weak: Recipe | None = None,
    after: str = "",
    max_new_tokens: int = 64,
    on_progress: Callable[[int], None] | None = None,
) -> xr.Dataset:
    """How many problems self-contrast solves at each alpha and beta, beside plain greedy decoding.

    How to read it: `solved` is a share with a 95 % interval (Wilson); `p` is that of an exact McNemar test against
    plain decoding of the same problems. Choose on one set of problems and report on another: the best of many settings
    is best on this set partly by luck.

    Args:
        problems: with their answers.
        alphas, betas: settings to try.
        weak: the weak routing.
        after: the answer stands behind the first such mark in what was written (`</think>`).
        max_new_tokens: for each problem.
        on_progress: called with the number of problems done, of len(problems) x (1 + settings).

    Returns:
        Dataset with dims (alpha, beta): solved, low, high, gained, lost (problems), p, tokens (mean written); and
        plain, plain_low, plain_high, plain_tokens (); attrs: problems.

    Raises:
        MoescopeError: no problems, or a prompt that leaves no room for its answer.
    """
    items = list(problems)
    if not items:
        raise MoescopeError("There are no problems to tune on.")
    _require_room(model, max(_lengths(model, [item.prompt for item in items])), max_new_tokens)
    done = 0

    def attempt(options: dict[str, Any]) -> tuple[np.ndarray, float]:
        nonlocal done
        right, lengths = [], []
        for item in items:
            (one,) = written(model, [item.prompt], max_new_tokens, do_sample=False, **options)
            right.append(solved(one.text, item.answer, after))
            lengths.append(len(one.tokens))
            done += 1
            if on_progress is not None:
                on_progress(done)
        return np.array(right), float(np.mean(lengths))

    plain, plain_tokens = attempt({})
    shape = (len(alphas), len(betas))
    values = {name: np.zeros(shape) for name in ("solved", "low", "high", "gained", "lost", "p", "tokens")}
    for a, alpha in enumerate(alphas):
        for b, beta in enumerate(betas):
            contrast = SelfContrast(model, alpha=alpha, beta=beta, weak=weak)
            right, tokens = attempt({"custom_generate": contrast})
            gained, lost = int((right & ~plain).sum()), int((plain & ~right).sum())
            low, high = interval(right)
            p = binomtest(gained, gained + lost).pvalue if gained + lost else 1.0
            row = (right.mean(), low, high, gained, lost, p, tokens)
            for name, value in zip(values, row, strict=True):
                values[name][a, b] = value
    low, high = interval(plain)
    return xr.Dataset(
        {name: (("alpha", "beta"), table) for name, table in values.items()}
        | {
            "plain": ((), plain.mean()),
            "plain_low": ((), low),
            "plain_high": ((), high),
            "plain_tokens": ((), plain_tokens),
        },
        coords={"alpha": list(alphas), "beta": list(betas)},
        attrs={
            "analysis": "self_contrast",
            "model": model.name,
            "problems": len(items),
            "after": after or "none",
            "weak": "rank 2 of every layer" if weak is None else "a recipe",
            "table": "alpha, beta",
            "table_order": "solved",
        },
    )


def interval(right: np.ndarray) -> tuple[float, float]:
    """95 % Wilson interval of a share."""
    found = binomtest(int(right.sum()), len(right)).proportion_ci(method="wilson")
    return float(found.low), float(found.high)
