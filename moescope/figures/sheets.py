"""A figure collected as plain settings and checked by plotly once: checked at every step it would cost many times that.

`Sheet` has the methods of a plotly figure, with nested settings instead of names joined by underscores.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import cache, lru_cache
from typing import Any

import plotly.graph_objects as go
from plotly.subplots import make_subplots

from moescope.figures.theme import Mode, template

_template = cache(template)  # plotly copies it into each figure


class Sheet:
    """Panels in rows and columns, numbered from 1, each with its title at its left edge.

    Attributes:
        layout: plotly's settings so far, without the template.
        traces: what is drawn so far.
    """

    def __init__(self, titles: Sequence[str] = (), **geometry: Any) -> None:
        """Empty panels.

        Args:
            titles: of the panels, row by row; the last may have none.
            geometry: as `plotly.subplots.make_subplots` takes it; one panel without any.
        """
        self.layout: dict[str, Any] = {"xaxis": {}, "yaxis": {}}
        self.traces: list[Any] = []
        self._axes: dict[tuple[int, int], tuple[str, str]] = {(1, 1): ("xaxis", "yaxis")}
        if geometry or titles:
            # Told of titles, plotly leaves room for them.
            text, self._axes = _panels(json.dumps(geometry | ({"subplot_titles": ["…"]} if titles else {})))
            self.layout = json.loads(text)
        for title, (across, down) in zip(titles, list(self._axes.values())[: len(titles)], strict=True):
            self.add_annotation(
                text=title, x=self.layout[across]["domain"][0], y=self.layout[down]["domain"][1], xref="paper",
                yref="paper", xanchor="left", yanchor="bottom", showarrow=False, align="left", font={"size": 13},
            )  # fmt: skip

    def add_trace(self, trace: Any, row: int = 1, col: int = 1) -> None:
        """Draws a trace in a panel."""
        across, down = self._axes[row, col]
        if len(self._axes) > 1:
            trace.xaxis, trace.yaxis = across.replace("axis", ""), down.replace("axis", "")
        self.traces.append(trace)

    def update_xaxes(self, settings: dict[str, Any] | None = None, /, row: int = 0, col: int = 0, **more: Any) -> None:
        """Settings of the x axis of a panel, or of a whole row or column or of all (0)."""
        self._axis(0, settings or {}, row, col, more)

    def update_yaxes(self, settings: dict[str, Any] | None = None, /, row: int = 0, col: int = 0, **more: Any) -> None:
        """Settings of the y axis of a panel, or of a whole row or column or of all (0)."""
        self._axis(1, settings or {}, row, col, more)

    def update_layout(self, **settings: Any) -> None:
        """Settings of the whole figure."""
        _merge(self.layout, settings)

    def add_annotation(self, **settings: Any) -> None:
        """A word on the figure."""
        self.layout.setdefault("annotations", []).append(settings)

    def add_shape(self, **settings: Any) -> None:
        """A line or a box on the figure."""
        self.layout.setdefault("shapes", []).append(settings)

    def add_vline(self, x: float, row: int = 1, col: int = 1, **settings: Any) -> None:
        """A line at `x` from the bottom of a panel to its top."""
        across, down = (name.replace("axis", "") for name in self._axes[row, col])
        self.add_shape(type="line", x0=x, x1=x, y0=0, y1=1, xref=across, yref=f"{down} domain", **settings)

    def axes(self, row: int = 1, col: int = 1) -> tuple[dict[str, Any], dict[str, Any]]:
        """The settings so far of a panel's (x, y) axis."""
        across, down = self._axes[row, col]
        return self.layout[across], self.layout[down]

    def figure(self, mode: Mode = "light") -> go.Figure:
        """What was collected, checked."""
        return go.Figure(data=self.traces, layout=self.layout | {"template": _template(mode)})

    def _axis(self, which: int, settings: dict[str, Any], row: int, col: int, more: dict[str, Any]) -> None:
        for (its_row, its_column), names in self._axes.items():
            if row in (0, its_row) and col in (0, its_column):
                _merge(self.layout[names[which]], settings)
                _merge(self.layout[names[which]], more)


@lru_cache(maxsize=64)
def _panels(geometry: str) -> tuple[str, dict[tuple[int, int], tuple[str, str]]]:
    """(plotly's axes of so many panels, as JSON; the names of the axes of each), row by row."""
    given = json.loads(geometry)
    figure: Any = make_subplots(**given)
    names = {}
    for row in range(1, given.get("rows", 1) + 1):
        for col in range(1, given.get("cols", 1) + 1):
            if panel := figure.get_subplot(row, col):
                names[row, col] = panel.xaxis.plotly_name, panel.yaxis.plotly_name
    layout = figure.layout.to_plotly_json()
    return json.dumps({name: layout[name] for pair in names.values() for name in pair}), names


def _merge(into: dict[str, Any], more: dict[str, Any]) -> None:
    """Settings inside settings are joined, others replaced."""
    for name, value in more.items():
        if isinstance(value, dict) and isinstance(into.get(name), dict):
            into[name] = dict(into[name])
            _merge(into[name], value)
        else:
            into[name] = value
