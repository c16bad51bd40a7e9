"""The settings of a run, checked before anything is loaded or trained."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from typing import Any, Literal, get_args

from moescope.errors import MoescopeError
from moescope.unlearning.objectives import Definition, Method

Scope = Literal["expert", "model"]
Precision = Literal["no", "bf16", "fp16"]
Retention = Literal["kl", "loss"]
RETAINS = ("gd", "npo", "rmu")


@dataclass(frozen=True)
class Settings:
    """How to unlearn. The defaults were tuned on the bundled model; a larger one wants a lower learning rate.

    Attributes:
        method: "ga" gradient ascent, "gd" gradient difference, "npo" against a frozen copy, "rmu" misdirection of
            hidden states. All but "ga" also keep the retain set.
        scope: "expert" trains the targets' tensors and their layers' routers; "model" everything, as a baseline.
        anchor: weight of the router anchor (alpha); 0 for none. Only with scope "expert".
        definition: of the anchor, "paper" summed over experts or "code" averaged.
        retain_weight: weight of the retain set's term.
        retention: what that term is for "gd" and "npo": "kl", the divergence from the frozen copy's predictions, or
            "loss", the retain set's own loss. "rmu" keeps hidden states.
        beta: of NPO.
        steering: RMU's c, in units of the forget set's mean hidden norm.
        steps: optimiser steps at most.
        batch, retain_batch: sequences of a step from either set.
        accumulate: parts in which a step's gradient is gathered.
        learning_rate: of AdamW, without weight decay.
        warmup: steps over which it rises; afterwards it falls by half a cosine to a tenth.
        max_length: tokens of a sequence.
        precision: "no", or "bf16" / "fp16" arithmetic under autocast.
        checkpointing: compute activations again instead of keeping them.
        check_every: steps between looks at the utility.
        tolerance: the utility holds while the held-out retain loss is within this share above what it was.
        patience: looks in a row at which it may not hold; then the run stops. 0 never stops.
        held_out: share of the retain set that is not trained on and tells the utility.
        seed: of batches and RMU's direction.
    """

    method: Method = "npo"
    scope: Scope = "expert"
    anchor: float = 0.5
    definition: Definition = "paper"
    retain_weight: float = 3.0
    retention: Retention = "kl"
    beta: float = 1.0
    steering: float = 4.0
    steps: int = 280
    batch: int = 10
    retain_batch: int = 24
    accumulate: int = 1
    learning_rate: float = 3e-3
    warmup: int = 5
    max_length: int = 512
    precision: Precision = "no"
    checkpointing: bool = False
    check_every: int = 20
    tolerance: float = 0.1
    patience: int = 0
    held_out: float = 0.1
    seed: int = 0

    def __post_init__(self) -> None:
        for name, allowed in (
            ("method", get_args(Method)), ("scope", get_args(Scope)), ("definition", get_args(Definition)),
            ("precision", get_args(Precision)), ("retention", get_args(Retention)),
        ):  # fmt: skip
            if getattr(self, name) not in allowed:
                raise MoescopeError(f"{name} is one of {', '.join(allowed)}, not {getattr(self, name)!r}.")
        for name in ("steps", "batch", "retain_batch", "accumulate", "max_length", "check_every"):
            if getattr(self, name) < 1:
                raise MoescopeError(f"{name} must be at least 1.")
        for name in ("anchor", "retain_weight", "tolerance", "patience", "warmup"):
            if getattr(self, name) < 0:
                raise MoescopeError(f"{name} cannot be negative.")
        for name in ("beta", "steering", "learning_rate"):
            if not getattr(self, name) > 0:
                raise MoescopeError(f"{name} must be above 0.")
        if not 0 <= self.held_out < 1:
            raise MoescopeError("held_out is a share of the retain set, at least 0 and below 1.")
        if self.accumulate > self.batch:
            raise MoescopeError(f"A batch of {self.batch} cannot be gathered in {self.accumulate} parts.")

    @property
    def anchors(self) -> bool:
        """Whether routers are anchored."""
        return self.anchor > 0 and self.scope == "expert"

    @property
    def retains(self) -> bool:
        """Whether the retain set has a term."""
        return self.method in RETAINS and self.retain_weight > 0

    def as_dict(self) -> dict[str, Any]:
        """Every setting by name."""
        return asdict(self)

    @classmethod
    def names(cls) -> list[str]:
        """Names of all settings."""
        return [field.name for field in fields(cls)]
