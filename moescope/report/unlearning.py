"""The report of an unlearning study as one HTML file: what was forgotten, what was kept, and how it went."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr

from moescope import figures
from moescope.errors import MoescopeError
from moescope.figures import attributing, forgetting
from moescope.report import shell

READ = {
    "unlearning": forgetting.READ,
    "unlearning_progress": forgetting.READ_PROGRESS,
    "relearning": forgetting.READ_RELEARNING,
    "attribution": attributing.READ,
}
UNLEARNED = "unlearned"


def write_unlearning(parts: Sequence[xr.Dataset], path: str | Path) -> Path:
    """Writes the report of a study's results as one HTML file that needs no network and no other file.

    Args:
        parts: `Study.parts()`: the table, and what there is of attribution, progress and relearning.
        path: the file, replaced if it is there.

    Raises:
        MoescopeError: the folder does not exist or cannot be written, or the table is missing.
    """
    by_name = {str(part.attrs["analysis"]): part for part in parts}
    if "unlearning" not in by_name:
        raise MoescopeError("The report of unlearning needs the table that `unlearning.compared` gives.")
    file, table = shell.target(path), by_name["unlearning"]
    variants = [str(name) for name in table["variant"].values]
    page = shell.fill(
        "unlearning.html.j2",
        {name: figures.draw(part) for name, part in by_name.items()},
        model=str(table.attrs.get("model", "the model")).rstrip("/").rsplit("/", 1)[-1],
        attrs=table.attrs,
        facts=_facts(table),
        findings=_findings(table) + _carried(by_name.get("attribution")),
        variants=variants,
        rows=[_row(table, str(measure)) for measure in table["measure"].values],
        read=READ,
        provenance=[(name, str(value)) for name, value in table.attrs.items() if name != "table"],
    )
    return shell.put(file, page)


def _value(table: xr.Dataset, variant: str, measure: str) -> float:
    if measure not in table["measure"].values or variant not in table["variant"].values:
        return float("nan")
    return float(table["value"].sel(variant=variant, measure=measure))


def _facts(table: xr.Dataset) -> list[tuple[str, str]]:
    found = [(str(table.attrs.get("targets", "")), "trained")]
    share = _value(table, UNLEARNED, "share")
    if np.isfinite(share):
        found.append((f"{share:.2%}", "of the parameters"))
    return found + [(part.rpartition(" ")[2], part.rpartition(" ")[0]) for part in str(table.attrs["sets"]).split(", ")]


def _findings(table: xr.Dataset) -> list[tuple[str, str]]:
    found = []
    exact = [_value(table, variant, "forget: exact") for variant in ("before", UNLEARNED)]
    if np.isfinite(exact).all():
        reworded = _value(table, UNLEARNED, "forget: paraphrase")
        more = f" Reworded, it answers {reworded:.0%}." if np.isfinite(reworded) else ""
        found.append((
            f"It answers {exact[1]:.0%} of what it was to forget, {exact[0]:.0%} before.",
            f"Greedy decoding, exact match.{more}",
        ))  # fmt: skip
    else:
        losses = [_value(table, variant, "forget: loss") for variant in ("before", UNLEARNED)]
        found.append(
            (f"The loss of what it was to forget went from {losses[0]:.2f} to {losses[1]:.2f} nats per token.", "")
        )
    kept = []
    for measure in map(str, table["measure"].values):
        name, _, kind = measure.partition(": ")
        if f"{name}: exact" in table["measure"].values and kind == "loss":
            continue  # recall says it
        if name != "forget" and kind in ("exact", "loss"):
            old, new = (_value(table, variant, measure) for variant in ("before", UNLEARNED))
            if np.isfinite([old, new]).all():
                kept.append(
                    f"{name}: {old:.0%} → {new:.0%} exact" if kind == "exact" else f"{name}: loss {new / old - 1:+.1%}"
                )
    if kept:
        found.append(("What it was to keep.", "; ".join(kept) + "."))
    still = _value(table, UNLEARNED, "kept")
    if np.isfinite(still):
        overlap = _value(table, UNLEARNED, "overlap")
        found.append((
            f"Of the forget tokens that chose the target, {still:.0%} still do.",
            f"A token keeps {overlap:.0%} of its experts in the target's layer.",
        ))  # fmt: skip
    hidden = _value(table, UNLEARNED, "relearnt_hidden")
    if np.isfinite(hidden):
        found.append((
            f"Five steps of relearning on one half bring back {hidden:.0%} of the other.",
            "What returns without being shown again was hidden rather than erased.",
        ))  # fmt: skip
    return found


def _carried(found: xr.Dataset | None) -> list[tuple[str, str]]:
    """How far the expert that carries the forget set is the forget set's own."""
    if found is None:
        return []
    cells = found.stack(cell=("layer", "expert"))
    best = cells.isel(cell=int(np.nanargmin(cells["rank"].values)))
    where, first = f"Layer {int(best['layer'])}, expert {int(best['expert'])}", float(best["first"])
    sure = f"; it is so in {first:.0%} of resamples of the set" if np.isfinite(first) else ""
    headline = f"{where} gets the most of the forget set's routing{sure}."
    if not int(found["rest_documents"]):
        return [(headline, "")]
    text = (
        f"{float(best['attribution']):.3f}, and {float(best['rest']):.3f} of the retain set's; in that layer both sets "
        f"share {float(best['shared']):.0%} of their routing."
    )
    if np.isfinite(p := float(found["target_p"])):
        text += f" As many texts taken at random from both prefer their first expert so with p = {p:.2g}."
    return [(headline, text)]


def _row(table: xr.Dataset, measure: str) -> dict[str, Any]:
    part = table.sel(measure=measure)
    cells = []
    for place in range(part.sizes["variant"]):
        low, high = (float(part[name].values[place]) for name in ("low", "high"))
        said = "{:.3f}" if measure.endswith("loss") else "{:.2%}" if measure == "share" else "{:.0%}"
        value = float(part["value"].values[place])
        interval = f"{said.format(low)} to {said.format(high)}" if np.isfinite([low, high]).all() else ""
        value = said.format(value) if np.isfinite(value) else "–"
        cells.append({"value": value, "interval": interval})
    return {"measure": str(part["title"].values), "about": str(part["about"].values), "cells": cells}
