"""Gradients of one expert's place in a fused parameter, without a gradient of the whole parameter.

Where all experts of a layer share a parameter, autograd makes a gradient of all of it to give one expert's. Here, while
the experts' module runs, the parameter has no history, and where the target's place of it is used, a view of that place
that does have one stands in: the same memory, so that the forward is the same to the bit. Activations that only the
other experts' gradients would need are not kept either. A parameter that is used in a way not known here falls back to
its whole gradient: slower and larger, never wrong.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from moescope.hooks.parts import Part
from moescope.hooks.watching import override_forward

Gather = Callable[[str, torch.Tensor], None]
GROUPED = ("grouped_mm", "_grouped_mm", "grouped_mm_fallback")  # torch 2.10 on, torch 2.9, and transformers' own loop


class _Unknown(Exception):
    """A parameter is used in a way whose gradient is not known here."""

    def __init__(self, fused: Fused) -> None:
        super().__init__()
        self.fused = fused


class Fused:
    """One parameter of all experts, and the places of it that train.

    Args:
        parameter: the whole.
        parts: places that train, by name.
        gather: takes a part's gradient.

    Attributes:
        sliced: whether the places alone get gradients.
    """

    def __init__(self, parameter: nn.Parameter, parts: Mapping[str, Part], gather: Gather) -> None:
        self.parameter, self.sliced, self._known = parameter, False, True
        self.places = [part.of(parameter.detach()).requires_grad_() for part in parts.values()]
        for name, place in zip(parts, self.places, strict=True):
            place.register_post_accumulate_grad_hook(_taking(name, gather))

    def begin(self) -> None:
        """Let the places alone have a history, unless that was found not to do."""
        if self._known and not self.sliced:
            self.sliced = True
            self.parameter.requires_grad_(False)

    def give_up(self) -> None:
        """Let the whole parameter have a history, from now on."""
        self._known = self.sliced = False
        self.parameter.requires_grad_(True)

    def holds(self, tensor: torch.Tensor) -> bool:
        """Whether a tensor is this parameter or a view of it, without a history."""
        if tensor.requires_grad or tensor.device != self.parameter.device or not tensor.numel():
            return False
        first, end = _span(tensor)
        start, stop = _span(self.parameter)
        return start <= first and end <= stop

    def touches(self, tensor: torch.Tensor) -> bool:
        """Whether a view of the parameter reaches into a place that trains."""
        first, end = _span(tensor)
        return any(first < stop and start < end for start, stop in map(_span, self.places))

    def instead(self, view: torch.Tensor) -> torch.Tensor:
        """A view of the parameter, or the place that trains where it is just that one."""
        for place in self.places:
            (first, end), (start, stop) = _span(view), _span(place)
            if (first, end) == (start, stop) and view.is_contiguous() and place.is_contiguous():
                return place.view(view.shape)
            within = first <= start and stop <= end
            if first < stop and start < end and not within:
                raise _Unknown(self)
        return view

    def grouped(self, args: Sequence[Any], kwargs: Mapping[str, Any], run: Callable[[], Any]) -> torch.Tensor:
        """A product of rows in groups, each group with an expert's matrix of its own."""
        given = dict(zip(("input", "weight", "offs"), args, strict=False)) | dict(kwargs)
        rows, weight, ends = given.pop("input", None), given.pop("weight", None), given.pop("offs", None)
        plain = all(isinstance(one, torch.Tensor) for one in (rows, weight, ends))
        if not plain or any(more is not None for more in given.values()) or (rows.ndim, weight.ndim) != (2, 3):
            raise _Unknown(self)
        edges = [0, *ends.tolist()]
        return self._multiplied(run(), rows, weight, [slice(*edges[e : e + 2]) for e in range(len(weight))])

    def batched(self, args: Sequence[Any], kwargs: Mapping[str, Any], run: Callable[[], Any]) -> torch.Tensor:
        """A product of all rows with every expert's matrix, [expert, row, …] (llama4)."""
        if kwargs or len(args) != 2 or not self.holds(args[1]):
            raise _Unknown(self)
        return self._multiplied(run(), args[0], args[1], range(len(args[1])))

    def _multiplied(self, out: Any, rows: Any, weight: Any, where: Sequence[slice | int]) -> torch.Tensor:
        """A product whose rows at `where[expert]` were multiplied by an expert's matrix."""
        of_expert = {_span(weight[expert]): expert for expert in range(len(weight))}
        for place in self.places:
            expert = of_expert.get(_span(place))
            if expert is None:
                raise _Unknown(self)
            own = weight[expert]
            turned = next((p for p in (place, place.mT) if (p.shape, p.stride()) == (own.shape, own.stride())), None)
            if turned is None:
                raise _Unknown(self)
            out = _Rows.apply(out, rows.detach()[where[expert]], turned, where[expert])
        return out


