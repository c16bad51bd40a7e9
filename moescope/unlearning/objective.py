"""What one batch of each set costs under a method, with the history that its gradient needs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from moescope.hooks.sites import Site
from moescope.unlearning import objectives
from moescope.unlearning.batching import Batch, batch_of, in_turn
from moescope.unlearning.examples import Tokens
from moescope.unlearning.prefix import Prefix
from moescope.unlearning.settings import Settings
from moescope.unlearning.trained import Trained
from moescope.unlearning.watching import Watch

if TYPE_CHECKING:
    from moescope.hooks import Model

Target = tuple[Site, int]
EVALUATED = 32  # sequences of a batch without gradients


class Objective:
    """A method's terms for batches of the forget and the retain set.

    Args:
        model: the model.
        settings: method and weights.
        targets: (site, expert) to anchor the routers to; RMU steers the last one's layer.
        trained: the tensors that train, whose frozen copy NPO, KL and RMU hold against.
        forget, retain: token ids of both sets.
        watch: sees the routers of the targets and RMU's layer.
        prefix: runs the sets "forget" and "retain" from the first trained layer on; None runs every layer.
    """

    def __init__(
        self,
        model: Model,
        settings: Settings,
        targets: Sequence[Target],
        trained: Trained,
        forget: Sequence[Tokens],
        retain: Sequence[Tokens],
        watch: Watch,
        prefix: Prefix | None = None,
    ) -> None:
        self._model, self._settings, self._trained, self._watch = model, settings, trained, watch
        self._forget, self._retain, self._prefix = forget, retain, prefix
        self._experts: dict[str, list[int]] = {}
        for site, expert in targets:
            self._experts.setdefault(site.key, []).append(expert)
        self._steered = max(targets, key=lambda target: target[0].ordinal)[0].key
        self._frozen = self._frozen_nats() if settings.method == "npo" else None
        self._control = self._direction() if settings.method == "rmu" else None

    def forget_terms(self, rows: Sequence[int]) -> tuple[Batch, dict[str, torch.Tensor]]:
        """The forget term of some rows of the forget set, and the anchor where routers are anchored."""
        batch = batch_of(self._model, self._forget, rows)
        logits = self._run(batch, "forget")
        settings = self._settings
        nats, tokens = objectives.sequence_losses(logits, batch.ids, batch.counted)
        if settings.method == "npo":
            assert self._frozen is not None
            term = objectives.negative_preference(nats, self._frozen[list(batch.rows)].to(nats), settings.beta)
        elif settings.method == "rmu":
            assert self._control is not None
            hidden = self._watch.hidden(self._steered)
            term = objectives.misdirection(hidden, self._control.to(hidden), batch.real)
        else:
            term = objectives.gradient_ascent(nats, tokens)
        found = {"forget": term}
        if settings.anchors:
            anchors = [
                objectives.router_anchor(self._watch.scores(key, batch.real), experts, settings.definition)
                for key, experts in self._experts.items()
            ]
            found["anchor"] = torch.stack(anchors).mean()
        return batch, found

    def retain_term(self, rows: Sequence[int]) -> tuple[Batch, torch.Tensor]:
        """The retain term of some rows of the retain set. The frozen copy runs first: it stands in the same place."""
        batch = batch_of(self._model, self._retain, rows)
        settings, frozen = self._settings, None
        steady = settings.method == "rmu"
        if steady or settings.retention == "kl":
            with self._trained.frozen_copy():
                frozen = self._run(batch, "retain")
                if steady:
                    frozen = self._watch.hidden(self._steered)
        logits = self._run(batch, "retain")
        if steady:
            assert frozen is not None
            return batch, objectives.steadiness(self._watch.hidden(self._steered), frozen, batch.real)
        if frozen is not None:
            return batch, objectives.divergence(logits, frozen, batch.counted)
        nats, tokens = objectives.sequence_losses(logits, batch.ids, batch.counted)
        return batch, (nats / tokens).mean()

    def _run(self, batch: Batch, name: str) -> torch.Tensor:
        self._watch.forget()
        if self._prefix is None:
            logits = self._model.forward(batch.ids, batch.real.long())
        else:
            logits = self._prefix.logits(name, batch)
        return logits if logits.dtype == torch.float64 else logits.float()

    def _frozen_nats(self) -> torch.Tensor:
        """[row] -log p of each forget sequence under the frozen copy."""
        with self._trained.frozen_copy():
            found = torch.zeros(len(self._forget), dtype=torch.float64, device=self._model.device)
            for batch in in_turn(self._model, self._forget, EVALUATED):
                nats, _ = objectives.sequence_losses(self._run(batch, "forget"), batch.ids, batch.counted)
                found[list(batch.rows)] = nats.double()
        return found

    def _direction(self) -> torch.Tensor:
        """RMU's c * u: a random direction of the seed, as long as the settings say in mean hidden norms."""
        with self._trained.frozen_copy():
            norms, n = 0.0, 0
            for batch in in_turn(self._model, self._forget, EVALUATED):
                self._run(batch, "forget")
                hidden = self._watch.hidden(self._steered)[batch.real]
                norms, n = norms + float(hidden.double().norm(dim=-1).sum()), n + len(hidden)
        draw = torch.Generator().manual_seed(self._settings.seed)
        direction = torch.rand(self._model.hidden_size, generator=draw, dtype=torch.float64)  # of [0, 1), as published
        return (direction / direction.norm() * self._settings.steering * norms / max(1, n)).to(self._model.device)


def mean_loss(model: Model, tokens: Sequence[Tokens]) -> float:
    """Mean loss over counted tokens of examples, nats."""
    total, n = 0.0, 0
    with torch.no_grad():
        for batch in in_turn(model, tokens, EVALUATED):
            logits = model.forward(batch.ids, batch.real.long())
            nats, counted = objectives.sequence_losses(logits, batch.ids, batch.counted)
            total, n = total + float(nats.double().sum()), n + int(counted.sum())
    return total / max(1, n)
