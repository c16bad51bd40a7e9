"""A figure as one HTML file, which opens without a network and sends nothing over one."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import plotly.graph_objects as go

CONFIG: dict[str, Any] = {"displaylogo": False, "showSendToCloud": False, "plotlyServerURL": ""}
"""What a figure is drawn with: left alone, plotly 7 offers under every figure to upload it to its maker's cloud."""


def page(figure: go.Figure) -> str:
    """The HTML of a page with the figure and with plotly itself (about 5 MB)."""
    return figure.to_html(include_plotlyjs=True, config=CONFIG)


def save(figure: go.Figure, path: str | Path) -> None:
    """Writes `page` to a file."""
    Path(path).write_text(page(figure), encoding="utf-8")
