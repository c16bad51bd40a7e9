"""Findings: what a person would want to know first about a model's experts, in words, each with its null."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import xarray as xr

from moescope.analysis.labelled import expert_name, layer_name, layer_names
from moescope.analysis.loads import load, uniform_p
from moescope.analysis.outliers import super_experts
from moescope.analysis.specialisation import npmi
from moescope.errors import MoescopeError

if TYPE_CHECKING:
    from moescope.store import Store

LEVEL = 0.05
"""The false discovery rate at which a specialisation is called one."""


@dataclass(frozen=True)
class Finding:
    """One thing found, or honestly not found.

    Attributes:
        analysis: the analysis it comes from ("load", "npmi", "super_experts").
        headline: one short sentence.
        detail: the numbers behind it, with their null.
        holds: True if it stands against its null, False if it does not, None if it could not be looked at.
        values: the numbers by name, and `layer`, `site` (its key), `expert`, `label` where it is about one.
    """

    analysis: str
    headline: str
    detail: str
    holds: bool | None
    values: dict[str, Any] = field(default_factory=dict)


def findings(
    store: Store,
    by: str | None = None,
    permutations: int | None = None,
    seed: int = 0,
    results: dict[str, xr.Dataset | MoescopeError] | None = None,
) -> list[Finding]:
    """The three findings to read first: who specialises in what, how even the load is, which experts are outliers.

    Args:
        store: an open store.
        by: the document label to look at; the store's first if None.
        permutations, seed: of the specialisation null.
        results: results already computed, by analysis name (a MoescopeError where one could not be), from
            `first_results`.

    Returns:
        Three findings; an analysis that this store does not allow gives one that says why, with `holds` None.
    """
    found = first_results(store, by, permutations, seed) if results is None else results
    tell = {"npmi": specialisation_finding, "load": balance_finding, "super_experts": outlier_finding}
    told = []
    for name, say in tell.items():
        result = found[name]
        if isinstance(result, MoescopeError):
            told.append(Finding(name, _CANNOT[name], str(result), None))
        else:
            told.append(say(result))
    return told


def first_results(
    store: Store, by: str | None = None, permutations: int | None = None, seed: int = 0
) -> dict[str, xr.Dataset | MoescopeError]:
    """The results behind the findings and the report; the reason in place of one this store does not allow."""
    ask = {
        "load": lambda: load(store, seed=seed),
        "npmi": lambda: npmi(store, by=by, permutations=permutations, seed=seed),
        "super_experts": lambda: super_experts(store, seed=seed),
    }
    found: dict[str, xr.Dataset | MoescopeError] = {}
    for name, run in ask.items():
        try:
            found[name] = run()
        except MoescopeError as reason:
            found[name] = reason
    return found


_CANNOT = {
    "npmi": "Who specialises in what cannot be told from this store.",
    "load": "Load and balance cannot be told from this store.",
    "super_experts": "Outlier experts cannot be told from this store.",
}


def specialisation_finding(result: xr.Dataset, level: float = LEVEL, label: str | None = None) -> Finding:
    """The strongest specialisation that stands against its null, and how many others do (from `analysis.npmi`).

    Args:
        result: from `analysis.npmi`.
        level: the false discovery rate, over the cells of all labels.
        label: one of the result's labels, to tell of it alone; None: of all.
    """
    labels = [str(name) for name in result["label"].values]
    by = str(result.attrs["by"])
    if len(labels) < 2:
        return Finding(
            "npmi",
            f"All documents carry one {by}, so nothing can be compared.",
            f"Every document with a {by} has the value “{labels[0]}”: specialisation needs two or more.",
            None,
        )
    what, any_of = (f"a {by}", f"at least one {by}") if label is None else (f"“{label}”", f"“{label}”")
    selected = int((np.nansum(result["count"].values, axis=2) > 0).sum())
    smallest, documents = float(np.nanmin(result["p"].values, initial=1.0)), result["documents"].values.sum()
    if label is not None:
        result = result.sel(label=[label])
    value, q = result["npmi"].values, result["q"].values
    stands = (q <= level) & (value > 0)
    if not stands.any():
        best = _cell(result, np.nanargmax(value)) if np.isfinite(value).any() else None
        nearest = f" The largest is {best['name']} for “{best['label']}”: nPMI {best['npmi']:.2f}" if best else ""
        if np.isnan(q).all():
            headline = f"Whether an expert specialises in {what} was not tested."
            return Finding("npmi", headline, f"There are no p-values.{nearest}{'.' * bool(best)}", None, best or {})
        nearest += f", its null's 99th percentile {best['null_p99']:.2f}, q {small(best['q'])}." if best else ""
        # Others' p may be the smallest there can be where none of these is: more draws would not help these.
        floor = floor_words(result) if np.nanmin(result["p"].values[value > 0], initial=1.0) <= smallest else ""
        headline = (
            f"Too few permutations to tell who specialises in {what}."
            if floor
            else f"No expert specialises in {what} more than chance explains."
        )
        detail = (
            f"None of {int(np.isfinite(q).sum())} tests reaches q ≤ {level:g} against {result.attrs['permutations']} "
            f"dealings of labels over {int(documents)} documents.{nearest}{floor}"
        )
        return Finding("npmi", headline, detail, None if floor else False, best or {})
    best = _cell(result, int(np.argmax(np.where(stands, value, -np.inf))))
    experts = int(stands.any(axis=2).sum())
    detail = (
        f"nPMI {best['npmi']:.2f}, where dealing the labels anew over documents reaches {best['null_p99']:.2f} once in "
        f"a hundred times; q {small(best['q'])}. It is active at {best['p_active']:.0%} of {best['label']} tokens, "
        f"{best['lift']:.1f} times its share of all tokens. "
        f"{experts} of {selected} experts prefer {any_of} at q ≤ {level:g}."
    )
    headline = (
        f"In layer {layer_name(best['layer'], best['site'])}, expert {best['expert']} fires for “{best['label']}” "
        f"{best['lift']:.1f} times as often as overall."
    )
    return Finding("npmi", headline, detail, True, best | {"experts": experts, "of": selected})


def floor_words(result: xr.Dataset) -> str:
    """A sentence to append, of a null with too few draws for anything to stand; empty where that is not so."""
    floor = str(result.attrs.get("floor", ""))
    return f" {floor[:1].upper()}{floor[1:]}." if floor else ""


def balance_finding(result: xr.Dataset) -> Finding:
    """How unevenly work is shared, at worst and in the middle, against uniform random choice (`analysis.load`)."""
    vio = result["max_vio"].values
    if not np.isfinite(vio).any():
        return Finding("load", "No expert was ever selected.", "The store holds no filled routing slot.", None)
    least_p, most_p = _uneven(result)
    p = np.minimum(least_p, most_p)
    # Of layers that are more uneven than chance, where there are any: the same excess means less in a wide one.
    stands = p <= LEVEL
    row = int(np.nanargmax(np.where(stands, vio, np.nan) if stands.any() else vio))
    layer, site = int(result["layer"].values[row]), str(result["site"].values[row])
    written, width = layer_name(layer, site), int(result["n_experts"].values[row])
    counts, share = result["count"].values[row], result["relative_load"].values[row]
    idle = least_p[row] <= LEVEL < most_p[row]
    expert = int(np.nanargmin(counts) if idle else np.nanargmax(counts))
    null = float(result["null_max_vio_p99"].values[row])
    effective = float(result["effective_experts"].values[row])
    dead = int(np.nansum(result["dead"].values))
    all_experts = int(result["exists"].values.sum())
    dead_words = (
        f"{dead} of {all_experts} experts are never selected." if dead else "Every expert is selected at least once."
    )
    median = float(np.nanmedian(vio)) + 1
    if stands.any():
        which = "least busy" if idle else "busiest"
        headline = f"The {which} expert, {expert_name(written, expert)}, does {share[expert]:.1f} times "
        headline += "its fair share of the work."
    else:
        headline = "Work is shared as evenly as random choice would."
    detail = (
        f"In layer {written} the load of {width} experts is as mixed as {effective:.1f} equally busy ones; random "
        f"choice would leave its busiest at {null + 1:.2f} times a fair share or less; it is at {vio[row] + 1:.2f}, "
        f"its least busy at {np.nanmin(share):.2f} (p {small(float(p[row]))} over all layers, both ways). In the "
        f"median layer the busiest does {median:.1f} times. {dead_words}"
    )
    values = {"layer": layer, "site": site, "expert": expert, "dead": dead}
    values |= {"max_vio": float(vio[row]), "null_max_vio_p99": null, "p": float(p[row])}
    return Finding("load", headline, detail, bool(stands.any()), values)


def _uneven(result: xr.Dataset) -> tuple[np.ndarray, np.ndarray]:
    """[layer] p of the least busy and of the busiest expert of each layer under uniform choice, over all layers."""
    found = np.full((2, result.sizes["layer"]), 1.0)
    tested = np.flatnonzero(result["selections"].values)
    for row in tested.tolist():
        counts = result["count"].values[row]
        total, width = float(np.nansum(counts)), int(result["n_experts"].values[row])
        ends = float(np.nanmin(counts)), float(np.nanmax(counts))
        found[:, row] = [min(1.0, tested.size * uniform_p(end, total, width)) for end in ends]
    return found[0], found[1]


def outlier_finding(result: xr.Dataset) -> Finding:
    """Whether the published rule's super experts are outliers by the ratio and the null too (from `super_experts`)."""
    sup = result["super"].values
    z, limit = result["robust_z"].values, result["z_null_p99"].values[:, None]
    solid = sup & result["by_ratio"].values & (z > limit)
    cap = int(result["cap"])
    absmax = result["absmax"].values
    order = [int(i) for i in np.argsort(-np.nan_to_num(absmax, nan=-1).ravel()) if sup.ravel()[i]]
    named = ", ".join(_name(result, index) for index in order) or "none"
    rule = (
        f"The published rule (layers 0 to {result.attrs['depth']}; it can name at most {cap} of "
        f"{int(result['n_pooled'])} experts) names {named}."
    )
    pooled = np.where(result["pooled"].values, absmax, -np.inf)
    largest = order[0] if order else int(np.argmax(pooled))
    row, column = np.unravel_index(largest, sup.shape)
    ratio = float(result["ratio_to_median"].values[row, column])
    values = {
        "layer": int(result["layer"].values[row]),
        "site": str(result["site"].values[row]),
        "expert": int(column),
        "absmax": float(absmax[row, column]),
        "ratio_to_median": ratio,
        "robust_z": float(z[row, column]),
        "z_null_p99": float(limit[row, 0]),
        "super": [_name(result, index) for index in order],
    }
    measure = (
        f"{_name(result, largest)} writes up to {absmax[row, column]:.3g}, {ratio:.1f} times its layer's median "
        f"({z_words(z[row, column], limit[row, 0])})."
    )
    if solid.any():
        n = int(solid.sum())
        sure = ", ".join(_name(result, index) for index in order if solid.ravel()[index])
        noun = "is a super expert: its output is" if n == 1 else "are super experts: their outputs are"
        headline = f"{sure} {noun} far larger than the rest of the layer's."
        return Finding("super_experts", headline, f"{measure} {rule}", True, values)
    headline = "No expert stands out as a super expert."
    always = "That rule always names the largest; " if order else ""
    why = f"{always}{measure} A super expert here needs {result.attrs['ratio']:g} times."
    return Finding("super_experts", headline, f"{rule} {why}", False, values)


