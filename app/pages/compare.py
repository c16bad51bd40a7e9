"""Compare: one store with another of the same tokens, before and after edits, and one set of texts with another."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from dash import html

from moescope import analysis, figures
from moescope.analysis.cards import parsed
from moescope.analysis.labelled import table
from moescope.app import controls, slicing
from moescope.app.expert_words import where_of, worded
from moescope.app.labels import label_values
from moescope.app.links import to
from moescope.app.place import Place
from moescope.app.scene import Scene
from moescope.app.shelf import Opened
from moescope.app.slicing import where_of_slice
from moescope.app.views import BlockView, FigureView, Page, TableView, to_expert
from moescope.errors import MoescopeError
from moescope.figures.comparing import LOSS
from moescope.figures.comparing import READ as READ_COMPARED
from moescope.figures.risk import READ as READ_RISK

if TYPE_CHECKING:
    import pandas as pd
    import xarray as xr

_TEXTS = ("by", "label", "phase", "slices", "slice")
_STORES = ("other", *_TEXTS)


def _pair(scene: Scene) -> Any:
    """The two stores side by side, with the edits under which each was captured; or which there are to choose from."""
    place = scene.place
    if place.other is None:
        names = _alike(scene)
        words = "Compare this store with another of its model, before and after a recipe, for instance: "
        none = (
            "No other store in this folder is of this model. `moescope capture` under `--recipe` makes one to compare "
            "with."
        )
        links = [to(place.go(other=name), name, className="tally") for name in names[:12]]
        inside: list[Any] = [words, html.Span(links, className="tallies inline")] if names else worded(none)
        return html.Article(html.Div(inside, className="dim"), className="panel finding counted")
    other = scene.other()
    if other.name == scene.opened.name:
        raise MoescopeError("This is the same store: choose another to compare it with.")
    swapped = place.go(store=other.name, page="compare", other=scene.opened.name)
    return html.Div(
        [
            _side(scene.opened, "First", None),
            _side(other, "Second", to(swapped, "exchange the two", title="Make the second store the first")),
        ],
        className="two-sides",
    )


def _alike(scene: Scene) -> list[str]:
    """The other stores whose layers and experts are this store's: what can be compared expert by expert."""
    found = []
    for name in scene.desk.shelf.names():
        try:
            other = scene.desk.shelf.open(name)
        except MoescopeError:  # a damaged store is named on the page of stores
            continue
        same = other.store.manifest.model.name == scene.store.manifest.model.name
        shapes = [[(site.key, site.n_experts) for site in one.store.sites] for one in (other, scene.opened)]
        if name != scene.opened.name and same and shapes[0] == shapes[1]:
            found.append(name)
    return found


def _side(opened: Opened, role: str, link: Any) -> Any:
    store, manifest = opened.store, opened.store.manifest
    edits = edits_of(opened)
    listed = (
        html.Ul([html.Li(edit) for edit in edits], className="side-edits")
        if edits
        else html.Div("captured without edits", className="dim")
    )
    about = (
        f"{manifest.model.name}; {store.n_tokens:,} tokens of {store.n_documents:,} documents; {', '.join(store.tiers)}"
    )
    head = [html.Span(role, className="dim"), html.Strong(opened.name), *([link] if link is not None else [])]
    return html.Article(
        [html.Div(head, className="side-head"), html.Div(about, className="dim"), listed],
        className="panel finding counted",
    )


def edits_of(opened: Opened) -> list[str]:
    """The edits that were live when a store was captured, one line each."""
    manifest = opened.store.manifest
    return [str(edit) for edit in manifest.settings.get("edits") or []]


def _compared(scene: Scene, by: str | None = None) -> xr.Dataset:
    where = where_of(scene) if by is None else scene.where
    return scene.ask("compare", scene.other(), by=by, where=where, phase=scene.place.phase)


def _agreement(scene: Scene) -> Any:
    return figures.compare(_compared(scene))


def _labels(scene: Scene) -> pd.DataFrame:
    if scene.by is None:
        raise MoescopeError("The store has no labels: there is nothing to tell its documents apart by.")
    return table(_compared(scene, scene.by), ["label"])


def _moved(scene: Scene) -> pd.DataFrame:
    frame: Any = table(_compared(scene), ["layer", "expert", "label"]).drop(columns="label")
    order = frame["share_change"].abs().sort_values(ascending=False, kind="stable", na_position="last").index
    return frame.loc[order].reset_index(drop=True)


def _between(scene: Scene) -> Any:
    other = scene.other()
    names = (scene.opened.name, other.name)
    asked = {"names": names, "where": where_of(scene), "phase": scene.place.phase}
    return figures.risk_difference_between(scene.ask("risk_difference_between", other, **asked))


