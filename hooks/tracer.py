"""Follow the routing weights through whatever experts implementation runs, to read each output where it is used.

Every experts implementation ends in one product: expert output times routing weight. The tracer hands the
implementation its own weights as a tensor subclass that carries, through each reshape and gather, the (token, slot) of
every weight. Where the product happens, the other factor *is* ``f_e(x)``, before the routing weight, and the tracer
knows whose it is. Nothing that is computed changes: every operation runs on the original tensors, so the model's output
stays bit-identical by construction, whatever the layout, activation, bias or kernel of the matrix products.

Cost: a few Python calls for each layer, one gather of int64 slot numbers, and what the observer does with the outputs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch

Observer = Callable[[torch.Tensor, torch.Tensor], None]
"""Called with expert outputs [rows, D] and their slot numbers [rows] (slot = token * k + position in the call)."""

_T = torch.Tensor
_MOVES = {
    _T.reshape, _T.view, _T.flatten, _T.unsqueeze, _T.squeeze, _T.transpose, _T.permute, _T.t, _T.__getitem__,
    _T.index_select, torch.index_select, torch.reshape, torch.flatten, torch.unsqueeze, torch.squeeze, torch.transpose,
}  # fmt: skip
_CASTS = {_T.to, _T.type_as, _T.float, _T.half, _T.bfloat16, _T.double, _T.contiguous, _T.clone, _T.detach}
_PRODUCTS = {_T.mul, _T.__mul__, _T.__rmul__, _T.mul_, _T.__imul__, torch.mul, torch.multiply}


class TracedWeights(torch.Tensor):
    """Routing weights that know which (token, slot) each of them belongs to. Behaves as the plain tensor elsewhere."""

    slots: torch.Tensor
    observe: Observer

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        traced = next((a for a in args if isinstance(a, TracedWeights)), None)
        if traced is not None and func in _PRODUCTS and len(args) == 2:
            _meet(args[1] if args[0] is traced else args[0], traced)  # before it runs: the product may be in place
        with torch._C.DisableTorchFunctionSubclass():
            result = func(*args, **kwargs)
        if traced is None or args[0] is not traced or not isinstance(result, torch.Tensor):
            return result
        if func in _MOVES:
            with torch._C.DisableTorchFunctionSubclass():
                return _wrap(result, func(traced.slots, *args[1:], **kwargs), traced.observe)
        return _wrap(result, traced.slots, traced.observe) if func in _CASTS else result


def trace_weights(weights: torch.Tensor, observe: Observer) -> TracedWeights:
    """Wrap routing weights so that ``observe`` sees the expert outputs they multiply.

    Args:
        weights: routing weights [T, k] as the block passes them to its experts.
        observe: called once or more, with outputs [rows, D] and slot numbers [rows]; together the calls cover every
            (token, slot) that was computed.
    """
    slots = torch.arange(weights.numel(), device=weights.device).view(weights.shape)
    return _wrap(weights, slots, observe)


def _wrap(plain: torch.Tensor, slots: torch.Tensor, observe: Observer) -> TracedWeights:
    traced = cast(TracedWeights, plain.as_subclass(TracedWeights))
    traced.slots, traced.observe = slots, observe
    return traced


def _meet(outputs: Any, traced: TracedWeights) -> None:
    slots = traced.slots
    per_row = slots.ndim >= 1 and slots.shape[-1] == 1
    if isinstance(outputs, torch.Tensor) and per_row and outputs.ndim == slots.ndim:
        rows = outputs.shape[:-1]
        if rows == slots.shape[:-1]:
            traced.observe(outputs.detach().reshape(-1, outputs.shape[-1]), slots.reshape(-1))
