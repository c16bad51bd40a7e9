"""Change what a router selects from, inside its own forward: its bias, groups and renormalisation run on the result.

The block throws the router's returned logits away, so editing those does nothing. What can be edited is the one linear
map with as many columns as the router has classes, the score function over them, and the scores that the selection
(`topk`, `argmax`, `sort`) looks at.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

LINEAR = {nn.functional.linear}
SCORES = {torch.sigmoid, torch.Tensor.sigmoid, nn.functional.sigmoid, torch.sqrt, torch.Tensor.sqrt}
SUMS = {
    torch.add, torch.Tensor.add, torch.Tensor.__add__, torch.Tensor.__radd__, torch.Tensor.add_, torch.Tensor.__iadd__,
}  # fmt: skip
PICKS = {torch.argmax, torch.Tensor.argmax, torch.max, torch.Tensor.max}  # one by one, as phimoe does
SELECTIONS = PICKS | {
    torch.topk, torch.Tensor.topk, torch.sort, torch.Tensor.sort, torch.argsort, torch.Tensor.argsort,
}  # fmt: skip
GONE = ("mask", "remove")
STEP = 1e-2  # by how much a promoted expert stands above the best, and a demoted one below the worst

Change = Callable[[torch.Tensor], torch.Tensor]
Rows = Callable[[], torch.Tensor | None]


@dataclass(frozen=True)
class Wish:
    """What is wanted of the selection at one site, in the rows that `rows` gives (None: all).

    Attributes:
        kind: "mask" (not selected; scores stay as they are where a selection bias can say so, else the logit is gone),
            "remove" (as if the expert were not there: its logit is gone), "promote", "demote", "logit" (multiply the
            logit) or "score" (multiply the score).
        experts: whose.
        factor: for the last two.
        rows: bool [T] at the time of the call, or None for every row.
    """

    kind: str
    experts: tuple[int, ...]
    factor: float = 1.0
    rows: Rows = lambda: None


class Choosing(TorchFunctionMode):
    """Lets wishes act on every tensor with one column for each class of a router, at the three stages.

    Args:
        wishes: in the order in which they act.
        columns: classes of the router (experts and skip classes).
        wider: rows of the router's own weight, where it scores more than its classes (inkling's shared experts, last).
        softmax: whether scores are a softmax, whose unnormalised scores are scaled through the logits.
        biased: whether a vector is added to the scores for the selection alone.
        acted: takes the stages that were met: "logits", "scores", "selection".
        scores: whether logits and scores are made in this scope; else only the selection is.
    """

    def __init__(
        self,
        wishes: list[Wish],
        columns: int,
        wider: int,
        softmax: bool,
        biased: bool,
        acted: set[str],
        *,
        scores: bool = True,
    ) -> None:
        super().__init__()
        self._linear, self._scores = (LINEAR, SCORES) if scores else (set(), set())
        self._wishes, self._columns, self._wider, self._softmax = wishes, columns, wider, softmax
        self._biased, self._acted = biased, acted

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in SELECTIONS and args and self._is_ours(args[0], self._columns):
            self._acted.add("selection")
            stage = _before_pick if func in PICKS else _before_selection
            return func(self._act(args[0], stage), *args[1:], **kwargs)
        result = func(*args, **kwargs)
        if func in self._linear and self._is_ours(result, self._columns, self._wider):
            self._acted.add("logits")
            return self._on_classes(result, self._on_logits)
        if func in self._scores and not self._softmax and self._is_ours(result, self._columns):
            self._acted.add("scores")
            return self._act(result, _on_scores)
        if func in SUMS and self._is_ours(result, self._columns):
            return self._act(result, _after_bias)
        return result

    def _is_ours(self, values: Any, *widths: int) -> bool:
        return isinstance(values, torch.Tensor) and values.is_floating_point() and values.shape[-1] in widths

    def _on_classes(self, values: torch.Tensor, stage: Callable[[Wish, torch.Tensor], torch.Tensor]) -> torch.Tensor:
        """Act on the first columns alone where there are more."""
        if values.shape[-1] == self._columns:
            return self._act(values, stage)
        classes = self._act(values[..., : self._columns], stage)
        return torch.cat([classes, values[..., self._columns :]], -1)

    def _act(self, values: torch.Tensor, stage: Callable[[Wish, torch.Tensor], torch.Tensor]) -> torch.Tensor:
        for wish in self._wishes:
            changed = stage(wish, values)
            rows = wish.rows()
            if changed is not values and rows is not None:
                changed = torch.where(rows.view(*values.shape[:-1], 1), changed, values)
            values = changed
        return values

    def _on_logits(self, wish: Wish, logits: torch.Tensor) -> torch.Tensor:
        if wish.kind == "logit":
            return _column(logits, wish.experts, lambda part: part * wish.factor)
        if wish.kind == "score" and self._softmax:
            shift = torch.log(torch.tensor(wish.factor, dtype=torch.float64)).item()
            return _column(logits, wish.experts, lambda part: part + shift)
        if wish.kind == "remove" or (wish.kind == "mask" and not self._biased):
            return _column(logits, wish.experts, lambda part: torch.full_like(part, -torch.inf))
        return _extreme(wish, logits)


def _on_scores(wish: Wish, scores: torch.Tensor) -> torch.Tensor:
    if wish.kind == "score":
        return _column(scores, wish.experts, lambda part: part * wish.factor)
    return scores


def _after_bias(wish: Wish, scores: torch.Tensor) -> torch.Tensor:
    """A masked expert must not count for its group by its bias alone."""
    if wish.kind in GONE:
        return _column(scores, wish.experts, lambda part: torch.full_like(part, -torch.inf))
    return scores


def _before_selection(wish: Wish, scores: torch.Tensor) -> torch.Tensor:
    """A bias added after the logits must not bring a masked expert back, or keep a promoted one out."""
    if wish.kind in GONE:
        # Experts of lost groups stand at -inf too; they come before a masked one where the kept groups run out.
        lowest = torch.finfo(scores.dtype).min
        return _column(scores.clamp_min(lowest), wish.experts, lambda part: torch.full_like(part, -torch.inf))
    return _extreme(wish, scores)


def _before_pick(wish: Wish, scores: torch.Tensor) -> torch.Tensor:
    """The same where experts are picked one by one: what was picked stands at -inf, and must not be picked again."""
    changed = _before_selection(wish, scores)
    return torch.where(scores == -torch.inf, scores, changed) if wish.kind == "promote" else changed


def _extreme(wish: Wish, values: torch.Tensor) -> torch.Tensor:
    """Promoted experts above the largest other value, demoted ones below the smallest finite one, if they are not."""
    if wish.kind not in ("promote", "demote"):
        return values
    sign = 1 if wish.kind == "promote" else -1
    others = _column(values * sign, wish.experts, lambda part: torch.full_like(part, -torch.inf))
    others = others.masked_fill(others == torch.inf, -torch.inf)  # demoting: lost groups stand below anyway
    edge = others.amax(-1, keepdim=True)

    def moved(part: torch.Tensor) -> torch.Tensor:
        return torch.where(part * sign > edge, part, sign * (edge + _step(edge)))

    return _column(values, wish.experts, moved)


def _step(values: torch.Tensor) -> torch.Tensor:
    """`STEP`, or what the dtype can still tell apart at that magnitude."""
    return (values.abs() * 4 * torch.finfo(values.dtype).eps).clamp_min(STEP)


def _column(values: torch.Tensor, experts: tuple[int, ...], change: Change) -> torch.Tensor:
    index = torch.tensor(experts, device=values.device)
    return values.index_copy(-1, index, change(values.index_select(-1, index)).to(values.dtype))
