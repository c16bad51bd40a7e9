"""Self-contrast decoding (SCMoE, arXiv 2405.14507): what the model says against what a weaker routing of it says.

The next token is chosen by ``z = (1 + beta) z_strong - beta z_weak`` among the tokens that the strong routing finds
plausible, ``z_strong >= log(alpha) + max z_strong``. Both streams run in one forward pass: the batch is doubled, and
the edits of each routing act on its own half, with its own rows of the key-value cache.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from transformers import LogitsProcessor, LogitsProcessorList

from moescope.edits import Recipe, Route
from moescope.errors import MoescopeError
from moescope.hooks import Model
from moescope.hooks.interventions import Act, Live, Where

CONFIGURED = ("MaxLengthCriteria", "EosTokenCriteria", "MaxTimeCriteria", "StopStringCriteria")
SHOWN = 5  # most likely tokens kept of each distribution


@dataclass(frozen=True)
class Step:
    """One generated token.

    Attributes:
        token: its id.
        strong, weak, contrast: its probability under each routing, and among those it was chosen from.
        top_strong, top_weak, top_contrast: (token id, probability) of the most likely ones.
    """

    token: int
    strong: float
    weak: float
    contrast: float
    top_strong: list[tuple[int, float]]
    top_weak: list[tuple[int, float]]
    top_contrast: list[tuple[int, float]]


@dataclass(frozen=True)
class Written:
    """What was written after one prompt.

    Attributes:
        prompt, text: the prompt, and what was written.
        tokens: ids of what was written.
        steps: both distributions at each of them; empty unless asked for.
    """

    prompt: str
    text: str
    tokens: list[int]
    steps: list[Step] = field(default_factory=list)


def weak_routing(model: Model, rank: int = 1) -> Recipe:
    """SCMoE's weak routing: every token goes to its expert of one rank alone (1: the second best).

    Raises:
        MoescopeError: no token of this model has an expert of that rank.
    """
    few = min(model.semantics[site.key].top_k for site in model.sites)
    if not 0 <= rank < few:
        raise MoescopeError(f"This model selects {few} experts a token: there is no rank {rank} to route by.")
    return Recipe([Route(layer=site.key, ranks=(rank,)) for site in model.sites])


class SelfContrast:
    """Self-contrast for one model: a context, and a function for ``hf.generate(custom_generate=…)``.

    Args:
        model: the model.
        beta: strength of the contrast; 0 decodes as the strong routing alone.
        alpha: tokens less likely than this share of the likeliest, under the strong routing, are left out.
        weak: the weak routing; by default rank 2 of each layer alone.
        strong: the strong routing; by default the model's own.
        steps: keep both distributions of every token.

    ```python
    contrast = SelfContrast(model, beta=0.5)
    model.hf.generate(**inputs, custom_generate=contrast, max_new_tokens=64)
    ```
    """

    def __init__(
        self,
        model: Model,
        *,
        beta: float = 0.5,
        alpha: float = 0.1,
        weak: Recipe | None = None,
        strong: Recipe | None = None,
        steps: bool = False,
    ) -> None:
        if not 0 < alpha <= 1 or not beta >= 0 or not math.isfinite(beta):
            raise MoescopeError("alpha must lie in (0, 1], and beta must be 0 or more.")
        self.model, self.beta, self.alpha = model, beta, alpha
        self._weak = (weak_routing(model) if weak is None else weak).acts(model)
        self._strong = {} if strong is None else strong.acts(model)
        self._keep_steps = steps
        self.steps: list[list[Step]] = []

    def __call__(self, hf: Any, input_ids: torch.Tensor, **given: Any) -> torch.Tensor:
        """Generate for `hf.generate(custom_generate=self)`: ids [B, S + new], prompts included."""
        config = given["generation_config"]
        if config.num_beams != 1:
            raise MoescopeError("Self-contrast decodes greedily or by sampling; set num_beams=1.")
        mask = given.get("attention_mask")
        mask = torch.ones_like(input_ids) if mask is None else mask
        # What reshapes a distribution (temperature, top-k, …) acts on the contrastive one, all else on both streams.
        given_processors = given.get("logits_processor") or []
        warpers = LogitsProcessorList([each for each in given_processors if type(each).__name__.endswith("Warper")])
        others = [each for each in given_processors if not type(each).__name__.endswith("Warper")]
        chooser = _Chooser(self, len(input_ids), warpers, config.do_sample)
        processors = LogitsProcessorList([*others, chooser])
        greedy = {"do_sample": False, "temperature": None, "top_k": None, "top_p": None, "max_length": None}
        plain = type(config)(**{**config.to_dict(), **greedy, "return_dict_in_generate": False})
        with self.streams(len(input_ids)):
            written = hf.generate(
                input_ids=torch.cat([input_ids, input_ids]),
                attention_mask=torch.cat([mask, mask]),
                generation_config=plain,
                logits_processor=processors,
                # Those that the configuration asks for are made anew by the call.
                stopping_criteria=[
                    each for each in given.get("stopping_criteria") or [] if type(each).__name__ not in CONFIGURED
                ],
            )
        self.steps = chooser.steps
        return written[: len(input_ids)]

    def streams(self, batch: int) -> Live:
        """The edits of both routings on a doubled batch: strong on the first half, weak on the second."""
        halves = tuple(range(batch)), tuple(range(batch, 2 * batch))
        acts: dict[str, list[Act]] = {}
        for routing, rows in zip((self._strong, self._weak), halves, strict=True):
            for key, some in routing.items():
                acts.setdefault(key, []).extend(_on(act, rows) for act in some)
        return Live(self.model, acts, check=False)

    def scores(self, strong: torch.Tensor, weak: torch.Tensor) -> torch.Tensor:
        """Contrastive scores [B, V] from the logits of both routings; -inf where implausible."""
        z = (1 + self.beta) * strong - self.beta * weak
        plausible = strong >= math.log(self.alpha) + strong.amax(-1, keepdim=True)
        return z.masked_fill(~plausible, -torch.inf)


def _on(act: Act, rows: tuple[int, ...]) -> Act:
    if act.where.batch is not None:
        raise MoescopeError("A routing for self-contrast cannot restrict itself to rows of the batch.")
    return replace(act, where=Where(rows, act.where.positions, act.where.phase))


class _Chooser(LogitsProcessor):
    """Chooses one token for both halves of the batch, and leaves generate no other choice."""

    def __init__(self, contrast: SelfContrast, batch: int, warpers: LogitsProcessorList, sample: bool) -> None:
        self._contrast, self._batch, self._warpers, self._sample = contrast, batch, warpers, sample
        self.steps: list[list[Step]] = [[] for _ in range(batch)]

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        strong, weak = scores.float().split(self._batch)
        z: Any = self._warpers(input_ids[: self._batch], self._contrast.scores(strong, weak))  # pyright: ignore
        token = torch.multinomial(z.softmax(-1), 1) if self._sample else z.argmax(-1, keepdim=True)
        if self._contrast._keep_steps:
            for row, (a, b, c) in enumerate(zip(strong.softmax(-1), weak.softmax(-1), z.softmax(-1), strict=True)):
                self.steps[row].append(_step(int(token[row]), a, b, c))
        only = torch.full_like(scores, -torch.inf)
        return only.scatter(-1, torch.cat([token, token]), 0.0)  # type: ignore[return-value]


def _step(token: int, strong: torch.Tensor, weak: torch.Tensor, contrast: torch.Tensor) -> Step:
    tops = [
        list(zip(best.indices.tolist(), best.values.tolist(), strict=True))
        for best in (p.topk(min(SHOWN, len(p))) for p in (strong, weak, contrast))
    ]
    return Step(token, float(strong[token]), float(weak[token]), float(contrast[token]), *tops)


def self_contrast(
    model: Model,
    prompts: str | Sequence[str],
    *,
    beta: float = 0.5,
    alpha: float = 0.1,
    weak: Recipe | None = None,
    strong: Recipe | None = None,
    max_new_tokens: int = 64,
    do_sample: bool = False,
    temperature: float = 1.0,
    seed: int = 0,
    steps: bool = True,
) -> list[Written]:
    """Go on from each prompt by self-contrast decoding.

    Args:
        model: a model with a tokenizer.
        prompts: one or several; they are run one after the other.
        beta, alpha, weak, strong: as in `SelfContrast`.
        max_new_tokens: at most so many; less where the model ends.
        do_sample, temperature, seed: sample from the contrastive distribution instead of taking its largest.
        steps: keep both distributions of each token.

    Raises:
        MoescopeError: no tokenizer, no room in the model's positions, or a number out of its range.
    """
    from moescope.decoding.problems import written

    contrast = SelfContrast(model, beta=beta, alpha=alpha, weak=weak, strong=strong, steps=steps)
    options = {"do_sample": do_sample, "temperature": temperature if do_sample else None, "seed": seed}
    results = []
    for prompt in [prompts] if isinstance(prompts, str) else prompts:
        (one,) = written(model, [prompt], max_new_tokens, custom_generate=contrast, **options)
        results.append(replace(one, steps=contrast.steps[0] if steps else []))
    return results
