"""Puts the report together: results, figures and words into one self-contained HTML file."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import plotly.graph_objects as go
import xarray as xr

from moescope import figures
from moescope.analysis.facts import model_facts
from moescope.analysis.loads import load
from moescope.analysis.summary import findings, first_results
from moescope.errors import MoescopeError
from moescope.figures import loads as loads_figure
from moescope.figures import outliers as outliers_figure
from moescope.figures import specialisation as specialisation_figure
from moescope.report import sections, shell

if TYPE_CHECKING:
    from moescope.store import Store


def write(
    store: Store, path: str | Path, by: str | None = None, permutations: int | None = None, seed: int = 0
) -> Path:
    """Writes the report of a store as one HTML file that needs no network and no other file.

    Args:
        store: an open store; one still being written gives a report on its committed shards.
        path: the file, replaced if it is there. It appears whole or not at all.
        by: the document label of the specialisation section; the store's first if None.
        permutations, seed: of the specialisation null.

    Returns:
        The path.

    Raises:
        MoescopeError: the folder does not exist, is full or cannot be written, or the store has no tokens yet.
    """
    target = shell.target(path)
    return shell.put(target, render(store, by=by, permutations=permutations, seed=seed))


def render(store: Store, by: str | None = None, permutations: int | None = None, seed: int = 0) -> str:
    """The report as a string of HTML; arguments as in `write`."""
    if not store.n_tokens:
        raise MoescopeError(f"{store.path} has no committed tokens yet: there is nothing to report.")
    if by is not None and by not in store.labels:
        known = f"its labels are {', '.join(store.labels)}" if store.labels else "it was captured without labels"
        raise MoescopeError(f"The store has no label {by!r}: {known}.")
    results = first_results(store, by=by, permutations=permutations, seed=seed)
    by_label = _load_by_label(store, results, seed)
    drawn = _figures(results, by_label)
    return shell.fill(
        "report.html.j2",
        drawn,
        model=model_facts(store),
        findings=findings(store, results=results),
        balance=sections.balance_rows(results["load"]),
        labels=sections.label_cards(store, results["npmi"]),
        outliers=sections.outlier_rows(store, results["super_experts"]),
        cannot={name: str(found) for name, found in results.items() if isinstance(found, MoescopeError)},
        read=_how_to_read(results),
        notes=sections.notes(results),
        provenance=sections.provenance_rows(store, results),
    )


def _load_by_label(store: Store, results: dict[str, Any], seed: int) -> xr.Dataset | None:
    """Load for each label, for its own figure; None where there is only one label to show."""
    found = results["npmi"]
    if isinstance(found, MoescopeError) or found.sizes["label"] < 2:
        return None
    return load(store, by=str(found.attrs["by"]), seed=seed)


def _figures(results: dict[str, Any], by_label: xr.Dataset | None) -> dict[str, go.Figure]:
    drawn = {name: figures.draw(found) for name, found in results.items() if isinstance(found, xr.Dataset)}
    if by_label is not None:
        drawn["load_by_label"] = figures.draw(by_label)
    return drawn


def _how_to_read(results: dict[str, Any]) -> dict[str, str]:
    words = {"load": loads_figure.READ}
    if isinstance(results["npmi"], xr.Dataset):
        words["npmi"] = specialisation_figure.read(results["npmi"])
    if isinstance(results["super_experts"], xr.Dataset):
        words["super_experts"] = outliers_figure.read(results["super_experts"])
    return words
