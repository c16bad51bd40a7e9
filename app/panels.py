"""A view's frame on the page: heading, how to read it, full window, save; and the parts that callbacks fill."""

from __future__ import annotations

from typing import Any

import dash_ag_grid as dag
import dash_mantine_components as dmc
from dash import dcc, html

from moescope.app.aria import SILENT, named, titled_by
from moescope.app.scene import Scene
from moescope.app.views import BlockView, FigureView, Page, TableView, View
from moescope.figures.pages import CONFIG

MODEBAR = {"bgcolor": "rgba(0,0,0,0)", "color": "#8b919a", "activecolor": "#3f84c9"}
"""Colours of a figure's buttons, on either page."""
HIDDEN, SHOWN = {"display": "none"}, {}
"""Styles of a part that is there, and seen only at times."""


def part(kind: str, view: View) -> dict[str, str]:
    """The id of one part of a panel."""
    return {"type": kind, "of": kind_of(view), "view": view.name}


def kind_of(view: View) -> str:
    """ "figure", "block" or "table": each kind is filled by a callback of its own."""
    return "figure" if isinstance(view, FigureView) else "table" if isinstance(view, TableView) else "block"


def grid_of(page: Page, scene: Scene, at_hand: dict[str, tuple[Any, list[Any]]]) -> Any:
    """The panels of a page that are shown; `?full=` fills the window with one.

    Args:
        page: which.
        scene: where we are.
        at_hand: what is drawn already, by view: the components or the figure, and the key of what they show.
    """
    shown = page.shown(scene.place, scene.store)
    columns = [
        dmc.GridCol(panel(view, scene, *at_hand.get(view.name, (None, None))), span={"base": 12, "md": view.width})
        for view in shown
    ]
    return dmc.Grid(columns, gutter="md")


def panel(view: View, scene: Scene, drawn: Any = None, key: list[Any] | None = None) -> Any:
    """One panel, empty until its callback has drawn it, unless it is `drawn` already, of what `key` says."""
    if isinstance(view, FigureView):
        bound = {} if view.tallest is None else {"maxHeight": f"{view.tallest}px", "overflowY": "auto"}
        body: Any = html.Div(
            _graph(view, drawn),
            id=part("body", view),
            className="panel-figure",
            style=bound,
            tabIndex=stop(view, drawn),
        )
    elif isinstance(view, TableView):
        body = html.Div(_table(view), id=part("body", view), className="panel-table")
    else:
        body = html.Div(drawn, id=part("body", view), className="panel-block")
    state = [
        dcc.Store(id=part("wanted", view), data=key),
        dcc.Store(id=part("reads", view), data=view.follows),
        dcc.Store(id=part("act", view)),
        dcc.Store(id=part("job", view)),
        dcc.Interval(id=part("tick", view), max_intervals=0),
    ]
    inside = [*([] if _bare(view) else [_head(view, scene)]), html.Div(id=part("note", view), role="status"), body]
    return html.Section(
        [*inside, *state],
        id=f"panel-{view.name}",
        className="panel bare" if _bare(view) else "panel",
        **(named(view.title) if _bare(view) else titled_by(f"title-{view.name}")),
    )


def note(message: str, trouble: bool = False, retry: View | None = None, way: Any = None) -> Any:
    """A word of why a panel is empty, or of what went wrong; and a link that leads on."""
    button = (
        dmc.Button("Try again", size="compact-xs", variant="light", **_act("retry", retry))
        if retry is not None
        else None
    )
    return dmc.Alert(
        dmc.Group(
            [html.Span([message] if way is None else [message, way]), *([button] if button else [])],
            justify="space-between",
        ),
        color="red" if trouble else "gray",
        variant="light",
        className="note",
    )


def progress(view: View, title: str, what: str, done: int, total: int) -> Any:
    """Long work on its way, and a button that stops it."""
    shown = f"{what}: {done:,} of {total:,}" if total else what
    mark = ":" if shown and title[-1:].isalnum() else ""
    return html.Div(
        [
            dmc.Group(
                [
                    dmc.Text(f"{title}{mark} {shown}".strip(), size="sm"),
                    dmc.Button("Cancel", size="compact-xs", variant="default", **_act("cancel", view)),
                ],
                justify="space-between",
            ),
            dmc.Progress(
                value=100 * done / total if total else 100,
                striped=not total,
                animated=not total,
                size="sm",
                **named(title),
            ),
        ],
        className="note pending",
    )


def _bare(view: View) -> bool:
    return isinstance(view, BlockView) and view.bare


def plot_config(lasso: bool = False) -> Any:
    """What every figure of the app lets its reader do."""
    removed = ["autoScale2d", "toImage", *([] if lasso else ["lasso2d", "select2d"])]
    return CONFIG | {"responsive": True, "modeBarButtonsToRemove": removed}


