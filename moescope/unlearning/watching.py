"""What training looks at inside a forward pass, with its history: router scores and a layer's hidden states."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import checkpoint

from moescope.errors import RefusedError
from moescope.hooks.sites import Site
from moescope.hooks.watching import override_forward

if TYPE_CHECKING:
    from moescope.hooks import Model
    from moescope.hooks.facts import Undo


class _LastLinear(TorchFunctionMode):
    def __init__(self) -> None:
        super().__init__()
        self.last: torch.Tensor | None = None

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func is nn.functional.linear:
            self.last = result
        return result


class Watch:
    """Router scores of some sites and hidden states after some layers, of the forward pass that ran last.

    Args:
        model: the model.
        routers: sites whose scores are wanted.
        layers: sites whose decoder layer's output is wanted.

    Raises:
        RefusedError: a router whose scores are unproven; train without the anchor then.
    """

    def __init__(self, model: Model, routers: Sequence[Site], layers: Sequence[Site] = ()) -> None:
        self._model, self._routers, self._layers = model, routers, layers
        self._logits: dict[str, torch.Tensor] = {}
        self._hidden: dict[str, torch.Tensor] = {}
        self._undo: list[Undo] = []
        for site in routers:
            semantics = model.semantics[site.key]
            if semantics.score_function is None or semantics.logits_from == "none":
                raise RefusedError(
                    f"{site.key}: how this family's router makes its scores is unproven, so that it cannot be "
                    "anchored; set the anchor to 0."
                )

    def __enter__(self) -> Watch:
        for site in self._routers:
            self._undo.append(override_forward(self._model.hf.get_submodule(site.router), self._router(site)))
        for site in self._layers:
            layer = self._model.hf.get_submodule(site.layer_path)
            self._undo.append(layer.register_forward_hook(self._layer(site.key)).remove)
        return self

    def __exit__(self, *exc: object) -> None:
        while self._undo:
            self._undo.pop()()
        self.forget()

    def forget(self) -> None:
        """Before a forward pass: what a recomputation of activations sees later is not kept in its place."""
        self._logits, self._hidden = {}, {}

    def scores(self, key: str, real: torch.Tensor) -> torch.Tensor:
        """Router scores [tokens, E] of one site at the real tokens (bool [row, position]), with their history.

        Raises:
            RefusedError: the router did not run on one row for each position.
        """
        logits = self._logits.get(key)
        if logits is None or len(logits) != real.numel():
            raise RefusedError(f"{key}: its router did not run on every token of this batch; it cannot be anchored.")
        site = next(site for site in self._routers if site.key == key)
        semantics = self._model.semantics[key]
        if logits.dtype == torch.float64:  # `Semantics.scores` works in single precision
            from moescope.hooks.semantics import SCORES

            assert semantics.score_function is not None
            return SCORES[semantics.score_function](logits)[real.flatten()][:, : site.n_experts]
        scores = semantics.scores(logits)
        assert scores is not None
        return scores[real.flatten()][:, : site.n_experts]

    def hidden(self, key: str) -> torch.Tensor:
        """Hidden states [row, position, channel] after a site's decoder layer."""
        return self._hidden[key]

    def _router(self, site: Site) -> Callable[..., Any]:
        linear = self._model.semantics[site.key].logits_from == "linear"

        def run(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            with _LastLinear() as seen:
                output = original(*args, **kwargs)
            said = output
            if linear:
                said = seen.last
            elif isinstance(output, tuple):
                said = output[-1] if site.reader == "plan" else output[0]  # jetmoe gives its logits last
            if isinstance(said, torch.Tensor):
                self._logits.setdefault(site.key, said.reshape(-1, said.shape[-1]))
            return output

        return run

    def _layer(self, key: str) -> Callable[..., None]:
        def hook(module: Any, args: Any, output: Any) -> None:
            self._hidden.setdefault(key, output[0] if isinstance(output, tuple) else output)

        return hook


def checkpointing(hf: nn.Module, sites: Sequence[Site]) -> list[Undo]:
    """Let decoder layers forget their activations and compute them again for the gradient, from the first site's on."""
    undo: list[Undo] = []
    stacks: dict[str, int] = {}
    for site in sites:
        stack, _, number = site.layer_path.rpartition(".")
        stacks[stack] = min(stacks.get(stack, int(number)), int(number))
    for stack, first in stacks.items():
        for name, layer in hf.get_submodule(stack).named_children():
            if int(name) >= first:
                undo.append(override_forward(layer, _again))
    return undo


def _again(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    if not torch.is_grad_enabled():
        return original(*args, **kwargs)
    return checkpoint(original, *args, use_reentrant=False, **kwargs)