def z_words(z: float, limit: float) -> str:
    """A robust z beside what chance reaches."""
    if np.isnan(z):
        return "its layer's outputs are too few or too equal for a robust z"
    return f"robust z {z:.1f}; chance reaches {limit:.1f} in 1 layer of 100"


def _cell(result: xr.Dataset, flat: Any) -> dict[str, Any]:
    row, expert, label = np.unravel_index(int(flat), result["npmi"].shape)
    names = ("npmi", "null_p99", "p", "q", "p_max", "lift", "p_active")
    return {
        "layer": int(result["layer"].values[row]),
        "site": str(result["site"].values[row]),
        "expert": int(expert),
        "name": expert_name(layer_names(result)[row], int(expert)),
        "label": str(result["label"].values[label]),
    } | {name: float(result[name].values[row, expert, label]) for name in names}


def _name(result: xr.Dataset, flat: int) -> str:
    row, expert = np.unravel_index(flat, result["absmax"].shape)
    return expert_name(layer_names(result)[row], int(expert))


def small(value: float) -> str:
    """A p- or q-value as it is written in a sentence, after its name: "= 0.012"."""
    if value < 1e-300:  # near what a float can hold, where it is 0 or has lost its digits
        return "< 1e-300"
    return f"= {value:.3f}" if value >= 0.0005 else f"= {value:.0e}"
