"""The relearning attack: how few steps of plain training bring back what was forgotten, shown again or not."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch
import xarray as xr

from moescope.errors import MoescopeError
from moescope.hooks.parts import Part
from moescope.hooks.sites import plain_path
from moescope.unlearning.batching import batch_of, drawn
from moescope.unlearning.evaluation import evaluate
from moescope.unlearning.examples import Example, tokenised
from moescope.unlearning.objectives import sequence_losses
from moescope.unlearning.trained import Trained

if TYPE_CHECKING:
    from moescope.hooks import Model
    from moescope.unlearning.unlearned import Unlearned

LOOKS = (0, 1, 2, 5, 10, 20)


def relearn(
    model: Model,
    done: Unlearned,
    forget: Sequence[Example],
    *,
    attack: Literal["same", "model"] = "model",
    looks: Sequence[int] = LOOKS,
    learning_rate: float = 3e-4,
    batch: int = 16,
    max_length: int = 512,
    seed: int = 0,
) -> xr.Dataset:
    """Train on half of what was forgotten, and see how soon it comes back, shown again or not.

    How to read it: a fact that comes back although it was not shown again was hidden, not forgotten. `shown` rises
    for anything that can be learnt; hold `hidden` against it.

    Args:
        model: the model, as it was.
        done: what was unlearned; the attack starts from there.
        forget: the examples with prompts and answers.
        attack: train the whole "model", or the "same" tensors that were trained to forget.
        looks: steps at which recall is measured.
        learning_rate: of AdamW.
        batch: examples of a step.
        max_length: tokens of a sequence.
        seed: of the halves and the batches.

    Returns:
        Dataset with dims (step): shown, hidden (exact match of either half); attrs: shown_half, hidden_half (first look
        at which at least half is recalled; "never").

    Raises:
        MoescopeError: fewer than two examples with an answer.
    """
    asked = [example for example in forget if example.asks]
    if len(asked) < 2:
        raise MoescopeError("A relearning attack needs at least two forgotten examples with prompt and answer.")
    order = np.random.default_rng([seed, 3]).permutation(len(asked))
    halves = {"shown": [asked[i] for i in order[::2]], "hidden": [asked[i] for i in order[1::2]]}
    tokens = tokenised(model, halves["shown"], max_length, "relearning")
    parts = [Part.parse(name) for name in done.tensors]
    if attack == "model":
        parts = [Part(plain_path(name)) for name, p in model.hf.named_parameters() if p.is_floating_point()]
    found: dict[str, list[float]] = {"shown": [], "hidden": []}
    with done.live(model), Trained(model.hf, parts) as trained:
        optimizer = torch.optim.AdamW(trained.leaves.values(), learning_rate, weight_decay=0.0)
        for step in range(max(looks) + 1):
            if step in looks:
                seen = evaluate(model, halves, routed=None, max_length=max_length)
                for name in found:
                    found[name].append(seen.mean(name, "exact"))
            if step == max(looks):
                break
            some = batch_of(model, tokens, drawn(len(tokens), batch, step, seed, 4))
            nats, counted = sequence_losses(model.forward(some.ids, some.real.long()), some.ids, some.counted)
            (nats.sum() / counted.sum()).backward()
            optimizer.step()
            optimizer.zero_grad()
            trained.write_back()
    steps = sorted(looks)
    return xr.Dataset(
        {name: ("step", values) for name, values in found.items()},
        coords={"step": steps},
        attrs={
            "analysis": "relearning", "attack": attack, "learning_rate": learning_rate, "batch": batch, "seed": seed,
            "examples": len(asked), "table": "step",
            **{f"{name}_half": next((str(s) for s, v in zip(steps, values, strict=True) if v >= 0.5), "never")
               for name, values in found.items()},
        },
    )  # fmt: skip
