"""One self-contained HTML file: figures, words and scripts in it, nothing fetched, written whole or not at all.

Everything that comes from a corpus, a tokenizer or a model is data: the template escapes it, figures escape it for
plotly's own markup, and the page's content policy lets only the page's own two scripts run, whatever the text says.
"""

from __future__ import annotations

import base64
import hashlib
import html
import os
import secrets
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any

import plotly.graph_objects as go
from jinja2 import Environment, FunctionLoader, StrictUndefined
from markupsafe import Markup
from plotly.io import to_json
from plotly.offline import get_plotlyjs

from moescope import figures
from moescope.errors import MoescopeError
from moescope.report import sections


def target(path: str | Path) -> Path:
    """The file to write, checked before any work is done.

    Raises:
        MoescopeError: it is a folder, or its folder does not exist.
    """
    file = Path(path)
    if file.is_dir():
        raise MoescopeError(f"{file} is a folder: name a file in it, such as {file / 'report.html'}.")
    if not file.parent.is_dir():
        raise MoescopeError(f"{file.parent} does not exist: create it, or write the report elsewhere.")
    return file


def put(file: Path, page: str) -> Path:
    """Writes a page; it appears whole or not at all.

    Raises:
        MoescopeError: the folder is full or cannot be written.
    """
    partial = file.with_name(f".{file.name}.{secrets.token_hex(4)}.tmp")
    try:
        # Half characters of a byte-level tokenizer cannot be encoded; they become question marks.
        partial.write_bytes(page.encode("utf-8", errors="replace"))
        os.replace(partial, file)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise MoescopeError(f"Cannot write the report to {file}: {error.strerror or error}.") from error
    return file


def fill(template: str, drawn: Mapping[str, go.Figure], **values: Any) -> str:
    """A page from one of this package's templates.

    Args:
        template: a file that extends `base.html.j2`.
        drawn: figures by name; the template places them by that name.
        values: what else the template shows.
    """
    script, plotly = _resource("report.js"), get_plotlyjs()
    return (
        _environment()
        .get_template(template)
        .render(
            **values,
            figures={name: _json(figure) for name, figure in drawn.items()},
            heights={name: int(figure.layout.height) for name, figure in drawn.items()},  # pyright: ignore
            templates={mode: _json_of_template(mode) for mode in ("light", "dark")},
            plotly=_script(plotly),
            script=_script(script),
            policy=_policy(plotly, script),
        )
    )


def _environment() -> Environment:
    environment = Environment(
        loader=FunctionLoader(_resource),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
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
