"""Attention sinks: the share of attention mass that each head of a layer puts on the first token (METHODS 4).

``sdpa`` gives no attention weights, and ``eager`` changes the numbers, so what runs is left as it is. The function that
transformers hands to its attention modules is wrapped; beside its call the softmax of the same queries, keys and mask
is worked out in float32, and its product with the values is compared with what the layer really returned. Where they
differ (a kernel, an argument or a mask that is not understood) the share is wrong too: ask `SinkShare.proven`.

Layers whose attention does not ask `ALL_ATTENTION_FUNCTIONS` (linear attention, Mamba, their own code), runs more than
once in a forward pass or past a cache, or does not use ``sdpa`` or ``eager``, have no share: they are absent.

Cost: one more attention without fused kernels, over the sequences asked for alone, `QUERIES_AT_ONCE` at a time.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

QUERIES_AT_ONCE = 256
READABLE = ("sdpa", "eager")
# Relative error of an attention output up to which it is rounding: a wrong mask, scale or sink gives 1e-1 and more.
ROUNDING = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}


@dataclass
class SinkShare:
    """One layer in one forward pass, H heads, on the model's device.

    Attributes:
        mass: attention on the first token of the query's sequence, summed over the queries [H] float32.
        queries: how many; every real token but the first of its sequence, which can see nothing else.
        error: distance of the recomputed attention output from the layer's own, relative to its norm; the share is
            true where this is rounding (about 1e-6 in float32, 1e-2 in bfloat16).
    """

    mass: torch.Tensor
    queries: torch.Tensor
    error: torch.Tensor

    def proven(self, dtype: torch.dtype) -> bool:
        """Whether the recomputed attention is the one that ran, but for rounding in ``dtype``; waits for the device."""
        return bool(self.error <= ROUNDING.get(dtype, 1e-4))


class SinkWatch:
    """Watches the self-attention of chosen layers while the model runs; changes nothing.

    Args:
        model: the transformers model.
        layers: path of each layer's module, by number.
    """

    def __init__(self, model: nn.Module, layers: Mapping[int, str]) -> None:
        self._owners = {
            id(module): number for number, path in layers.items() for module in model.get_submodule(path).modules()
        }
        self._mask: torch.Tensor | None = None
        self._shares: dict[int, SinkShare | None] = {}

    def __enter__(self) -> SinkWatch:
        choose = ALL_ATTENTION_FUNCTIONS.get_interface

        def get_interface(name: str, default: Callable[..., Any]) -> Callable[..., Any]:
            return self._beside(name, choose(name, default))

        # On the one instance that modelling files share, so that leaving the block is to take it away again.
        vars(ALL_ATTENTION_FUNCTIONS)["get_interface"] = get_interface
        return self

    def __exit__(self, *exc: object) -> None:
        del vars(ALL_ATTENTION_FUNCTIONS)["get_interface"]

    def begin(self, mask: torch.Tensor) -> None:
        """Start a forward pass of which the first sequences are looked at.

        Args:
            mask: attention mask [b, S] of those sequences (b <= B), 1 for real tokens; pads on either side.
        """
        self._mask, self._shares = mask.bool(), {}

    def take(self) -> dict[int, SinkShare]:
        """Shares by layer; layers that could not be read are absent."""
        shares, self._shares, self._mask = self._shares, {}, None
        return {number: share for number, share in shares.items() if share is not None}

    def _beside(self, name: str, attend: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(attend)
        def run(module: nn.Module, query: Any, key: Any, value: Any, attention_mask: Any, *args: Any, **kwargs: Any):
            result = attend(module, query, key, value, attention_mask, *args, **kwargs)
            number = self._owners.get(id(module))
            if number is not None and self._mask is not None and _of_tokens(self._mask, query, key, result[0]):
                seen = None
                if number not in self._shares and name in READABLE and not args:
                    with torch.no_grad():
                        seen = _share(self._mask, name, module, query, key, value, attention_mask, kwargs, result[0])
                self._shares[number] = seen
            return result

        return run


def _of_tokens(real: torch.Tensor, query: Any, key: Any, output: Any) -> bool:
    """Whether an attention is among the sequence's own tokens (inkling2 also attends over its residual blocks)."""
    b, length = real.shape
    return query.shape[2] == length == key.shape[2] and len(query) >= b and output.shape[1] == length


def _share(
    real: torch.Tensor,
    name: str,
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    kwargs: Mapping[str, Any],
    output: torch.Tensor,
) -> SinkShare | None:
    """The share, or None where the mask is of another shape."""
    b, length = real.shape
    if mask is not None and (mask.ndim != 4 or mask.shape[-1] != length):
        return None
    heads = query.shape[1]
    keys, values = (t[:b].float().repeat_interleave(heads // t.shape[1], 1) for t in (key, value))
    first = real.long().argmax(-1)
    counted = real.clone()
    counted[torch.arange(b, device=real.device), first] = False
    mass = torch.zeros(heads, device=query.device)
    missed, norm = torch.zeros((), device=query.device), torch.zeros((), device=query.device)
    for start in range(0, length, QUERIES_AT_ONCE):
        rows = slice(start, start + QUERIES_AT_ONCE)
        scores = _scores(name, module, query[:b, :, rows].float(), keys, mask, kwargs, rows, b)
        shares = scores.softmax(-1)[..., :length]
        mine = counted[:, None, rows]
        at = first[:, None, None, None].expand(b, heads, shares.shape[2], 1)
        mass += torch.where(mine, shares.gather(-1, at).squeeze(-1), 0).sum((0, 2))
        there = output[:b, rows].float().reshape(b, -1, heads, values.shape[-1]).transpose(1, 2)
        mine = mine.unsqueeze(-1)
        missed += torch.where(mine, shares @ values - there, 0).square().sum()
        norm += torch.where(mine, there, 0).square().sum()
    return SinkShare(mass, counted.sum(), (missed / norm.clamp_min(1e-30)).sqrt())


def _scores(
    name: str,
    module: nn.Module,
    query: torch.Tensor,
    keys: torch.Tensor,
    mask: torch.Tensor | None,
    kwargs: Mapping[str, Any],
    rows: slice,
    b: int,
) -> torch.Tensor:
    """What the softmax runs over, [b, H, rows, S], with one column more where a head has a sink of its own."""
    scaling = kwargs.get("scaling")
    scores = query @ keys.transpose(-1, -2) * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    if kwargs.get("softcap") is not None:
        scores = torch.tanh(scores / kwargs["softcap"]) * kwargs["softcap"]
    if kwargs.get("position_bias") is not None:
        scores = scores + kwargs["position_bias"][:b, :, rows].float()
    causal = kwargs.get("is_causal")
    causal = getattr(module, "is_causal", True) if causal is None else causal
    if mask is not None:
        part = mask[:b, :, rows]
        scores = scores.masked_fill(~part, -torch.inf) if part.dtype == torch.bool else scores + part.float()
    elif causal and name == "sdpa":
        n = keys.shape[2]
        later = torch.ones(n, n, dtype=torch.bool, device=scores.device).triu(1)[rows]
        scores = scores.masked_fill(later, -torch.inf)
    sink = kwargs.get("s_aux")
    if sink is not None and name == "eager":  # gpt_oss: one learned score for each head, which gives nothing
        column = sink.float().reshape(1, -1, 1, 1).expand(b, -1, scores.shape[2], 1)
        scores = torch.cat([scores, column], -1)
    if kwargs.get("sinks") is not None:  # inkling2: one for each head and query
        scores = torch.cat([scores, kwargs["sinks"][:b, :, rows].float()], -1)
    return scores
