"""What a page is made of: figures, blocks of words, and tables; each says what it follows and how to read it.

A view is a function of a `Scene` and of nothing else. It is drawn again only when a field of the place that it
`reads` changes, so that no panel resets from its own click.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from moescope.app.answers import Pending
from moescope.app.place import Place, coerced
from moescope.app.scene import Scene
from moescope.errors import MoescopeError

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go

    from moescope.store import Store


class ElsewhereError(MoescopeError):
    """What cannot be shown here, and where it can.

    Attributes:
        there: the place.
        way: what its link says.
    """

    def __init__(self, message: str, there: Place, way: str) -> None:
        super().__init__(message)
        self.there, self.way = there, way


@dataclass(frozen=True)
class View:
    """One panel.

    Attributes:
        name: unique in the app; names it in `?hide=` and `?full=`.
        title: its heading.
        how: how to read it, one or two sentences; "" where the words say it themselves.
        reads: the fields of the place that it follows, besides the store.
        width: of twelve columns.
        controls: what chooses what this panel alone shows, in its heading, each from a scene (`moescope.app.controls`).
        needs: fields of the place without which there is nothing to show: the panel is not there until they are chosen.
        fits: whether there is something to show at a place that has all that; None: always.
        held: whether a store holds what it is drawn from, where another panel says what to do if not; None: any store.
        themed: it is drawn otherwise on a dark page.
    """

    name: str
    title: str
    how: str
    reads: tuple[str, ...]
    width: int = 12
    controls: tuple[Callable[[Scene], Any], ...] = ()
    needs: tuple[str, ...] = ()
    fits: Callable[[Place], bool] | None = None
    held: Callable[[Store], bool] | None = None
    themed: bool = False

    @property
    def follows(self) -> list[str]:
        """What the browser watches for this panel, besides the store."""
        return [*self.reads, *(["theme"] if self.themed else [])]


@dataclass(frozen=True)
class FigureView(View):
    """A plotly figure from `moescope.figures`.

    Attributes:
        draw: the figure.
        click: where a click on a point leads: (place, plotly's point) -> place; None: nowhere.
        pick: the same as `click` for what the point alone does not say: (scene, plotly's point) -> place.
        select: what a lasso does: (scene, plotly's points) -> place.
        marks: how the selected expert is outlined: "cell" where a map's axes are expert and layer, "row" where y is an
            expert of the selected layer; a figure of points says itself that it has them.
        tallest: pixels of its panel: a figure that is taller scrolls in it; None: the panel is as tall as the figure.
    """

    themed: bool = True
    draw: Callable[[Scene], go.Figure] = None  # pyright: ignore[reportAssignmentType]
    click: Callable[[Place, dict[str, Any]], Place | None] | None = None
    pick: Callable[[Scene, dict[str, Any]], Place | None] | None = None
    select: Callable[[Scene, list[dict[str, Any]]], Place | None] | None = None
    marks: Literal["", "cell", "row"] = ""
    tallest: int | None = None


@dataclass(frozen=True)
class Partial:
    """What a block can show already, while an answer that it waits for is on its way.

    Attributes:
        shown: the components.
        pending: the answer.
    """

    shown: Any
    pending: Pending


@dataclass(frozen=True)
class BlockView(View):
    """Words, tokens, cards: Dash components, in which text is text (React escapes it); or a `Partial` of them.

    Attributes:
        draw: the components.
        bare: without a frame.
    """

    draw: Callable[[Scene], Any] = None  # pyright: ignore[reportAssignmentType]
    bare: bool = False


@dataclass(frozen=True)
class TableView(View):
    """A table that filters, sorts and pages on the server, and exports what it shows.

    Attributes:
        frame: the whole table; columns named "layer" and "expert" make its rows lead to that expert.
        columns: column -> (heading, plotly-style number format such as ".2f", or ""); the order shown.
        go: where a click on a row leads; None: to its expert, if it has one.
        height: in pixels.
    """

    frame: Callable[[Scene], pd.DataFrame] = None  # pyright: ignore[reportAssignmentType]
    columns: dict[str, tuple[str, str]] | None = None
    go: Callable[[Place, dict[str, Any]], Place | None] | None = None
    height: int = 420


@dataclass(frozen=True)
class Page:
    """One page of a store.

    Attributes:
        name: one of `moescope.app.place.PAGES`.
        title: in the menu.
        question: what it answers, one line under the title.
        views: its panels in reading order; rows fill twelve columns.
        controls: what it needs beside the common controls, each from a scene (`moescope.app.controls`).
        register: adds callbacks of its own: (dash app, desk).
        choices: what there is to choose from in its own controls, by field, where that changes with the place: values,
            or [value, shown text].
    """

    name: str
    title: str
    question: str
    views: tuple[View, ...]
    controls: tuple[Callable[[Scene], Any], ...] = ()
    register: Callable[[Any, Any], None] | None = None
    choices: Callable[[Scene], dict[str, Any]] | None = None

    def shown(self, place: Place, store: Store | None = None) -> list[View]:
        """The panels that are there: not those that `?hide=` names, nor those with nothing to show (in this store)."""
        return [
            view
            for view in self.views
            if view.name not in place.hide
            and all(getattr(place, name) is not None for name in view.needs)
            and (view.fits is None or view.fits(place))
            and (view.held is None or store is None or view.held(store))
        ]


def to_expert(place: Place, point: dict[str, Any]) -> Place | None:
    """The click of every map of layers and experts: selects that expert (its x is the expert, its y the layer)."""
    try:
        expert, layer = float(point["x"]), coerced("layer", str(point["y"]))
    except (KeyError, TypeError, ValueError):
        return None
    # Between two experts is what a layer does not have: the hatched bar at its end.
    return place.go(layer=layer, expert=int(expert)) if layer is not None and expert.is_integer() else None


def to_texts(place: Place, row: dict[str, Any]) -> Place | None:
    """The click on a token of a table: finds its text in the store's documents."""
    words = str(row.get("text") or "").strip()
    return place.go(page="text", find=words, doc=None, full=None) if words else None
