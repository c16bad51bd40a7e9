"""Taps read the sites of a model while it runs, and change nothing.

``with Tap(...) as tap:`` installs plain module hooks; each forward pass between ``tap.begin(rows)`` and ``tap.take()``
leaves a `Reading`. Leaving the block removes every hook, whatever happened inside.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from moescope.errors import RefusedError
from moescope.hooks.facts import Facts, Gather, flat
from moescope.hooks.readers import READERS
from moescope.hooks.readings import (
    Reading,
    SiteReading,
    expert_maxima,
    hidden_maximum,
    largest_magnitude,
    rank_and_summarise,
)
from moescope.hooks.semantics import Semantics
from moescope.hooks.sites import Site


@dataclass(frozen=True)
class Want:
    """What to read beyond ids and weights. ``outliers`` implies that expert outputs are observed.

    ``vectors``, ``neurons`` and ``router_inputs`` name the sites whose vectors are kept, by key.
    """

    logits: bool = False
    experts: bool = False
    outliers: bool = False
    vectors: frozenset[str] = frozenset()
    neurons: frozenset[str] = frozenset()
    router_inputs: frozenset[str] = frozenset()

    def gather(self, key: str, semantics: Semantics) -> Gather:
        """What a site's reader must gather for this."""
        return Gather(
            output=semantics.logits_from == "output",
            linear=semantics.logits_from == "linear",
            magnitudes=self.experts or self.outliers,
            vectors=key in self.vectors,
            neurons=key in self.neurons,
            router_input=key in self.router_inputs,
        )


