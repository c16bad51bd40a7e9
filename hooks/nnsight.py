"""nnsight as the way a model is run: capture from an nnsight model, and names for routing inside its traces.

```python
from moescope.hooks import nnsight as ns

model = ns.wrap(language_model)                      # any nnsight model: capture, doctor and analyses as ever
with language_model.trace("Two and two is"):
    site = ns.routed(language_model, model, layer=3)
    logits = site.logits.save()                      # [T, E], then ids and weights [T, k], in the router's own order
    ids, weights = site.ids.save(), site.weights.save()
    outputs = site.expert_outputs.save()             # [T, k, D], each expert's own, before its weight
    site.scale(expert=7, factor=0.0)                 # what is computed from here on is without expert 7
    answer = language_model.output.save()
```

Inside a trace values can be had in the order in which the model makes them: logits, then ids and weights, then sums.
Needs `pip install 'moescope[nnsight]'`.
"""

from __future__ import annotations

from functools import cached_property
from typing import Any

import torch

from moescope.errors import MoescopeError, RefusedError
from moescope.hooks.facts import Gather, Slots
from moescope.hooks.model import Model
from moescope.hooks.sites import Site
from moescope.hooks.tracer import trace_weights

try:
    from nnsight import LanguageModel
except ImportError as error:
    raise ImportError("nnsight is not installed; pip install 'moescope[nnsight]'") from error


class TracedModel(Model):
    """A model whose forward passes run inside ``trace``: edits made with nnsight's own ``edit`` are captured too.

    Attributes:
        envoy: the nnsight model.
        trace_options: passed on to ``trace``, ``remote=True`` among them.
    """

    def __init__(self, envoy: Any, tokenizer: Any, name: str, **trace_options: Any) -> None:
        self.envoy = envoy
        self.trace_options = trace_options
        super().__init__(envoy._module, tokenizer, name)

    def run(self, inputs: dict[str, Any]) -> torch.Tensor:
        """Logits of one forward pass inside a trace."""
        envoy = self.envoy
        with envoy.trace(**inputs, **self.trace_options):
            logits = envoy.output.logits.save()
        return logits  # noqa: RET504 - it leaves the trace as a value


def wrap(envoy: Any, tokenizer: Any = None, name: str | None = None, **trace_options: Any) -> TracedModel:
    """Look into a model that is wrapped by nnsight.

    Args:
        envoy: an `nnsight.LanguageModel`, or `nnsight.NNsight` round a transformers model.
        tokenizer: by default the language model's own.
        name: by default the model's own.
        trace_options: passed on to each ``trace``.

    Raises:
        RefusedError: it has no MoE layer, cannot be read faithfully, or runs elsewhere.
    """
    if trace_options.get("remote"):
        raise RefusedError(
            "A model that runs remotely has no modules here to hook; name what you want inside your own trace, with "
            "`routed`, and pass remote=True to it."
        )
    if isinstance(envoy, LanguageModel) and tokenizer is None:
        tokenizer = envoy.tokenizer
    module = envoy._module
    config = getattr(module, "config", None)
    return TracedModel(
        envoy, tokenizer, name or getattr(config, "_name_or_path", "") or type(module).__name__, **trace_options
    )


class Routed:
    """One MoE layer inside a trace.

    Only layers whose experts are called as ``experts(hidden, ids, weights)`` have names here (`Site.reader` "call").
    """

    def __init__(self, envoy: Any, site: Site) -> None:
        if site.reader != "call":
            raise RefusedError(f"{site.experts} is not called with ids and weights; it has no names inside a trace.")
        self.site = site
        self._router: Any = envoy.get(site.router)
        self._experts: Any = envoy.get(site.experts)

    @property
    def logits(self) -> Any:
        """What the router returns first, [T, E]: logits, or probabilities where `Semantics.router_output` says so."""
        output = self._router.output
        return output[0] if isinstance(output, tuple) else output

    @cached_property
    def _call(self) -> tuple[Any, Any, Any]:
        args, kwargs = self._experts.inputs
        hidden, ids, weights = (*args, *kwargs.values())
        return hidden, ids, weights

    @property
    def hidden(self) -> Any:
        """What the experts are given, [T, D]."""
        return self._call[0]

    @property
    def ids(self) -> Any:
        """Experts that run, [T, k], in the router's own order."""
        return self._call[1]

    @property
    def weights(self) -> Any:
        """Routing weights, [T, k]."""
        return self._call[2]

    @property
    def output(self) -> Any:
        """The routed sum that the experts return, [T, D]."""
        return self._experts.output

    @cached_property
    def expert_outputs(self) -> Any:
        """Each selected expert's own output, before its routing weight, [T, k, D], in the order of ``ids``.

        They are those that the layer computes, seen where the weights multiply them; NaN where nothing ran. Ask for
        them after `scale` and before `output`.
        """
        hidden, ids, weights = self._call
        slots = Slots(weights.numel(), Gather(vectors=True))
        self._experts.inputs = ((hidden, ids, trace_weights(weights, slots.put)), {})
        _ = self._experts.output  # comes when they have run
        return slots.values["vectors"].reshape(*ids.shape, -1)

    def scale(self, expert: int, factor: float) -> None:
        """Multiply the routing weight of one expert, wherever it was selected; 0 takes it out of the sum.

        Raises:
            MoescopeError: no such expert.
        """
        if not 0 <= expert < self.site.n_experts:
            raise MoescopeError(f"No expert {expert} at {self.site.key}; it has {self.site.n_experts}.")
        hidden, ids, weights = self._call
        scaled = torch.where(ids == expert, weights * factor, weights)
        self._experts.inputs = ((hidden, ids, scaled), {})
        self._call = (hidden, ids, scaled)


def routed(envoy: Any, model: Model, layer: int | str) -> Routed:
    """Names for one MoE layer (or site key) inside a trace of ``envoy``.

    Raises:
        MoescopeError: no such layer.
    """
    found = [site for site in model.sites if layer in (site.key, site.layer)]
    if len(found) != 1:
        raise MoescopeError(f"No single MoE layer {layer!r}; there are {', '.join(s.key for s in model.sites)}.")
    return Routed(envoy, found[0])
