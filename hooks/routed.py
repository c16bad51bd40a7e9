"""Names for one MoE layer inside an nnsight trace, here or on a server.

A `Routed` is made from an nnsight model outside or inside a trace and holds nothing but places in it, so that it goes
with a trace that runs elsewhere: nnsight sends this module's source along, and the model over there gives the values.

Where the experts are called with ids and weights, each value is had when the model makes it, and can be changed there:
logits, then ids and weights, then the sum. Where they are modules, or a family has a block of its own (llama4, JetMoE,
doge), the same reader that captures the family finds them out, so they are had when the layer has run.
"""

from __future__ import annotations

from typing import Any

import torch

from moescope.errors import MoescopeError, RefusedError
from moescope.hooks.facts import Facts, Gather, Slots
from moescope.hooks.readers import READERS
from moescope.hooks.sites import Site
from moescope.hooks.tracer import trace_weights

EVERYTHING = Gather(output=True, linear=True, vectors=True, returned=True)


class Routed:
    """One MoE layer inside a trace.

    Values are the block's own: ids in the order in which it made them, expert outputs before their routing weight.
    """

    def __init__(self, envoy: Any, site: Site, top_k: int | None = None) -> None:
        self.site = site
        self._root = envoy
        self._top_k = top_k
        self._router: Any = envoy.get(site.router)
        self._experts: Any = envoy.get(site.experts)
        self._layer: Any = envoy.get(site.layer_path)
        self._facts: Facts | None = None

    @property
    def is_called(self) -> bool:
        """Whether the experts are called as ``experts(hidden, ids, weights)`` (67 families)."""
        return self.site.reader == "call"

    @property
    def logits(self) -> Any:
        """What the router returns first, [T, E]: logits, or probabilities where `Semantics.router_output` says so."""
        if not self.is_called:
            facts = self._read()
            return facts.linear if facts.output is None else facts.output
        output = self._router.output
        return output[0] if isinstance(output, tuple) else output

    @property
    def hidden(self) -> Any:
        """What the experts are given, [T, D]."""
        return self._call()[0] if self.is_called else self._read().hidden

    @property
    def ids(self) -> Any:
        """Experts that run, [T, k], in the block's own order; -1 where its experts are modules and a slot is empty."""
        if self.is_called:
            return self._call()[1]
        facts = self._read()
        return facts.ids if facts.missing is None else facts.ids.masked_fill(facts.missing, -1)

    @property
    def weights(self) -> Any:
        """Routing weights, [T, k]."""
        return self._call()[2] if self.is_called else self._read().weights

    @property
    def output(self) -> Any:
        """The routed sum that the experts return, [T, D]."""
        return self._experts.output if self.is_called else self._read().returned

    @property
    def expert_outputs(self) -> Any:
        """Each selected expert's own output, before its routing weight, [T, k, D], in the order of ``ids``.

        They are those that the layer computes, seen where the weights multiply them; NaN where nothing ran. llama4
        weighs the experts' input instead: its outputs are f(w x). Ask for them after `scale` and before `output`.
        """
        if not self.is_called:
            facts = self._read()
            return facts.slots["vectors"].reshape(*facts.ids.shape, -1)
        hidden, ids, weights = self._call()
        slots = Slots(weights.numel(), Gather(vectors=True))
        self._experts.inputs = ((hidden, ids, trace_weights(weights, slots.put)), {})
        _ = self._experts.output  # comes when they have run
        return slots.values["vectors"].reshape(*ids.shape, -1)

    def scale(self, expert: int, factor: float) -> None:
        """Multiply the routing weight of one expert, wherever it was selected; 0 takes it out of the sum.

        Raises:
            MoescopeError: no such expert.
            RefusedError: nothing in this layer is called with weights.
        """
        if not 0 <= expert < self.site.n_experts:
            raise MoescopeError(f"No expert {expert} at {self.site.key}; it has {self.site.n_experts}.")
        if not self.is_called:
            raise RefusedError(
                f"{self.site.experts} is not called with weights that a trace could change; put the trace inside "
                "`with model.edited(recipe):` instead."
            )
        hidden, ids, weights = self._call()
        self._experts.inputs = ((hidden, ids, torch.where(ids == expert, weights * factor, weights)), {})

    def _call(self) -> tuple[Any, Any, Any]:
        args, kwargs = self._experts.inputs
        hidden, ids, weights = (*args, *kwargs.values())
        return hidden, ids, weights

    def _read(self) -> Facts:
        """What the family's own reader finds out about this layer in this pass; it waits for the layer's end."""
        if self._facts is None:
            found: list[Facts] = []
            model = self._root._module
            reader = READERS[self.site.reader](model, self.site, EVERYTHING, found.append, self._top_k)
            undo = reader.install()
            try:
                _ = self._layer.output
            finally:
                for remove in reversed(undo):
                    remove()
            if len(found) != 1:
                raise RefusedError(f"{self.site.block} ran {len(found)} times in this trace; name one that runs once.")
            self._facts = found[0]
        return self._facts
