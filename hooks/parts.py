"""The tensors of one expert, and of one router: whole parameters, or places along the first dimension of fused ones.

What belongs to a single expert is told by shape alone: experts that are modules of their own hold it whole; a fused
parameter has a place for each expert first (dbrx: as many rows for each). Norms and biases of all experts together
belong to none of them.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from moescope.errors import MoescopeError, RefusedError
from moescope.hooks.sites import Site, expert_modules, plain_path

if TYPE_CHECKING:
    from moescope.hooks.facts import Undo

DIGEST_VALUES = 4096  # of each tensor: enough to tell two trainings apart, and quick
PLACE = re.compile(r"^(?P<path>[^\[\]]+)(\[(?P<first>\d+)(:(?P<end>\d+))?\])?$")


@dataclass(frozen=True)
class Part:
    """A parameter, or some places along its first dimension.

    Attributes:
        path: of the parameter, as transformers names it.
        first, end: the places; None for all of it. Without ``end`` it is the one place ``first``, a dimension less.
    """

    path: str
    first: int | None = None
    end: int | None = None

    def __str__(self) -> str:
        """As in a file of tensors: ``path``, ``path[3]`` or ``path[96:192]``."""
        if self.first is None:
            return self.path
        return f"{self.path}[{self.first}{'' if self.end is None else f':{self.end}'}]"

    @classmethod
    def parse(cls, text: str) -> Part:
        """The part that a name in a file of tensors means.

        Raises:
            MoescopeError: it is no such name.
        """
        found = PLACE.match(text)
        if found is None:
            raise MoescopeError(f"{text!r} names no part of a parameter.")
        first, end = (None if found[name] is None else int(found[name]) for name in ("first", "end"))
        return cls(found["path"], first, end)

    def of(self, tensor: torch.Tensor) -> torch.Tensor:
        """This part of its parameter, as a view."""
        if self.first is None:
            return tensor
        return tensor[self.first] if self.end is None else tensor[self.first : self.end]


def expert_parts(hf: nn.Module, site: Site, expert: int) -> list[Part]:
    """What one expert alone computes with.

    Raises:
        MoescopeError: the layer has no such expert.
        RefusedError: its tensors cannot be told from the other experts', or cannot be trained (quantised).
    """
    if not 0 <= expert < site.n_experts:
        raise MoescopeError(f"Layer {site.layer} has experts 0 to {site.n_experts - 1}, no expert {expert}.")
    real = site.n_experts - site.zero_experts
    if expert >= real:
        raise RefusedError(f"Layer {site.layer}, expert {expert} computes nothing; it has no tensors.")
    if site.reader == "product keys":
        raise RefusedError(f"{site.block} finds its experts by product keys; one of them is a single neuron.")
    module = hf.get_submodule(site.experts)
    if site.reader == "modules":
        own = expert_modules(module)[expert]
        prefix = next(path for path, part in hf.named_modules() if part is own)
        found = [Part(f"{prefix}.{name}") for name, _ in own.named_parameters()]
    else:
        others = [f"{path}." for path in (site.router, *site.shared)]
        found = [
            part
            for name, parameter in module.named_parameters(prefix=site.experts)
            if not name.startswith(tuple(others)) and (part := _place(name, parameter, expert, real)) is not None
        ]
    if not found:
        raise RefusedError(f"{site.experts} ({type(module).__name__}) has no tensor with a place for each expert.")
    return _plain(hf, found)


def router_parts(hf: nn.Module, site: Site) -> list[Part]:
    """The parameters of a site's router."""
    router = hf.get_submodule(site.router)
    return _plain(hf, [Part(f"{site.router}.{name}") for name, _ in router.named_parameters()])


def parameter_of(hf: nn.Module, path: str) -> nn.Parameter:
    """A parameter by the path that transformers gives it.

    Raises:
        MoescopeError: the model has none such.
    """
    found = next((p for name, p in hf.named_parameters(remove_duplicate=False) if plain_path(name) == path), None)
    if found is None:
        raise MoescopeError(f"The model has no parameter {path}.")
    return found


def replace_parts(hf: nn.Module, tensors: Mapping[str, torch.Tensor]) -> list[Undo]:
    """Put tensors in the place of parts of parameters, by the parts' names; gives what puts the old bits back.

    Raises:
        MoescopeError: no such parameter, or of another shape; nothing is replaced then.
    """
    places = [(Part.parse(name).of(parameter_of(hf, Part.parse(name).path)), new) for name, new in tensors.items()]
    for name, (old, new) in zip(tensors, places, strict=True):
        if old.shape != new.shape:
            raise MoescopeError(f"{name} has the shape {tuple(old.shape)}, what replaces it {tuple(new.shape)}.")
    undo = []
    with torch.no_grad():
        for old, new in places:
            undo.append(_putting_back(old, old.detach().clone()))
            old.copy_(new)
    return undo


def digest_of(tensors: Mapping[str, torch.Tensor]) -> str:
    """blake2b-64 of evenly spaced numbers of some tensors, by name: what tells a kept run with others from this one."""
    digest = hashlib.blake2b(digest_size=8)
    for name, tensor in sorted(tensors.items()):
        values = tensor.detach().flatten()
        some = values[:: max(1, len(values) // DIGEST_VALUES)].double().cpu()
        digest.update(f"{name} {tuple(tensor.shape)}".encode() + some.numpy().tobytes())
    return digest.hexdigest()


def _putting_back(place: torch.Tensor, bits: torch.Tensor) -> Callable[[], None]:
    def undo() -> None:
        with torch.no_grad():
            place.copy_(bits)

    return undo


def _place(name: str, parameter: Any, expert: int, n_experts: int) -> Part | None:
    """The expert's place in a parameter of all experts, or None where it has none of its own."""
    rows = len(parameter) if parameter.ndim else 0
    if parameter.ndim < 2 or rows % n_experts:
        return None
    if not parameter.is_floating_point():
        raise RefusedError(f"{name} is stored as {parameter.dtype}; quantised experts cannot be trained or replaced.")
    if rows == n_experts:
        return Part(name, expert)
    return Part(name, expert * rows // n_experts, (expert + 1) * rows // n_experts)


def _plain(hf: nn.Module, parts: list[Part]) -> list[Part]:
    return [Part(plain_path(part.path), part.first, part.end) for part in parts]
