"""How well something was forgotten and how much else was kept: loss, recall, choices, extraction, routing, by item."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from moescope.errors import MoescopeError
from moescope.hooks.taps import Tap, Want
from moescope.unlearning.batching import in_turn
from moescope.unlearning.examples import Example, Tokens, joined, tokens_of
from moescope.unlearning.objectives import sequence_losses

if TYPE_CHECKING:
    from jaxtyping import Float

    from moescope.edits import Recipe
    from moescope.hooks import Model
    from moescope.unlearning.unlearned import Unlearned

TOGETHER = 32  # sequences in a batch
WRONG = 3  # wrong choices drawn where an example brings none
MEASURES = {
    "loss": "nats per token, of the answer where there is a prompt",
    "exact": "share of prompts after which greedy decoding writes the answer's tokens",
    "paraphrase": "the same after other wordings of the prompt",
    "choice": "share in which the right one of several answers has the least loss per token",
    "extraction": "share of an answer that greedy decoding completes from the shortest prefix that lets it (1: all)",
}


@dataclass(frozen=True)
class Evaluation:
    """What one state of a model does on some sets of examples, item by item.

    Attributes:
        items: by (set, measure), [item]; see `MEASURES`. An item without a measure is NaN.
        tokens: by set, [item] counted tokens, the weights of "loss".
        selected: by site key, [token, E] bool of the forget set's tokens: which experts each chose.
        chance: by set, what guessing among the choices gets.
    """

    items: dict[tuple[str, str], Float[np.ndarray, " item"]]
    tokens: dict[str, np.ndarray]
    selected: dict[str, np.ndarray] = field(repr=False, default_factory=dict)
    chance: dict[str, float] = field(default_factory=dict)

    def mean(self, name: str, measure: str) -> float:
        """Of a set's items; the loss over tokens."""
        values = self.items[name, measure]
        there = ~np.isnan(values)
        if not there.any():
            return float("nan")
        weights = self.tokens[name][there] if measure == "loss" else None
        return float(np.average(values[there], weights=weights))


def evaluate(
    model: Model,
    sets: Mapping[str, Sequence[Example]],
    done: Unlearned | Recipe | None = None,
    *,
    routed: str | None = "forget",
    max_length: int = 512,
    seed: int = 0,
) -> Evaluation:
    """Measure a model, as it is or with something unlearned, on sets of examples.

    Greedy decoding is followed in one forward pass: it writes an answer's tokens exactly if each is the likeliest
    after the right ones before it. What comes after the answer is not looked at, so that "harpist" would count as
    "harp": recall is never understated.

    Args:
        model: the model.
        sets: examples by name; texts without a prompt have a loss alone.
        done: what to apply while it is measured.
        routed: the set whose routing is kept; None for none.
        max_length: tokens of a sequence.
        seed: of the wrong choices, drawn among the set's other answers of the same kind.

    Raises:
        MoescopeError: a set without a token.
    """
    with applied(model, done):
        items: dict[tuple[str, str], np.ndarray] = {}
        counted, chance = {}, {}
        for name, examples in sets.items():
            tokens = [tokens_of(model, example, max_length) for example in examples]
            if not any(len(one) > 0 for one in tokens):
                raise MoescopeError(f"The set {name!r} has no token to predict.")
            losses, right = _followed(model, tokens)
            sizes = np.array([max(0, len(one)) for one in tokens])
            asks = np.array([example.asks for example in examples])
            items[name, "loss"], counted[name] = losses, sizes
            if asks.any():
                items[name, "exact"] = np.where(asks, [float(all(r)) if len(r) else np.nan for r in right], np.nan)
                items[name, "extraction"] = np.where(asks, [_suffix(r) for r in right], np.nan)
                items[name, "paraphrase"] = _paraphrased(model, examples, max_length)
                items[name, "choice"], chance[name] = _chosen(model, examples, losses, max_length, seed)
        selected = {} if routed is None or routed not in sets else selections(model, sets[routed], max_length)
    return Evaluation(items, counted, selected, chance)


def applied(model: Model, done: Unlearned | Recipe | None) -> AbstractContextManager[Any]:
    """The model with a recipe or a finished run live, or as it is."""
    if done is None:
        return nullcontext()
    return done.live(model) if hasattr(done, "live") else model.edited(done)  # type: ignore[union-attr, arg-type]


def _followed(model: Model, tokens: Sequence[Tokens]) -> tuple[np.ndarray, list[list[bool]]]:
    """[item] loss per counted token, and for each counted token whether it was the likeliest."""
    there = [place for place, one in enumerate(tokens) if len(one) > 0]
    some = [tokens[place] for place in there]
    losses = np.full(len(tokens), np.nan)
    right: list[list[bool]] = [[] for _ in tokens]
    with torch.inference_mode():
        for batch in in_turn(model, some, TOGETHER):
            logits = model.forward(batch.ids, batch.real.long())
            nats, counted = sequence_losses(logits, batch.ids, batch.counted)
            likeliest = logits[:, :-1].argmax(-1) == batch.ids[:, 1:]
            for place, row in enumerate(batch.rows):
                losses[there[row]] = float(nats[place]) / int(counted[place])
                right[there[row]] = likeliest[place][batch.counted[place, 1:]].tolist()
    return losses, right


