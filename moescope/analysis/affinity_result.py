"""The labelled result of affinity: scores of each pair of layers, and of each transition, from counts and draws."""

from __future__ import annotations

from typing import Any

import numpy as np
import xarray as xr

from moescope.analysis.affinity_null import Drawn
from moescope.analysis.discovery import adjusted, too_few
from moescope.analysis.permutation import TIE
from moescope.errors import MoescopeError

UNDEFINED = (
    "conditional, lift, p and q are NaN from a source expert (lift, p and q also to a target expert) that was never "
    "selected; p and normalised are NaN for a pair one of whose layers used a single expert: nothing could be told"
)


def affinity_dataset(
    tables: list[np.ndarray],
    observed: list[dict[str, float]],
    drawn: list[Drawn],
    coordinates: dict[str, Any],
    attrs: dict,
) -> xr.Dataset:
    """The result of `affinity`: `drawn` is empty without a null, `tables` without single transitions."""
    column = {name: np.array([measured[name] for measured in observed], dtype=np.float64) for name in observed[0]}
    n = len(observed)
    blank = np.full(n, np.nan)
    null = np.array([held.mi.mean() for held in drawn]) if drawn else blank
    p99 = np.array([np.quantile(held.mi, 0.99, method="higher") for held in drawn]) if drawn else blank
    p = blank
    if drawn:
        draws = drawn[0].mi.size
        above = np.array([(held.mi >= mi - TIE).sum() for held, mi in zip(drawn, column["mi"], strict=True)])
        told = (column["used_source"] > 1) & (column["used_target"] > 1)
        p = np.where(told, (above + 1) / (draws + 1), np.nan)
    per_pair = {name: column[name] for name in ("mi", "mi_bias", "entropy_source", "entropy_target", "total")}
    per_pair |= {
        "mi_null": null,
        "mi_null_p99": p99,
        "mi_corrected": column["mi"] - null,
        "p_mi": p,
        "q_mi": adjusted(p),
    }
    per_pair["normalised"] = normalised(column["mi"], null, observed)
    per_pair["conditional_entropy"] = column["entropy_target"] - column["mi"]
    variables: dict[str, Any] = {name: ("pair", values) for name, values in per_pair.items()}
    attrs = attrs | {"undefined": UNDEFINED, "table": "pair", "table_order": "mi_corrected"}
    if tables:
        cell = ("pair", "source_expert", "target_expert")
        found = _cells(tables, drawn)
        variables |= {name: (cell, values) for name, values in found.items()}
        coordinates = coordinates | {
            name: np.arange(size) for name, size in zip(cell[1:], found["count"].shape[1:], strict=True)
        }
        attrs |= {"table": ", ".join(cell), "table_order": "count"}
        if drawn:
            attrs |= _note(found["p"], found["q"], drawn[0].mi.size)
    return xr.Dataset(variables, coords=coordinates, attrs=attrs)


def _cells(tables: list[np.ndarray], drawn: list[Drawn]) -> dict[str, np.ndarray]:
    """The variables with dims (pair, source_expert, target_expert), padded to the widest layers."""
    shape = (len(tables), max(t.shape[0] for t in tables), max(t.shape[1] for t in tables))
    names = ("count", "conditional", "lift", "expected", "p")
    out = {name: np.full(shape, np.nan) for name in names}
    out["exists"] = np.zeros(shape, dtype=bool)
    for index, table in enumerate(tables):
        place = (index, slice(table.shape[0]), slice(table.shape[1]))
        source, target, total = table.sum(axis=1, keepdims=True), table.sum(axis=0), table.sum()
        with np.errstate(divide="ignore", invalid="ignore"):
            conditional = table / source
            lift = conditional / (target / total)
        out["count"][place], out["conditional"][place], out["lift"][place] = table, conditional, lift
        out["exists"][place] = True
        if drawn:
            draws = drawn[index].mi.size
            out["expected"][place] = drawn[index].summed / draws
            out["p"][place] = np.where(np.isnan(lift), np.nan, (drawn[index].above + 1) / (draws + 1))
    return out | {"q": adjusted(out["p"])}


def _note(p: np.ndarray, q: np.ndarray, draws: int) -> dict[str, str]:
    tests = int((~np.isnan(p)).sum())
    family = {"family": f"q: all {tests} defined transitions of this result; q_mi: its pairs of layers"}
    floor = too_few(p, q, draws, tests, "transitions")
    return family | ({"floor": floor, "notes": f"{floor}; or read p_mi"} if floor else {})


def normalised(mi: np.ndarray, null: np.ndarray, observed: list[dict[str, float]]) -> np.ndarray:
    """Corrected information over the most there could be of it; NaN where there could be none."""
    most = np.array([min(measured["entropy_source"], measured["entropy_target"]) for measured in observed])
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(most - null > TIE, (mi - null) / (most - null), np.nan)


def trimmed(table: np.ndarray) -> np.ndarray:
    """A table without the NaN rows and columns at its end, which are experts that a layer lacks."""
    if table.ndim != 2:
        raise MoescopeError(
            f"Counts of a pair of layers need the axes source and target expert; got {table.ndim} axes."
        )
    there = ~np.isnan(table)
    table = table[
        : 1 + np.flatnonzero(there.any(axis=1)).max(initial=-1), : 1 + np.flatnonzero(there.any(axis=0)).max(initial=-1)
    ]
    if np.isnan(table).any() or (table < 0).any():
        raise MoescopeError("Counts must be 0 or more, and NaN only for experts at the end that a layer lacks.")
    return table
