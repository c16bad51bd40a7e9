"""What a recipe does to answers: problems solved with and without it, beside the same edits on random experts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext

import numpy as np
import xarray as xr
from scipy.stats import binomtest

from moescope.decoding.problems import Problem, answered, interval, solved
from moescope.edits import Recipe
from moescope.effects.recipes import at_strength, describe, matched
from moescope.errors import MoescopeError
from moescope.hooks import Model

PLAIN, RECIPE, RANDOM = "plain", "recipe", "random experts"
COLUMNS = ("solved", "low", "high", "gained", "lost", "p", "tokens")


def solving(
    model: Model,
    problems: Sequence[Problem],
    recipe: Recipe,
    *,
    factors: Sequence[float] | None = None,
    after: str = "",
    max_new_tokens: int = 64,
    controls: int = 1,
    seed: int = 0,
    on_progress: Callable[[int, int], None] | None = None,
) -> xr.Dataset:
    """How many problems are solved plainly, under a recipe, and under the same edits on random experts.

    How to read it: `solved` is a share with a 95 % interval (Wilson); `gained` and `lost` are problems against plain
    decoding of the same ones, and `p` is McNemar's exact test of the two. The recipe's experts matter where it differs
    from plain and random experts do not. Of several random recipes the mean is shown, with a bootstrap interval over
    problems, and no p: their answers to one problem are not independent.

    Args:
        model: a model with a tokenizer.
        problems: with their answers.
        recipe: its edits must name experts, unless `controls` is 0.
        factors: strengths of its scale edits to try; as it is if None.
        after: the answer stands behind the first such mark in what is written.
        max_new_tokens: for each problem.
        controls: random recipes.
        seed: of them.
        on_progress: called with the problems done, and how many there are in all.

    Returns:
        Dataset with dims (factor, routing): solved, low, high, gained, lost, p, tokens (mean written); coordinate
        routing: "plain", "recipe", "random experts"; factor is NaN where none was asked for.

    Raises:
        MoescopeError: no problems, or a recipe that does not fit.
    """
    items = list(problems)
    if not items:
        raise MoescopeError("There are no problems to solve.")
    rng = np.random.default_rng(seed)
    others = [matched(recipe, model, rng) for _ in range(controls)]
    strengths = [None] if factors is None else list(factors)
    total, done = len(items) * (1 + len(strengths) * (1 + controls)), 0

    def attempt(live: Recipe | None) -> tuple[np.ndarray, float]:
        nonlocal done
        with nullcontext() if live is None else model.edited(live):
            texts = answered(model, [item.prompt for item in items], max_new_tokens, do_sample=False)
        done += len(items)
        if on_progress is not None:
            on_progress(done, total)
        right = [solved(text.text, item.answer, after) for text, item in zip(texts, items, strict=True)]
        return np.array(right), float(np.mean([len(text.tokens) for text in texts]))

    plain, plain_tokens = attempt(None)
    routings = [PLAIN, RECIPE, *[RANDOM] * bool(controls)]
    values = {name: np.full((len(strengths), len(routings)), np.nan) for name in COLUMNS}
    for place, factor in enumerate(strengths):
        own = [attempt(at_strength(recipe, factor))]
        random = [attempt(at_strength(other, factor)) for other in others]
        for column, found in enumerate([[(plain, plain_tokens)], own, *[random] * bool(controls)]):
            row = _row([right for right, _ in found], plain)
            for name, value in zip(COLUMNS, (*row, np.mean([tokens for _, tokens in found])), strict=True):
                values[name][place, column] = value
    return xr.Dataset(
        {name: (("factor", "routing"), table) for name, table in values.items()},
        coords={"factor": [np.nan if factor is None else factor for factor in strengths], "routing": routings},
        attrs={
            "analysis": "solving", "model": model.name, "config_hash": model.config_hash, "problems": len(items),
            "controls": controls, "seed": seed, "after": after or "none", "edits": describe(recipe),
            "table": "factor, routing",
        },
    )  # fmt: skip


def _row(found: Sequence[np.ndarray], plain: np.ndarray) -> tuple[float, ...]:
    """One routing's figures, or those of several random ones: the unit is a problem, however often it was tried."""
    right = np.stack(found).astype(np.float64)  # [recipe, problem]
    gained, lost = (right * ~plain).sum(axis=1).mean(), ((1 - right) * plain).sum(axis=1).mean()
    if len(found) == 1:
        low, high = interval(found[0])
        p = float(binomtest(int(gained), int(gained + lost)).pvalue) if gained + lost else 1.0
    else:
        share = right.mean(axis=0)
        draws = np.random.default_rng(0).integers(0, share.size, (2000, share.size))
        low, high = (float(bound) for bound in np.quantile(share[draws].mean(axis=1), (0.025, 0.975)))
        p = np.nan
    return float(right.mean()), low, high, float(gained), float(lost), p
