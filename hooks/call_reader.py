"""Read sites whose experts are one module, called once as ``experts(hidden, ids [T, k], weights [T, k])``.

This is the contract of 67 of transformers' 72 families. The arguments of that call are what is really computed: the
safest place to read ids and weights. Expert outputs are observed where the weights multiply them (`tracer`).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from moescope.errors import RefusedError
from moescope.hooks.facts import Facts, Gather, OnFacts, Reader, Slots, Undo, flat
from moescope.hooks.routers import RouterWatch
from moescope.hooks.sites import Site
from moescope.hooks.tracer import trace_weights


class CallReader(Reader):
    """Hooks before and after the call of the experts module, and on the router."""

    def __init__(self, model: nn.Module, site: Site, gather: Gather, on_facts: OnFacts, top_k: int | None) -> None:
        super().__init__(model, site, gather, on_facts, top_k)
        self._words = RouterWatch(self.router, gather)
        self._inputs: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None = None
        self._slots = Slots(0, gather)
        self._neurons = torch.empty(0, 0)

    def install(self) -> list[Undo]:
        # First what may refuse: a refusal leaves no hook behind.
        neurons = [watch_neurons(self.site.experts, self.experts, self._see_neurons)] if self.gather.neurons else []
        return [
            *neurons,
            *self._words.install(),
            self.experts.register_forward_pre_hook(self._before, with_kwargs=True).remove,
            self.experts.register_forward_hook(self._after).remove,
        ]

    def _before(self, module: nn.Module, args: Any, kwargs: Any) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        hidden, ids, weights = experts_arguments(module, args, kwargs)
        self._inputs = (flat(hidden), flat(ids), flat(weights))
        if not self.gather.outputs:
            return None
        self._slots = Slots(weights.numel(), self.gather)
        return (hidden, ids, trace_weights(weights, self._observe)), {}

    def _see_neurons(self, neurons: torch.Tensor) -> None:
        self._neurons = flat(neurons)

    def _observe(self, outputs: torch.Tensor, slots: torch.Tensor) -> None:
        self._slots.put(outputs, slots)
        if self.gather.neurons:
            # Experts implementations keep the order of rows between their two projections; a family's own forward
            # (eager) may go past the parts that are watched.
            if len(self._neurons) != len(outputs):
                raise RefusedError(
                    f"The neurons of {self.site.experts} cannot be seen while it runs its own forward; load the model "
                    "with experts_implementation='grouped_mm', or capture its outputs instead."
                )
            self._slots.place("neurons", self._neurons, slots)

    def _after(self, module: nn.Module, args: Any, output: Any) -> None:
        assert self._inputs is not None, "experts finished without having started"
        if self.gather.outputs and not self._slots.values and self._inputs[0].numel():
            raise RefusedError(
                f"{self.site.experts} ({type(module).__name__}) does not multiply its experts' outputs by the routing "
                "weights in a way that can be observed (a fused kernel?); capture the routing and logits tiers only."
            )
        hidden, ids, weights = self._inputs
        self._inputs = None
        returned = flat(output) if self.gather.returned else None
        said, linear = self._words.take()
        slots = self._slots.values
        self.on_facts(Facts(hidden, ids, weights, output=said, linear=linear, slots=slots, returned=returned))


def watch_neurons(path: str, experts: nn.Module, see: Callable[[torch.Tensor], None]) -> Undo:
    """Show what enters the down projection of a fused experts module: what its gate, or its activation, gives.

    Raises:
        RefusedError: this module has neither as a part of its own.
    """
    gate: Callable[..., torch.Tensor] | None = getattr(experts, "_apply_gate", None)
    activation = getattr(experts, "act_fn", None)
    if getattr(experts, "has_gate", False) and gate is not None:

        def watched(*args: Any, **kwargs: Any) -> torch.Tensor:
            result = gate(*args, **kwargs)
            see(result)
            return result

        experts.__dict__["_apply_gate"] = watched
        return lambda: experts.__dict__.pop("_apply_gate") and None
    if getattr(experts, "has_gate", True) is False and isinstance(activation, nn.Module):

        def after(module: nn.Module, args: Any, output: Any) -> None:
            see(output)

        return activation.register_forward_hook(after).remove
    raise RefusedError(f"The neurons of {path} ({type(experts).__name__}) cannot be seen; capture its outputs instead.")


def experts_arguments(module: nn.Module, args: Any, kwargs: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Hidden states, ids [T, k] and weights [T, k] of an experts call; families differ in names, not in order."""
    if kwargs:
        args = tuple(inspect.signature(type(module).forward).bind(module, *args, **kwargs).arguments.values())[1:]
    return args[0], args[1], args[2]
