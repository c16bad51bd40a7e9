"""Read sites whose experts are separate modules: remote code, transformers 4 shapes, nllb_moe, switch_transformers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from moescope.errors import RefusedError
from moescope.hooks.facts import Facts, Gather, OnFacts, Reader, Undo, flat, measured
from moescope.hooks.routers import RouterWatch
from moescope.hooks.rowtracer import Ledger, TracedRows, tag, untag
from moescope.hooks.sites import Site, expert_modules


class ModuleReader(Reader):
    """Hooks on the block and on each expert; tokens, experts and weights are those that ran (`rowtracer`)."""

    def __init__(self, model: nn.Module, site: Site, gather: Gather, on_facts: OnFacts, top_k: int | None) -> None:
        super().__init__(model, site, gather, on_facts, top_k)
        # What such a router returns differs from model to model; its own linear map is what it scores with.
        wanted = replace(gather, linear=gather.linear or gather.output)
        self._words = RouterWatch(self.router, wanted, self._logits_of)
        self._shared = [model.get_submodule(path) for path in site.shared]
        self._hidden = torch.empty(0, 0)
        self._ledger = Ledger()
        self._beside: list[torch.Tensor] = []
        self._running: list[torch.Tensor] = []

    def install(self) -> list[Undo]:
        undo = [
            *self._words.install(),
            self.block.register_forward_pre_hook(self._before, with_kwargs=True).remove,
            self.block.register_forward_hook(self._after).remove,
        ]
        for number, expert in expert_modules(self.experts).items():
            undo.append(expert.register_forward_pre_hook(self._before_expert).remove)
            undo.append(expert.register_forward_hook(self._after_expert(number)).remove)
        if self.gather.returned:
            undo += [module.register_forward_hook(self._after_shared).remove for module in self._shared]
        return undo

    def _logits_of(self, output: Any) -> torch.Tensor | None:
        """The floating-point item of a router's output with one column for each expert, if there is just one."""
        items = output if isinstance(output, tuple) else (output,)
        scores = [item for item in items if isinstance(item, torch.Tensor) and item.is_floating_point()]
        scores = [item for item in scores if item.shape[-1] == self.site.n_experts]
        return scores[0] if len(scores) == 1 else None

    def _before(self, module: nn.Module, args: Any, kwargs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
        name = next(iter(kwargs), "") if not args else ""
        hidden = args[0] if args else kwargs[name]
        self._hidden, self._ledger, self._beside = flat(hidden), Ledger(), []
        tokens = torch.arange(len(self._hidden), device=hidden.device).view(hidden.shape[:-1])
        traced = tag(hidden, tokens, self._ledger, paired=False)
        return ((traced, *args[1:]), kwargs) if args else (args, {**kwargs, name: traced})

    def _before_expert(self, module: nn.Module, args: Any) -> tuple[Any, ...]:
        if not isinstance(args[0], TracedRows) or args[0].paired or (args[0].tags < 0).any():
            raise RefusedError(
                f"{self.site.experts} ({type(module).__name__}) is called with rows that cannot be followed from the "
                "block's input; which tokens they are is not known, so nothing is captured."
            )
        self._running.append(args[0].tags.reshape(-1))
        return (untag(args[0]), *args[1:])

    def _after_expert(self, number: int) -> Callable[..., torch.Tensor]:
        def hook(module: nn.Module, args: Any, output: torch.Tensor) -> torch.Tensor:
            return self._ledger.called(number, self._running.pop(), output)

        return hook

    def _after_shared(self, module: nn.Module, args: Any, output: Any) -> None:
        self._beside.append(flat(output))

    def _after(self, module: nn.Module, args: Any, output: Any) -> Any:
        ids, weights, missing, slots = self._by_slot()
        said, linear = self._words.take()
        if linear is not None and linear.shape[-1] >= self.site.n_experts:
            said = linear
        factors = self._ledger.factors
        if len(factors) > 1:
            raise RefusedError(f"{self.site.block} multiplies its experts' outputs by several factors: {factors}.")
        first = output[0] if isinstance(output, tuple) else output
        facts = Facts(self._hidden, ids, weights, missing, said, linear, slots, factor=next(iter(factors), 1.0))
        if self.gather.returned:
            facts.returned = self._routed_sum(flat(first))
        self.on_facts(facts)
        self._ledger = Ledger()
        if not isinstance(first, TracedRows):
            return None
        return (untag(first), *output[1:]) if isinstance(output, tuple) else untag(first)

    def _by_slot(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, dict[str, torch.Tensor]]:
        """The ledger's pairs as ids and weights [T, k], missing slots, and what is wanted of the outputs."""
        ledger, n, device = self._ledger, len(self._hidden), self._hidden.device
        if not ledger.n_pairs:
            raise RefusedError(f"No expert of {self.site.experts} ran in this forward pass.")
        tokens = torch.cat(ledger.tokens)
        counts = [len(part) for part in ledger.tokens]
        experts = torch.repeat_interleave(torch.tensor(ledger.experts), torch.tensor(counts)).to(device)
        weights = self._pair_weights(ledger)
        kept = _counted(tokens * self.site.n_experts + experts, weights)
        tokens, experts, weights = tokens[kept], experts[kept], weights[kept]
        order = tokens.argsort(stable=True)
        used = torch.bincount(tokens, minlength=n)
        k = max(int(used.max()), self.top_k or 0)
        if self.top_k is not None and k > self.top_k:
            raise RefusedError(f"{self.site.block} ran {k} experts for a token, where its check saw {self.top_k}.")
        place = torch.arange(len(order), device=device) - (used.cumsum(0) - used)[tokens[order]]
        at = tokens[order] * k + place
        ids = torch.zeros(n * k, dtype=torch.int64, device=device).index_put((at,), experts[order])
        routed = weights.new_zeros(n * k).index_put((at,), weights[order])
        missing = torch.ones(n * k, dtype=torch.bool, device=device).index_fill(0, at, False)
        slots = {}
        if self.gather.outputs:
            outputs = torch.cat([part.reshape(-1, part.shape[-1]) for part in ledger.outputs])[kept]
            for name, values in measured(outputs, self.gather).items():
                slots[name] = values.new_full((n * k, *values.shape[1:]), torch.nan)
                slots[name][at] = values[order]
        gone = missing.view(n, k) if bool(missing.any()) else None
        return ids.view(n, k), routed.view(n, k), gone, slots

    def _pair_weights(self, ledger: Ledger) -> torch.Tensor:
        """The weight of each pair [P]: every pair must have met exactly one."""
        pairs = torch.cat([part for part, _ in ledger.weights]) if ledger.weights else torch.empty(0)
        if len(pairs) != ledger.n_pairs or len(pairs.unique()) != ledger.n_pairs:
            raise RefusedError(
                f"{self.site.block} does not multiply each expert's output by one weight in a way that can be "
                "followed; it is not captured, rather than captured wrongly."
            )
        values = torch.cat([part for _, part in ledger.weights])
        return torch.empty_like(values).index_put((pairs,), values)

    def _routed_sum(self, whole: torch.Tensor) -> torch.Tensor:
        """The block's output without its shared experts, which may be gated by a sigmoid (Qwen2-MoE)."""
        gate = getattr(self.block, "shared_expert_gate", None)
        for shared in self._beside:
            scale = 1.0 if gate is None else torch.sigmoid(nn.functional.linear(self._hidden, gate.weight, gate.bias))
            whole = whole - scale * shared
        return whole


def _counted(pairs: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Which rows [P] count: all but those of weight zero among several of one (token, expert).

    nllb_moe calls expert 0 once for every expert that a token was *not* sent to first, all but one with weight zero.
    """
    _, pair, times = pairs.unique(return_inverse=True, return_counts=True)
    return ((times[pair] == 1) | (weights != 0)).nonzero().squeeze(-1)
