"""What unlearning minimises, as plain functions of losses, scores and hidden states (METHODS 10).

Losses of a sequence are in nats: summed over its counted tokens where NPO takes ratios of probabilities, averaged over
them elsewhere.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

import torch
from torch.nn import functional

from moescope.errors import MoescopeError

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int

Method = Literal["ga", "gd", "npo", "rmu"]
Definition = Literal["paper", "code"]
METHODS: tuple[Method, ...] = ("ga", "gd", "npo", "rmu")


def sequence_losses(
    logits: Float[torch.Tensor, "row position word"],
    ids: Int[torch.Tensor, "row position"],
    counted: Bool[torch.Tensor, "row position"],
) -> tuple[Float[torch.Tensor, " row"], Int[torch.Tensor, " row"]]:
    """Summed loss of each row's counted tokens, and how many they are; a row's first token is never counted."""
    wide = logits[:, :-1] if logits.dtype == torch.float64 else logits[:, :-1].float()
    losses = functional.cross_entropy(wide.transpose(1, 2), ids[:, 1:], reduction="none")
    here = counted[:, 1:]
    return losses.masked_fill(~here, 0).sum(-1), here.sum(-1)


def gradient_ascent(nats: Float[torch.Tensor, " row"], tokens: Int[torch.Tensor, " row"]) -> torch.Tensor:
    """The forget set's loss, to be climbed: minus the mean over sequences of the mean over tokens."""
    return -(nats / tokens).mean()


def negative_preference(
    nats: Float[torch.Tensor, " row"], frozen: Float[torch.Tensor, " row"], beta: float
) -> torch.Tensor:
    """NPO (Zhang et al., arXiv 2404.05868, eq. 3): -2/beta * mean log sigmoid(-beta * log(p / p_frozen)).

    Args:
        nats: -log p of each sequence under the tensors being trained.
        frozen: the same under the frozen copy.
        beta: inverse temperature; gradient ascent as it goes to 0.
    """
    return -2 / beta * functional.logsigmoid(beta * (nats - frozen)).mean()


def misdirection(
    hidden: Float[torch.Tensor, "row position channel"],
    control: Float[torch.Tensor, " channel"],
    real: Bool[torch.Tensor, "row position"],
) -> torch.Tensor:
    """RMU on the forget set (Li et al., arXiv 2403.03218, eq. 1): mean square distance of hidden states from c * u."""
    return (hidden - control)[real].square().mean()


def steadiness(
    hidden: Float[torch.Tensor, "row position channel"],
    frozen: Float[torch.Tensor, "row position channel"],
    real: Bool[torch.Tensor, "row position"],
) -> torch.Tensor:
    """RMU on the retain set: mean square distance of hidden states from the frozen copy's."""
    return (hidden - frozen)[real].square().mean()


def divergence(
    logits: Float[torch.Tensor, "row position word"],
    frozen: Float[torch.Tensor, "row position word"],
    counted: Bool[torch.Tensor, "row position"],
) -> torch.Tensor:
    """Mean over sequences of the mean over counted tokens of KL(frozen copy || trained), nats."""
    here = counted[:, 1:]
    p, q = (part[:, :-1][here].log_softmax(-1) for part in (frozen, logits))
    apart = torch.zeros(here.shape, dtype=q.dtype, device=q.device).masked_scatter(here, (p.exp() * (p - q)).sum(-1))
    return (apart.sum(-1) / here.sum(-1)).mean()


def router_anchor(
    scores: Float[torch.Tensor, "token expert"], targets: Sequence[int], definition: Definition = "paper"
) -> torch.Tensor:
    """The anchor: mean over tokens of ||score - onehot(target)||^2, "paper" summed over experts, "code" averaged.

    With several targets in a layer, the mean over them.

    Raises:
        MoescopeError: a target that is no expert of this layer.
    """
    wrong = [target for target in targets if not 0 <= target < scores.shape[-1]]
    if wrong or not targets:
        raise MoescopeError(f"The router scores experts 0 to {scores.shape[-1] - 1}, no expert {(*wrong, None)[0]}.")
    hot = functional.one_hot(torch.tensor(targets, device=scores.device), scores.shape[-1]).to(scores.dtype)
    apart = (scores.unsqueeze(-2) - hot).square()
    return (apart.sum(-1) if definition == "paper" else apart.mean(-1)).mean()
