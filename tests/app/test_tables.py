"""Tables: ag-grid's filters and sorting on the server agree with doing it by hand."""

from __future__ import annotations

import threading
import time

import numpy as np
import pandas as pd
import pytest
from dash import no_update
from hypothesis import given
from hypothesis import strategies as st

from moescope.app import book
from moescope.app.answers import Answers
from moescope.app.jobs import Jobs
from moescope.app.place import Place
from moescope.app.tables import arranged, definitions, known, rows
from moescope.app.views import TableView
from moescope.errors import MoescopeError

_FRAME = pd.DataFrame(
    {"layer": [0, 0, 1, 1, 2], "value": [0.5, np.nan, -1.0, 2.0, 0.5], "word": ["Ab", "b.", None, "c", "abc"]}
)


def _number(kind, value, to=None):
    return {"filterType": "number", "type": kind, "filter": value, "filterTo": to}


@given(
    st.sampled_from(["equals", "notEqual", "lessThan", "lessThanOrEqual", "greaterThan", "greaterThanOrEqual"]),
    st.sampled_from([-1.0, 0.0, 0.5, 2.0]),
)
def test_numbers_are_compared_as_python_does(kind, value):
    tests = {
        "equals": lambda x: x == value, "notEqual": lambda x: x != value, "lessThan": lambda x: x < value,
        "lessThanOrEqual": lambda x: x <= value, "greaterThan": lambda x: x > value,
        "greaterThanOrEqual": lambda x: x >= value,
    }  # fmt: skip
    kept = arranged(_FRAME, {"value": _number(kind, value)}, None)
    assert list(kept.index) == [row for row, x in enumerate(_FRAME["value"]) if tests[kind](x)]


@pytest.mark.parametrize(
    ("rule", "rows"),
    [
        ({"filterType": "text", "type": "contains", "filter": "B"}, [0, 1, 4]),
        ({"filterType": "text", "type": "contains", "filter": "."}, [1]),
        ({"filterType": "text", "type": "startsWith", "filter": "ab"}, [0, 4]),
        ({"filterType": "text", "type": "equals", "filter": "C"}, [3]),
        ({"filterType": "text", "type": "blank"}, [2]),
        (
            {
                "operator": "OR",
                "conditions": [
                    {"filterType": "text", "type": "equals", "filter": "c"},
                    {"filterType": "text", "type": "endsWith", "filter": "."},
                ],
            },
            [1, 3],
        ),
    ],
)
def test_words_are_found_as_written(rule, rows):
    assert list(arranged(_FRAME, {"word": rule}, None).index) == rows


def test_rows_are_sorted_by_several_columns_and_missing_ones_come_last():
    order = [{"colId": "value", "sort": "desc"}, {"colId": "layer", "sort": "asc"}]
    assert list(arranged(_FRAME, None, order).index) == [3, 0, 4, 2, 1]


def test_unknown_columns_and_filters_are_refused():
    with pytest.raises(MoescopeError, match="no column 'x'"):
        arranged(_FRAME, {"x": _number("equals", 1)}, None)
    with pytest.raises(MoescopeError, match="no filter 'like'"):
        arranged(_FRAME, {"value": _number("like", 1)}, None)


def test_columns_carry_their_heading_and_format():
    view = TableView(
        "t", "T", "", (), frame=lambda scene: _FRAME, columns={"value": ("a value", ".2f"), "gone": ("x", "")}
    )
    (column,) = definitions(view, _FRAME)
    assert column["headerName"] == "a value"
    assert column["filter"] == "agNumberColumnFilter"
    assert ".2f" in column["valueFormatter"]["function"]


def test_columns_left_out_are_of_tables_that_there_are():
    good = ("experts.ean", "cells.p", "rows.of_any_question")
    assert getattr(book.view("rows"), "columns", ()) is None
    place, words = known(Place("expert", "a", without=(*good, "experts.klingon", "gone.p", "load.p", "experts", "")))
    assert place.without == good
    assert [word.split("'")[1] for word in words] == ["experts.klingon", "gone.p", "load.p", "experts", ""]


def test_rows_that_were_forgotten_stay_open_and_are_never_none():
    answers, go = Answers(Jobs()), threading.Event()

    def frame():
        return answers.ask("rows", "counting", lambda: go.wait(60) and _FRAME, patience=0.01)

    request = {"startRow": 0, "endRow": 2}
    assert rows(frame, request, 3) == (no_update, 4)
    go.set()
    while (answer := rows(frame, request, 4))[0] is no_update:
        time.sleep(0.01)
    assert answer[0]["rowCount"] == len(_FRAME)
    assert len(answer[0]["rowData"]) == 2
    assert answer[1] is no_update
