"""Follow rows through a block whose experts are separate modules, to know whose they are without being told.

Such a block never hands ids or weights to anybody: it picks rows, calls an expert on them, multiplies and adds. The
block's input goes in as a tensor subclass that carries each row's token number through reshapes and gathers, so that
what an expert module is called with says which tokens it runs for. Its output comes back carrying a (token, expert)
pair for each row, and where it is multiplied by one number a row, that number is the routing weight. Ids and weights
are thus those that really ran, whatever the router meant. Every operation runs on the plain tensors: nothing changes.
"""

from __future__ import annotations

from typing import Any, cast

import torch

from moescope.errors import RefusedError

_T = torch.Tensor
_RESHAPES = {
    _T.reshape, _T.view, _T.flatten, _T.unsqueeze, _T.squeeze, torch.reshape, torch.flatten, torch.unsqueeze,
    torch.squeeze,
}  # fmt: skip
_PICKS = {
    _T.__getitem__, _T.index_select, torch.index_select, _T.repeat_interleave, torch.repeat_interleave, _T.repeat,
}  # fmt: skip
_CASTS = {
    _T.to, _T.type, _T.type_as, _T.float, _T.half, _T.bfloat16, _T.double, _T.contiguous, _T.clone, _T.detach,
}  # fmt: skip
_BLANKS = {torch.empty_like, torch.zeros_like}
_PRODUCTS = {_T.mul, _T.__mul__, _T.__rmul__, _T.mul_, _T.__imul__, torch.mul, torch.multiply}


class Ledger:
    """What ran in one pass through a block: a (token, expert) pair for each row of each expert's call."""

    def __init__(self) -> None:
        self.tokens: list[torch.Tensor] = []
        self.experts: list[int] = []
        self.outputs: list[torch.Tensor] = []
        self.weights: list[tuple[torch.Tensor, torch.Tensor]] = []
        self.factors: set[float] = set()
        self.n_pairs = 0

    def called(self, expert: int, tokens: torch.Tensor, output: torch.Tensor) -> TracedRows:
        """Enter an expert's call, rows [n] and outputs [n, D]; gives the output, tagged with its pairs."""
        first, self.n_pairs = self.n_pairs, self.n_pairs + len(tokens)
        self.tokens.append(tokens)
        self.experts.append(expert)
        self.outputs.append(output.detach())
        pairs = torch.arange(first, self.n_pairs, device=output.device)
        return tag(output, pairs.view(output.shape[:-1]), self, paired=True)

    def weighted(self, pairs: torch.Tensor, factor: Any) -> None:
        """Enter a product of outputs with pairs [...]: one number for each row is its weight, one alone a factor."""
        if not isinstance(factor, torch.Tensor):
            self.factors.add(float(factor))
        elif factor.shape[-1:] == (1,) and factor.ndim == pairs.ndim + 1:
            weights = factor.detach().squeeze(-1).expand(pairs.shape)
            self.weights.append((pairs.reshape(-1), weights.reshape(-1)))
        else:
            raise RefusedError(
                f"An expert's output is multiplied by a tensor of shape {tuple(factor.shape)}, which is not a weight "
                "for each of its rows; what that means is not known, so nothing is captured."
            )


class TracedRows(torch.Tensor):
    """Rows [..., D] that know whose they are: ``tags`` [...] are token numbers, or pairs of the ledger."""

    tags: torch.Tensor
    ledger: Ledger
    paired: bool

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        with torch._C.DisableTorchFunctionSubclass():
            traced = _first_traced(args)
            if traced is None:
                return func(*args, **kwargs)
            if func in _PRODUCTS and traced.paired and len(args) == 2:
                traced.ledger.weighted(traced.tags, args[1] if args[0] is traced else args[0])
            result = func(*args, **kwargs)
            if func is _T.__setitem__ and isinstance(args[0], TracedRows):
                _set(args[0], args[1], args[2])
            if not isinstance(result, torch.Tensor):
                return result
            tags = _follow(func, args, kwargs, traced, result)
            return result if tags is None else tag(result, tags, traced.ledger, traced.paired)


def tag(plain: torch.Tensor, tags: torch.Tensor, ledger: Ledger, paired: bool) -> TracedRows:
    """Rows [..., D] that carry ``tags`` [...]; the same memory, the same autograd history."""
    traced = cast(TracedRows, plain.as_subclass(TracedRows))
    traced.tags, traced.ledger, traced.paired = tags, ledger, paired
    return traced


def untag(rows: torch.Tensor) -> torch.Tensor:
    """The plain tensor again."""
    with torch._C.DisableTorchFunctionSubclass():
        return rows.as_subclass(torch.Tensor)


def _first_traced(args: tuple[Any, ...]) -> TracedRows | None:
    inside = [item for a in args for item in (a if isinstance(a, list | tuple) else (a,))]
    return next((a for a in inside if isinstance(a, TracedRows)), None)


def _follow(func: Any, args: Any, kwargs: Any, traced: TracedRows, result: torch.Tensor) -> torch.Tensor | None:
    """Tags of the result, or None where its rows are no longer rows of what came in."""
    if func in (torch.cat, torch.concat) and kwargs.get("dim", args[1] if len(args) > 1 else 0) == 0:
        parts = args[0]
        whole = all(isinstance(part, TracedRows) and part.paired == traced.paired for part in parts)
        return torch.cat([part.tags for part in parts]) if whole else None
    if args[0] is not traced and func not in _PRODUCTS:
        return None
    if func in _PRODUCTS:
        return traced.tags if traced.paired and result.shape == traced.shape else None
    if func in _BLANKS:
        return torch.full_like(traced.tags, -1)
    if func in _CASTS:
        return traced.tags if result.shape == traced.shape else None
    if func in _RESHAPES and result.shape[-1:] == traced.shape[-1:] and result.numel() == traced.numel():
        return traced.tags.reshape(result.shape[:-1])
    if func in _PICKS and result.shape[-1:] == traced.shape[-1:] and traced.tags.numel():
        # The same pick on a column of tags: right exactly if it leaves the last dimension alone.
        picked = _pick(func, traced.tags.unsqueeze(-1), args[1:], kwargs)
        return picked.squeeze(-1) if picked is not None and picked.shape[:-1] == result.shape[:-1] else None
    return None


def _pick(func: Any, tags: torch.Tensor, args: Any, kwargs: Any) -> torch.Tensor | None:
    picked = func(tags, *args, **kwargs)
    return picked if picked.shape[-1:] == (1,) else None


def _set(blank: TracedRows, index: Any, value: Any) -> None:
    """Rows written into an empty tensor bring their tags along; anything else leaves rows of nobody."""
    if isinstance(value, TracedRows):
        blank.tags[index] = value.tags
        blank.paired = value.paired
    else:
        blank.tags[index] = -1
