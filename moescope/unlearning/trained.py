"""The tensors that train: copies of parts of a model's parameters, with gradients and optimiser state of their own.

The model computes with its own parameters, so that nothing about its forward changes. A part's gradient is moved out as
soon as it is complete; that of one expert of a fused layer is made for its place alone (see `slices`). What the
optimiser makes of a copy is written back into its part.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from moescope.errors import RefusedError
from moescope.hooks.parts import Part, parameter_of
from moescope.unlearning.slices import Fused, Slices

if TYPE_CHECKING:
    from collections.abc import Callable


class Trained:
    """Parts of a model's parameters as tensors of their own, while the block lasts; afterwards the model is as before.

    Args:
        hf: the model.
        parts: what trains.
        experts: paths of modules whose fused parameters get gradients for the parts alone; those of others for the
            whole parameter, for a moment.

    Attributes:
        leaves: what the optimiser sees, by part: float32 copies (float64 of float64), with the gradients.
        frozen: what was there on entering, by part.
    """

    def __init__(self, hf: nn.Module, parts: Sequence[Part], experts: Iterable[str] = ()) -> None:
        self._hf, self._experts = hf, list(dict.fromkeys(experts))
        self._parts = {str(part): (part, parameter_of(hf, part.path)) for part in parts}
        odd = next((part for part, p in self._parts.values() if not p.is_floating_point()), None)
        if odd is not None:
            raise RefusedError(f"{odd.path} is quantised; it cannot be trained.")
        self.leaves: dict[str, nn.Parameter] = {}
        self.frozen: dict[str, torch.Tensor] = {}
        self._open = ExitStack()

    def __enter__(self) -> Trained:
        self._flags = [(parameter, parameter.requires_grad) for parameter in self._hf.parameters()]
        for parameter, _ in self._flags:
            parameter.requires_grad_(False)
        by_parameter: dict[int, list[str]] = {}
        for name, (part, parameter) in self._parts.items():
            here = part.of(parameter.detach())
            self.frozen[name] = here.clone()
            wide = torch.float64 if here.dtype == torch.float64 else torch.float32
            self.leaves[name] = nn.Parameter(here.to(wide, copy=True))
            by_parameter.setdefault(id(parameter), []).append(name)
        for names in by_parameter.values():
            parameter = self._parts[names[0]][1]
            parameter.requires_grad_(True)
            self._open.callback(parameter.register_post_accumulate_grad_hook(self._gathering(names)).remove)
        for path in self._experts:
            module = self._hf.get_submodule(path)
            fused = [
                Fused(parameter, {name: self._parts[name][0] for name in names}, self._gather)
                for parameter in module.parameters()
                if (names := by_parameter.get(id(parameter), [])) and self._parts[names[0]][0].first is not None
            ]
            if fused:
                self._open.enter_context(Slices(module, fused))
        return self

    def __exit__(self, *exc: object) -> None:
        self._open.close()
        self._put(self.frozen)
        for parameter, flag in self._flags:
            parameter.grad = None
            parameter.requires_grad_(flag)

    def _gathering(self, names: list[str]) -> Callable[[torch.Tensor], None]:
        def gather(parameter: torch.Tensor) -> None:
            assert parameter.grad is not None
            for name in names:
                self._gather(name, self._parts[name][0].of(parameter.grad))
            parameter.grad = None

        return gather

    def _gather(self, name: str, gradient: torch.Tensor) -> None:
        leaf = self.leaves[name]
        new = gradient.to(leaf.dtype, copy=True)
        leaf.grad = new if leaf.grad is None else leaf.grad.add_(new)

    def complete(self) -> None:
        """Before a step: a part that no token of it met has gradient zero, whichever way its layer is built."""
        for leaf in self.leaves.values():
            if leaf.grad is None:
                leaf.grad = torch.zeros_like(leaf)

    def _put(self, tensors: dict[str, Any]) -> None:
        with torch.no_grad():
            for name, new in tensors.items():
                part, parameter = self._parts[name]
                part.of(parameter).copy_(new)
        torch.clear_autocast_cache()  # under autocast it holds roundings of what was there before

    def write_back(self) -> None:
        """Let the model compute with the copies as they are now, rounded to its own precision."""
        self._put(self.leaves)

    @contextmanager
    def frozen_copy(self) -> Iterator[None]:
        """The model as it was on entering, for a forward pass without gradients."""
        self._put(self.frozen)
        try:
            with torch.no_grad():
                yield
        finally:
            self.write_back()

    def tensors(self, dtype: torch.dtype | None = None) -> dict[str, torch.Tensor]:
        """The parts as they are now, in the model's precision, or rounded to another one first."""
        found = {}
        for name, leaf in self.leaves.items():
            own = self._parts[name][1].dtype
            found[name] = leaf.detach().to(own) if dtype is None else leaf.detach().to(dtype).to(own)
        return found

    @property
    def n_parameters(self) -> int:
        """Numbers that train."""
        return sum(leaf.numel() for leaf in self.leaves.values())
