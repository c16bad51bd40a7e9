"""What is to be forgotten and what kept: examples from prompt/answer JSONL, text, and TOFU- and WMDP-shaped files.

A row is told by its fields: ``prompt``/``answer`` (``paraphrases``, ``choices``), TOFU's ``question``/``answer``
(``paraphrased_question``, ``perturbed_answer``), WMDP's ``question``/``choices`` with the answer's number, or ``text``.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moescope.capturing import Corpus
from moescope.errors import CorpusError, MoescopeError

if TYPE_CHECKING:
    from moescope.hooks import Model

KINDS = ("relation", "subject", "category", "domain")  # fields by which answers are of one kind


@dataclass(frozen=True)
class Example:
    """One text, or one prompt with its answer.

    Attributes:
        text: the whole sequence.
        prompt: what it begins with and is not counted in the loss; "" where all of it counts.
        answer: what follows the prompt.
        paraphrases: other prompts for the same answer.
        choices: answers to choose from, the right one among them.
        kind: answers of one kind can stand for each other as wrong choices.
    """

    text: str
    prompt: str = ""
    answer: str = ""
    paraphrases: tuple[str, ...] = ()
    choices: tuple[str, ...] = ()
    kind: str = ""

    @property
    def asks(self) -> bool:
        """Whether it has a prompt and an answer."""
        return bool(self.prompt and self.answer)


@dataclass(frozen=True)
class Tokens:
    """An example's token ids, and from which one on they count: the first is predicted from nothing, so never."""

    ids: tuple[int, ...]
    start: int

    def __len__(self) -> int:
        return max(0, len(self.ids) - self.start)


def read_examples(source: str | Path | Iterable[Any], limit: int | None = None) -> list[Example]:
    """Examples of a JSONL, Parquet or text file, a folder of them, or rows in memory.

    Raises:
        CorpusError: no such file, no row, or a row of no known shape, with its number.
    """
    if isinstance(source, str | Path):
        rows: Iterator[Any] = (row for row, _ in Corpus(source).rows())
        name = os.fspath(source)
    else:
        rows, name = iter(source), "the rows given"
    found = []
    for number, row in enumerate(rows, 1):
        if limit is not None and len(found) >= limit:
            break
        example = row if isinstance(row, Example) else _example(row, f"{name}, row {number}")
        if example.text.strip():
            found.append(example)
    if not found:
        raise CorpusError(f"{name} has no text in it.")
    return found


def _example(row: Any, where: str) -> Example:
    if isinstance(row, str):
        return Example(row)
    if not isinstance(row, Mapping):
        raise CorpusError(f"{where}: expected an object, found {type(row).__name__}.")
    kind = next((str(row[name]) for name in KINDS if row.get(name) is not None), "")
    answer, choices = row.get("answer"), _texts(row.get("choices"))
    if isinstance(row.get("question"), str):  # TOFU and WMDP ask without saying how
        prompt = f"Question: {row['question']}\nAnswer:"
        if choices and isinstance(answer, int) and not isinstance(answer, bool):
            if not 0 <= answer < len(choices):
                raise CorpusError(f"{where}: the answer is choice {answer} of {len(choices)}.")
            answer = choices[answer]
        others = _texts(row.get("paraphrased_question"))
        paraphrases = tuple(f"Question: {other}\nAnswer:" for other in others)
        choices = choices or tuple(dict.fromkeys([str(answer), *_texts(row.get("perturbed_answer"))]))
    else:
        prompt, paraphrases = row.get("prompt"), _texts(row.get("paraphrases"))
    if isinstance(prompt, str) and isinstance(answer, str) and prompt and answer.strip():
        text = row.get("text")
        if not (isinstance(text, str) and text.startswith(prompt) and text[len(prompt) :].strip() == answer.strip()):
            text = joined(prompt, answer)
        return Example(text, prompt, answer, paraphrases, choices if len(choices) > 1 else (), kind)
    if isinstance(row.get("text"), str):
        return Example(row["text"], kind=kind)
    fields = ", ".join(map(str, row)) or "none"
    raise CorpusError(
        f"{where}: no example in it; expected prompt and answer, question and answer (TOFU), question, choices and "
        f"answer (WMDP), or text; its fields are {fields}."
    )


def _texts(value: Any) -> tuple[str, ...]:
    if value is None:
        return ()
    if isinstance(value, str):
        return (value,)
    return tuple(str(item) for item in value)


def joined(prompt: str, answer: str) -> str:
    """A prompt and its answer as one text, a space between them where neither has one."""
    return prompt + ("" if prompt[-1:].isspace() or answer[:1].isspace() else " ") + answer


def tokens_of(model: Model, example: Example, max_length: int) -> Tokens:
    """Token ids of an example, cut at `max_length`; what counts begins where its text leaves the prompt's own ids."""
    if model.tokenizer is None:
        raise MoescopeError("This model was wrapped without a tokenizer; pass one: moescope.wrap(hf_model, tokenizer).")
    ids = list(model.tokenizer(example.text)["input_ids"])
    start = 1
    if example.prompt:
        before = list(model.tokenizer(example.prompt)["input_ids"])
        same = (place for place, (a, b) in enumerate(zip(before, ids, strict=False)) if a != b)
        start = max(1, next(same, min(len(before), len(ids))))
    return Tokens(tuple(ids[:max_length]), start)


def tokenised(model: Model, examples: Sequence[Example], max_length: int, what: str) -> list[Tokens]:
    """Those of the examples that have a token to predict.

    Raises:
        MoescopeError: none has one.
    """
    limit = min(max_length, model.max_positions or max_length)
    found = [tokens for example in examples if len(tokens := tokens_of(model, example, limit)) > 0]
    if not found:
        raise MoescopeError(
            f"The {what} set has no token to predict: {len(examples)} examples, all of them empty, a single token, or "
            f"with the answer beyond {limit} tokens."
        )
    return found


def require_apart(forget: Sequence[Example], retain: Sequence[Example]) -> None:
    """Raises MoescopeError where a text stands in both sets: it cannot be forgotten and kept."""
    kept = {" ".join(example.text.split()) for example in retain}
    both = [example.text for example in forget if " ".join(example.text.split()) in kept]
    if both:
        raise MoescopeError(
            f"{len(both)} of {len(forget)} texts to forget are in the retain set too, such as {both[0][:60]!r}; take "
            "them out of one of the two."
        )
