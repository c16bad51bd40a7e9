"""What one forward pass leaves behind at each site, and the reductions that turn it into columns of a store.

Everything here runs on the model's device, over the real tokens alone (pads are dropped before), without a host
synchronisation; `to_host` then moves all of it in one copy.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import numpy as np
import torch

from moescope.hooks.semantics import Semantics

ROUNDING = 1e-5  # of a selection score: the router may have added its bias in another precision


@dataclass
class SiteReading:
    """One site in one forward pass, N real tokens. Slots are in rank order. Absent fields were not asked for.

    Attributes:
        valid: False [N, k] where a slot chose no expert; None where slots cannot be missing.
        expert: selected experts [N, k] int64.  weight: the weights really multiplied in [N, k], the router's dtype.
        logits: router logits [N, E], the router's dtype.
        logsumexp, entropy, margin: of logits, of the normalised scores (nats), and between the last selected and the
            first rejected selection score (inside the kept groups, where there are groups); [N] float32, NaN where
            the router's rule is unproven.
        norm, absmax: L2 norm and largest magnitude of each expert's unweighted output [N, k] float32.
        vectors, neurons: unweighted outputs themselves [M, k, D] and what entered the down projections [M, k, I], of
            the M chosen tokens; missing slots hold anything.
        router_input: what entered the router [M, D].
        outliers: per-expert maxima, where the outliers tier is wanted.
    """

    expert: torch.Tensor
    weight: torch.Tensor
    valid: torch.Tensor | None = None
    logits: torch.Tensor | None = None
    logsumexp: torch.Tensor | None = None
    entropy: torch.Tensor | None = None
    margin: torch.Tensor | None = None
    norm: torch.Tensor | None = None
    absmax: torch.Tensor | None = None
    vectors: torch.Tensor | None = None
    neurons: torch.Tensor | None = None
    router_input: torch.Tensor | None = None
    outliers: ExpertMaxima | None = None


@dataclass
class ExpertMaxima:
    """Per-expert maxima of one forward pass, [E] each; -inf and N where an expert had no token.

    Attributes:
        output: max |f_e(x)|.  input: max |x| among the tokens routed to e.  first: max |f_e| over e's first routed
            token of this batch only (the released super-expert code).  row: token where ``output`` occurred.
        tokens: selections.
    """

    output: torch.Tensor
    input: torch.Tensor
    first: torch.Tensor
    row: torch.Tensor
    tokens: torch.Tensor


@dataclass
class HiddenMaximum:
    """The largest magnitude of a decoder layer's output, and the token and channel where it stands (scalars)."""

    absmax: torch.Tensor
    row: torch.Tensor
    channel: torch.Tensor


@dataclass
class Reading:
    """All sites (by key) and all decoder layers (by index) of one forward pass."""

    sites: dict[str, SiteReading]
    hidden: dict[int, HiddenMaximum]


