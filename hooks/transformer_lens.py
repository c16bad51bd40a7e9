"""TransformerLens as the way a model is run: capture from a bridge, and the names of its hook points for routing.

```python
from moescope.hooks import transformer_lens as tl

model = tl.wrap(bridge)                              # a TransformerBridge: capture, doctor and analyses as ever
points = tl.points(model)["L003"]                    # points.logits == "blocks.3.mlp.gate.hook_out", …
_, cache = bridge.run_with_cache(tokens, names_filter=tl.names(model))
store = ms.capture_cache(model, [ms.CachedRun(tokens, cache)], "runs/cached")
```

A bridge changes the model in place: its parts stand round the model's own, which run as before. So the model's own
parts are read, below the bridge's hooks, and whatever those hooks change in a router's ids and weights is captured.
``model.edited(recipe)`` edits it as it does any model.

TransformerLens 4.3 has bridges for 28 of the families that MoEscope captures. 26 give what the plain model gives, to
the bit; DeepSeek-V2 gives it but for rounding, by an attention of the bridge's own; granitemoehybrid does not run
without rotary embeddings. Booting a multimodal one asks the hub for its processor and, where that fails, installs
torchvision by itself. Needs `pip install 'moescope[transformer-lens]'`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from moescope.errors import RefusedError
from moescope.hooks.facts import Facts, Gather
from moescope.hooks.model import Model
from moescope.hooks.readers import READERS
from moescope.hooks.sites import WRAPPED, Site

try:
    from transformer_lens.model_bridge import TransformerBridge  # pyright: ignore[reportMissingImports]
except ImportError as error:
    raise ImportError("TransformerLens is not installed; pip install 'moescope[transformer-lens]'") from error


class BridgedModel(Model):
    """A model inside a TransformerBridge.

    Attributes:
        bridge: the TransformerBridge; hooks placed on it act while capturing.
    """

    def __init__(self, bridge: Any, tokenizer: Any, name: str) -> None:
        self.bridge = bridge
        super().__init__(bridge.original_model, tokenizer, name)


@dataclass(frozen=True)
class Points:
    """Names of the bridge's hook points at one site; None where none gives that, or gives something else.

    Attributes:
        logits: what the router says, [T, E].
        ids: the experts that run, [T, k], in the router's own order.
        weights: their routing weights, spread over all experts, [T, E].
    """

    logits: str | None
    ids: str | None
    weights: str | None


def wrap(bridge: Any, tokenizer: Any = None, name: str | None = None) -> BridgedModel:
    """Look into a model that is wrapped by TransformerLens.

    Args:
        bridge: a `TransformerBridge`, from `TransformerBridge.boot_transformers`.
        tokenizer: by default the bridge's own.
        name: by default the model's own.

    Raises:
        RefusedError: it is no such bridge, has no MoE layer, or cannot be read faithfully.
    """
    if not isinstance(bridge, TransformerBridge):
        raise RefusedError(
            f"{type(bridge).__name__} is not a TransformerBridge, so it has no modules here to hook; "
            "load the model with TransformerBridge.boot_transformers."
        )
    name = name or str(getattr(bridge.cfg, "model_name", "") or type(bridge.original_model).__name__)
    return BridgedModel(bridge, bridge.tokenizer if tokenizer is None else tokenizer, name)


def points(model: BridgedModel) -> dict[str, Points]:
    """The bridge's hook points for each site, by key.

    Each was watched over the self-check's batch, and is named only where it gave, to the bit, what the router said and
    what the experts were called with.
    """
    hooks = {site.key: _declared(model, site) for site in model.sites}
    cached: dict[str, torch.Tensor] = {}
    facts: dict[str, Facts] = {}

    def keep(value: Any, hook: Any) -> None:
        if isinstance(value, torch.Tensor):  # round a router (jamba's) that says several things a point gives a tuple
            cached[hook.name] = value.detach().clone()

    undo = []
    try:
        for site in model.sites:
            gather = Gather(output=True)
            top_k = model.semantics[site.key].top_k
            reader = READERS[site.reader](model.hf, site, gather, _keeper(facts, site.key), top_k)
            undo += reader.install()
        batch = model.check_batch()
        named = [(hook.name, keep) for found in hooks.values() for hook in found.values()]
        with torch.no_grad(), model.bridge.hooks(fwd_hooks=named):
            model.forward(batch, torch.ones_like(batch))
    finally:
        for remove in reversed(undo):
            remove()
    return {key: _agreeing(found, cached, facts[key]) for key, found in hooks.items()}


def proven_points(model: BridgedModel) -> dict[str, Points]:
    """`points`, where all of them tell.

    Raises:
        RefusedError: some layer has a hook point too few.
    """
    found = points(model)
    for site in model.sites:
        blind = [kind for kind, name in vars(found[site.key]).items() if name is None]
        semantics = model.semantics[site.key]
        if not blind and (semantics.can_miss or semantics.logits_from != "output"):
            blind = ["which slots are empty" if semantics.can_miss else "logits"]
        if blind:
            raise RefusedError(
                f"No hook point of this bridge gives the {blind[0]} of {site.key} as computed, so a cache cannot; "
                "capture from the bridge instead."
            )
    return found


def names(model: BridgedModel) -> list[str]:
    """The hook points that a cache must hold to become a store: the ``names_filter`` of ``run_with_cache``.

    Raises:
        RefusedError: some layer has a hook point too few.
    """
    return [str(name) for found in proven_points(model).values() for name in vars(found).values()]


def _keeper(facts: dict[str, Facts], key: str) -> Any:
    def keep(found: Facts) -> None:
        facts[key] = found

    return keep


def _declared(model: BridgedModel, site: Site) -> dict[str, Any]:
    """Hook points of the bridge's part that stands round a site's router, by what they ought to give."""
    if not site.router.endswith(WRAPPED):
        return {}
    part = model.hf.get_submodule(site.router.removesuffix(WRAPPED))
    names = {"logits": "hook_out", "ids": "hook_expert_indices", "weights": "hook_expert_weights"}
    found = {ours: getattr(part, theirs, None) for ours, theirs in names.items()}
    return {ours: hook for ours, hook in found.items() if getattr(hook, "name", None)}


def _agreeing(hooks: dict[str, Any], cached: dict[str, torch.Tensor], facts: Facts) -> Points:
    truth = {"logits": facts.output, "ids": facts.ids}
    if facts.output is not None:
        spread = facts.weights.new_zeros(facts.output.shape)
        truth["weights"] = spread.scatter(-1, facts.ids, facts.weights)

    def name(kind: str) -> str | None:
        seen = cached.get(hooks[kind].name) if kind in hooks else None
        true = truth.get(kind)
        if seen is None or true is None or seen.numel() != true.numel():
            return None
        return hooks[kind].name if torch.equal(seen.reshape(true.shape), true) else None

    return Points(name("logits"), name("ids"), name("weights"))
