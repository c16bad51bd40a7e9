"""What a router's numbers mean, found out from one batch rather than from the model's name.

The ids and weights that reach the experts are facts. Everything else (which score function, is there a selection bias,
are there groups, are weights renormalised) is a hypothesis about how they came from the logits, and is kept only where
it reproduces them. What no hypothesis explains stays ``None``, and what depends on it is null in the store.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import product

import torch
from torch import nn

from moescope.hooks.sites import Site

SCORES: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "softmax": lambda logits: logits.softmax(-1),
    "sigmoid": torch.sigmoid,
    "sqrtsoftplus": lambda logits: nn.functional.softplus(logits).sqrt(),
}
CLEARLY = 3.0  # times the least residual, or the rounding error if that is larger: a wrong rule fits worse than this
GROUP_NAMES = ("n_group", "num_expert_group", "n_groups", "num_expert_groups")
KEPT_GROUP_NAMES = ("topk_group", "num_limited_groups", "topk_groups")


@dataclass(frozen=True)
class Semantics:
    """How a site's ids and weights follow from its logits, as far as one batch could prove it.

    Attributes:
        top_k: slots for each token, read from the experts' own argument.
        logits_from: "output" (first item of the router's output), "linear" (the router's own linear, where the output
            holds something else: probabilities in gemma4), or "none" (probabilities and no linear to be seen).
        router_output: "logits" or "probabilities", what the router itself returns first.
        score_function: a key of `SCORES`, or None where none reproduces the weights.
        renormalised: a token's weights are its scores divided by one number: their sum where ``scaling`` is known,
            else another (dbrx's p-norm, inkling's sum with the shared experts); None where undecided.
        scaling: the factor in the weights beyond score and renormalisation; None where it is not one number.
        selection: whose largest k were chosen: "score", "logit" (where the score function is unknown or a bias is added
            to the logit), or None where unproven (hash layers).
        bias: path below the block of the vector added for selection only.
        groups: (number of groups, groups kept, how a group is scored), where selection goes through groups.
        group_fill: what stands for the selection score of an expert outside the kept groups: -inf, or 0 (mistral4).
        native: the selection goes by scores in the logits' own precision, not in float32 (zaya in bfloat16).
        skips: router classes beyond the experts that mean "no expert" (zaya has one); a slot that chose one reaches the
            experts as id 0 with weight 0, and is missing.
        drops: a slot can stay empty because its expert's capacity is used up (switch_transformers, nllb_moe).
        weight_on: what the weight multiplies: the expert's "output", or (llama4) its "input".
        hashed: ids come from a table of token ids and not from the scores (deepseek_v4's first layers).
        selection_bias: that vector, [E].
    """

    top_k: int
    logits_from: str
    router_output: str
    score_function: str | None = None
    renormalised: bool | None = None
    scaling: float | None = None
    selection: str | None = None
    bias: str | None = None
    groups: tuple[int, int, str] | None = None
    group_fill: float = -math.inf
    native: bool = False
    skips: int = 0
    drops: bool = False
    weight_on: str = "output"
    hashed: bool = False
    selection_bias: torch.Tensor | None = field(default=None, repr=False, compare=False)

    def choices(self, ids: torch.Tensor, weights: torch.Tensor, n_experts: int) -> torch.Tensor:
        """The router class of each slot [T, k]: the expert, or the first skip class where the slot is missing."""
        return ids if not self.skips else ids.masked_fill(weights == 0, n_experts)

    @property
    def can_miss(self) -> bool:
        """Whether a slot may hold no expert."""
        return self.skips > 0 or self.drops

    @property
    def rank_by(self) -> str:
        """The number that orders a token's slots: the selection score where proven, else the routing weight."""
        return "weight" if self.selection is None else f"selection {self.selection}"

    def scores(self, logits: torch.Tensor) -> torch.Tensor | None:
        """Router scores over all experts, [T, E] float32, or None where the score function is unknown."""
        if self.score_function is None:
            return None
        return SCORES[self.score_function](logits if self.native else logits.float()).float()

    def selection_scores(self, logits: torch.Tensor, scores: torch.Tensor | None) -> torch.Tensor | None:
        """The numbers whose largest k were selected, [T, E], with those of lost groups filled; None where unproven."""
        base = {"score": scores, "logit": logits.float(), None: None}[self.selection]
        if base is not None and self.selection_bias is not None:
            base = base + self.selection_bias.to(base)
        if base is None or self.groups is None:
            return base
        return within_groups(base, self.groups, self.group_fill)


def infer(
    site: Site,
    block: nn.Module,
    *,
    output: torch.Tensor,
    linear: torch.Tensor | None,
    ids: torch.Tensor,
    weights: torch.Tensor,
    missing: torch.Tensor | None = None,
) -> Semantics:
    """Find the hypothesis that reproduces a batch's ids and weights.

    Args:
        site: the site.
        block: the module that holds router and experts; its vectors of length E are candidates for biases and scales.
        output: first item of the router's output, [T, columns].
        linear: output of the router's last linear, [T, columns], if one was seen.
        ids, weights: what the experts received, [T, k].
        missing: True [T, k] where a slot stayed empty; such tokens prove nothing and are left out.
    """
    if missing is not None:
        whole = ~missing.any(-1)
        output, ids, weights = output[whole], ids[whole], weights[whole]
        linear = None if linear is None else linear[whole]
    probabilities = _are_probabilities(output)
    sources = {"linear": linear} if probabilities else {"output": output, "linear": linear}
    columns = output.shape[-1]
    sources = {name: logits for name, logits in sources.items() if logits is not None and logits.shape[-1] == columns}
    vectors = dict(_vectors(block, columns))
    found = Semantics(
        top_k=ids.shape[-1],
        logits_from=next(iter(sources), "none"),
        router_output="probabilities" if probabilities else "logits",
        skips=columns - site.n_experts,
    )
    ids = found.choices(ids, weights, site.n_experts)
    precision = SINGLE if weights.dtype == torch.float32 and output.dtype == torch.float32 else HALF
    best = _best_weight_rule(sources, vectors, ids, weights, precision)
    if best is not None:
        found = replace(
            found,
            logits_from=best.source,
            score_function=best.score,
            renormalised=best.renormalised,
            scaling=None if best.scaling is None else round(best.scaling, precision.decimals),
        )
    if found.logits_from == "none":
        return found
    logits = sources[found.logits_from]
    return _with_selection(found, logits, ids, vectors, _group_settings(block), _has_table(block))


@dataclass(frozen=True)
class _Precision:
    """How far a true rule may miss (relative), what rounding alone explains, and the decimals worth keeping."""

    tolerance: float
    rounding: float
    decimals: int


SINGLE = _Precision(tolerance=1e-4, rounding=2e-6, decimals=6)
HALF = _Precision(tolerance=3e-2, rounding=4e-3, decimals=3)  # bfloat16 keeps 8 bits


@dataclass(frozen=True)
class _WeightRule:
    residual: float
    source: str
    score: str
    renormalised: bool | None
    scaling: float | None


def _best_weight_rule(
    sources: Mapping[str, torch.Tensor],
    vectors: Mapping[str, torch.Tensor],
    ids: torch.Tensor,
    weights: torch.Tensor,
    precision: _Precision,
) -> _WeightRule | None:
    """The best-fitting rule: weight = scaling * score / (1 or the selected sum) * (1 or a vector over experts)."""
    rules = []
    whole = (weights != 0).all(-1)  # tokens without a missing slot
    scales = {"": None, **vectors}
    for (source, logits), (name, score), scale in product(sources.items(), SCORES.items(), scales.values()):
        selected = score(logits.double()).gather(-1, ids)[whole]
        target = weights.double()[whole] / (1 if scale is None else scale.double()[ids[whole]])
        ratio = target / selected
        constant = float(ratio.mean())
        rules.append(_WeightRule(_spread(ratio, ratio.mean()), source, name, False, constant))
        if ids.shape[-1] > 1:
            sums = target.sum(-1, keepdim=True)
            scaling = float(sums.mean()) if _spread(sums, sums.mean()) < 1e-2 else None
            rules.append(_WeightRule(_spread(ratio, ratio.mean(-1, keepdim=True)), source, name, True, scaling))
    fitting = [
        rule for rule in rules if rule.residual <= precision.tolerance
    ]  # false where the residual is not a number
    least = max(min((rule.residual for rule in fitting), default=0.0), precision.rounding)
    close = [rule for rule in fitting if rule.residual <= CLEARLY * least]
    # Of rules that fit about as well, the first has the least freedom; two score functions that do leave it undecided.
    return close[0] if len({rule.score for rule in close}) == 1 else None


def _spread(values: torch.Tensor, centre: torch.Tensor) -> float:
    """Largest relative distance from the centre; without any value nothing fits."""
    if not values.numel():
        return float("inf")
    return float(((values - centre) / centre).abs().max())


def _with_selection(
    found: Semantics,
    logits: torch.Tensor,
    ids: torch.Tensor,
    vectors: Mapping[str, torch.Tensor],
    group_settings: tuple[int, int] | None,
    hashed: bool,
) -> Semantics:
    """Add the selection rule that picks exactly these ids: plain before groups, and with a bias where there is one.

    A small bias may change no selection of a small batch, so the rule with it is preferred where both fit.
    """
    bases: dict[tuple[str, bool], torch.Tensor] = {("logit", False): logits.float()}
    if found.score_function is not None:
        kinds = {native: replace(found, native=native).scores(logits) for native in (False, True)}
        bases = {("score", native): scores for native, scores in kinds.items() if scores is not None} | bases
    rules = [None] if group_settings is None else [None, (*group_settings, "max"), (*group_settings, "top-2 sum")]
    biases = {name: vector for name, vector in vectors.items() if "bias" in name and bool(vector.any())}
    additions = [*biases.items(), (None, None), *(item for item in vectors.items() if item[0] not in biases)]
    fills = [-math.inf] if group_settings is None else [-math.inf, 0.0]
    for groups, fill, (bias, vector), ((selection, native), base) in product(rules, fills, additions, bases.items()):
        rule = replace(
            found, selection=selection, native=native, bias=bias, groups=groups, group_fill=fill, selection_bias=vector
        )
        if _selects(base if vector is None else base + vector.to(base), ids, groups, fill):
            return rule
    return replace(found, hashed=hashed)


def _selects(
    chooser: torch.Tensor, ids: torch.Tensor, groups: tuple[int, int, str] | None, fill: float = -math.inf
) -> bool:
    """Whether the ids are a top-k of the chooser (ties count as right), inside the kept groups if there are any."""
    if groups is not None:
        chooser = within_groups(chooser, groups, fill)
    chosen = chooser.gather(-1, ids).min(-1).values
    rest = chooser.scatter(-1, ids, -torch.inf).max(-1).values
    return bool((chosen >= rest).all())


def within_groups(chooser: torch.Tensor, groups: tuple[int, int, str], fill: float = -math.inf) -> torch.Tensor:
    """Selection scores [T, E], filled in the groups that are not kept (DeepSeek-V2 and V3, group-limited routing)."""
    n_groups, kept, how = groups
    grouped = chooser.unflatten(-1, (n_groups, -1))
    worth = grouped.max(-1).values if how == "max" else grouped.topk(min(2, grouped.shape[-1]), -1).values.sum(-1)
    keep = torch.zeros_like(worth, dtype=torch.bool).scatter(-1, worth.topk(kept, -1).indices, True)
    return grouped.masked_fill(~keep.unsqueeze(-1), fill).flatten(-2)


def _vectors(block: nn.Module, n_experts: int) -> Iterator[tuple[str, torch.Tensor]]:
    """Parameters and buffers of the block that hold one number for each expert."""
    for name, tensor in [*block.named_parameters(), *block.named_buffers()]:
        if tensor.numel() == n_experts and tensor.is_floating_point():
            yield name, tensor.detach().flatten()


def _has_table(block: nn.Module) -> bool:
    tensors = [*block.parameters(), *block.buffers()]
    return any(tensor.ndim == 2 and not tensor.is_floating_point() for tensor in tensors)


def _group_settings(block: nn.Module) -> tuple[int, int] | None:
    modules = list(block.modules())
    holders = [*modules, *(getattr(module, "config", None) for module in modules)]
    n_groups, kept = _first_int(holders, GROUP_NAMES), _first_int(holders, KEPT_GROUP_NAMES)
    return (n_groups, kept) if n_groups > 1 else None


def _first_int(holders: Sequence[object], names: Sequence[str]) -> int:
    found = (getattr(holder, name, None) for holder in holders for name in names)
    return next((value for value in found if isinstance(value, int)), 1)


def _are_probabilities(output: torch.Tensor) -> bool:
    values = output.float()
    return bool((values >= 0).all()) and torch.allclose(values.sum(-1), values.new_ones(()), atol=1e-2)
