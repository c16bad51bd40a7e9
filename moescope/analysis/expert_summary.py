"""One expert in words: what it does, what it prefers, how it matters, each with the null that its number is held to.

Each function reads one result of a whole store, so that one question serves every expert.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import xarray as xr
from scipy.stats import norm, t

from moescope.analysis.discovery import adjusted
from moescope.analysis.labelled import row_of_expert
from moescope.analysis.loads import uniform_p
from moescope.analysis.summary import LEVEL, Finding, floor_words, small, z_words

NAMED = 3
"""Labels named in a headline; the rest are counted."""


def work_finding(result: xr.Dataset, site: str, expert: int) -> Finding:
    """How much of its layer's work an expert does, against its fair share (from `analysis.load`, without labels).

    Raises:
        MoescopeError: the result has no such expert.
    """
    part = _part(result, site, expert)
    selections = float(part["selections"])
    if not selections:
        return Finding("load", "Nothing was counted in its layer.", "No routing slot of it is filled.", None)
    times, count = float(part["relative_load"]), float(part["count"])
    place, width = _place(result, "count", site, expert)
    chance = float(part["null_max_vio_p99"]) + 1
    p = uniform_p(count, selections, width)
    values = {"relative_load": times, "count": count, "rank": place, "of": width, "null": chance, "p": p}
    tested = f"p {small(p)} against uniform random choice, over {width} experts and both ways"
    if not count:
        fair = selections / width
        detail = f"None of its layer's {selections:,.0f} selections, where a fair share is {fair:,.0f}; {tested}."
        return Finding("load", "It is never selected.", detail, p <= LEVEL, values)
    detail = (
        f"{count:,.0f} of its layer's {selections:,.0f} selections ({count / selections:.1%}), number {place} of "
        f"{width} by load; {tested}. Such choice would leave the busiest at {chance:.2f} times or less."
    )
    return Finding("load", f"Does {times:.2f} times its fair share of the work.", detail, p <= LEVEL, values)


def preference_finding(result: xr.Dataset, site: str, expert: int) -> Finding:
    """The labels an expert prefers beyond chance, or that there are none (from `analysis.npmi`)."""
    part, by = _part(result, site, expert), str(result.attrs["by"])
    labels = [str(name) for name in result["label"].values]
    if len(labels) < 2:
        words = f"Every document with a {by} has the value “{labels[0]}”: a preference needs two or more."
        return Finding("npmi", f"Nothing can be said of its {by}.", words, None)
    value, q = part["npmi"].values, part["q"].values
    if not np.isfinite(value).any():
        return Finding("npmi", f"It is never selected, so it prefers no {by}.", "There is nothing to test.", None)
    order = np.argsort(-np.nan_to_num(value, nan=-2), kind="stable")
    stands = [index for index in order.tolist() if q[index] <= LEVEL and value[index] > 0]
    best = stands[0] if stands else int(order[0])
    told = (
        f"nPMI {value[best]:.2f}; dealing the labels anew reaches {float(part['null_p99'][best]):.2f} once in a hundred"
    )
    values = {"label": labels[best], "npmi": float(value[best]), "null_p99": float(part["null_p99"][best])}
    if np.isnan(q).all():
        return Finding("npmi", f"Fires most for “{labels[best]}”, untested.", f"nPMI {value[best]:.2f}.", None, values)
    tested = f"q {small(float(q[best]))}, {result.attrs['permutations']} dealings"
    if not stands:
        detail = f"The nearest is “{labels[best]}”: {told} ({tested})."
        floor = floor_words(result)
        if floor and np.nanmin(part["p"].values[value > 0], initial=1.0) <= np.nanmin(result["p"].values):
            headline = f"Too few permutations to tell whether it prefers a {by}."
            return Finding("npmi", headline, f"{detail}{floor}", None, values)
        return Finding("npmi", f"Prefers no {by} beyond chance.", detail, False, values)
    named = ", ".join(f"“{labels[index]}”" for index in stands[:NAMED])
    more = f" and {len(stands) - NAMED} more" if len(stands) > NAMED else ""
    detail = (
        f"“{labels[best]}”: {told} ({tested}). It is active at {float(part['p_active'][best]):.0%} of these tokens, "
        f"{float(part['lift'][best]):.1f} times its share of all."
    )
    return Finding("npmi", f"Prefers {named}{more}.", detail, True, values | {"stand": len(stands)})


def outlier_of_expert(result: xr.Dataset, site: str, expert: int) -> Finding:
    """Whether an expert's largest output is an outlier, by the rule and by the null (from `analysis.super_experts`)."""
    part = _part(result, site, expert)
    largest, ratio = float(part["absmax"]), float(part["ratio_to_median"])
    z, chance, needed = float(part["robust_z"]), float(part["z_null_p99"]), float(result.attrs["ratio"])
    if np.isnan(largest):
        return Finding("super_experts", "It wrote nothing: it was never selected.", "There is no output.", None)
    named, solid = bool(part["super"]), bool(part["super"]) and bool(part["by_ratio"]) and z > chance
    values = {"absmax": largest, "ratio_to_median": ratio, "robust_z": z, "z_null_p99": chance, "super": named}
    detail = f"Its largest output is {largest:.3g}, {ratio:.1f} times its layer's median ({z_words(z, chance)})."
    if solid:
        return Finding("super_experts", "Is a super expert.", detail, True, values)
    if named:
        why = f" The rule always names the largest; here it would need {needed:g} times and a z beyond chance."
        return Finding("super_experts", "Named by the super expert rule, but no outlier.", detail + why, False, values)
    return Finding("super_experts", "Is no super expert.", detail, False, values)


