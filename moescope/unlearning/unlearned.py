"""What a run of unlearning left: a recipe to apply, the log of the run, and the tensors themselves."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
import xarray as xr

from moescope.edits import Recipe
from moescope.errors import MoescopeError
from moescope.hooks.parts import replace_parts
from moescope.unlearning.settings import Settings

if TYPE_CHECKING:
    from moescope.hooks import Model


@dataclass(frozen=True)
class Unlearned:
    """A finished run.

    Attributes:
        recipe: the replaced tensors as a recipe; None where the whole model was trained (a baseline, no edit).
        targets: (site key, expert) that were trained; all of them listed by the attribution's rank.
        settings: as it ran.
        log: one row for each step: the terms, and at each look the utility.
        stopped: why it ended, in words.
        n_trained, n_parameters: numbers that trained, of how many.
        tensors: by part, as the model holds them.
        attribution: how the targets were found; None where they were named.
    """

    recipe: Recipe | None
    targets: tuple[tuple[str, int], ...]
    settings: Settings
    log: list[dict[str, Any]]
    stopped: str
    n_trained: int
    n_parameters: int
    tensors: dict[str, torch.Tensor] = field(repr=False)
    attribution: xr.Dataset | None = field(repr=False, default=None)

    @contextmanager
    def live(self, model: Model) -> Iterator[Model]:
        """The model with what was unlearned, while the block lasts."""
        undo = replace_parts(model.hf, self.tensors)
        try:
            yield model
        finally:
            for back in reversed(undo):
                back()

    @property
    def share(self) -> float:
        """Share of the model's parameters that were trained."""
        return self.n_trained / self.n_parameters

    def require_recipe(self) -> Recipe:
        """The recipe.

        Raises:
            MoescopeError: the whole model was trained.
        """
        if self.recipe is None:
            raise MoescopeError("The whole model was trained: that is a baseline to compare with, not an edit to keep.")
        return self.recipe

    def progress(self) -> xr.Dataset:
        """The log as a result: dims (step), NaN where a step was not looked at."""
        names = sorted({name for row in self.log for name in row} - {"step"})
        return xr.Dataset(
            {name: ("step", [float(row.get(name, float("nan"))) for row in self.log]) for name in names},
            coords={"step": [int(row["step"]) for row in self.log]},
            attrs={
                "analysis": "unlearning_progress", "method": self.settings.method, "stopped": self.stopped,
                "targets": ", ".join(f"{key} expert {expert}" for key, expert in self.targets), "table": "step",
            },
        )  # fmt: skip