def rank_and_summarise(
    semantics: Semantics,
    expert: torch.Tensor,
    weight: torch.Tensor,
    logits: torch.Tensor | None,
    missing: torch.Tensor | None = None,
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The rank order of the slots [N, k], missing ones last, and logsumexp, entropy and margin [N] each."""
    order, scores, margin = rank_slots(semantics, expert, weight, logits, missing)
    unknown = torch.full((len(expert),), torch.nan, device=expert.device)
    return order, {
        "logsumexp": unknown if logits is None else logits.float().logsumexp(-1),
        "entropy": unknown if scores is None else _entropy(scores),
        "margin": unknown if margin is None else margin,
    }


def rank_slots(
    semantics: Semantics,
    expert: torch.Tensor,
    weight: torch.Tensor,
    logits: torch.Tensor | None,
    missing: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """The rank order of the slots [N, k], missing ones last; the scores [N, E] and the margin [N], or None each."""
    if logits is None:
        key = weight.float() if missing is None else weight.float().masked_fill(missing, -torch.inf)
        return _descending(key), None, None
    values = logits.float()
    scores = semantics.scores(values)
    chooser = semantics.selection_scores(values, scores)
    margin = None
    if chooser is None:
        key = weight.float()
    else:
        key = chooser.gather(-1, expert)
        margin = key.min(-1).values - chooser.scatter(-1, expert, -torch.inf).max(-1).values
        # Where a rejected expert beats a selected one, the rule that the self-check proved does not hold for this row.
        # (a selected expert of a lost group counts -inf, so that its margin is -inf or not a number.)
        broken = ~(margin >= -ROUNDING)
        key = torch.where(broken.unsqueeze(-1), weight.float(), key)
        nobody_rejected = margin == torch.inf
        margin = margin.clamp_min(0).masked_fill(broken | nobody_rejected, torch.nan)
    if missing is not None:
        key = key.masked_fill(missing, -torch.inf)
        margin = None if margin is None else margin.masked_fill(missing.any(-1), torch.nan)
    return _descending(key), scores, margin


def _descending(values: torch.Tensor) -> torch.Tensor:
    return values.sort(dim=-1, descending=True, stable=True).indices


def _entropy(scores: torch.Tensor) -> torch.Tensor:
    shares = scores / scores.sum(-1, keepdim=True)
    return torch.special.entr(shares).sum(-1)


def expert_maxima(
    n_experts: int,
    expert: torch.Tensor,
    absmax: torch.Tensor,
    input_absmax: torch.Tensor,
    valid: torch.Tensor | None = None,
) -> ExpertMaxima:
    """Reduce [N, k] output and input maxima of experts to one row for each expert, with no host round trip."""
    n, k = expert.shape
    # Missing slots go to one bucket more, which is cut off: a mask would have to ask the host how many they are.
    ids = (expert if valid is None else expert.masked_fill(~valid, n_experts)).flatten()
    rows = torch.arange(n, device=expert.device).unsqueeze(-1).expand(n, k).flatten()
    low = torch.full((n_experts + 1,), -torch.inf, device=expert.device)
    nowhere = torch.full((n_experts + 1,), n, dtype=torch.int64, device=expert.device)
    values = absmax.flatten().float()
    output = low.scatter_reduce(0, ids, values, "amax")
    at = torch.where(values == output[ids], rows, n)
    first_row = nowhere.scatter_reduce(0, ids, rows, "amin")
    largest_input = low.scatter_reduce(0, ids, input_absmax.float().flatten(), "amax")
    first = low.scatter_reduce(0, ids, torch.where(rows == first_row[ids], values, -torch.inf), "amax")
    row = nowhere.scatter_reduce(0, ids, at, "amin")
    tokens = torch.zeros_like(nowhere).scatter_add(0, ids, torch.ones_like(ids))
    return ExpertMaxima(*(maxima[:n_experts] for maxima in (output, largest_input, first, row, tokens)))


def largest_magnitude(rows: torch.Tensor) -> torch.Tensor:
    """max |x| of each row of [N, D]: exact, NaN where a row holds one.

    Two vectorised passes; the maximum norm of torch 2.13 takes four times as long on a CPU.
    """
    return torch.maximum(rows.amax(-1), -rows.amin(-1))


def hidden_maximum(hidden: torch.Tensor) -> HiddenMaximum:
    """Largest magnitude in hidden states [N, H] and where it stands."""
    per_row = largest_magnitude(hidden)
    row = per_row.argmax()
    return HiddenMaximum(absmax=per_row[row].float(), row=row, channel=hidden[row].abs().argmax())


class HostCopy:
    """A reading on its way to the host: started without waiting, finished by `arrays`.

    All tensors are packed into one buffer, so that a GPU makes one copy for each forward pass.
    """

    def __init__(self, reading: Reading, extra: dict[tuple[str, ...], torch.Tensor] | None = None) -> None:
        self._names: list[tuple[str, ...]] = []
        self._tensors: list[torch.Tensor] = []
        for key, site in reading.sites.items():
            self._take(("site", key), site)
        for layer, maximum in reading.hidden.items():
            self._take(("hidden", str(layer)), maximum)
        for name, tensor in (extra or {}).items():
            self._names.append(name)
            self._tensors.append(tensor.detach())
        self._done: torch.cuda.Event | None = None
        if self._tensors and self._tensors[0].is_cuda:
            self._start_copy()

    def _take(self, prefix: tuple[str, ...], record: object) -> None:
        for item in fields(record):  # type: ignore[arg-type]
            value = getattr(record, item.name)
            if isinstance(value, torch.Tensor):
                self._names.append((*prefix, item.name))
                self._tensors.append(value.detach())
            elif value is not None:
                self._take((*prefix, item.name), value)

    def _start_copy(self) -> None:
        # Each piece starts at a multiple of 8 bytes so that any dtype can be viewed in place.
        pieces = [t.contiguous().reshape(-1).view(torch.uint8) for t in self._tensors]
        packed = torch.cat([torch.nn.functional.pad(p, (0, -len(p) % 8)) for p in pieces])
        host = torch.empty(packed.shape, dtype=torch.uint8, pin_memory=True)
        host.copy_(packed, non_blocking=True)
        self._done = torch.cuda.Event()
        self._done.record()
        landed, offset = [], 0
        for tensor, piece in zip(self._tensors, pieces, strict=True):
            landed.append(host[offset : offset + len(piece)].view(tensor.dtype).view(tensor.shape))
            offset += len(piece) + -len(piece) % 8
        self._tensors = landed

    def arrays(self) -> dict[tuple[str, ...], np.ndarray]:
        """Wait for the copy and give NumPy arrays by name; bfloat16 comes as its bits in uint16."""
        if self._done is not None:
            self._done.synchronize()
        return {name: _numpy(tensor) for name, tensor in zip(self._names, self._tensors, strict=True)}


def _numpy(tensor: torch.Tensor) -> np.ndarray:
    if tensor.dtype == torch.bfloat16:
        return tensor.contiguous().view(torch.int16).numpy().view(np.uint16)
    return tensor.numpy()