def importance_of_expert(result: xr.Dataset, site: str, expert: int) -> Finding:
    """An expert's place in its layer by the criteria of a store (from `analysis.importance`, without labels)."""
    part = _part(result, site, expert)
    if not float(part["count"]):
        return Finding(
            "importance", "It has no rank: it is never selected.", "Every criterion needs a selection.", None
        )
    outputs = "reap" in result
    criteria = ("reap", "ean") if outputs else ("mc_moe", "mean_weight")
    shown, values = [], {}
    for name in criteria:
        place, width = _place(result, name, site, expert)
        low, high = float(part[f"{name}_low"]), float(part[f"{name}_high"])
        interval = f", 95 % interval {low:.3g} to {high:.3g}" if np.isfinite(low) else ""
        shown.append(f"{_CRITERIA[name]} {float(part[name]):.3g}{interval}")
        values |= {name: float(part[name]), f"{name}_rank": place, "of": width}
    first, second = criteria
    headline = (
        f"Number {values[f'{first}_rank']} of {values['of']} in its layer by {_SHORT[first]}, "
        f"{values[f'{second}_rank']} by {_SHORT[second]}."
    )
    why = "" if outputs else " REAP and EAN need output norms: capture with the experts tier."
    detail = f"{'; '.join(shown)}. A rank does not say that an expert matters: only removing it does.{why}"
    return Finding("importance", headline, detail, None, values)


def margin_of_expert(result: xr.Dataset, site: str, expert: int) -> Finding:
    """How narrowly an expert is chosen, against the selections of its layer (from `analysis.margins`)."""
    part = _part(result, site, expert)
    margin, low, high = (float(part[f"margin{end}"]) for end in ("", "_low", "_high"))
    layer = float(part["layer_margin"])
    if np.isnan(margin):
        why = "It was never selected, or its router defines no margin."
        return Finding("margins", "Its margin cannot be told.", why, None)
    row = [str(key) for key in result["site"].values].index(site)
    q = float(_margin_q(result.isel(layer=row))[expert])
    interval = f" (95 % interval {low:.3g} to {high:.3g})" if np.isfinite(low) else ""
    detail = f"Mean margin of its tokens {margin:.3g}{interval}; over all selections of its layer {layer:.3g}"
    detail += f"; q {small(q)} over its layer's experts." if np.isfinite(q) else "."
    values = {"margin": margin, "layer_margin": layer, "low": low, "high": high, "q": q}
    if q <= LEVEL and margin < layer:
        return Finding("margins", "Is chosen more narrowly than its layer's others.", detail, True, values)
    if q <= LEVEL and margin > layer:
        return Finding("margins", "Is chosen more clearly than its layer's others.", detail, True, values)
    if np.isnan(q):
        headline = "Whether it is chosen as clearly as its layer's others was not tested."
        return Finding(
            "margins", headline, f"{detail} No spread between its documents is known to judge it by.", None, values
        )
    return Finding("margins", "Is chosen about as clearly as its layer's others.", detail, False, values)


def _margin_q(layer: xr.Dataset) -> np.ndarray:
    """[expert] q that an expert's mean margin is its layer's: t tests by the interval's width, over its documents.

    NaN where fewer than two groups of documents, or groups that are all alike, show no spread.
    """
    groups = layer["margin_groups"].values
    freedom = np.where(groups > 1, groups - 1, np.nan)
    spread = (layer["margin_high"] - layer["margin_low"]).values / (2 * norm.ppf(0.975))
    spread = spread * np.sqrt(1 + 1 / freedom)  # the bootstrap's variance divides by n
    margin = layer["margin"].values
    gap = np.abs(margin - float(layer["layer_margin"]))
    # Documents that are all alike show no spread to judge a gap by.
    apart = gap / np.where(spread > 1e-12 * np.abs(margin), spread, np.nan)
    return adjusted(np.where((gap == 0) & ~np.isnan(spread), 1.0, 2 * t.sf(apart, freedom)))


_CRITERIA = {
    "reap": "REAP (mean weight × output norm)",
    "ean": "EAN (mean output norm)",
    "mc_moe": "MC-MoE (frequency × weight)",
    "mean_weight": "mean routing weight",
}
_SHORT = {"reap": "REAP", "ean": "EAN", "mc_moe": "MC-MoE", "mean_weight": "mean weight"}


def _part(result: xr.Dataset, site: str, expert: int) -> Any:
    return result.isel(layer=row_of_expert(result, site, expert), expert=expert)


def _place(result: xr.Dataset, name: str, site: str, expert: int) -> tuple[int, int]:
    """An expert's place in its layer by one measure, 1 the largest, where equals share one; and of how many."""
    row = [str(key) for key in result["site"].values].index(site)
    width = int(result["n_experts"].values[row])
    values = result[name].values[row, :width]
    return 1 + int((values > values[expert]).sum()), width
