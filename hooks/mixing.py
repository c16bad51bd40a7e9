"""The routing that the experts were really handed: recorded, and mixed anew with weights that can be differentiated.

Both stand at the call ``experts(hidden, ids [T, k], weights [T, k])``, so they need families that make it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from moescope.errors import RefusedError
from moescope.hooks.call_reader import experts_arguments
from moescope.hooks.facts import Undo
from moescope.hooks.sites import Site

if TYPE_CHECKING:
    from moescope.hooks.model import Model


@dataclass(frozen=True)
class Routed:
    """What one site's experts were handed in one pass.

    Attributes:
        ids: [T, k] experts, in the block's own order.
        weights: [T, k] theirs.
    """

    ids: torch.Tensor
    weights: torch.Tensor

    def dense(self, n_experts: int) -> torch.Tensor:
        """[T, E] weights in float32 (float64 if they are), 0 where an expert was not selected."""
        values = self.weights if self.weights.dtype == torch.float64 else self.weights.float()
        return values.new_zeros(len(self.ids), n_experts).scatter_add(-1, self.ids, values)


def called_sites(model: Model) -> list[Site]:
    """The sites of a model, each of whose experts is handed ids and weights.

    Raises:
        RefusedError: a site's experts are not.
    """
    for site in model.sites:
        if site.reader != "call":
            raise RefusedError(f"{site.experts} is never handed ids and weights; its routing cannot be given to it.")
    return model.sites


class Recording:
    """``with Recording(model) as seen:`` keeps the routing of the last pass: `seen.routed`, by site key."""

    def __init__(self, model: Model) -> None:
        self._model = model
        self._undo: list[Undo] = []
        self.routed: dict[str, Routed] = {}

    def __enter__(self) -> Recording:
        for site in called_sites(self._model):
            module = self._model.hf.get_submodule(site.experts)
            self._undo.append(module.register_forward_pre_hook(self._keep(site.key), with_kwargs=True).remove)
        return self

    def __exit__(self, *exc: object) -> None:
        while self._undo:
            self._undo.pop()()

    def _keep(self, key: str) -> Any:
        def before(module: Any, args: Any, kwargs: Any) -> None:
            _, ids, weights = experts_arguments(module, args, kwargs)
            self.routed[key] = Routed(ids.detach().clone(), weights.detach().clone())

        return before


class Mixing:
    """Lets chosen rows have the output ``sum_e w[e] f_e(x)`` over *all* experts, for weights that may need a gradient.

    The experts module is called once more for these rows alone, with one slot for every expert, so that an expert of
    weight 0 has a gradient too; all other rows keep their output to the bit.

    Args:
        model: the model.
        mixtures: site key -> (rows [n] of the flattened batch, weights [n, E]); tensors may be replaced between passes.
    """

    def __init__(self, model: Model, mixtures: Mapping[str, tuple[torch.Tensor, torch.Tensor]]) -> None:
        self._model, self._mixtures = model, mixtures
        self._undo: list[Undo] = []

    def __enter__(self) -> Mixing:
        for site in called_sites(self._model):
            if site.key in self._mixtures:
                module = self._model.hf.get_submodule(site.experts)
                self._undo.append(module.register_forward_hook(self._mix(site), with_kwargs=True).remove)
        return self

    def __exit__(self, *exc: object) -> None:
        while self._undo:
            self._undo.pop()()

    def _mix(self, site: Site) -> Any:
        def after(module: Any, args: Any, kwargs: Any, output: Any) -> Any:
            hidden, _, weights = experts_arguments(module, args, kwargs)
            rows, mixture = self._mixtures[site.key]
            flat = hidden.reshape(-1, hidden.shape[-1])
            ids = torch.arange(site.n_experts, device=rows.device).expand(len(rows), -1)
            mixed = type(module).forward(module, flat[rows], ids, mixture.to(weights.dtype))
            whole = output.reshape(-1, output.shape[-1]).index_put((rows,), mixed.reshape(len(rows), -1))
            return whole.view(output.shape)

        return after