def _suffix(right: Sequence[bool]) -> float:
    """Share of the tokens at the end that all are right: 1 - (shortest prefix that suffices) / (length)."""
    if not right:
        return float("nan")
    wrong = next((place for place, one in enumerate(reversed(right)) if not one), len(right))
    return wrong / len(right)


def _paraphrased(model: Model, examples: Sequence[Example], max_length: int) -> np.ndarray:
    asked = [
        (place, prompt) for place, example in enumerate(examples) for prompt in example.paraphrases if example.asks
    ]
    found: list[list[float]] = [[] for _ in examples]
    tokens = [
        tokens_of(model, Example(joined(prompt, examples[at].answer), prompt, examples[at].answer), max_length)
        for at, prompt in asked
    ]
    for (at, _), right in zip(asked, _followed(model, tokens)[1], strict=True):
        if right:
            found[at].append(float(all(right)))
    return np.array([np.mean(values) if values else np.nan for values in found])


def _chosen(
    model: Model, examples: Sequence[Example], losses: np.ndarray, max_length: int, seed: int
) -> tuple[np.ndarray, float]:
    """[item] whether the right answer has the least loss per token among its choices; and what guessing gets."""
    choices = [_choices(examples, at, seed) if example.asks else () for at, example in enumerate(examples)]
    wrong = [(at, choice) for at, some in enumerate(choices) for choice in some if choice != examples[at].answer]
    tokens = [
        tokens_of(model, Example(joined(examples[at].prompt, choice), examples[at].prompt, choice), max_length)
        for at, choice in wrong
    ]
    others = _followed(model, tokens)[0]
    best = np.full(len(examples), np.nan)
    for (at, _), loss in zip(wrong, others, strict=True):
        best[at] = np.fmin(best[at], loss)
    guess = [1 / len(some) for some in choices if len(some) > 1]
    return np.where(np.isnan(best), np.nan, (losses < best).astype(float)), float(np.mean(guess)) if guess else np.nan


def _choices(examples: Sequence[Example], at: int, seed: int) -> tuple[str, ...]:
    own = examples[at]
    if own.choices:
        return own.choices
    others = sorted({e.answer for e in examples if e.asks and e.kind == own.kind} - {own.answer})
    if not others:
        return ()
    drawn = np.random.default_rng([seed, at]).permutation(len(others))[:WRONG]
    return (own.answer, *(others[place] for place in drawn))


def selections(model: Model, examples: Sequence[Example], max_length: int) -> dict[str, np.ndarray]:
    """By site key, [token, E] bool: the experts that each token of some texts selects; the same rows in every state."""
    tokens = [one for example in examples if len((one := tokens_of(model, example, max_length)).ids)]
    parts: dict[str, list[np.ndarray]] = {site.key: [] for site in model.sites}
    with torch.inference_mode(), Tap(model.hf, model.sites, model.semantics, Want()) as tap:
        for batch in in_turn(model, tokens, TOGETHER):
            tap.begin(batch.ids.numel(), batch.real.flatten().nonzero().flatten())
            model.forward(batch.ids, batch.real.long())
            for key, reading in tap.take().sites.items():
                site = next(site for site in model.sites if site.key == key)
                chosen = torch.zeros(len(reading.expert), site.n_experts + 1, dtype=torch.bool)
                ids = reading.expert.cpu()
                if reading.valid is not None:
                    ids = ids.masked_fill(~reading.valid.cpu(), site.n_experts)
                parts[key].append(chosen.scatter(1, ids, True)[:, :-1].numpy())
    return {key: np.concatenate(some) for key, some in parts.items()}


def kept_selection(before: Evaluation, after: Evaluation, targets: Sequence[tuple[str, int]]) -> dict[str, float]:
    """How the forget set's routing moved.

    Returns:
        "kept": of the tokens that selected a target before, the share that still do; "chosen" and "chosen_before": of
        all tokens, the share that select a target; "overlap": share of a token's experts that it keeps, in the
        targets' layers; "overlap_all": the same, mean over all layers.
    """
    of_target, n_before, n_after, n_tokens = 0, 0, 0, 0
    for key, expert in targets:
        old, new = before.selected[key][:, expert], after.selected[key][:, expert]
        of_target, n_before = of_target + int((old & new).sum()), n_before + int(old.sum())
        n_after, n_tokens = n_after + int(new.sum()), n_tokens + len(old)
    overlap = {}
    for key, old in before.selected.items():
        both, had = (old & after.selected[key]).sum(1), old.sum(1)
        overlap[key] = float((both[had > 0] / had[had > 0]).mean())
    keys = {key for key, _ in targets}
    return {
        "kept": of_target / n_before if n_before else float("nan"),
        "chosen": n_after / n_tokens,
        "chosen_before": n_before / n_tokens,
        "overlap": float(np.mean([overlap[key] for key in keys])),
        "overlap_all": float(np.mean(list(overlap.values()))),
    }
