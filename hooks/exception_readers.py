"""Read the four blocks of transformers that follow no contract but their own; `sites.EXCEPTIONS` says which and why."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from moescope.errors import RefusedError
from moescope.hooks.facts import Facts, Gather, OnFacts, Reader, Slots, Undo, flat, measured
from moescope.hooks.routers import RouterWatch
from moescope.hooks.sites import Site
from moescope.hooks.watching import override_forward


class ScaledInputReader(Reader):
    """llama4: every expert runs on every token, on the input times its score; unselected scores are exactly zero.

    What is added is f(w x), not w f(x): outputs are those, and their coefficient is one.
    """

    weight_on = "input"

    def __init__(self, model: nn.Module, site: Site, gather: Gather, on_facts: OnFacts, top_k: int | None) -> None:
        super().__init__(model, site, gather, on_facts, top_k)
        self._words = RouterWatch(self.router, gather, lambda output: output[1])
        self._hidden = self._scores = torch.empty(0, 0)

    def install(self) -> list[Undo]:
        return [
            self.router.register_forward_hook(self._after_router).remove,
            *self._words.install(),
            self.experts.register_forward_hook(self._after).remove,
        ]

    def _after_router(self, module: nn.Module, args: Any, output: Any) -> None:
        self._hidden, self._scores = flat(args[0]), output[0].detach()

    def _after(self, module: nn.Module, args: Any, output: torch.Tensor) -> None:
        n, k = len(self._hidden), int(self.router.top_k)  # type: ignore[arg-type]
        weights, ids = self._scores.topk(k, dim=-1)
        by_expert = output.detach().view(self.site.n_experts, n, -1)
        tokens = torch.arange(n, device=ids.device).unsqueeze(-1).expand_as(ids)
        chosen = by_expert[ids.flatten(), tokens.flatten()] if self.gather.outputs else by_expert[:0, 0]
        said, linear = self._words.take()
        slots = measured(chosen, self.gather)
        facts = Facts(self._hidden, ids, weights, output=said, linear=linear, slots=slots)
        if self.gather.returned:
            facts.returned = by_expert.sum(0)
        self.on_facts(facts)


class PlanReader(Reader):
    """jetmoe: no experts module; the router returns a dispatch plan (slots sorted by expert, gates, counts, logits).

    Its attention is a second mixture of the same kind, whose `map` and `reduce` are plain methods: only its router and
    its `output_linear` run as modules, and the plan tells whose their rows are.
    """

    def __init__(self, model: nn.Module, site: Site, gather: Gather, on_facts: OnFacts, top_k: int | None) -> None:
        super().__init__(model, site, gather, on_facts, top_k)
        self._words = RouterWatch(self.router, gather, lambda output: output[4])
        self._plan: tuple[Any, ...] = ()
        self._hidden = torch.empty(0, 0)
        self._facts: Facts | None = None

    def install(self) -> list[Undo]:
        last = self.block.get_submodule("output_linear")
        undo = [
            self.router.register_forward_hook(self._after_router).remove,
            *self._words.install(),
            last.register_forward_hook(self._after_experts).remove,
        ]
        if self.gather.returned:  # the sum is the last thing that `reduce` or the block's forward does
            name = "reduce" if hasattr(self.block, "reduce") else "forward"
            undo.append(_override(self.block, name, self._after_sum))
        return undo

    def _after_router(self, module: nn.Module, args: Any, output: Any) -> None:
        self._hidden, self._plan = flat(args[0]), output

    def _after_experts(self, module: nn.Module, args: Any, output: torch.Tensor) -> None:
        order, _, gates, counts, _ = self._plan
        k = len(order) // len(self._hidden)
        sizes = torch.as_tensor(counts, device=order.device)
        experts = torch.repeat_interleave(torch.arange(self.site.n_experts, device=order.device), sizes)
        ids = torch.empty_like(order).index_put((order,), experts).view(-1, k)
        weights = torch.empty_like(gates).index_put((order,), gates).detach().view(-1, k)
        slots = Slots(len(order), self.gather)
        slots.put(output.detach(), order)
        said, linear = self._words.take()
        self._facts = Facts(self._hidden, ids, weights, output=said, linear=linear, slots=slots.values)
        if not self.gather.returned:
            self.on_facts(self._facts)

    def _after_sum(self, output: torch.Tensor) -> None:
        assert self._facts is not None, "the sum was made before its experts ran"
        self._facts.returned = flat(output - self.block.get_parameter("bias"))
        self.on_facts(self._facts)


class ProductKeyReader(Reader):
    """doge: experts are rows of two embeddings, f_e(x) = act(<down_e, x>) up_e, found by product keys.

    The embeddings are called with the ids; the product of activations and weights is where both are seen. The router's
    logits here are the n x n sums of its two halves, as the block adds them. The block mixes the halves of different
    tokens (kept upstream on purpose), so a token's experts depend on what else is in the batch.
    """

    def __init__(self, model: nn.Module, site: Site, gather: Gather, on_facts: OnFacts, top_k: int | None) -> None:
        super().__init__(model, site, gather, on_facts, top_k)
        self._ids = self._up = self._logits = self._shared = torch.empty(0)
        self._hidden = torch.empty(0, 0)
        self._product: _Product | None = None

    def install(self) -> list[Undo]:
        part = self.block.get_submodule
        return [
            self.block.register_forward_pre_hook(self._before).remove,
            self.router.register_forward_hook(self._after_router).remove,
            part("up_embed").register_forward_hook(self._after_up).remove,
            part("act_fn").register_forward_hook(self._after_activation).remove,
            part("down_proj").register_forward_hook(self._after_shared).remove,
            self.block.register_forward_hook(self._after).remove,
        ]

    def _before(self, module: nn.Module, args: Any) -> None:
        self._hidden, self._product = flat(args[0]), None

    def _after_router(self, module: nn.Module, args: Any, output: torch.Tensor) -> None:
        halves = output.detach().view(2, len(self._hidden), -1)
        self._logits = (halves[0].unsqueeze(-1) + halves[1].unsqueeze(-2)).flatten(1)

    def _after_up(self, module: nn.Module, args: Any, output: torch.Tensor) -> None:
        self._ids, self._up = args[0].detach(), output.detach()

    def _after_activation(self, module: nn.Module, args: Any, output: torch.Tensor) -> torch.Tensor | None:
        if self._product is not None:
            return None  # the second call is the shared expert's
        self._product = output.as_subclass(_Product)  # type: ignore[assignment]
        return self._product

    def _after_shared(self, module: nn.Module, args: Any, output: torch.Tensor) -> None:
        self._shared = flat(output)

    def _after(self, module: nn.Module, args: Any, output: Any) -> None:
        if self._product is None or self._product.weights is None:
            raise RefusedError(f"{self.site.block} does not multiply its activations by its weights where expected.")
        slots: dict[str, torch.Tensor] = {}
        if self.gather.outputs:
            activations = self._product.detach().as_subclass(torch.Tensor)
            slots = measured((activations.unsqueeze(-1) * self._up).flatten(0, 1), self.gather)
        facts = Facts(self._hidden, self._ids, self._product.weights, slots=slots)
        if self.gather.output or self.gather.linear:
            facts.output = self._logits
        if self.gather.returned:
            facts.returned = flat(output[0]) - self._shared
        self.on_facts(facts)


class _Product(torch.Tensor):
    """Activations that remember what they are multiplied by."""

    weights: torch.Tensor | None = None

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        with torch._C.DisableTorchFunctionSubclass():
            if func in (torch.Tensor.mul, torch.Tensor.__mul__, torch.mul) and isinstance(args[0], _Product):
                args[0].weights = args[1].detach().clone()
            return func(*args, **(kwargs or {}))


def _override(module: nn.Module, name: str, after: Any) -> Undo:
    """Call ``after(output)`` when a method has run."""
    if name == "forward":

        def run(original: Any, *args: Any, **kwargs: Any) -> Any:
            output = original(*args, **kwargs)
            after(output)
            return output

        return override_forward(module, run)
    original = getattr(module, name)

    def method(*args: Any, **kwargs: Any) -> Any:
        output = original(*args, **kwargs)
        after(output)
        return output

    module.__dict__[name] = method
    return lambda: module.__dict__.pop(name) and None
