"""Tables as CSV that a spreadsheet may open: tokens and labels come from corpora, and it would run some as formulas."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import pandas as pd

_FORMULA = ("=", "+", "-", "@", "\t", "\r", "\n", "\uff1d", "\uff0b", "\uff0d", "\uff20")
"""What a spreadsheet takes for the beginning of a formula, or skips before one: OWASP, CSV Injection."""
_LINE_END = "\r\n"
"""As in RFC 4180: with "\\n" alone a token "\\r" would not be quoted, and would break its row."""


def as_csv(rows: pd.DataFrame) -> str:
    """Rows as CSV, without their index; text that a spreadsheet would run as a formula gets a quote before it.

    A text (or heading) that begins with =, +, -, @, a tab or a line's end has a single quote put before it, as OWASP
    advises; numbers are as they are. JSON and Parquet hold every text as it is.
    """
    return _harmless(rows).to_csv(index=False, lineterminator=_LINE_END)


def write_csv(rows: pd.DataFrame, file: Path) -> None:
    """The same into a file; compressed where its name says so (.gz, .zst, …).

    Raises:
        OSError: it cannot be written.
    """
    _harmless(rows).to_csv(file, index=False, lineterminator=_LINE_END)


def _harmless(rows: pd.DataFrame) -> pd.DataFrame:
    def plain(cell: Any) -> Any:
        return f"'{cell}" if isinstance(cell, str) and cell.startswith(_FORMULA) else cell

    safe = rows.rename(columns=plain)
    for place, kind in enumerate(safe.dtypes):
        if kind.kind not in "biufM":
            cells = np.empty(len(safe), dtype=object)
            cells[:] = [plain(cell) for cell in safe.iloc[:, place]]
            safe.isetitem(place, cells)
    return safe
