"""nnsight as the way a model is run: capture and edits from an nnsight model, names for routing inside its traces.

```python
from moescope.hooks import nnsight as ns

model = ns.wrap(language_model)                      # any nnsight model: capture, doctor and analyses as ever
with language_model.trace("Two and two is"):
    site = ns.routed(language_model, model, layer=3)
    logits = site.logits.save()                      # [T, E], then ids and weights [T, k], in the router's own order
    ids, weights = site.ids.save(), site.weights.save()
    site.scale(expert=7, factor=0.0)                 # what is computed from here on is without expert 7
    outputs = site.expert_outputs.save()             # [T, k, D], each expert's own, before its weight
    answer = language_model.output.save()
with model.edited(recipe), language_model.trace("Two and two is"):
    answer = language_model.output.save()            # every edit that a plain model takes
```

Inside a trace values can be had in the order in which the model makes them: logits, then ids and weights, then sums.

A model that was never loaded here has the same names in traces that run on a server: `routed` needs its architecture
alone, and what it gives travels with the trace.

```python
site = ns.routed(language_model, layer=3)            # no weights needed
with language_model.trace("Two and two is", remote=True):
    ids, outputs = site.ids.save(), site.expert_outputs.save()
```

Needs `pip install 'moescope[nnsight]'`.
"""

from __future__ import annotations

from typing import Any

import torch

from moescope.errors import MoescopeError, RefusedError
from moescope.hooks.model import Model
from moescope.hooks.routed import Routed
from moescope.hooks.sites import discover

try:
    import nnsight
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
        RefusedError: it has no MoE layer, cannot be read faithfully, or its weights are elsewhere.
    """
    if trace_options.get("remote", "local") != "local":  # "local" is nnsight's rehearsal of a remote run, made here
        raise RefusedError(
            "A server gives back what a trace names, and reads no model with hooks of ours: the self-check cannot be "
            "made there. Name what you want in a trace of your own: `routed(model, layer=…)` works with remote=True."
        )
    tokenizer = vars(envoy).get("tokenizer") if tokenizer is None else tokenizer
    module = envoy._module
    if next(module.parameters()).is_meta:
        raise RefusedError("This nnsight model has not loaded its weights; call its dispatch() first.")
    config = getattr(module, "config", None)
    return TracedModel(
        envoy, tokenizer, name or getattr(config, "_name_or_path", "") or type(module).__name__, **trace_options
    )


def routed(envoy: Any, model: Model | None = None, layer: int | str = 0) -> Routed:
    """Names for one MoE layer (or site key) inside a trace of ``envoy``, made inside or outside of it.

    Args:
        envoy: the nnsight model; its weights need not be here.
        model: from `wrap`, where it is; without it the layers are found from the architecture, unchecked.
        layer: number of the layer, or site key.

    Raises:
        MoescopeError: no such layer.
        RefusedError: this architecture has no MoE layer that could be named.
    """
    nnsight.register("moescope")  # a server has no such package: what a trace needs of it is sent along
    sites = discover(envoy._module) if model is None else model.sites
    found = [site for site in sites if layer in (site.key, site.layer)]
    if len(found) != 1:
        raise MoescopeError(f"No single MoE layer {layer!r}; there are {', '.join(site.key for site in sites)}.")
    return Routed(envoy, found[0], None if model is None else model.semantics[found[0].key].top_k)
