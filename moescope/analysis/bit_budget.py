"""Bits for each expert under a budget: MC-MoE's integer program on HiGHS, against uniform and random bits (METHODS 7).

Source: MC-MoE (arXiv 2410.06270): minimise the sum over experts of freq^alpha * weight^beta * error(width)^gamma with
an average width. It is a choice among stated costs: nothing is quantised here, and no loss of a model is predicted.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import xarray as xr
from scipy.sparse import csr_array, eye_array, kron

from moescope.analysis.counts import Phase, document_counts, labelling, sites_of
from moescope.analysis.integer_programs import LIMIT, SHORT, solve
from moescope.analysis.labelled import PADDING, LayerAxis, provenance
from moescope.analysis.question import LAYERS, PHASE, SEED, Analysis, Parameter
from moescope.analysis.watching import counted
from moescope.errors import MoescopeError

if TYPE_CHECKING:
    from jaxtyping import Float, Int

    from moescope.store import Store

Scope = Literal["layer", "model"]
Costs = list[np.ndarray]

SCALE = 1e4
"""The costliest choice of a program as HiGHS sees it: its absolute tolerance of 1e-6 is then far below any difference
that counts."""
STAND_IN = (
    "stand-in: 2^-width alike for every expert, how the rounding step of a uniform quantiser shrinks with its bits; "
    "measure each expert's quantisation error and give it as `errors` for MC-MoE's own program"
)
UNDEFINED = (
    "an expert that was never selected costs nothing at any width and gets the smallest; savings are NaN where uniform "
    "bits cost nothing; heldout_saving is NaN with fewer than two documents"
)


@dataclass(frozen=True)
class Allocation:
    """Widths with what is proven about them.

    Attributes:
        choice: [expert] index into the widths.
        cost: what was minimised.
        bound: no choice within the budget costs less.
        optimal: HiGHS finished within its time.
    """

    choice: Int[np.ndarray, " expert"]
    cost: float
    bound: float
    optimal: bool


def bits(
    store: Store,
    budget: float = 2.0,
    widths: Sequence[int] = (1, 2, 3),
    errors: Float[np.ndarray, "layer expert width"] | None = None,
    alpha: float = 1.0,
    beta: float = 1.0,
    gamma: float = 2.0,
    scope: Scope = "layer",
    layers: Sequence[int] | None = None,
    where: dict[str, str | Sequence[str]] | None = None,
    phase: Phase | None = None,
    draws: int = 200,
    seed: int = 0,
    time_limit: float = 30.0,
) -> xr.Dataset:
    """How many bits each expert should get, so that the experts used most lose least, within an average width.

    How to read it: `bits` is each expert's width. `saving` is the share of the cost of uniform bits that this choice
    avoids; hold it against `random_saving`, the same widths dealt to experts at random, and `heldout_saving`, widths
    chosen on one half of the documents and judged on the other. `gap` 0 means that no choice is better.

    Args:
        store: an open store with the routing tier.
        budget: bits for each expert on average, at most.
        widths: the widths there are.
        errors: [layer, expert, width] quantisation error (a norm) of each expert at each width, layers as chosen;
            without it a stand-in that does not tell experts apart (`attrs["errors"]`).
        alpha, beta: powers of frequency (selections per token) and of weight (routing weight per token).
        gamma: power of the error.
        scope: "layer" keeps the budget in every layer, as MC-MoE does; "model" over all layers together.
        layers, where, phase: filters, as in `analysis.load`.
        draws: random dealings behind `random_saving`.
        seed: of the dealings and of the halves.
        time_limit: seconds for all programs.

    Returns:
        Dataset with dims (layer, expert): bits, importance = frequency^alpha * weight^beta, frequency, weight, cost,
        exists; (layer): mean_bits, layer_cost, layer_uniform_cost; and without dims: total_cost, bound, gap =
        (total_cost - bound) / total_cost, uniform_bits (the largest width within the budget), uniform_cost, saving,
        random_saving, random_saving_p99, heldout_saving.

    Raises:
        MoescopeError: a budget that no width meets, errors of another shape, weights that are not numbers of 0 or
            more, or nothing left to count.
    """
    sites = sites_of(store, layers)
    chosen = labelling(store, None, where, phase)
    n = chosen.documents.size
    halves = np.random.default_rng([seed, 1]).permutation(n) % 2
    frequency, weight, parts = [], [], []
    per_half = np.bincount(halves, weights=chosen.tokens, minlength=2)
    for site in sites:
        counts = document_counts(store, site, weighted=True, phase=phase).regrouped(chosen.spread(halves))
        both = np.array([0, 1])
        count, total = counts.by_label(both, 2), counts.by_label(both, 2, "weight")
        if not np.isfinite(total).all() or (total < 0).any():
            raise MoescopeError(f"Layer {site.layer} has routing weights that are not numbers of 0 or more.")
        frequency.append(count.sum(axis=1) / per_half.sum())
        weight.append(total.sum(axis=1) / per_half.sum())
        size = np.maximum(per_half, 1)
        parts.append((count / size) ** alpha * (total / size) ** beta)
    importance = [f**alpha * w**beta for f, w in zip(frequency, weight, strict=True)]
    axis = LayerAxis.of_sites(sites)
    attrs = provenance(
        store,
        analysis="bits",
        budget=budget,
        widths=list(widths),
        alpha=alpha,
        beta=beta,
        gamma=gamma,
        scope=scope,
        where=where,
        phase=phase,
        draws=draws,
        seed=seed,
        documents_filtered=chosen.filtered,
    )
    result = _solved(axis, importance, errors, budget, widths, gamma, scope, draws, seed, time_limit, attrs)
    if n > 1:
        halves = [[p[:, half] for p in parts] for half in (0, 1)]
        saved = [
            _held_out(fitted, judged, errors, budget, widths, gamma, scope, time_limit)
            for fitted, judged in (halves, halves[::-1])
        ]
        result["heldout_saving"] = float(np.mean(saved))
    cell = ("layer", "expert")
    return result.assign(frequency=(cell, axis.pad(frequency)), weight=(cell, axis.pad(weight)))


def bits_from_importance(
    importance: Float[np.ndarray, "layer expert"],
    budget: float = 2.0,
    widths: Sequence[int] = (1, 2, 3),
    errors: Float[np.ndarray, "layer expert width"] | None = None,
    gamma: float = 2.0,
    scope: Scope = "layer",
    layers: Sequence[int] | None = None,
    draws: int = 200,
    seed: int = 0,
    time_limit: float = 30.0,
) -> xr.Dataset:
    """The same from any importance of experts, such as another criterion's.

    Args:
        importance: [layer, expert], 0 or more; NaN for experts that a layer lacks.
        budget, widths, errors, gamma, scope, draws, seed, time_limit: as in `bits`.
        layers: model layer indices; 0, 1, 2, ... if None.

    Returns:
        As `bits`, without frequency and weight; heldout_saving is NaN.
    """
    table = np.asarray(importance, dtype=np.float64)
    if table.ndim != 2 or (table < 0).any() or np.isinf(table).any():
        raise MoescopeError("`importance` is a [layer, expert] array of numbers, 0 or more.")
    axis = LayerAxis.of_array(table, layers)
    rows = [np.nan_to_num(table[row, :width]) for row, width in enumerate(axis.n_experts)]
    attrs = provenance(None, analysis="bits", budget=budget, widths=list(widths), gamma=gamma, scope=scope, seed=seed)
    return _solved(axis, rows, errors, budget, widths, gamma, scope, draws, seed, time_limit, attrs)


def allocate(
    costs: Float[np.ndarray, "expert width"], widths: Sequence[int], budget: float, time_limit: float = 30.0
) -> Allocation:
    """One program: a width for each expert with the least summed cost, and at most `budget` bits on average.

    Args:
        costs: [expert, width] cost of each choice, 0 or more.
        widths: bits of each choice, ascending.
        budget: average bits, at least the smallest width.
        time_limit: seconds.
    """
    experts, choices = costs.shape
    sizes = np.asarray(widths, dtype=np.float64)
    top = float(costs.max(initial=0.0))
    if top <= 0:
        return Allocation(np.zeros(experts, dtype=np.int64), 0.0, 0.0, True)
    n = experts * choices
    one_each = kron(eye_array(experts), np.ones((1, choices)), format="csr")
    spent = csr_array(np.tile(sizes, experts)[None, :])
    rows = [(one_each, 1, 1), (spent, -np.inf, budget * experts + 1e-9)]
    program = ((costs / top * SCALE).ravel(), rows, np.ones(n), np.zeros(n), np.ones(n))
    time_limit = max(time_limit, 0.05)
    # Most take milliseconds, a process of its own a second: only what is not solved by then gets one.
    answer = solve(*program, time_limit=min(time_limit, SHORT), gap=0.0)
    if answer.status == LIMIT and time_limit > SHORT:
        answer = solve(*program, time_limit=time_limit - SHORT, gap=0.0)
    every = np.arange(experts)
    # Everything at the smallest width is within the budget: something to fall back on if time runs out at once.
    choice = np.zeros(experts, dtype=np.int64)
    if answer.x is not None:
        choice = answer.x.reshape(experts, choices).argmax(axis=1)
    choice = _without_waste(costs, choice)
    cost = float(costs[every, choice].sum())
    lowest = float(costs.min(axis=1).sum()) if answer.bound is None else answer.bound * top / SCALE
    if answer.status == 0:
        lowest = cost if abs(cost - lowest) <= 1e-9 * max(cost, top) else lowest
    return Allocation(choice, cost, min(lowest, cost), answer.status == 0)


def _without_waste(costs: np.ndarray, choice: np.ndarray) -> np.ndarray:
    """The same cost with the smallest width of each expert that has it: bits that buy nothing are not given."""
    held = costs[np.arange(choice.size), choice]
    return (costs <= held[:, None]).argmax(axis=1)


def _costs(
    importance: list[np.ndarray], errors: np.ndarray | None, widths: Sequence[int], gamma: float
) -> list[Float[np.ndarray, "expert width"]]:
    sizes = np.asarray(widths, dtype=np.float64)
    if errors is None:
        return [values[:, None] * (2.0**-sizes) ** gamma for values in importance]
    given = np.asarray(errors, dtype=np.float64)
    widest = max(values.size for values in importance)
    if given.shape != (len(importance), widest, sizes.size):
        raise MoescopeError(
            f"`errors` has shape {given.shape}; {len(importance)} layers, {widest} experts and {sizes.size} widths "
            f"need {(len(importance), widest, sizes.size)}."
        )
    found = []
    for row, values in enumerate(importance):
        error = given[row, : values.size]
        if not np.isfinite(error).all() or (error < 0).any():
            raise MoescopeError(f"`errors` of layer number {row} has values that are not numbers of 0 or more.")
        found.append(values[:, None] * error**gamma)
    return found


def _check(budget: float, widths: Sequence[int], scope: str) -> list[int]:
    sizes = sorted(widths)
    if not sizes or sizes[0] < 0 or len(set(sizes)) != len(sizes) or list(widths) != sizes:
        raise MoescopeError("`widths` are different numbers of bits, 0 or more, in ascending order.")
    if budget < sizes[0]:
        raise MoescopeError(f"A budget of {budget:g} bits is below the smallest width, {sizes[0]}.")
    if scope not in ("layer", "model"):
        raise MoescopeError('`scope` is "layer" or "model".')
    return sizes


def _plan(
    costs: Costs, widths: Sequence[int], budget: float, scope: str, time_limit: float
) -> tuple[list[np.ndarray], float, bool]:
    """(choice of each layer, summed bound, all optimal)."""
    if scope == "model":
        whole = allocate(np.concatenate(costs), widths, budget, time_limit)
        edges = np.cumsum([len(layer) for layer in costs])[:-1]
        return np.split(whole.choice, edges), whole.bound, whole.optimal
    begun, found = time.perf_counter(), []
    for row, layer in enumerate(counted("programs of the layers", costs)):
        left = (time_limit - (time.perf_counter() - begun)) / (len(costs) - row)
        found.append(allocate(layer, widths, budget, left))
    return [one.choice for one in found], sum(one.bound for one in found), all(one.optimal for one in found)


def _spent(costs: Costs, plan: Sequence[np.ndarray]) -> Float[np.ndarray, " layer"]:
    return np.array([layer[np.arange(len(layer)), choice].sum() for layer, choice in zip(costs, plan, strict=True)])


def _uniform(costs: Costs, widths: Sequence[int], budget: float) -> list[np.ndarray]:
    place = int(np.flatnonzero(np.asarray(widths) <= budget)[-1])
    return [np.full(len(layer), place) for layer in costs]


def _saving(cost: float, uniform: float) -> float:
    return 1 - cost / uniform if uniform > 0 else float("nan")


def _held_out(
    fitted: list[np.ndarray],
    judged: list[np.ndarray],
    errors: np.ndarray | None,
    budget: float,
    widths: Sequence[int],
    gamma: float,
    scope: str,
    time_limit: float,
) -> float:
    plan, _, _ = _plan(_costs(fitted, errors, widths, gamma), widths, budget, scope, time_limit)
    costs = _costs(judged, errors, widths, gamma)
    return _saving(_spent(costs, plan).sum(), _spent(costs, _uniform(costs, widths, budget)).sum())


def _solved(
    axis: LayerAxis,
    importance: list[np.ndarray],
    errors: np.ndarray | None,
    budget: float,
    widths: Sequence[int],
    gamma: float,
    scope: str,
    draws: int,
    seed: int,
    time_limit: float,
    attrs: dict[str, Any],
) -> xr.Dataset:
    sizes = np.array(_check(budget, widths, scope))
    costs = _costs(importance, errors, widths, gamma)
    plan, bound, optimal = _plan(costs, widths, budget, scope, time_limit)
    spent, uniform = _spent(costs, plan), _spent(costs, _uniform(costs, widths, budget))
    rng = np.random.default_rng(seed)
    dealt = []
    for _ in counted("draws of the null", range(draws)):
        # The same widths, dealt within what shares a budget.
        if scope == "layer":
            mixed = [rng.permutation(choice) for choice in plan]
        else:
            mixed = np.split(rng.permutation(np.concatenate(plan)), np.cumsum([len(c) for c in plan])[:-1])
        dealt.append(_saving(_spent(costs, mixed).sum(), uniform.sum()))
    cell, total = ("layer", "expert"), float(spent.sum())
    chosen = [layer[np.arange(len(layer)), choice] for layer, choice in zip(costs, plan, strict=True)]
    variables: dict[str, Any] = {
        "bits": (cell, axis.pad([sizes[choice].astype(np.float64) for choice in plan])),
        "importance": (cell, axis.pad(importance)),
        "cost": (cell, axis.pad(chosen)),
        "exists": (cell, axis.exists),
        "mean_bits": ("layer", np.array([sizes[choice].mean() if choice.size else np.nan for choice in plan])),
        "layer_cost": ("layer", spent),
        "layer_uniform_cost": ("layer", uniform),
        "total_cost": ((), total),
        "bound": ((), bound),
        "gap": ((), (total - bound) / total if total > 0 else 0.0),
        "uniform_bits": ((), int(sizes[sizes <= budget][-1])),
        "uniform_cost": ((), float(uniform.sum())),
        "saving": ((), _saving(total, float(uniform.sum()))),
        "random_saving": ((), float(np.mean(dealt)) if dealt else np.nan),
        "random_saving_p99": ((), float(np.quantile(dealt, 0.99)) if dealt else np.nan),
        "heldout_saving": ((), np.nan),
    }
    attrs = attrs | {
        "errors": STAND_IN if errors is None else "given",
        "status": "optimal" if optimal else "time limit",
        "null": "random_saving: the chosen widths dealt to experts at random, within each layer if scope is layer",
        "undefined": UNDEFINED,
        "padding": PADDING,
        "table": "layer, expert",
        "table_order": "importance",
    }
    return xr.Dataset(variables, coords=axis.coordinates(), attrs=attrs)


BITS_QUESTION = Analysis(
    name="bits",
    run=bits,
    figure="bits",
    help="How many bits should each expert get within a budget, and what does that save?",
    parameters=(
        Parameter("budget", float, 2.0, "bits for each expert on average, at most"),
        Parameter("widths", int, (1, 2, 3), "widths there are", many=True),
        Parameter("alpha", float, 1.0, "power of frequency"),
        Parameter("beta", float, 1.0, "power of routing weight"),
        Parameter("gamma", float, 2.0, "power of the error"),
        Parameter("scope", str, "layer", "keep the budget in every layer, or over the model", ("layer", "model")),
        LAYERS,
        PHASE,
        Parameter("draws", int, 200, "random dealings of the same widths"),
        Parameter("time_limit", float, 30.0, "seconds for all programs"),
        SEED,
    ),
    tier="routing",
)
