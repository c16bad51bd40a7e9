"""Batches of examples: the same ones for the same seed and step, so that a resumed run goes on as if never stopped."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from moescope.unlearning.examples import Tokens

if TYPE_CHECKING:
    from moescope.hooks import Model


@dataclass(frozen=True)
class Batch:
    """Padded sequences.

    Attributes:
        rows: which examples they are.
        ids, real, counted: [row, position]: token ids, no pad, and in the loss (a row's first token never is).
    """

    rows: tuple[int, ...]
    ids: torch.Tensor
    real: torch.Tensor
    counted: torch.Tensor


def batch_of(model: Model, tokens: Sequence[Tokens], rows: Sequence[int]) -> Batch:
    """Some examples side by side, padded at the end."""
    longest = max(len(tokens[row].ids) for row in rows)
    ids = np.full((len(rows), longest), model.pad_id, dtype=np.int64)
    real, counted = np.zeros(ids.shape, dtype=bool), np.zeros(ids.shape, dtype=bool)
    for place, row in enumerate(rows):
        n = len(tokens[row].ids)
        ids[place, :n] = tokens[row].ids
        real[place, :n] = True
        counted[place, max(1, tokens[row].start) : n] = True
    parts = (torch.from_numpy(array).to(model.device) for array in (ids, real, counted))
    return Batch(tuple(rows), *parts)


def in_turn(model: Model, tokens: Sequence[Tokens], size: int) -> list[Batch]:
    """All examples once, those of like length together; one at a time where a batch would mix them."""
    order = sorted(range(len(tokens)), key=lambda row: len(tokens[row].ids))
    step = 1 if model.own_batch is not None else size
    return [batch_of(model, tokens, order[at : at + step]) for at in range(0, len(order), step)]


def drawn(n: int, size: int, step: int, seed: int, stream: int) -> list[int]:
    """Rows of one step: each of n comes once before any comes again; depends on nothing but the arguments."""
    first, end = step * size, (step + 1) * size
    epochs = range(first // n, (end - 1) // n + 1)
    order = np.concatenate([np.random.default_rng([seed, stream, epoch]).permutation(n) for epoch in epochs])
    rows = order[first - epochs[0] * n : end - epochs[0] * n]
    return list(dict.fromkeys(rows.tolist()))


def split(rows: Sequence[int], parts: int) -> list[list[int]]:
    """Rows in as many parts, some of which may be empty."""
    return [list(part) for part in np.array_split(np.asarray(rows, dtype=int), parts)]