def sets_of(scene: Scene) -> tuple[dict[str, Any], dict[str, Any] | None, tuple[str, str]]:
    """The two sets of texts of the place: (first, second, their names); a second of None is all other documents.

    The first is what the selection keeps: the value, of the slice if one is active. The second is another value (of
    the same slice), or another slice; by default all other values, or all other documents.

    Raises:
        MoescopeError: nothing is selected, or the two are one.
    """
    place, by = scene.place, scene.by
    first = where_of(scene)
    if first is None:
        what = "a slice" if by is None else "a value of the label, or a slice,"
        raise MoescopeError(f"Select {what} above: that is the first set of texts; “Against” chooses the second.")
    name = " of ".join(part for part in (place.label, place.slice and f"slice {place.slice}") if part)
    against = place.against
    if against is not None and against.startswith("slice:"):
        wanted = against.removeprefix("slice:")
        second = where_of_slice(place, wanted)
        if wanted == place.slice and place.label is None:
            raise MoescopeError("Both sets are the same slice: choose another to hold it against.")
        return first, second, (name, f"slice {wanted}")
    inside = None if by is None else (scene.where or {}).get(by)
    known = [value for value in label_values(scene) if inside is None or place.label is None or value in inside]
    if against is not None and by is not None:
        if against == place.label:
            raise MoescopeError(f"Both sets are {against!r}: choose another value to hold it against.")
        if against not in known:
            of = "" if against not in label_values(scene) else f" of the slice {place.slice!r}"
            raise MoescopeError(f"No document{of} has {against!r} as its {by}.")
        kept = (scene.where or {}) if place.label is not None else {}
        return first, kept | {by: [against]}, (name, against)
    if place.label is not None and by is not None:
        others = [value for value in known if value != place.label]
        if not others:
            of = "" if inside is None else f" of the slice {place.slice!r}"
            raise MoescopeError(
                f"Every document{of} has {place.label!r} as its {by}: there is no other to compare with."
            )
        return first, (scene.where or {}) | {by: others}, (name, f"other {by}s")
    return first, None, (name, "all others")


def _texts(scene: Scene) -> Any:
    first, second, names = sets_of(scene)
    phase: Any = scene.place.phase
    result = scene.compute(
        ("sets", str(first), str(second), names, phase),
        "Which experts are active more often on one set of texts than on the other?",
        lambda: analysis.risk_difference_of(scene.store, first, second, names, phase=phase),
    )
    return figures.risk_difference(result)


def _to_cell(place: Place, point: dict[str, Any]) -> Place | None:
    """The expert of a map's cell, or of a row of the strongest ("L3 E7"); other points are of no one expert."""
    if "z" in point:
        return to_expert(place, point)
    try:
        layer, expert = parsed(str(point.get("y", "")).replace(" ", ""))
    except MoescopeError:
        return None
    return place.go(layer=str(layer), expert=expert)


def _to_label(place: Place, row: dict[str, Any]) -> Place | None:
    return place.go(label=str(row["label"]))


def _row(place: Place, row: dict[str, Any]) -> Place | None:
    return to_expert(place, {"x": row.get("expert"), "y": row.get("site") or row.get("layer")})


def _with(scene: Scene) -> Any:
    names = [name for name in scene.desk.shelf.names() if name != scene.opened.name]
    return controls.select("other", "With store", [(name, name) for name in names], width=128, placeholder="none")


def _against(scene: Scene) -> Any:
    return controls.select("against", "Against", [], width=122, many=True, placeholder="all others")


def _choices(scene: Scene) -> dict[str, list[str]]:
    values = [] if scene.by is None else label_values(scene)
    return {"against": [*values, *(f"slice:{name}" for name in slicing.names(scene.place))]}


COMPARE = Page(
    name="compare",
    title="Compare",
    question="What is different in another store, after an edit, or on other texts?",
    controls=(_with, _against),
    choices=_choices,
    views=(
        BlockView(name="pair", title="Two stores", how="", reads=("other", "slices"), draw=_pair, bare=True),
        FigureView(
            name="agreement",
            title="The same tokens in both stores",
            how=READ_COMPARED.format(level=0.05, loss=LOSS) + " A click on the map selects the expert.",
            reads=_STORES,
            needs=("other",),
            draw=_agreement,
            click=_to_cell,
            marks="cell",
        ),
        TableView(
            name="shifts",
            title="Load that moved",
            how="Each expert's share of its layer's selections in the first and in the second store, the largest "
            "change first. p and q: the two stores exchanged at random within whole documents.",
            reads=_STORES,
            needs=("other",),
            width=7,
            frame=_moved,
            columns={
                "layer": ("Layer", ""),
                "site": ("Router", ""),
                "expert": ("Expert", ""),
                "share": ("First", ".2%"),
                "other_share": ("Second", ".2%"),
                "share_change": ("Change", "+.2%"),
                "share_p": ("p", ".2~g"),
                "share_q": ("q", ".2~g"),
            },
            go=_row,
            height=360,
        ),
        TableView(
            name="agreements",
            title="By label",
            how="Experts in common, averaged over layers, with 95 % limits over documents; and how much worse the "
            "second store's model predicts the label's tokens, in nats per token, where both stores hold losses. All "
            "values of the label; a click selects one.",
            reads=("other", "by", "phase", "slices", "slice"),
            needs=("other",),
            width=5,
            frame=_labels,
            columns={
                "label": ("Label", ""),
                "mean_overlap": ("In common", ".1%"),
                "mean_overlap_low": ("low", ".1%"),
                "mean_overlap_high": ("high", ".1%"),
                "nll_change": ("Loss", "+.3f"),
                "nll_q": ("q", ".2~g"),
            },
            go=_to_label,
            height=360,
        ),
        FigureView(
            name="between",
            title="More active in one store than in the other",
            how=READ_RISK + " First set: this store; second: the other. This needs no shared tokens: two corpora "
            "through one model can be compared so.",
            reads=_STORES,
            needs=("other",),
            draw=_between,
            click=_to_cell,
            marks="cell",
        ),
        FigureView(
            name="texts",
            title="Two sets of texts in this store",
            how=READ_RISK + " First set: the selected value or slice. Second: what “Against” says, by default all "
            "other values or documents.",
            reads=("against", *_TEXTS),
            draw=_texts,
            click=_to_cell,
            marks="cell",
        ),
    ),
)
