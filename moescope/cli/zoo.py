"""`moescope doctor --zoo`: the self-check on a tiny model of every family, from the repository's tests."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Any

import moescope
from moescope.cli import screen
from moescope.errors import MoescopeError


def report(json: bool) -> None:
    """Print what capture makes of every family of transformers.

    Raises:
        MoescopeError: MoEscope is installed without its repository.
    """
    table = _table()
    rows = [table.row(name) for name in screen.track(table.names(), "families")]
    if json:
        screen.print_json(rows)
        return
    cells = [tuple(_cell(row.get(name)) for name in table.COLUMNS) for row in rows]
    screen.table(table.COLUMNS, cells, numbers=("sites", "rebuild error"))


def _table() -> Any:
    root = Path(moescope.__file__).parents[1]
    if not (root / "tests" / "zoo" / "table.py").is_file():
        raise MoescopeError("doctor --zoo needs a clone of MoEscope's repository: its tiny models stand in tests/zoo.")
    if str(root) not in sys.path:
        sys.path.insert(0, str(root))
    return importlib.import_module("tests.zoo.table")


def _cell(value: object) -> str:
    return "" if value is None else f"{value:.1e}" if isinstance(value, float) else str(value)
