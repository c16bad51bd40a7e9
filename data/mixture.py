"""What the model is trained on, in order: the mixture of domains, packed into contexts."""

import random
from collections.abc import Iterator
from itertools import islice

import numpy as np
from transformers import PreTrainedTokenizerFast

from . import generate
from .tokenizer import VOCABULARY

#: Tokens per context, and contexts per step.
CONTEXT = 384
BATCH = 6
#: How often a domain is drawn, in documents. Short documents (facts, arithmetic) are drawn more often.
MIXTURE = {
    "stories": 9,
    "german": 12,
    "spanish": 11,
    "python": 10,
    "records": 9,
    "arithmetic": 42,
    "facts": 40,
}


def no_counts() -> dict[str, np.ndarray]:
    """Per domain [vocabulary], zeros: to be counted up by `contexts`."""
    return {name: np.zeros(VOCABULARY, dtype=np.int64) for name in generate.DOMAINS}


def training_documents(seed: int) -> Iterator[generate.Document]:
    """Training documents without end, each drawn once, domains mixed by `MIXTURE`."""
    rng = random.Random(f"mixture-{seed}")
    domains, weights = list(MIXTURE), list(MIXTURE.values())
    drawn = dict.fromkeys(domains, 0)
    while True:
        domain = rng.choices(domains, weights)[0]
        yield generate.document(domain, "train", drawn[domain])
        drawn[domain] += 1


def contexts(tokenizer: PreTrainedTokenizerFast, seed: int, counts: dict[str, np.ndarray]) -> Iterator[list[int]]:
    """Contexts of `CONTEXT` tokens, filled with whole documents; the last one is cut and its tail dropped.

    So every context begins with `<|bos|>`, as in use.

    Args:
        tokenizer: Encodes a text behind `<|bos|>`.
        seed: Of the mixture.
        counts: Per domain, how often each token was trained on [vocabulary]; added to here, for the unigram models.
    """
    room: list[int] = []
    for document in training_documents(seed):
        ids = [*tokenizer(document.text).input_ids, tokenizer.eos_token_id][: CONTEXT - len(room)]
        counts[document.domain] += np.bincount(np.array(ids[1:], dtype=np.int64), minlength=VOCABULARY)
        room += ids
        if len(room) == CONTEXT:
            yield room
            room = []


def token_counts(tokenizer: PreTrainedTokenizerFast, seed: int, steps: int) -> dict[str, np.ndarray]:
    """How often each token is trained on per domain [vocabulary] in `steps` steps, without training."""
    counts = no_counts()
    for _ in islice(contexts(tokenizer, seed, counts), steps * BATCH):
        pass
    return counts
