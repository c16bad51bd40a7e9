"""Taps read the sites of a model while it runs, and change nothing.

``with Tap(...) as tap:`` installs plain module hooks; each forward pass between ``tap.begin(rows)`` and ``tap.take()``
leaves a `Reading`. Leaving the block removes every hook, whatever happened inside.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from moescope.errors import RefusedError
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
from moescope.hooks.tracer import trace_weights


@dataclass(frozen=True)
class Want:
    """What to read beyond ids and weights. ``outliers`` implies that expert outputs are observed."""

    logits: bool = False
    experts: bool = False
    outliers: bool = False
    vectors: bool = False

    @property
    def outputs(self) -> bool:
        """Whether expert outputs must be observed at all."""
        return self.experts or self.outliers or self.vectors


class LinearWatch(TorchFunctionMode):
    """Remembers the last linear map inside its scope: a router's own projection, before anything is done to it."""

    def __init__(self) -> None:
        super().__init__()
        self.last: torch.Tensor | None = None

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func is nn.functional.linear:
            self.last = result.detach()
        return result


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
        self._reading = Reading({}, {})

    def __enter__(self) -> Tap:
        try:
            for site in self._sites:
                self._install(_SiteTap(self, site, self._semantics[site.key], self._want))
            if self._want.outliers:
                self._watch_layers()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *exc: object) -> None:
        while self._undo:
            self._undo.pop()()

    def begin(self, positions: int, rows: torch.Tensor | None = None) -> None:
        """Start a forward pass.

        Args:
            positions: batch size times padded length.
            rows: flat positions [N] of the real tokens; None means all of them.
        """
        self._positions, self._rows = positions, rows
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

    def keep(self, site: Site, reading: SiteReading) -> None:
        """Store a site's reading; a site that runs twice in one forward pass is refused."""
        if site.key in self._reading.sites:
            raise RefusedError(f"{site.experts} ran twice in one forward pass; its tokens cannot be told apart.")
        self._reading.sites[site.key] = reading

    def _install(self, tap: _SiteTap) -> None:
        router, experts = self._model.get_submodule(tap.site.router), self._model.get_submodule(tap.site.experts)
        if tap.semantics.logits_from == "linear":
            self._undo.append(override_forward(router, tap.run_router))
        else:
            self._undo.append(router.register_forward_hook(tap.after_router).remove)
        self._undo.append(experts.register_forward_pre_hook(tap.before_experts, with_kwargs=True).remove)
        self._undo.append(experts.register_forward_hook(tap.after_experts).remove)

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


