"""Which rows of an expert's first map gate and which are linear, found by asking the gate function itself."""

from __future__ import annotations

from collections.abc import Callable

import torch

SMALL = 0.1
"""Reach of the numbers with which a gate function is asked: no published clamp is as narrow as twice that."""
STRAIGHTER = 4.0
"""How many times more curved in one argument than in the other a gate function must be to say which one gates."""

Function = Callable[[torch.Tensor], torch.Tensor]


def roles(
    phi: Function, n_rows: int, n_neurons: int, device: torch.device
) -> tuple[torch.Tensor | None, torch.Tensor] | str:
    """Which rows of the first map gate and which are linear, found by asking `phi`; a reason if it cannot be told."""
    plain = torch.arange(n_neurons, device=device)
    if n_rows == n_neurons:
        ours = _depends(phi, plain[None, :])
        return (None, plain) if ours else "its neurons do not stand for themselves between its projections"
    for pair in (torch.stack([plain, plain + n_neurons]), torch.stack([2 * plain, 2 * plain + 1])):
        if not _depends(phi, pair):
            continue
        curved = [_curvature(phi, pair, role) for role in (0, 1)]
        if max(curved) <= STRAIGHTER * min(curved):
            return "its gate function is as curved in one argument as in the other"
        gate = int(curved[1] > curved[0])
        return pair[gate], pair[1 - gate]
    return "its gate function pairs rows in no known order"


def _depends(phi: Function, pair: torch.Tensor) -> bool:
    """Does each neuron depend on its own pair of rows [role, neuron], and on no other?"""
    draw = torch.Generator().manual_seed(0)
    base, other = (SMALL * (2 * torch.rand(1, pair.numel(), generator=draw) - 1).to(pair.device) for _ in range(2))
    before = phi(base)
    for _ in range(24):  # a row of another neuron stays unseen with probability 2^-24
        moved = (torch.rand(pair.shape[1], generator=draw) < 0.5).to(pair.device)
        mask = torch.zeros(pair.numel(), dtype=torch.bool, device=pair.device)
        mask[pair.flatten()] = moved.repeat(pair.shape[0])
        same = (phi(torch.where(mask, other, base)) == before)[0]
        if not same[~moved].all():
            return False
    return bool((phi(other) != before).float().mean() > 0.2)  # relu leaves a quarter where it was, at zero


def _curvature(phi: Function, pair: torch.Tensor, role: int) -> float:
    draw = torch.Generator().manual_seed(1)
    base = SMALL * (2 * torch.rand(8, pair.numel(), generator=draw) - 1).to(pair.device)
    step = torch.zeros_like(base)
    step[:, pair[role]] = SMALL
    return float((phi(base + step) - 2 * phi(base) + phi(base - step)).abs().mean())
