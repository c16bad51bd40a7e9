"""Ways of looking into a module's forward that plain hooks do not offer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode


class LinearWatch(TorchFunctionMode):
    """Remembers the last linear map inside its scope: a router's own projection, before anything is done to it."""

    def __init__(self) -> None:
        super().__init__()
        self.last: torch.Tensor | None = None

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func is nn.functional.linear:
            self.last = result.detach()
        return result


def override_forward(module: nn.Module, run: Callable[..., Any]) -> Callable[[], None]:
    """Let ``run(original, *args, **kwargs)`` stand round a module's forward; gives the function that undoes it.

    Needed where a hook is too late or too early: only inside the forward can its own linear map be seen.
    """
    mine = "forward" in module.__dict__
    original = module.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        return run(original, *args, **kwargs)

    def undo() -> None:
        if mine:
            module.__dict__["forward"] = original
        else:
            del module.__dict__["forward"]

    # Not by assignment: a part of a TransformerLens bridge hands what is assigned on to what it stands round.
    module.__dict__["forward"] = forward
    return undo