class _SiteTap:
    """The hooks of one site, and what they have seen so far in this forward pass."""

    def __init__(self, tap: Tap, site: Site, semantics: Semantics, want: Want) -> None:
        self.site, self.semantics = site, semantics
        self._tap, self._want = tap, want
        self._logits: torch.Tensor | None = None
        self._slots: dict[str, torch.Tensor] = {}
        self._inputs: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None = None

    def after_router(self, module: nn.Module, args: Any, output: Any) -> None:
        if self.semantics.logits_from != "none":
            self._see_logits(output[0] if isinstance(output, tuple) else output)

    def run_router(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        with LinearWatch() as watch:
            output = original(*args, **kwargs)
        self._see_logits(watch.last)
        return output

    def _see_logits(self, logits: torch.Tensor | None) -> None:
        self._logits = None if logits is None else logits.detach().reshape(-1, logits.shape[-1])

    def before_experts(
        self, module: nn.Module, args: Any, kwargs: Any
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        hidden, ids, weights = experts_arguments(module, args, kwargs)
        self._inputs = (hidden.detach().reshape(-1, hidden.shape[-1]), ids.detach(), weights.detach())
        self._slots = {}
        if not self._want.outputs:
            return None
        return (hidden, ids, trace_weights(weights, self._observe)), {}

    def _observe(self, outputs: torch.Tensor, slots: torch.Tensor) -> None:
        """Place what is wanted of some expert outputs [rows, D] at their slots."""
        n_slots = self._inputs[1].numel() if self._inputs is not None else 0
        parts = {}
        if self._want.experts or self._want.outliers:
            parts["norm"] = torch.linalg.vector_norm(outputs, dim=-1, dtype=torch.float32)
            parts["absmax"] = largest_magnitude(outputs).float()
        if self._want.vectors:
            parts["vectors"] = outputs
        for name, values in parts.items():
            if name not in self._slots:
                self._slots[name] = values.new_full((n_slots, *values.shape[1:]), torch.nan)
            self._slots[name][slots] = values

    def after_experts(self, module: nn.Module, args: Any, output: Any) -> None:
        assert self._inputs is not None, "experts finished without having started"
        hidden, ids, weights = self._inputs
        if self._want.outputs and not self._slots:
            raise RefusedError(
                f"{self.site.experts} ({type(module).__name__}) does not multiply its experts' outputs by the routing "
                "weights in a way that can be observed (a fused kernel?); capture the routing and logits tiers only."
            )
        ids, weights = self._tap.real(ids), self._tap.real(weights)
        logits = None if self._logits is None else self._tap.real(self._logits)
        choices = self.semantics.choices(ids, weights, self.site.n_experts)
        order, summaries = rank_and_summarise(self.semantics, choices, weights, logits)
        ranked = {name: self._ranked(values, order) for name, values in self._slots.items()}
        reading = SiteReading(
            expert=ids.gather(-1, order),
            weight=weights.gather(-1, order),
            valid=choices.gather(-1, order) < self.site.n_experts if self.semantics.skips else None,
            logits=logits[:, : self.site.n_experts] if self._want.logits and logits is not None else None,
            logsumexp=summaries["logsumexp"],
            entropy=summaries["entropy"],
            margin=summaries["margin"],
            norm=ranked.get("norm"),
            absmax=ranked.get("absmax"),
            vectors=ranked.get("vectors"),
        )
        if reading.valid is not None:  # expert 0 ran for a missing slot, with weight 0: that says nothing of expert 0
            reading.norm, reading.absmax = (
                None if values is None else values.masked_fill(~reading.valid, torch.nan)
                for values in (reading.norm, reading.absmax)
            )
        if self._want.outliers:
            assert reading.absmax is not None
            largest_input = largest_magnitude(self._tap.real(hidden))
            reading.outliers = expert_maxima(
                self.site.n_experts, reading.expert, reading.absmax, largest_input, reading.valid
            )
        if not self._want.experts:
            reading.norm = reading.absmax = None
        self._tap.keep(self.site, reading)
        self._inputs, self._logits, self._slots = None, None, {}

    def _ranked(self, values: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
        k = order.shape[-1]
        per_token = self._tap.real(values.reshape(-1, k, *values.shape[1:]))
        index = order if per_token.ndim == 2 else order.unsqueeze(-1).expand_as(per_token)
        return per_token.gather(1, index)


def experts_arguments(module: nn.Module, args: Any, kwargs: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Hidden states, ids [T, k] and weights [T, k] of an experts call; families differ in names, not in order."""
    if kwargs:
        args = tuple(inspect.signature(module.forward).bind(*args, **kwargs).arguments.values())
    return args[0], args[1], args[2]


def override_forward(module: nn.Module, run: Callable[..., Any]) -> Callable[[], None]:
    """Let ``run(original, *args, **kwargs)`` stand round a module's forward; gives the function that undoes it.

    Needed where a hook is too late or too early: only inside the forward can its own linear map be seen.
    """
    mine = "forward" in module.__dict__
    original = module.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        return run(original, *args, **kwargs)

    def undo() -> None:
        if mine:
            module.forward = original  # type: ignore[method-assign]
        else:
            del module.__dict__["forward"]

    module.forward = forward  # type: ignore[method-assign]
    return undo
