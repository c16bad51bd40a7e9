"""Losses of a corpus by document, under several recipes in turn: each batch is run once for each of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from moescope.capturing.batches import TextBatch, batches
from moescope.capturing.corpus import Corpus, Document
from moescope.capturing.run import token_losses
from moescope.edits import Recipe
from moescope.errors import MoescopeError
from moescope.hooks import Model

MAX_LENGTH = 512
BATCH_TOKENS = 4096
Beside = Callable[[int, torch.Tensor], AbstractContextManager[Any]]


@dataclass(frozen=True)
class Losses:
    """Summed losses of n documents under r recipes.

    Attributes:
        documents: the documents, in order.
        tokens: [n] predicted tokens of each: all but the first of each context.
        nats: [r, n] summed loss.
        divergence: [r, n] summed KL of next-token distributions, the first recipe's to each recipe's, nats.
    """

    documents: list[Document]
    tokens: np.ndarray
    nats: np.ndarray
    divergence: np.ndarray

    def labels(self, by: str | None) -> tuple[list[str], np.ndarray]:
        """Names and [n] code of a label; one name "all" for None. Documents without it have code -1."""
        if by is None:
            return ["all"], np.zeros(len(self.documents), dtype=np.int64)
        values = [document.labels.get(by) for document in self.documents]
        names = sorted({value for value in values if value is not None})
        if not names:
            known = sorted({name for document in self.documents for name in document.labels})
            raise MoescopeError(f"No document has the label {by!r}; labels are {', '.join(known) or 'none'}.")
        place = {name: index for index, name in enumerate(names)}
        return names, np.array([-1 if value is None else place[value] for value in values])


def document_losses(
    model: Model,
    corpus: Corpus,
    recipes: Sequence[Recipe | None],
    *,
    max_length: int = MAX_LENGTH,
    batch_tokens: int = BATCH_TOKENS,
    beside: Beside | None = None,
    beginnings: bool = False,
    on_progress: Callable[[int], None] | None = None,
) -> Losses:
    """Run every batch of a corpus under each recipe in turn (None: as the model is).

    Args:
        model: a model with a tokenizer.
        corpus: the texts.
        recipes: the first is the one that divergences are measured from.
        max_length: tokens of context; longer documents are cut into contexts of their own.
        batch_tokens: padded tokens of one forward pass.
        beside: entered round each forward pass with the recipe's place and the attention mask [B, S]: what else to
            watch in the same runs.
        beginnings: only the first context of each document.
        on_progress: called with the tokens done, of all recipes together.

    Raises:
        MoescopeError: no tokenizer, a bad corpus or recipe.
    """
    if model.tokenizer is None:
        raise MoescopeError("This model was wrapped without a tokenizer; pass one: moescope.wrap(hf_model, tokenizer).")
    corpus.census()
    for recipe in recipes:
        if recipe is not None:
            with model.edited(recipe):
                pass  # refused here, before anything is run
    if model.own_batch is not None:
        batch_tokens = 1
    found: dict[int, Document] = {}
    tokens: dict[int, int] = {}
    sums: dict[int, np.ndarray] = {}
    done = 0
    for batch in batches(corpus, model.tokenizer, max_length=max_length, batch_tokens=batch_tokens, prompts=beginnings):
        for row, values in enumerate(_of_batch(model, batch, recipes, beside)):
            sequence = batch.sequences[row]
            number = sequence.document.number
            found[number] = sequence.document
            tokens[number] = tokens.get(number, 0) + max(0, len(sequence) - 1)
            sums[number] = sums.get(number, 0) + values
        done += batch.n_tokens * len(recipes)
        if on_progress is not None:
            on_progress(done)
    order = [number for number in sorted(found) if tokens[number]]
    table = np.stack([sums[number] for number in order], axis=-1) if order else np.zeros((2, len(recipes), 0))
    return Losses(
        [found[number] for number in order],
        np.array([tokens[number] for number in order], dtype=np.int64),
        table[0],
        table[1],
    )


def _of_batch(model: Model, batch: TextBatch, recipes: Sequence[Recipe | None], beside: Beside | None) -> np.ndarray:
    """[sequence, 2, recipe]: summed loss and divergence."""
    ids, mask = (torch.from_numpy(array).to(model.device) for array in batch.padded(model.pad_id))
    real = (mask != 0) & (torch.arange(ids.shape[1], device=ids.device) > 0)
    predicting = real[:, 1:]
    out = np.zeros((len(ids), 2, len(recipes)))
    reference: torch.Tensor | None = None
    with torch.inference_mode():
        for place, recipe in enumerate(recipes):
            watching = nullcontext() if beside is None else beside(place, mask)
            with nullcontext() if recipe is None else model.edited(recipe, check=False), watching:
                logits = model.forward(ids, mask)
            out[:, 0, place] = token_losses(logits, ids).masked_fill(~real, 0).double().sum(-1).cpu().numpy()
            log = logits[:, :-1].float().log_softmax(-1)
            if reference is None:
                reference = log
            else:
                apart = (reference.exp() * (reference - log)).nan_to_num().sum(-1)
                out[:, 1, place] = apart.masked_fill(~predicting, 0).double().sum(-1).cpu().numpy()
    return out
