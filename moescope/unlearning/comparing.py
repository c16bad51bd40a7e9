"""States of a model side by side: every measure with a 95 % interval, over the items of all runs of a variant."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import xarray as xr

from moescope.errors import MoescopeError
from moescope.unlearning.evaluation import MEASURES, Evaluation

DRAWS = 2000  # bootstrap draws of items
FIGURES = {
    "kept": "share of the forget tokens that selected the target before and still do",
    "overlap": "share of a token's experts that it keeps in the target's layer",
    "overlap_all": "the same, mean over all layers",
    "share": "share of the model's parameters that were trained",
    "relearnt_shown": "exact match of the half of the forget set that is trained on again, after 5 steps",
    "relearnt_hidden": "exact match of the other half then",
}
TITLES = {
    "kept": "target still chosen",
    "overlap": "experts kept, target's layer",
    "overlap_all": "experts kept, all layers",
    "share": "parameters trained",
    "relearnt_shown": "relearnt, shown again",
    "relearnt_hidden": "relearnt, not shown",
}


def compared(
    variants: Mapping[str, Sequence[Evaluation]],
    figures: Mapping[str, Sequence[Mapping[str, float]]] | None = None,
    *,
    seed: int = 0,
    **attrs: Any,
) -> xr.Dataset:
    """One table of what each variant does.

    How to read it: `value` pools the items of a variant's runs; `low` and `high` are 95 %, items drawn anew (2.5 and
    97.5 % of draws), and do not hold what differs between trainings: `least` and `most` are the runs' own extremes.

    Args:
        variants: evaluations of each variant's runs by name, "before" among them.
        figures: further numbers of each run by variant, see `FIGURES`; they have no interval.
        seed: of the draws.
        attrs: kept with the result.

    Returns:
        Dataset with dims (variant, measure): value, low, high, least, most; (variant): runs; (measure): about,
        title.

    Raises:
        MoescopeError: no variant, or one without a run.
    """
    if not variants or not all(variants.values()):
        raise MoescopeError("There is nothing to compare: every variant needs a run.")
    rng = np.random.default_rng(seed)
    pairs = list(dict.fromkeys(pair for runs in variants.values() for run in runs for pair in run.items))
    more = list(dict.fromkeys(n for runs in (figures or {}).values() for run in runs for n in run if n in FIGURES))
    names = [f"{name}: {measure}" for name, measure in pairs] + more
    table = {key: np.full((len(variants), len(names)), np.nan) for key in ("value", "low", "high", "least", "most")}
    for row, (variant, runs) in enumerate(variants.items()):
        for column, (name, measure) in enumerate(pairs):
            some = [run for run in runs if (name, measure) in run.items]
            if not some:
                continue
            own = [run.mean(name, measure) for run in some]
            values = np.concatenate([run.items[name, measure] for run in some])
            weights = np.concatenate(
                [run.tokens[name] if measure == "loss" else np.ones(len(run.tokens[name])) for run in some]
            )
            cell = _interval(values, weights, rng)
            for key, number in zip(table, (*cell, np.fmin.reduce(own), np.fmax.reduce(own)), strict=True):
                table[key][row, column] = number
        for column, name in enumerate(more, len(pairs)):
            own = [run[name] for run in (figures or {}).get(variant, []) if name in run]
            if own:
                table["value"][row, column] = np.mean(own)
                table["least"][row, column], table["most"][row, column] = min(own), max(own)
    about = [f"{name}: {MEASURES[measure]}" for name, measure in pairs] + [FIGURES[name] for name in more]
    return xr.Dataset(
        {key: (("variant", "measure"), values) for key, values in table.items()}
        | {"runs": ("variant", [len(runs) for runs in variants.values()]), "about": ("measure", about)}
        | {"title": ("measure", [TITLES.get(name, name) for name in names])},
        coords={"variant": list(variants), "measure": names},
        attrs={
            "analysis": "unlearning", "interval": "95 %, items of all runs drawn anew", "seed": seed,
            "table": "variant, measure", **attrs,
        },
    )  # fmt: skip


def _interval(values: np.ndarray, weights: np.ndarray, rng: np.random.Generator) -> tuple[float, float, float]:
    """Weighted mean of what is there, and its 95 % interval; NaN where nothing is."""
    there = ~np.isnan(values)
    values, weights = values[there], weights[there].astype(float)
    if not len(values):
        return np.nan, np.nan, np.nan
    mean = float(np.average(values, weights=weights))
    if len(values) < 2:
        return mean, np.nan, np.nan
    times = rng.multinomial(len(values), np.full(len(values), 1 / len(values)), DRAWS)
    low, high = np.quantile((times @ (values * weights)) / (times @ weights), [0.025, 0.975])
    return mean, float(low), float(high)
