"""Tables page, sort and filter on the server; the same rows go out as CSV or Parquet."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
from dash import MATCH, ClientsideFunction, Dash, Input, Output, State, no_update

from moescope.analysis.labelled import layer_name
from moescope.app import book
from moescope.app.answers import PATIENCE, Pending
from moescope.app.drawing import cancelled, guarded, inputs_of, once_more, outputs_of, pressed
from moescope.app.panels import HIDDEN, note
from moescope.app.place import Place, parse, short
from moescope.app.scene import Desk, Scene
from moescope.app.views import TableView
from moescope.errors import MoescopeError


def register(app: Dash, desk: Desk) -> None:
    """Adds the callbacks."""

    def one(kind: str) -> dict[str, Any]:
        return {"type": kind, "of": "table", "view": MATCH}

    def frame(view: TableView, place: Any) -> pd.DataFrame:
        return view.frame(desk.scene(parse(place["href"])[0], patience=0 if pressed("tick") else PATIENCE))

    @app.callback(
        Output(one("grid"), "columnDefs"),
        Output(one("grid"), "style"),
        *outputs_of("table"),
        *inputs_of("table"),
        prevent_initial_call=True,
    )
    def _columns(wanted: Any, ticks: Any, act: Any, name: Any, place: Any, theme: Any, job: Any) -> Any:
        view = book.view(name["view"])
        if not isinstance(view, TableView) or not wanted or not place or place.get("trouble"):
            return [[], HIDDEN, *once_more(desk, [None, True, None], ticks)]
        if cancelled(desk, act, job):
            words = [note("Cancelled.", retry=view), True, None]
            return [no_update, HIDDEN, *once_more(desk, words, ticks)]
        found, words = guarded(view, desk, lambda: frame(view, place))
        words = once_more(desk, words, ticks)
        if found is None:
            return [no_update, HIDDEN, *words]
        left_out = parse(place["href"])[0].left_out(view.name)
        return [definitions(view, found, left_out), {"height": f"{view.height}px", "width": "100%"}, *words]

    # Which columns are seen is set in the browser: choosing one asks nobody for rows.
    app.clientside_callback(
        ClientsideFunction("moescope", "columns"),
        Output(one("body"), "className"),
        Input("place", "data"),
        Input(one("grid"), "columnDefs"),
        State(one("grid"), "id"),
    )

    # What is shown has changed: the rows that the browser holds are no longer its rows.
    app.clientside_callback(
        ClientsideFunction("moescope", "refill"),
        Output(one("grid"), "className"),
        Input(one("grid"), "columnDefs"),
        State(one("grid"), "id"),
    )

    @app.callback(
        Output(one("grid"), "getRowsResponse"),
        Output(one("tick"), "max_intervals", allow_duplicate=True),
        Input(one("grid"), "getRowsRequest"),
        State(one("wanted"), "id"),
        State("place", "data"),
        State(one("tick"), "n_intervals"),
        prevent_initial_call=True,
    )
    def _rows(request: Any, name: Any, place: Any, ticks: int | None) -> Any:
        view = book.view(name["view"])
        if not request or not place or not isinstance(view, TableView):
            return no_update, no_update
        return rows(lambda: frame(view, place), request, ticks)


def rows(frame: Callable[[], pd.DataFrame], request: Any, ticks: int | None) -> tuple[Any, Any]:
    """(the rows that ag-grid asks for, how often the panel's clock may tick in all).

    Rows that are still to come are not the same as none: the request stays open and the panel's clock ticks once more,
    until the columns are there and the grid asks anew; also where an answer was known once and has been forgotten.
    """
    try:
        found = frame()
    except Pending:
        return no_update, (ticks or 0) + 1
    except (MoescopeError, OSError, pa.ArrowException):  # its panel says why
        return {"rowData": [], "rowCount": 0}, no_update
    chosen = arranged(found, request.get("filterModel"), request.get("sortModel"))
    part = chosen.iloc[request["startRow"] : request["endRow"]]
    return {"rowData": _plain(part), "rowCount": len(chosen)}, no_update


def known(place: Place) -> tuple[Place, list[str]]:
    """The place without columns that no table has, and a word on each of them."""
    strange = [one for one in place.without if not _has(*one.partition(".")[::2])]
    kept = tuple(one for one in place.without if one not in strange)
    words = [f"The address leaves out the column {short(one)!r}, which no table has." for one in strange]
    return replace(place, without=kept), words


def _has(table: str, column: str) -> bool:
    """Whether there is such a table, with such a column as far as its columns are fixed."""
    try:
        view = book.view(table)
    except MoescopeError:
        return False
    return isinstance(view, TableView) and bool(column) and (view.columns is None or column in view.columns)


def definitions(view: TableView, frame: pd.DataFrame, left_out: Sequence[str] = ()) -> list[dict[str, Any]]:
    """Column definitions: numbers to the right with their format, text with a text filter; some left out of sight."""
    shown = view.columns or {str(name): (str(name), "") for name in frame.columns}
    found = []
    for name, (heading, form) in shown.items():
        if name not in frame or (name == "site" and view.columns is not None and _of_one_router(frame)):
            continue
        number = pd.api.types.is_numeric_dtype(frame[name])
        column: dict[str, Any] = {
            "field": name,
            "headerName": heading,
            "hide": name in left_out,
            "filter": "agNumberColumnFilter" if number else "agTextColumnFilter",
        }
        if name == "site":
            column["minWidth"] = 124  # "L003-self_attention" is told from "L003-mlp"
        if number:
            column["type"] = "rightAligned"
            if view.columns is None and pd.api.types.is_float_dtype(frame[name]):
                form = _format(frame[name])
            if form:
                column["valueFormatter"] = {
                    "function": f"params.value == null ? '' : d3.format('{form}')(params.value)"
                }
        found.append(column)
    return found


def _of_one_router(frame: Any) -> bool:
    """Whether the layers' numbers name their routers: then the sites' keys say no more."""
    sites = zip(frame["layer"], frame["site"], strict=True)
    return all(layer_name(layer, str(site)) != site for layer, site in set(sites))


def _format(values: Any) -> str:
    """Whole numbers whole, large ones with one decimal, others with four digits that count."""
    held = values[np.isfinite(values)]
    if (held == held.round()).all():
        return ",.0f"
    return ",.1f" if held.abs().max() >= 1e4 else ".4~g"


def arranged(frame: Any, filters: Any, order: Any) -> pd.DataFrame:
    """The rows that ag-grid's filter model keeps, in the order of its sort model.

    Raises:
        MoescopeError: the models name a column that there is not, or a filter that is not known.
    """
    for column, rule in (filters or {}).items():
        if column not in frame:
            raise MoescopeError(f"The table has no column {column!r}.")
        if "conditions" in rule:
            kept = [_kept(frame[column], condition) for condition in rule["conditions"]]
            both = kept[0] & kept[1] if rule.get("operator") == "AND" else kept[0] | kept[1]
            frame = frame[both]
        else:
            frame = frame[_kept(frame[column], rule)]
    keys = [(rule["colId"], rule["sort"] == "asc") for rule in order or [] if rule["colId"] in frame]
    if keys:
        frame = frame.sort_values([key for key, _ in keys], ascending=[up for _, up in keys], kind="stable")
    return frame


def _kept(values: Any, rule: dict[str, Any]) -> Any:
    kind, wanted = rule["type"], rule.get("filter")
    if kind in ("blank", "notBlank"):
        empty = values.isna() | (values.astype(str) == "")
        return empty if kind == "blank" else ~empty
    if rule.get("filterType") == "number":
        number: Any = pd.to_numeric(values, errors="coerce")
        tests = {
            "equals": lambda: number == wanted,
            "notEqual": lambda: number != wanted,
            "lessThan": lambda: number < wanted,
            "lessThanOrEqual": lambda: number <= wanted,
            "greaterThan": lambda: number > wanted,
            "greaterThanOrEqual": lambda: number >= wanted,
            "inRange": lambda: (number >= wanted) & (number <= rule["filterTo"]),
        }
    else:
        text, word = values.fillna("").astype(str).str.lower(), str(wanted).lower()
        tests = {
            "contains": lambda: text.str.contains(word, regex=False),
            "notContains": lambda: ~text.str.contains(word, regex=False),
            "equals": lambda: text == word,
            "notEqual": lambda: text != word,
            "startsWith": lambda: text.str.startswith(word),
            "endsWith": lambda: text.str.endswith(word),
        }
    if kind not in tests:
        raise MoescopeError(f"The table has no filter {kind!r}.")
    return tests[kind]()


def rows_of(view: TableView, scene: Scene, filters: Any, order: Any) -> Any:
    """What a table shows, for export: without the columns that are left out.

    Raises:
        MoescopeError: the models are none of ag-grid's.
    """
    whole = view.frame(scene)
    try:
        frame = arranged(whole, filters, order)
    except (AttributeError, IndexError, KeyError, TypeError) as error:
        raise MoescopeError("The filters or the order of rows in this address cannot be read.") from error
    names = [name for name in (view.columns or frame.columns) if name in frame]
    left_out = scene.place.left_out(view.name)
    return frame[[name for name in names if name not in left_out] or names]


def _plain(part: pd.DataFrame) -> list[dict[str, Any]]:
    """Rows as JSON takes them; what is missing is null."""
    return part.astype(object).where(part.notna(), None).to_dict("records")
