"""Hidden states below the first layer that trains, computed once: nothing below it changes, whatever is trained above.

In a step the layers below hand on what they gave before. That this is the same model is seen on one batch of either set
before it is relied on; where it is not (layers that share state, or give more than hidden states) every layer runs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from moescope.hooks.sites import Site
from moescope.hooks.watching import override_forward
from moescope.unlearning.batching import Batch, batch_of, in_turn
from moescope.unlearning.examples import Tokens

if TYPE_CHECKING:
    from moescope.hooks import Model
    from moescope.hooks.facts import Undo

MOST_BYTES = 2**30  # of hidden states that are kept
TOGETHER = 32
SAME = 1e-4  # of the logits' largest magnitude: what another padding does to single precision


class Prefix:
    """While the block lasts, forward passes of known examples begin at the first trained layer.

    Args:
        model: the model.
        sites: whose layers train.
        sets: token ids by name.

    Attributes:
        active: whether hidden states are reused.
    """

    def __init__(self, model: Model, sites: Sequence[Site], sets: Mapping[str, Sequence[Tokens]]) -> None:
        self._model, self._sets = model, sets
        self._kept: dict[str, list[torch.Tensor]] = {}
        self._given: torch.Tensor | None = None
        self._undo: list[Undo] = []
        stacks = {site.layer_path.rpartition(".")[0] for site in model.sites}
        self._first = min(int(site.layer_path.rpartition(".")[2]) for site in sites)
        n = sum(len(one.ids) for tokens in sets.values() for one in tokens)
        small = n * model.hidden_size * torch.finfo(model.hf.dtype).bits // 8 <= MOST_BYTES
        self.active = len(stacks) == 1 and self._first > 0 and small and model.own_batch is None
        self._stack: Any = model.hf.get_submodule(stacks.pop())

    def __enter__(self) -> Prefix:
        if self.active:
            try:
                self._fill()
                self.active = bool(self._kept) and all(
                    self._is_the_same(name) for name in self._sets if self._sets[name]
                )
            finally:
                if not self.active:
                    self.__exit__()
        return self

    def __exit__(self, *exc: object) -> None:
        while self._undo:
            self._undo.pop()()
        self._kept = {}

    def logits(self, name: str, batch: Batch) -> torch.Tensor:
        """Logits of a batch of one of the sets, [row, position, word]."""
        if self.active:
            some = self._kept[name]
            given = some[batch.rows[0]].new_zeros(*batch.ids.shape, some[batch.rows[0]].shape[-1])
            for place, row in enumerate(batch.rows):
                given[place, : len(some[row])] = some[row]
            self._given = given
        try:
            return self._model.forward(batch.ids, batch.real.long())
        finally:
            self._given = None

    def _fill(self) -> None:
        seen: list[torch.Tensor] = []
        hook = self._stack[self._first - 1].register_forward_hook(_keeping(seen))
        try:
            with torch.no_grad():
                for name, tokens in self._sets.items():
                    rows: list[Any] = [None] * len(tokens)
                    for batch in in_turn(self._model, tokens, TOGETHER):
                        seen.clear()
                        self._model.forward(batch.ids, batch.real.long())
                        if len(seen) != 1 or seen[0].shape[:2] != batch.ids.shape:
                            self._kept = {}
                            return
                        for place, row in enumerate(batch.rows):
                            rows[row] = seen[0][place, : int(batch.real[place].sum())].clone()
                    self._kept[name] = rows
        finally:
            hook.remove()
        for number, layer in enumerate(self._stack[: self._first]):
            self._undo.append(override_forward(layer, self._instead(last=number == self._first - 1)))

    def _instead(self, *, last: bool) -> Callable[..., Any]:
        def run(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            if self._given is None:
                return original(*args, **kwargs)
            return self._given if last else args[0] if args else kwargs["hidden_states"]

        return run

    def _is_the_same(self, name: str) -> bool:
        tokens = self._sets[name]
        batch = batch_of(self._model, tokens, list(range(min(4, len(tokens)))))
        with torch.no_grad():
            whole = self._model.forward(batch.ids, batch.real.long())[batch.real]
            # State that layers share beside the hidden states would still be this batch's: put another's in its place.
            self._model.forward(batch.ids.roll(1, 1), batch.real.long())
            self.active = True
            again = self.logits(name, batch)[batch.real]
        return bool((whole - again).abs().max() <= SAME * whole.abs().max())


def _keeping(seen: list[torch.Tensor]) -> Callable[..., None]:
    def hook(module: nn.Module, args: Any, output: Any) -> None:
        if isinstance(output, torch.Tensor) and output.ndim == 3:
            seen.append(output.detach())

    return hook
