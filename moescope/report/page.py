"""Puts the report together: results, figures and words into one self-contained HTML file.

Everything that comes from a corpus, a tokenizer or a model is data: the template escapes it, figures escape it for
plotly's own markup, and the page's content policy lets only the page's own two scripts run, whatever the text says.
"""

from __future__ import annotations

import base64
import hashlib
import html
import os
import secrets
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

import plotly.graph_objects as go
import xarray as xr
from jinja2 import Environment, StrictUndefined
from markupsafe import Markup
from plotly.io import to_json
from plotly.offline import get_plotlyjs

from moescope import figures
from moescope.analysis.loads import load
from moescope.analysis.summary import findings, first_results
from moescope.errors import MoescopeError
from moescope.figures import loads as loads_figure
from moescope.figures import outliers as outliers_figure
from moescope.figures import specialisation as specialisation_figure
from moescope.report import sections

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
    target = Path(path)
    if target.is_dir():
        raise MoescopeError(f"{target} is a folder: name a file in it, such as {target / 'report.html'}.")
    if not target.parent.is_dir():
        raise MoescopeError(f"{target.parent} does not exist: create it, or write the report elsewhere.")
    page = render(store, by=by, permutations=permutations, seed=seed)
    partial = target.with_name(f".{target.name}.{secrets.token_hex(4)}.tmp")
    try:
        # Half characters of a byte-level tokenizer cannot be encoded; they become question marks.
        partial.write_bytes(page.encode("utf-8", errors="replace"))
        os.replace(partial, target)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise MoescopeError(f"Cannot write the report to {target}: {error.strerror or error}.") from error
    return target


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
    script = _resource("report.js")
    plotly = get_plotlyjs()
    return (
        _environment()
        .from_string(_resource("template.html.j2"))
        .render(
            model=sections.model_facts(store),
            findings=findings(store, results=results),
            balance=sections.balance_rows(results["load"]),
            labels=sections.label_cards(store, results["npmi"]),
            outliers=sections.outlier_rows(store, results["super_experts"]),
            cannot={name: str(found) for name, found in results.items() if isinstance(found, MoescopeError)},
            read=_how_to_read(results),
            notes=sections.notes(results),
            provenance=sections.provenance_rows(store, results),
            figures={name: _json(figure) for name, figure in drawn.items()},
            heights={name: int(figure.layout.height) for name, figure in drawn.items()},  # pyright: ignore
            templates={mode: _json_of_template(mode) for mode in ("light", "dark")},
            plotly=_script(plotly),
            script=_script(script),
            policy=_policy(plotly, script),
        )
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


def _environment() -> Environment:
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters["number"] = sections.number
    return environment


def _resource(name: str) -> str:
    return resources.files("moescope.report").joinpath(name).read_text(encoding="utf-8")


def _json(figure: go.Figure) -> Markup:
    """A figure as JSON inside a script element, without its template: the page has both, once.

    plotly writes <, > and / as escapes, so that no text in a figure can end the element it stands in.
    """
    bare = go.Figure(figure)
    bare.layout.template = None  # pyright: ignore[reportAttributeAccessIssue]
    text = to_json(bare, validate=False, engine="json")
    return _inert(text or "{}")


def _json_of_template(mode: Any) -> Markup:
    return _inert(
        to_json({"layout": figures.template(mode).to_plotly_json()["layout"]}, validate=False, engine="json") or ""
    )


def _inert(text: str) -> Markup:
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return Markup(text)  # JSON with every character escaped that HTML could take for markup


def _script(source: str) -> Markup:
    if "</script" in source.lower():
        raise MoescopeError("A script of the report would end its own element: this plotly version cannot be embedded.")
    return Markup(source)  # our own code and plotly's, no data


def _policy(*scripts: str) -> str:
    """A content policy: nothing is fetched, and no script runs but these, by their hashes."""
    hashes = " ".join(
        f"'sha256-{base64.b64encode(hashlib.sha256(source.encode()).digest()).decode()}'" for source in scripts
    )
    return html.escape(
        f"default-src 'none'; script-src {hashes}; style-src 'unsafe-inline'; img-src data: blob:; font-src data:; "
        "base-uri 'none'; form-action 'none'",
        quote=False,
    )
