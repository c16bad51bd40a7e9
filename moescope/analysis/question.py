"""What a face must know of an analysis: its question, its keywords, its figure; each module declares its own."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import xarray as xr


@dataclass(frozen=True)
class Parameter:
    """One keyword of an analysis, as an option of a command line or a control of an app.

    Attributes:
        name: the keyword.
        type: int, float, str or bool; the type of one value.
        default: its default; None means the analysis chooses.
        help: one line.
        choices: the allowed values, if they are few.
        many: the keyword takes a list of values.
    """

    name: str
    type: type
    default: Any
    help: str
    choices: tuple[str, ...] = ()
    many: bool = False


@dataclass(frozen=True)
class Analysis:
    """One analysis: `run(*inputs, **parameters)` gives a labelled result, `moescope.figures.draw(result)` its figure.

    Attributes:
        name: as on the command line and in `result.attrs["analysis"]`.
        run: the public function on what `inputs` names.
        figure: the function of `moescope.figures` that draws its result.
        help: one line: the question it answers.
        parameters: its keywords.
        tier: the store tier it needs; "none" if it reads no store.
        inputs: what `run` takes by position: "store", "other" (a second store of the same tokens), "stores" (a
            sequence of them, in order) or "weights" (each layer's expert weights, as `moescope.hooks.weights` gives).
    """

    name: str
    run: Callable[..., xr.Dataset]
    figure: str
    help: str
    parameters: tuple[Parameter, ...]
    tier: str
    inputs: tuple[str, ...] = ("store",)

    @property
    def reading(self) -> str:
        """How to read the answer, in the words of the function's docstring; "" if it does not say."""
        words = inspect.getdoc(self.run) or ""
        return " ".join(words.partition("How to read it:")[2].strip().split("\n\n")[0].split())

    @property
    def filters(self) -> bool:
        """It can count some documents only: `run` takes `where`."""
        return "where" in inspect.signature(self.run).parameters


SEED = Parameter("seed", int, 0, "seed of the random draws behind the null")
LAYERS = Parameter("layers", int, None, "model layer indices to look at (default: all MoE layers)", many=True)
PHASE = Parameter("phase", str, None, "only tokens of this phase (default: both)", ("prefill", "decode"))
RESAMPLES = Parameter("resamples", int, 500, "documents drawn again for the intervals; 0 for none")
