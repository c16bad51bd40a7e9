"""Are super experts what the model stands on? They are zeroed, beside random ones: loss, attention sinks, massive
activations (METHODS 4).

Source: "Unveiling Super Experts in Mixture-of-Experts Large Language Models" (arXiv 2507.23279), which prunes them and
sees the attention sinks decay: D = 1 - mean over heads of (attention on the first token after / before).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal

import numpy as np
import torch
import xarray as xr

from moescope.capturing.corpus import Corpus
from moescope.capturing.run import decoder_layers
from moescope.edits import Recipe
from moescope.effects.losses import MAX_LENGTH, document_losses
from moescope.effects.recipes import beside_controls, matched
from moescope.errors import MoescopeError
from moescope.hooks import Model
from moescope.hooks.sinks import SinkWatch

Kind = Literal["zero", "mask"]
BATCH_TOKENS = 2048  # attention is worked out a second time, without fused kernels
SINKS = (
    "D = 1 - mean over heads of the attention on the first token with the edit, divided by that without it: 1 where "
    "the sink is gone, 0 where it is as before, below 0 where it grew; NaN in layers whose attention cannot be read"
)


def super_expert_effects(
    model: Model,
    corpus: Corpus,
    found: xr.Dataset,
    *,
    by: str | None = None,
    kind: Kind = "zero",
    controls: int = 20,
    max_length: int = MAX_LENGTH,
    seed: int = 0,
    on_progress: Callable[[int], None] | None = None,
) -> xr.Dataset:
    """Silences the super experts and, as a control, random experts of the same layers.

    How to read it: super experts are real where `change` (nats per token) lies far above the controls and `p` is small;
    they make the sinks where `decay` is near 1 in the layers after them and the controls' is near 0; they make the
    massive activations where `massive_after` falls and the controls' does not. The published rule names an expert in
    any model, so that none of this may hold.

    Args:
        model: a model with a tokenizer.
        corpus: labelled texts.
        found: from `analysis.super_experts`, of this model.
        by: a label; without one, all documents together.
        kind: "zero" (selected, its output dropped, as in the paper) or "mask" (others take its place).
        controls: random recipes, no two alike, so fewer where a layer has fewer others; 0 for none. p cannot be below
            1 / (1 + controls).
        max_length: tokens of context.
        seed: of controls and intervals.
        on_progress: called with the tokens done, of (2 + controls) x the corpus.

    Returns:
        What `effects.effect` gives by label; and with dims (model_layer): sink_before, sink_after (mean attention on
            the first token over heads and later tokens), decay = D, decay_p = (1 + controls with at least this decay) /
            (1 + controls), massive_before, massive_after (largest |residual| after the layer at a real token);
            (control, model_layer): decay_control, massive_control.

    Raises:
        MoescopeError: no super expert was found, another model's result, or too few other experts in a layer.
        RefusedError: this family's experts cannot be silenced so.
    """
    if found.attrs.get("model") not in (None, model.name):
        raise MoescopeError(f"These super experts are of {found.attrs['model']}, not of {model.name}.")
    recipe = Recipe.from_super_experts(found, kind)
    rng = np.random.default_rng(seed)
    others = _distinct(recipe, model, controls, rng)
    recipes, controls = [None, recipe, *others], len(others)
    watch = _Watch(model, len(recipes))
    losses = document_losses(
        model, corpus, recipes, max_length=max_length, batch_tokens=BATCH_TOKENS, beside=watch.around,
        on_progress=on_progress,
    )  # fmt: skip
    result = beside_controls(model, corpus, recipe, losses, by, rng, seed)
    decay, share = watch.decay(), watch.share()
    layer = "model_layer"
    reached = (decay[2:] >= decay[1] - 1e-12).sum(axis=0)
    p = (
        np.where(np.isnan(decay[1]), np.nan, (1 + reached) / (1 + controls))
        if controls
        else np.full(decay.shape[1], np.nan)
    )
    return result.assign(
        sink_before=(layer, share[0]), sink_after=(layer, share[1]), decay=(layer, decay[1]), decay_p=(layer, p),
        decay_control=(("control", layer), decay[2:]), massive_before=(layer, watch.massive[0]),
        massive_after=(layer, watch.massive[1]), massive_control=(("control", layer), watch.massive[2:]),
    ).assign_coords(model_layer=list(watch.layers)).assign_attrs(
        analysis="super_expert_effects", kind=kind, sinks=SINKS, sinks_unproven=watch.unproven,
        definition=str(found.attrs.get("definition", "none")),
    )  # fmt: skip


def _distinct(recipe: Recipe, model: Model, controls: int, rng: np.random.Generator) -> list[Recipe]:
    """Random controls that silence different experts each."""
    found: dict[str, Recipe] = {}
    for _ in range(50 * controls):  # where there are hardly more to be had, a few are enough
        if len(found) == controls:
            break
        other = matched(recipe, model, rng)
        said = sorted((str(edit.layer), sorted(getattr(edit, "expert", ()))) for edit in other.edits)
        found.setdefault(str(said), other)
    return list(found.values())


class _Watch:
    """Attention on the first token and the largest |residual| of every decoder layer, for each of n recipes."""

    def __init__(self, model: Model, n: int) -> None:
        self._model = model
        self.layers = decoder_layers(model)
        if not self.layers:
            raise MoescopeError(
                "This model has several stacks of layers with the same numbers; its sinks are ambiguous."
            )
        self._mass: list[dict[int, np.ndarray]] = [{} for _ in range(n)]
        self._queries: list[dict[int, int]] = [{} for _ in range(n)]
        self._wrong: set[int] = set()
        self.massive = np.full((n, len(self.layers)), np.nan)

    @property
    def unproven(self) -> int:
        """Layers whose attention was not the one that was worked out again."""
        return len(self._wrong)

    @contextmanager
    def around(self, place: int, mask: torch.Tensor) -> Iterator[None]:
        """Watches one forward pass of recipe `place`."""
        real, hf = mask.flatten().bool(), self._model.hf
        undo = [
            hf.get_submodule(path).register_forward_hook(self._largest(place, row, real)).remove
            for row, path in enumerate(self.layers.values())
        ]
        try:
            with SinkWatch(hf, self.layers) as watch:
                watch.begin(mask)
                yield
                shares = watch.take()
        finally:
            for remove in undo:
                remove()
        for layer, share in shares.items():
            if not share.proven(hf.dtype):
                self._wrong.add(layer)
                continue
            mass = share.mass.double().cpu().numpy()
            self._mass[place][layer] = self._mass[place].get(layer, 0) + mass
            self._queries[place][layer] = self._queries[place].get(layer, 0) + int(share.queries)

    def _largest(self, place: int, row: int, real: torch.Tensor) -> Callable[..., None]:
        def hook(module: Any, args: Any, output: Any) -> None:
            hidden = output[0] if isinstance(output, tuple) else output
            rows = hidden.reshape(len(real), -1)[real]
            self.massive[place, row] = np.fmax(self.massive[place, row], float(rows.abs().max()))

        return hook

    def share(self) -> np.ndarray:
        """[recipe, layer] mean attention on the first token."""
        found = np.full(self.massive.shape, np.nan)
        for row, layer in enumerate(self.layers):
            for place, mass in enumerate(self._mass):
                if layer in mass and layer not in self._wrong and self._queries[place][layer]:
                    found[place, row] = mass[layer].mean() / self._queries[place][layer]
        return found

    def decay(self) -> np.ndarray:
        """[recipe, layer] D against the first recipe; heads that never look at the first token are left out."""
        found = np.full(self.massive.shape, np.nan)
        for row, layer in enumerate(self.layers):
            before = self._mass[0].get(layer)
            if before is None or layer in self._wrong or not (before > 0).any():
                continue
            for place, mass in enumerate(self._mass):
                found[place, row] = 1 - (mass[layer][before > 0] / before[before > 0]).mean()
        return found
