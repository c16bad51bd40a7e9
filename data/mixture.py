"""What the model is trained on, in order: the mixture of domains, packed into contexts."""

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

import numpy as np
from transformers import PreTrainedTokenizerFast

from . import generate
from .tokenizer import VOCABULARY

#: Tokens per context, and contexts per step.
CONTEXT = 384
BATCH = 6


@dataclass(frozen=True)
class Phase:
    """A part of the training with its own mixture.

    Attributes:
        steps: Optimiser steps.
        decay: Steps over which the learning rate would fall to its end; more than `steps` where it stays high.
        seed: Of the order in which domains are drawn.
        first: Number of the first training document of each domain, so that no phase repeats another's documents.
        shares: How often each domain is drawn, in documents.
    """

    steps: int
    decay: int
    seed: int
    first: int
    shares: dict[str, int]


#: First everything; then mostly what takes long to learn: arithmetic, and the facts.
PHASES = (
    Phase(
        steps=800,
        decay=1200,
        seed=20,
        first=0,
        shares={
            "stories": 9,
            "german": 11,
            "spanish": 11,
            "python": 10,
            "records": 8,
            "arithmetic": 55,
            "facts": 28,
        },
    ),
    Phase(
        steps=700,
        decay=700,
        seed=21,
        first=1_000_000,
        shares={
            "stories": 3,
            "german": 3,
            "spanish": 3,
            "python": 3,
            "records": 3,
            "arithmetic": 45,
            "facts": 38,
        },
    ),
)


def no_counts() -> dict[str, np.ndarray]:
    """Per domain [vocabulary], zeros: to be counted up by `contexts`."""
    return {name: np.zeros(VOCABULARY, dtype=np.int64) for name in generate.DOMAINS}


def training_documents(phase: Phase) -> Iterator[generate.Document]:
    """Training documents without end, each drawn once, domains mixed as `phase` says."""
    rng = random.Random(f"mixture-{phase.seed}")
    domains, weights = list(phase.shares), list(phase.shares.values())
    drawn = dict.fromkeys(domains, phase.first)
    while True:
        domain = rng.choices(domains, weights)[0]
        yield generate.document(domain, "train", drawn[domain])
        drawn[domain] += 1


def contexts(tokenizer: PreTrainedTokenizerFast, phase: Phase, counts: dict[str, np.ndarray]) -> Iterator[list[int]]:
    """Contexts of `CONTEXT` tokens, filled with whole documents; the last one is cut and its tail dropped.

    So every context begins with `<|bos|>`, as in use.

    Args:
        tokenizer: Encodes a text behind `<|bos|>`.
        phase: Whose mixture to draw from.
        counts: Per domain, how often each token was trained on [vocabulary]; added to here, for the unigram models.
    """
    room: list[int] = []
    for document in training_documents(phase):
        ids = [*tokenizer(document.text).input_ids, tokenizer.eos_token_id][: CONTEXT - len(room)]
        counts[document.domain] += np.bincount(np.array(ids[1:], dtype=np.int64), minlength=VOCABULARY)
        room += ids
        if len(room) == CONTEXT:
            yield room
            room = []


def token_counts(tokenizer: PreTrainedTokenizerFast, phases: Sequence[Phase]) -> dict[str, np.ndarray]:
    """How often each token is trained on per domain [vocabulary] in all phases, without training."""
    counts = no_counts()
    for phase in phases:
        for _ in islice(contexts(tokenizer, phase, counts), phase.steps * BATCH):
            pass
    return counts