class Slices:
    """Lets fused parameters of one experts' module train in their places alone, while the block lasts.

    Args:
        module: whose forward uses the parameters.
        fused: those parameters.
    """

    def __init__(self, module: nn.Module, fused: Sequence[Fused]) -> None:
        self._module, self._fused = module, fused

    def __enter__(self) -> Slices:
        self._undo = override_forward(self._module, self._run)
        return self

    def __exit__(self, *exc: object) -> None:
        self._undo()

    def _run(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return original(*args, **kwargs)
        for one in self._fused:
            one.begin()
        while some := [one for one in self._fused if one.sliced]:
            try:
                with _Standing(some):
                    return original(*args, **kwargs)
            except _Unknown as unknown:
                unknown.fused.give_up()
        return original(*args, **kwargs)


class _Standing(TorchFunctionMode):
    def __init__(self, fused: Sequence[Fused]) -> None:
        super().__init__()
        self._fused = fused

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        given = [one for one in _flat((*args, *kwargs.values())) if isinstance(one, torch.Tensor)]
        using = [(fused, one) for fused in self._fused for one in given if fused.holds(one)]
        if not using:
            return func(*args, **kwargs)
        name = getattr(func, "__name__", "")
        if len(using) == 1 and (name in GROUPED or func is torch.bmm):
            product = using[0][0].batched if func is torch.bmm else using[0][0].grouped
            return product(args, kwargs, lambda: func(*args, **kwargs))
        result = func(*args, **kwargs)
        if isinstance(result, tuple | list):
            return type(result)(self._seen(one, using) for one in result)
        return self._seen(result, using)

    def _seen(self, result: Any, using: Sequence[tuple[Fused, torch.Tensor]]) -> Any:
        if not isinstance(result, torch.Tensor):
            return result
        for fused, one in using:
            if fused.holds(result):
                return fused.instead(result)
            if fused.touches(one):
                raise _Unknown(fused)
        return result


class _Rows(torch.autograd.Function):
    """Gives what it is given; a matrix that made some rows of it gets the gradient of those rows."""

    @staticmethod
    def forward(ctx: Any, out: Any, rows: Any, matrix: Any, where: slice | int) -> Any:
        ctx.save_for_backward(rows.clone())  # a view would keep all rows alive
        ctx.where = where
        ctx.mark_dirty(out)
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        (rows,), (gradient,) = ctx.saved_tensors, gradients
        return gradient, None, rows.mT @ gradient[ctx.where], None


def _taking(name: str, gather: Gather) -> Callable[[torch.Tensor], None]:
    def take(place: torch.Tensor) -> None:
        assert place.grad is not None
        gather(name, place.grad)
        place.grad = None

    return take


def _span(tensor: torch.Tensor) -> tuple[int, int]:
    """First byte and the byte after the last that a tensor reaches."""
    reach = sum((size - 1) * step for size, step in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.data_ptr(), tensor.data_ptr() + (reach + 1) * tensor.element_size()


def _flat(values: Sequence[Any]) -> list[Any]:
    return [one for value in values for one in (value if isinstance(value, tuple | list) else (value,))]
