"""What leaves the app as a file: a view's figure as one offline HTML page, a table's rows as CSV or Parquet."""

from __future__ import annotations

import io
import json
from typing import Any

from dash import Dash
from flask import Response, request

from moescope.app import book
from moescope.app.answers import Pending
from moescope.app.drawing import figure_of
from moescope.app.place import parse
from moescope.app.scene import Desk
from moescope.app.tables import rows_of
from moescope.app.views import FigureView, TableView
from moescope.errors import MoescopeError


def register(app: Dash, desk: Desk) -> None:
    """Adds the routes: /file/<view>.html, .csv and .parquet, with the place in `at`."""

    @app.server.get("/file/<name>.<kind>")
    def _file(name: str, kind: str) -> Response:
        try:
            view = book.view(name)
            place = parse(request.args.get("at", ""))[0]
            scene = desk.scene(place, request.args.get("theme") == "dark")
            if kind == "html" and isinstance(view, FigureView):
                figure = figure_of(view, scene)
                if scene.dark:
                    figure.update_layout(paper_bgcolor="#1a1d21")
                page = figure.to_html(include_plotlyjs=True, config={"displaylogo": False})
                return _sent(page.encode(), "text/html; charset=utf-8", f"{name}.html")
            if kind in ("csv", "parquet") and isinstance(view, TableView):
                filters = json.loads(request.args.get("filter") or "null")
                order = json.loads(request.args.get("sort") or "null")
                rows = rows_of(view, scene, filters, order)
                if kind == "csv":
                    return _sent(rows.to_csv(index=False).encode(), "text/csv; charset=utf-8", f"{name}.csv")
                held = io.BytesIO()
                rows.to_parquet(held, index=False)
                return _sent(held.getvalue(), "application/vnd.apache.parquet", f"{name}.parquet")
        except Pending:
            return Response("This is still being computed; try again when the panel shows it.", 503)
        except (MoescopeError, ValueError) as error:
            return Response(desk.shelf.without_root(str(error)), 400, mimetype="text/plain")
        return Response("There is no such file.", 404, mimetype="text/plain")


def _sent(content: bytes, kind: str, name: str) -> Response:
    headers: dict[str, Any] = {"Content-Disposition": f'attachment; filename="{name}"'}
    return Response(content, content_type=kind, headers=headers)
