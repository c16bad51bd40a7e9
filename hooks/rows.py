"""Which rows of a forward pass an act touches: settled anew in every pass, and once for all sites of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import torch

from moescope.errors import MoescopeError, RefusedError


@dataclass(frozen=True)
class Where:
    """Which rows an act touches; what is None does not restrict.

    Attributes:
        batch: rows of the batch.
        positions: (first, end) positions in a sequence, pads not counted; negative numbers are not allowed.
        phase: "prefill" (no key-value cache yet) or "decode".
        marked: bool [batch, length]: tokens marked one by one, for passes of just this shape.
    """

    batch: tuple[int, ...] | None = None
    positions: tuple[int, int] | None = None
    phase: Literal["prefill", "decode"] | None = None
    marked: torch.Tensor | None = field(default=None, repr=False)

    @property
    def everywhere(self) -> bool:
        return self.batch is None and self.positions is None and self.phase is None and self.marked is None

    def __str__(self) -> str:
        parts = {"batch": self.batch, "positions": self.positions, "phase": self.phase}
        said = [f"{name} {value}" for name, value in parts.items() if value is not None]
        if self.marked is not None:
            said.append(f"{int(self.marked.sum())} marked tokens")
        return ", ".join(said)


EVERYWHERE = Where()


class TouchedRows:
    """What is known of the rows of the forward pass that runs now."""

    def __init__(self) -> None:
        self._shape = (0, 0)
        self._positions: torch.Tensor | None = None
        self._phase = "prefill"
        self._found: dict[tuple[Any, ...], torch.Tensor] = {}

    def see(self, module: Any, args: Any, kwargs: Any) -> None:
        """Before the model's forward: what its arguments say of its rows."""
        ids = kwargs.get("input_ids", args[0] if args else None)
        given = ids if ids is not None else kwargs.get("inputs_embeds")
        if given is None:
            raise RefusedError("A forward pass without token ids has no rows that an edit could be placed in.")
        batch, length = given.shape[:2]
        cache = kwargs.get("cache", kwargs.get("past_key_values"))
        past = int(cache.get_seq_length()) if cache is not None and hasattr(cache, "get_seq_length") else 0
        mask = kwargs.get("attention_mask")
        if isinstance(mask, torch.Tensor) and mask.ndim == 2:
            positions = (mask.cumsum(-1) - 1)[:, -length:]
        else:
            positions = torch.arange(past, past + length, device=given.device).expand(batch, length)
        self._shape, self._positions = (batch, length), positions
        self._phase = "decode" if past else "prefill"
        self._found = {}

    def of(self, where: Where) -> Callable[[], torch.Tensor | None]:
        """What gives the touched rows, bool [T], of the pass that runs then; None where all are."""
        return (lambda: None) if where.everywhere else (lambda: self._touched(where))

    def none(self, where: Where) -> bool:
        """Whether it is plain, without looking at a tensor, that no row of the pass that runs now is touched."""
        gone = where.batch is not None and not any(row < self._shape[0] for row in where.batch)
        return gone or (where.phase is not None and where.phase != self._phase)

    def _touched(self, where: Where) -> torch.Tensor:
        key = (where.batch, where.positions, where.phase, None if where.marked is None else id(where.marked))
        if key not in self._found:
            self._found[key] = self._settled(where)
        return self._found[key]

    def _settled(self, where: Where) -> torch.Tensor:
        assert self._positions is not None, "no forward pass has begun"
        touched = torch.ones_like(self._positions, dtype=torch.bool)
        if where.phase is not None and where.phase != self._phase:
            touched &= False
        if where.positions is not None:
            touched &= (self._positions >= where.positions[0]) & (self._positions < where.positions[1])
        if where.batch is not None:
            rows = torch.zeros(self._shape[0], dtype=torch.bool, device=touched.device)
            rows[[row for row in where.batch if row < self._shape[0]]] = True
            touched &= rows.unsqueeze(-1)
        if where.marked is not None:
            if where.marked.shape != touched.shape:
                raise MoescopeError(
                    f"Tokens are marked for a batch of shape {tuple(where.marked.shape)}, and one of shape "
                    f"{self._shape} came."
                )
            touched &= where.marked.to(touched.device)
        return touched.flatten()
