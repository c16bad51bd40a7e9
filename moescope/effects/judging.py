"""How traced effects are judged: intervals over cases, controls beside them, and where they came from."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from moescope.analysis.labelled import LayerAxis
from moescope.effects.cases import UNIT, Align, Case, Metric
from moescope.effects.trials import Kind, Run
from moescope.hooks import Model
from moescope.hooks.sites import Site

ROWS = 16  # interventions in one batch
DRAWS = 2000  # bootstrap draws of cases
FEWEST = 5  # cases: an interval from fewer would be their range
WITHIN = "p: share of the experts of the same layer whose effect is at least as large, whatever its sign"
SHUFFLED = (
    "each control gives the same positions the source's routing of random other tokens; p = (1 + controls whose "
    "effect is at least as large, whatever its sign) / (1 + controls)"
)
ELSEWHERE = (
    "each control is a path of random other experts in the same layers; p = (1 + controls whose effect is at "
    "least as large, whatever its sign) / (1 + controls)"
)


def p_within(effects: np.ndarray) -> np.ndarray:
    """[E] share of the experts whose effect is at least as large as that of each, whatever its sign."""
    sizes = np.abs(effects)
    return (len(sizes) - np.searchsorted(np.sort(sizes), sizes, side="left")) / len(sizes)


def beside(effect: np.ndarray, controls: np.ndarray) -> dict[str, np.ndarray]:
    """Mean, 95 % range and p of controls [control, ...] beside effects [...]; NaN where there are none."""
    n = len(controls)
    if not n:
        return {name: np.full(effect.shape, np.nan) for name in ("control_mean", "control_low", "control_high", "p")}
    extreme = (np.abs(controls) >= np.abs(effect)).sum(0)
    low, high = np.quantile(controls, [0.025, 0.975], axis=0)
    return {
        "control_mean": controls.mean(0),
        "control_low": low,
        "control_high": high,
        "p": (1 + extreme) / (1 + n),
    }


def recovered(effect: np.ndarray, found: Run) -> np.ndarray:
    """Share of the way from the plain metric to the source's, means over cases; NaN where there is no way."""
    way = float(np.mean(found.source - found.plain))
    return np.full(effect.shape, np.nan) if np.isnan(way) or way == 0 else effect / way


def intervals(change: np.ndarray, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """95 % of the mean over cases [case, n], cases drawn anew; NaN for fewer than `FEWEST`."""
    cases = len(change)
    if cases < FEWEST:
        return np.full(change.shape[1], np.nan), np.full(change.shape[1], np.nan)
    times = np.random.default_rng(seed).multinomial(cases, np.full(cases, 1 / cases), DRAWS)
    low, high = np.quantile(times @ change / cases, [0.025, 0.975], axis=0)
    return low, high


def axis_of(model: Model, sites: Sequence[Site]) -> LayerAxis:
    return LayerAxis(
        layers=np.array([site.layer for site in sites]),
        sites=tuple(site.key for site in sites),
        n_experts=np.array([site.n_experts for site in sites]),
        top_k=np.array([float(model.semantics[site.key].top_k) for site in sites]),
    )


def of_cases(found: Run) -> dict[str, Any]:
    return {"plain": ("case", found.plain), "source": ("case", found.source)}


def attrs(
    model: Model, cases: Sequence[Case], analysis: str, kind: Kind, metric: Metric, align: Align, seed: int
) -> dict[str, Any]:
    first = cases[0]
    return {
        "analysis": analysis, "model": model.name, "config_hash": model.config_hash, "kind": kind, "metric": metric,
        "unit": UNIT[metric], "cases": len(cases), "prompt": first.prompt, "answer": first.answer,
        "wrong": first.wrong or "none", "source_prompt": first.source or "none",
        "align": align if kind == "patch" else "none", "seed": seed,
        "interval": "95 %, cases drawn anew", "edits": "; ".join(model.edits) or "none",
    }  # fmt: skip
