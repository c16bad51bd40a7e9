"""Routers that are more than score, select, normalise: tables, capacities, states, product keys. Float64, by token."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from .reference_experts import rms_norm
from .reference_routing import Choice, Run, Site, best, finish, parameter, router_logits, score, standard


def _hash_or_topk(site: Site, run: Run) -> list[Choice]:
    """deepseek_v4: hash layers look their experts up by token id; the logits only weight them."""
    if not hasattr(site.router, "tid2eid"):
        return standard(site, run)
    choices = []
    for x, token in zip(site.router_input, run.inputs["input_ids"].reshape(-1), strict=True):
        logits, ids = router_logits(site, x), site.router.tid2eid[token].tolist()
        scores = score(site.family.routing.score, logits)
        choices.append(Choice(ids, finish(site.family.routing, scores[ids], site.config), logits, scores))
    return choices


def _sparsemixer(site: Site, run: Run) -> list[Choice]:
    """phimoe: pick the best, weight it by a softmax over its near-ties, remove it, and once more."""
    epsilon, choices = site.config.router_jitter_noise, []
    for x in site.router_input:
        logits = router_logits(site, x)
        ids, weights, removed = [], [], torch.zeros(len(logits), dtype=torch.bool)
        for _ in range(2):
            remaining = torch.where(removed, -math.inf, logits)
            top = remaining.max()
            near = (top - logits) / torch.maximum(logits.abs(), top) <= 2 * epsilon
            ids.append(best(remaining, 1)[0])
            weights.append(float(score("softmax", torch.where(near, remaining, -math.inf))[ids[-1]]))
            removed[ids[-1]] = True
        choices.append(Choice(ids, weights, logits, logits))
    return choices


def _joint_with_shared(site: Site, run: Run) -> list[Choice]:
    """inkling: routed and shared experts' sigmoids are normalised together; logits past E belong to the shared."""
    shared = site.config.n_shared_experts
    bias = parameter(site.block, str(site.family.routing.bias))
    scale = site.config.route_scale * float(parameter(site.router, "global_scale"))
    choices = []
    for x in site.router_input:
        logits = router_logits(site, x)
        scores = score("sigmoid", logits)
        selection = scores[:-shared] + bias
        ids = best(selection, site.config.num_experts_per_tok)
        total = scores[ids].sum() + scores[-shared:].sum()
        choices.append(Choice(ids, (scores[ids] / total * scale).tolist(), logits[:-shared], selection))
    return choices


def _skip_class(site: Site, run: Run) -> list[Choice]:
    """zaya: an MLP router with a state carried across layers and a last class that means no expert."""
    router, bias = site.router, parameter(site.router, "balancing_biases")
    mlp = router.router_mlp
    state = site.router_input @ parameter(router, "down_proj.weight").T + parameter(router, "down_proj.bias")
    if "zaya" in run.carried and hasattr(router, "router_states_scale"):
        state = state + run.carried["zaya"] * parameter(router, "router_states_scale")
    run.carried["zaya"] = state

    def gelu(x: Tensor) -> Tensor:
        return 0.5 * x * (1 + torch.erf(x / math.sqrt(2)))

    choices = []
    for hidden in state:
        hidden = rms_norm(hidden, mlp.norm.weight, site.config.rms_norm_eps)
        for name in ("fc1", "fc2"):
            hidden = gelu(parameter(mlp, f"{name}.weight") @ hidden + parameter(mlp, f"{name}.bias"))
        logits = parameter(mlp, "out_proj.weight") @ hidden
        scores = score("softmax", logits)
        selection = scores + bias
        chosen = best(selection, 1)[0]
        skipped = chosen == site.config.num_experts
        choices.append(
            Choice([-1 if skipped else chosen], [0.0 if skipped else float(scores[chosen])], logits, selection)
        )
    return choices


def _product_keys(site: Site, run: Run) -> list[Choice]:
    """doge: expert (i, j) scores x_i + y_j.

    The flat [T, 2n] logits are read as [2, T, n], so a token's halves come from other tokens (upstream keeps it).
    `logits` here are the n * n sums.
    """
    n = math.isqrt(site.config.num_experts)
    flat = torch.stack([router_logits(site, x) for x in site.router_input]).reshape(2, -1, n)
    choices = []
    for x, y in zip(flat[0], flat[1], strict=True):
        sums = (x[:, None] + y[None, :]).reshape(-1)
        ids = best(sums, site.config.num_experts_per_tok)
        choices.append(Choice(ids, score("softmax", sums[ids]).tolist(), sums, sums))
    return choices


def _capacity_top1(site: Site, run: Run) -> list[Choice]:
    """switch_transformers: an expert takes the first expert_capacity tokens of each sequence; the rest get none."""
    length, choices = site.shape[1], []
    taken: dict[int, int] = {}
    for token, x in enumerate(site.router_input):
        if token % length == 0:
            taken = {}
        logits = router_logits(site, x)
        scores = score("softmax", logits)
        chosen = best(scores, 1)[0]
        taken[chosen] = taken.get(chosen, 0) + 1
        kept = taken[chosen] <= site.config.expert_capacity
        choices.append(Choice([chosen if kept else -1], [float(scores[chosen]) if kept else 0.0], logits, scores))
    return choices


def _capacity_top2(site: Site, run: Run) -> list[Choice]:
    """nllb_moe: two choices under a shared capacity, weights normalised over what is kept.

    What runs is not what was chosen: the experts one-hot the *value* of the first-choice mask, so that expert 1 gets
    every kept first choice and expert 0 every kept second one. `ids` say what runs, `intended` what was chosen.
    """
    logits = [router_logits(site, x) for x in site.router_input]
    scores = [score("softmax", row) for row in logits]
    pairs = [best(row, 2) for row in scores]
    live = _unmasked(site)
    capacity = math.ceil(site.config.moe_eval_capacity_token_fraction * len(pairs))
    firsts, count = {}, dict.fromkeys(range(len(logits[0])), 0)
    for token, (first, _) in enumerate(pairs):
        if live[token]:
            firsts[token] = count[first]
            count[first] += 1
    choices = []
    for token, pair in enumerate(pairs):
        place = firsts.get(token, capacity), count[pair[1]]
        if live[token]:
            count[pair[1]] += 1
        kept = [live[token] and position < capacity for position in place]
        total = sum(float(scores[token][e]) for e, k in zip(pair, kept, strict=True) if k)
        weights = [float(scores[token][e]) / total if k else 0.0 for e, k in zip(pair, kept, strict=True)]
        ran = [expert if k else -1 for expert, k in zip((1, 0), kept, strict=True)]
        meant = [expert if k else -1 for expert, k in zip(pair, kept, strict=True)]
        choices.append(Choice(ran, weights, logits[token], scores[token], meant))
    return choices


def _unmasked(site: Site) -> list[bool]:
    """Which rows nllb_moe's router keeps: those where the mask it was given, read at its last query, is false."""
    mask = next((extra for extra in site.router_extras if isinstance(extra, Tensor)), None)
    if mask is None:
        return [True] * len(site.router_input)
    rows = mask[:, :, -1, :] if mask.ndim == 4 else mask
    return (~rows.reshape(-1).bool()).tolist()[-len(site.router_input) :]


ROUTES: dict[str, Callable[[Site, Run], list[Choice]]] = {
    "hash_or_topk": _hash_or_topk,
    "sparsemixer": _sparsemixer,
    "joint_with_shared": _joint_with_shared,
    "skip_class": _skip_class,
    "product_keys": _product_keys,
    "capacity_top1": _capacity_top1,
    "capacity_top2": _capacity_top2,
}
