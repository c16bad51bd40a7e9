"""Read what a router module says: its first output, and where asked its own last linear map."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from moescope.hooks.facts import Gather, Undo, flat
from moescope.hooks.watching import LinearWatch, override_forward


class RouterWatch:
    """Keeps a router's last words until the site takes them.

    Args:
        router: the router module.
        gather: whether its output, its linear map or both are wanted.
        pick: which part of its output holds the logits; by default the first item of a tuple, or the tensor itself.
    """

    def __init__(
        self, router: nn.Module, gather: Gather, pick: Callable[[Any], torch.Tensor | None] | None = None
    ) -> None:
        self._router, self._gather, self._pick = router, gather, pick or _first
        self._output: torch.Tensor | None = None
        self._linear: torch.Tensor | None = None

    def install(self) -> list[Undo]:
        """Place the hook that is needed; none where nothing is wanted."""
        if self._gather.linear:
            return [override_forward(self._router, self._run)]
        return [self._router.register_forward_hook(self._after).remove] if self._gather.output else []

    def take(self) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """The output and the linear map, [T, columns] each, of the pass that just went by."""
        words = self._output, self._linear
        self._output = self._linear = None
        return words

    def _run(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        with LinearWatch() as watch:
            output = original(*args, **kwargs)
        self._linear = None if watch.last is None else flat(watch.last)
        self._after(self._router, args, output)
        return output

    def _after(self, module: nn.Module, args: Any, output: Any) -> None:
        picked = self._pick(output)
        self._output = None if picked is None else flat(picked)


def _first(output: Any) -> torch.Tensor:
    return output[0] if isinstance(output, tuple) else output
