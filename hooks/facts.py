"""What one site really did in one forward pass, before anything is ranked, summarised or thrown away.

A reader (one for each way in which MoE layers are built) gathers these facts from the model's own calls; the taps turn
them into readings and the self-check into a verdict, so that what is verified is what is stored.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

from moescope.hooks.readings import largest_magnitude

if TYPE_CHECKING:
    from torch import nn

    from moescope.hooks.sites import Site


@dataclass(frozen=True)
class Gather:
    """What a reader must gather beyond ids and weights.

    Attributes:
        output: the router's own first output (its logits, in most families).
        linear: the router's last linear map, where its output holds something else.
        magnitudes: norm and largest magnitude of each selected expert's output.
        vectors: those outputs themselves.
        neurons: what entered each selected expert's down projection.
        router_input: what entered the router.
        returned: the routed sum that the experts gave back, for the self-check.
    """

    output: bool = False
    linear: bool = False
    magnitudes: bool = False
    vectors: bool = False
    neurons: bool = False
    router_input: bool = False
    returned: bool = False

    @property
    def outputs(self) -> bool:
        """Whether expert outputs must be observed at all."""
        return self.magnitudes or self.vectors or self.neurons


@dataclass
class Facts:
    """One site in one forward pass: T rows, pads included; k slots in the block's own order.

    Attributes:
        hidden: what the experts were given, [T, D], before any weight.
        ids: experts that ran, [T, k] int64; anything where ``missing``.
        weights: the weights that multiplied them, [T, k].
        missing: True [T, k] where a slot chose no expert or its token was dropped; None where none can be.
        output: the router's logits or probabilities as it returned them, [T, columns].
        linear: the router's last linear map, [T, columns].
        slots: "norm" and "absmax" [T * k] float32, "vectors" [T * k, D] and "neurons" [T * k, I], as asked; NaN where
            nothing was computed.
        returned: the routed sum, [T, D].
        factor: one number by which the block multiplies each weighted output once more (nllb_moe: 1 - token dropout).
    """

    hidden: torch.Tensor
    ids: torch.Tensor
    weights: torch.Tensor
    missing: torch.Tensor | None = None
    output: torch.Tensor | None = None
    linear: torch.Tensor | None = None
    slots: dict[str, torch.Tensor] = field(default_factory=dict)
    returned: torch.Tensor | None = None
    factor: float = 1.0


OnFacts = Callable[[Facts], None]
Undo = Callable[[], None]


class Reader(ABC):
    """Hooks one site and gives its facts once for each forward pass.

    Args:
        model: the transformers model.
        site: the site.
        gather: what to gather.
        on_facts: called at the end of each pass through the site.
        top_k: slots for each token where known (after the self-check); a pass with fewer has missing slots.
    """

    weight_on = "output"
    """Whether the routing weight multiplies the expert's output or (llama4) its input."""

    def __init__(self, model: nn.Module, site: Site, gather: Gather, on_facts: OnFacts, top_k: int | None) -> None:
        self.site = site
        self.block = model.get_submodule(site.block)
        self.router = model.get_submodule(site.router)
        self.experts = model.get_submodule(site.experts)
        self.gather = gather
        self.on_facts = on_facts
        self.top_k = top_k

    @abstractmethod
    def install(self) -> list[Undo]:
        """Place the hooks; gives the functions that remove them."""


class Slots:
    """Expert outputs on their way to their slots: observed in whatever order the experts run."""

    def __init__(self, n_slots: int, gather: Gather) -> None:
        self._n_slots = n_slots
        self._gather = gather
        self.values: dict[str, torch.Tensor] = {}

    def put(self, outputs: torch.Tensor, slots: torch.Tensor) -> None:
        """Place what is wanted of some expert outputs [rows, D] at their slots [rows]."""
        for name, values in measured(outputs, self._gather).items():
            self.place(name, values, slots)

    def place(self, name: str, values: torch.Tensor, slots: torch.Tensor) -> None:
        """Place one kind of values [rows, ...] at their slots [rows]."""
        if name not in self.values:
            self.values[name] = values.new_full((self._n_slots, *values.shape[1:]), torch.nan)
        self.values[name][slots] = values


def measured(outputs: torch.Tensor, gather: Gather) -> dict[str, torch.Tensor]:
    """What is wanted of expert outputs [rows, D], by name."""
    parts: dict[str, torch.Tensor] = {}
    if gather.magnitudes:
        wide = torch.promote_types(outputs.dtype, torch.float32)  # float64 is not narrowed while it is summed
        parts["norm"] = torch.linalg.vector_norm(outputs, dim=-1, dtype=wide).float()
        parts["absmax"] = largest_magnitude(outputs).float()
    if gather.vectors:
        parts["vectors"] = outputs.detach()
    return parts


def flat(tensor: torch.Tensor) -> torch.Tensor:
    """Rows of a tensor [..., D] as [T, D], without its history."""
    return tensor.detach().reshape(-1, tensor.shape[-1])