class Tap:
    """Reads chosen sites of a model during its forward passes.

    Args:
        model: the transformers model.
        sites: sites to read.
        semantics: what each site's numbers mean, by key.
        want: what to read.
    """

    def __init__(self, model: nn.Module, sites: Iterable[Site], semantics: dict[str, Semantics], want: Want) -> None:
        self._model = model
        self._sites = list(sites)
        self._semantics = semantics
        self._want = want
        self._undo: list[Callable[[], None]] = []
        self._positions = 0
        self._rows: torch.Tensor | None = None
        self._chosen: torch.Tensor | None = None
        self._router_inputs: dict[str, torch.Tensor] = {}
        self._reading = Reading({}, {})

    def __enter__(self) -> Tap:
        try:
            for site in self._sites:
                self._install(site, self._semantics[site.key])
            if self._want.outliers:
                self._watch_layers()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *exc: object) -> None:
        while self._undo:
            self._undo.pop()()

    def begin(self, positions: int, rows: torch.Tensor | None = None, chosen: torch.Tensor | None = None) -> None:
        """Start a forward pass.

        Args:
            positions: batch size times padded length.
            rows: flat positions [N] of the real tokens; None means all of them.
            chosen: which of the real tokens [M] keep their vectors, where vectors are wanted; None means all.
        """
        self._positions, self._rows, self._chosen = positions, rows, chosen
        self._reading = Reading({}, {})

    def take(self) -> Reading:
        """What the forward pass left.

        Raises:
            RefusedError: a site did not run, so there is nothing true to say about it.
        """
        reading, self._reading = self._reading, Reading({}, {})
        silent = [site.experts for site in self._sites if site.key not in reading.sites]
        if silent:
            raise RefusedError(f"Captured nothing at {silent[0]}: the module did not run in this forward pass.")
        return reading

    def real(self, values: torch.Tensor) -> torch.Tensor:
        """A copy of the rows of real tokens: the model may still change its own tensor in place.

        Raises:
            RefusedError: the rows are not one for each position of the batch, so they cannot be told apart.
        """
        if len(values) != self._positions:
            raise RefusedError(
                f"A site saw {len(values)} rows in a batch of {self._positions} positions (tokens of another modality, "
                "a canvas?); its rows cannot be matched with tokens."
            )
        return values.detach().clone() if self._rows is None else values.detach().index_select(0, self._rows)

    def _install(self, site: Site, semantics: Semantics) -> None:
        def keep(facts: Facts) -> None:
            if site.key in self._reading.sites:
                raise RefusedError(
                    f"{site.experts} ran twice in one forward pass (a looped layer?); its tokens cannot be told apart."
                )
            self._reading.sites[site.key] = self.read(site, facts)

        reader = READERS[site.reader](self._model, site, self._want.gather(site.key, semantics), keep, semantics.top_k)
        self._undo += reader.install()
        if site.key in self._want.router_inputs:
            router = self._model.get_submodule(site.router)
            self._undo.append(router.register_forward_pre_hook(self._before_router(site.key)).remove)

    def _before_router(self, key: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any) -> None:
            self._router_inputs[key] = self._chosen_of(self.real(flat(args[0])))

        return hook

    def _chosen_of(self, rows: torch.Tensor) -> torch.Tensor:
        return rows if self._chosen is None else rows.index_select(0, self._chosen)

    def read(self, site: Site, facts: Facts) -> SiteReading:
        """Facts of all rows as a reading of the real ones (see `begin`): slots in rank order, summaries, maxima."""
        semantics = self._semantics[site.key]
        ids, weights = self.real(facts.ids), self.real(facts.weights)
        missing = None if facts.missing is None else self.real(facts.missing)
        if missing is not None and not semantics.drops:
            raise RefusedError(f"{site.block} left slots empty, which it did not do when it was checked.")
        logits = facts.linear if semantics.logits_from == "linear" else facts.output
        logits = None if logits is None else self.real(logits)
        choices = semantics.choices(ids, weights, site.n_experts)
        order, summaries = rank_and_summarise(semantics, choices, weights, logits, missing)
        slots = {name: self._ranked(values, order) for name, values in facts.slots.items()}
        reading = SiteReading(
            expert=ids.gather(-1, order),
            weight=weights.gather(-1, order),
            valid=_valid(site, semantics, choices, missing, order),
            logits=logits[:, : site.n_experts] if self._want.logits and logits is not None else None,
            router_input=self._router_inputs.pop(site.key, None),
            logsumexp=summaries["logsumexp"],
            entropy=summaries["entropy"],
            margin=summaries["margin"],
            norm=slots.get("norm"),
            absmax=slots.get("absmax"),
            vectors=slots.get("vectors"),
            neurons=slots.get("neurons"),
        )
        if reading.valid is not None:  # whatever ran for a missing slot, with weight 0, says nothing of an expert
            reading.norm, reading.absmax = (
                None if values is None else values.masked_fill(~reading.valid, torch.nan)
                for values in (reading.norm, reading.absmax)
            )
        if self._want.outliers:
            assert reading.absmax is not None
            largest_input = largest_magnitude(self.real(facts.hidden)).unsqueeze(-1).expand_as(reading.expert)
            if READERS[site.reader].weight_on == "input":
                largest_input = largest_input * reading.weight
            reading.outliers = expert_maxima(
                site.n_experts, reading.expert, reading.absmax, largest_input, reading.valid
            )
        if not self._want.experts:
            reading.norm = reading.absmax = None
        return reading

    def _ranked(self, values: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
        k = order.shape[-1]
        per_token = self.real(values.reshape(-1, k, *values.shape[1:]))
        index = order if per_token.ndim == 2 else order.unsqueeze(-1).expand_as(per_token)
        if per_token.ndim == 3:  # vectors: of the chosen tokens alone
            per_token, index = self._chosen_of(per_token), self._chosen_of(index)
        return per_token.gather(1, index)

    def _watch_layers(self) -> None:
        stacks = {site.layer_path.rpartition(".")[0] for site in self._sites}
        if len(stacks) > 1:
            return  # their layers share numbers: a maximum would stand for the wrong stack, so there is none
        for stack in stacks:
            for name, layer in self._model.get_submodule(stack).named_children():
                self._undo.append(layer.register_forward_hook(self._after_layer(int(name))).remove)

    def _after_layer(self, index: int) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            hidden = output[0] if isinstance(output, tuple) else output
            # deepseek_v4 carries several residual streams, [B, S, streams, H]: one row for each token all the same.
            self._reading.hidden[index] = hidden_maximum(self.real(hidden.reshape(self._positions, -1)))

        return hook


def _valid(
    site: Site, semantics: Semantics, choices: torch.Tensor, missing: torch.Tensor | None, order: torch.Tensor
) -> torch.Tensor | None:
    """Which ranked slots [N, k] hold an expert; None where all always do."""
    if semantics.skips:
        return choices.gather(-1, order) < site.n_experts
    if semantics.drops:
        return torch.ones_like(order, dtype=torch.bool) if missing is None else ~missing.gather(-1, order)
    return None