def _graph(view: FigureView, drawn: dict[str, Any] | None) -> Any:
    shown: dict[str, Any] = {"style": HIDDEN} if drawn is None else {"figure": drawn, "style": frame_of(drawn)}
    return dcc.Graph(id=part("graph", view), config=plot_config(lasso=view.select is not None), **shown)


def frame_of(figure: dict[str, Any]) -> dict[str, str]:
    """As tall as the figure says: its frame must not be lower, whoever draws it again in the browser."""
    height = figure["layout"].get("height")
    return {"display": "block"} | ({"minHeight": f"{height}px"} if height else {})


def stop(view: View, figure: dict[str, Any] | None) -> str | None:
    """A panel that scrolls is a stop of the keyboard, so that its keys scroll it; others are none."""
    height = figure["layout"].get("height") if figure else None
    tallest = view.tallest if isinstance(view, FigureView) else None
    return "0" if tallest is not None and (height or 0) > tallest else None


def _table(view: TableView) -> Any:
    return dag.AgGrid(
        id=part("grid", view),
        rowModelType="infinite",
        columnDefs=[],
        defaultColDef={
            "resizable": True,
            "sortable": True,
            "filter": True,
            "floatingFilter": True,
            "wrapHeaderText": True,
            "autoHeaderHeight": True,
            "minWidth": 76,
            "flex": 1,
        },
        dashGridOptions={
            "theme": {"function": "themeOfPage(themeQuartz)"},
            "cacheBlockSize": 100,
            "maxBlocksInCache": 20,
            "maxConcurrentDatasourceRequests": -1,  # a request for rows that are still to come is never answered
            "rowSelection": {"mode": "singleRow", "checkboxes": False, "enableClickSelection": True},
            "animateRows": False,
            # All columns at once: a table that is filled while it is out of sight would otherwise stay without any.
            "suppressColumnVirtualisation": True,
            "suppressDragLeaveHidesColumns": True,  # the address says which columns are seen
            "enableCellTextSelection": True,
        },
        style={"height": f"{view.height}px", "width": "100%"},
        className="panel-grid",
    )


def _head(view: View, scene: Scene) -> Any:
    tools = []
    if view.how:
        tools.append(
            html.Details(
                [
                    html.Summary("?", title="How to read it", **named(f"How to read {view.title}")),
                    html.Div(view.how, className="how"),
                ],
                className="how-to-read",
            )
        )
    if isinstance(view, FigureView):
        tools.append(_tool("Save as one HTML file", "⤓", **_act("save", view)))
    if isinstance(view, TableView):
        tools.append(_columns(view))
        tools.append(dmc.Button("CSV", size="compact-xs", variant="subtle", color="gray", **_act("csv", view)))
        tools.append(dmc.Button("Parquet", size="compact-xs", variant="subtle", color="gray", **_act("parquet", view)))
    tools.append(_tool("Fill the window (Escape leaves)", "⤢", **_act("full", view)))
    for field, badge, words in _UNHEEDED if scene.place.page != "lab" else ():
        # A document is shown as it stands, whatever phase or value is selected.
        if field not in view.reads and (field == "slice" or "doc" not in view.reads):
            tools.insert(0, html.Span(badge, className=f"un{field} badge", title=words))
    heading: list[Any] = [dmc.Title(view.title, order=2, size="h5", id=f"title-{view.name}")]
    if view.controls:
        heading.append(html.Div([control(scene) for control in view.controls], className="panel-controls"))
    return html.Header([*heading, dmc.Group(tools, gap=2, className="panel-tools")], className="panel-head")


_UNHEEDED = (
    ("slice", "not sliced", "Not of the slice: this panel counts all documents, or none"),
    ("phase", "both phases", "Not of the phase: this panel counts prefill and decode together, or no tokens"),
    ("label", "all values", "Not of the selected value: this panel counts the documents of all values, or none"),
)
"""Of the selection, what a panel may not follow: (field, badge, why); the badge is seen while something is selected."""


def _columns(view: TableView) -> Any:
    """What chooses the table's columns; the page's script fills it when it is opened."""
    summary = html.Summary("Columns", title="Choose columns", **named(f"Choose columns of {view.title}"))
    return html.Details(
        [summary, html.Div(className="how", role="group", **named("Columns"))],
        className="how-to-read columns",
        **{"data-columns": view.name},  # pyright: ignore[reportArgumentType]
    )


def _tool(label: str, sign: str, **more: Any) -> Any:
    return dmc.ActionIcon(
        html.Span(sign, **SILENT),
        variant="subtle",
        color="gray",
        size="sm",
        **named(label),
        attributes={"root": {"title": label}},
        **more,
    )


def _act(what: str, view: View) -> dict[str, Any]:
    """Attributes that the page's script answers to: what to do, in which panel."""
    return {"data-act": what, "data-of": kind_of(view), "data-view": view.name}
