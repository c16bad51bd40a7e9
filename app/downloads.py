"""What leaves the app as a file: a view's figure as one offline HTML page, a table's rows as CSV or Parquet."""

from __future__ import annotations

import io
import json
from typing import Any

import pyarrow as pa
from dash import Dash
from flask import Response, request

from moescope import figures
from moescope.analysis.spreadsheets import as_csv
from moescope.app import book
from moescope.app.answers import Pending
from moescope.app.drawing import figure_of
from moescope.app.place import Place, parse
from moescope.app.scene import Desk
from moescope.app.tables import rows_of
from moescope.app.views import FigureView, TableView
from moescope.errors import MoescopeError, StoreError


def register(app: Dash, desk: Desk) -> None:
    """Adds the routes: /file/<view>.html, .csv and .parquet, with the place in `at`.

    What cannot be sent is said in a line: 400 what the address asks for cannot be, 404 there is no such view or store,
    410 the store went away while it was read, 500 it cannot be read, 503 the answer is still being computed.
    """

    @app.server.get("/file/<name>.<kind>")
    def _file(name: str, kind: str) -> Response:
        place = parse(request.args.get("at", ""))[0]
        try:
            return _made(desk, place, name, kind)
        except Pending:
            return _said("This is still being computed; try again when the panel shows it.", 503)
        except StoreError as error:
            return _said(desk.shelf.without_root(str(error)), 404)
        except (OSError, pa.ArrowException) as error:
            if place.store not in desk.shelf.names():
                return _said(f"The store {place.store!r} is no longer there.", 410)
            return _said(f"The store {place.store!r} could not be read: {desk.shelf.without_root(str(error))}", 500)
        except (MoescopeError, ValueError, RecursionError) as error:  # JSON may nest deeper than can be read
            return _said(desk.shelf.without_root(str(error)), 400)


def _made(desk: Desk, place: Place, name: str, kind: str) -> Response:
    try:
        view = book.view(name)
    except MoescopeError as error:
        return _said(str(error), 404)
    scene = desk.scene(place, request.args.get("theme") == "dark")
    if kind == "html" and isinstance(view, FigureView):
        figure = figure_of(view, scene)
        if scene.dark:
            figure.update_layout(paper_bgcolor="#1a1d21")
        page = figures.page(figure)
        return _sent(page.encode(), "text/html; charset=utf-8", f"{name}.html")
    if kind in ("csv", "parquet") and isinstance(view, TableView):
        filters, order = (json.loads(request.args.get(name) or "null") for name in ("filter", "sort"))
        rows = rows_of(view, scene, filters, order)
        if kind == "csv":
            return _sent(as_csv(rows).encode(), "text/csv; charset=utf-8", f"{name}.csv")
        held = io.BytesIO()
        rows.to_parquet(held, index=False)
        return _sent(held.getvalue(), "application/vnd.apache.parquet", f"{name}.parquet")
    return _said("There is no such file.", 404)


def _said(words: str, status: int) -> Response:
    return Response(words, status, mimetype="text/plain")


def _sent(content: bytes, kind: str, name: str) -> Response:
    headers: dict[str, Any] = {"Content-Disposition": f'attachment; filename="{name}"'}
    return Response(content, content_type=kind, headers=headers)
