"""Map: which experts, and which tokens, are alike?"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import numpy as np
import xarray as xr
from dash import html

from moescope import analysis, figures
from moescope.analysis.maps import By
from moescope.app import controls, slicing
from moescope.app.answers import Pending
from moescope.app.expert_words import ASKS, result_of, result_with, unselected
from moescope.app.labels import label_values
from moescope.app.linestocopy import copied
from moescope.app.links import to
from moescope.app.place import Place
from moescope.app.scene import Scene
from moescope.app.views import BlockView, ElsewhereError, FigureView, Page
from moescope.errors import CancelledError, MoescopeError
from moescope.figures.maps import READ_TRUST

_ALIKE = {"profile": "Labels", "tokens": "Tokens", "outputs": "Outputs"}
_PAINTS = {
    "layer": "Layer",
    "relative_load": "Load",
    "preferred": "Preferred label",
    "group": "Group",
    "reap": "REAP",
    "ean": "EAN",
    "margin": "Margin",
    "absmax": "Largest output",
}
_NAMES = {"relative_load": "load, × fair share", "preferred": "prefers", "absmax": "largest output"}
_NEAREST = 12
_FEWEST = 3
"""Values of a label from which experts can be told apart in two dimensions, as `analysis.expert_map` asks for."""
_SELECTION = ("by", "label", "phase", "slices", "slice")


def _alike(scene: Scene) -> By:
    chosen = scene.place.alike or _unasked(scene)
    if chosen not in _ALIKE:
        raise MoescopeError(f"A map is by one of {', '.join(_ALIKE)}, not {chosen!r}.")
    if chosen == "profile" and scene.by is not None and (few := len(label_values(scene))) < _FEWEST:
        raise MoescopeError(
            f"The label {scene.by!r} has {few} value{'s' if few != 1 else ''}, which are no map: it needs {_FEWEST}. "
            "Choose Tokens at “Alike in”, or another label."
        )
    return cast("By", chosen)


def _unasked(scene: Scene) -> str:
    """What the map is by unless another is chosen: labels where each of them is enough for a map, else tokens.

    Of the store alone, not of the label that is selected: the switch shows it, and is drawn once for a store.
    """
    labels = scene.store.labels
    return "profile" if labels and all(len(label_values(scene, name)) >= _FEWEST for name in labels) else "tokens"


def _label(scene: Scene, alike: str) -> str | None:
    return scene.by if alike == "profile" else None


def _map(scene: Scene) -> xr.Dataset:
    alike = _alike(scene)
    return scene.ask("expert_map", by=alike, label=_label(scene, alike))


def _experts(scene: Scene) -> Any:
    """The map, coloured by what is chosen."""
    laid, paint = _map(scene), scene.place.paint or "layer"
    if paint not in _PAINTS:
        raise MoescopeError(f"Experts are coloured by one of {', '.join(_PAINTS)}, not {paint!r}.")
    values, only = _values(scene, paint), _only(scene)
    words = unselected(ASKS[paint], scene.place) if paint in ASKS else ""
    note = f"{_PAINTS[paint].lower()} {words}" if words else ""
    if paint == "group":
        found = _groups(scene)
        note = (
            f"{int(found['groups'])} groups, the largest of {int(found['largest'])}; "
            f"of features dealt anew {int(found['null_largest'])}"
        )
    return figures.expert_map(laid, values, _NAMES.get(paint, _PAINTS[paint].lower()), only, note)


def _values(scene: Scene, paint: str) -> xr.DataArray | None:
    if paint == "layer":
        return None
    if paint == "group":
        found = _groups(scene)["group"]
        texts = np.vectorize(lambda group: "" if np.isnan(group) or group == 0 else f"{group:.0f}", otypes=[object])
        return found.copy(data=texts(found.values))
    if paint == "preferred":
        return analysis.preferred_labels(result_of(scene, "npmi"))
    return result_with(scene, paint)[paint]


def _groups(scene: Scene) -> xr.Dataset:
    alike = _alike(scene)
    by, store = _label(scene, alike), scene.store
    key = ("map groups", alike, by)
    return scene.compute(key, "linking experts", lambda: analysis.map_groups(store, alike, by))


def _only(scene: Scene) -> xr.DataArray | None:
    """The experts of the one layer, or of the one preferred label, that is not faint."""
    only = scene.place.only
    if only is None:
        return None
    laid = _map(scene)
    kind, _, value = only.partition(" ")
    if kind == "layer":
        if value not in scene.layers:
            raise MoescopeError(f"There is no layer {value!r}.")
        mine = laid["site"] == scene.site(value).key
        return (mine & laid["exists"]).transpose("layer", "expert")
    if kind == "prefers":
        return analysis.preferred_labels(result_of(scene, "npmi")) == value
    raise MoescopeError(f"There is no group {only!r}: it is a layer or a preferred label.")


def _choices(scene: Scene) -> dict[str, list[str]]:
    return {
        "only": [f"layer {name}" for name in scene.layers] + [f"prefers {value}" for value in label_values(scene)],
    }


def _to_expert(place: Place, point: dict[str, Any]) -> Place | None:
    """The expert of a point, by the names that it carries, whatever else is drawn."""
    carried = point.get("customdata")
    if not isinstance(carried, list) or len(carried) < 2:
        return None
    return place.go(layer=str(carried[0]), expert=int(carried[1]))


def _near(scene: Scene) -> Any:
    """The nearest experts of the selected one, in the features themselves."""
    chosen = scene.chosen()
    if chosen is None:
        return html.Div("Click a point: the experts that are nearest to its expert are listed here.", className="dim")
    alike, store = _alike(scene), scene.store
    by = _label(scene, alike)
    key = ("nearest", *chosen, alike, by)
    found = scene.compute(key, "nearest experts", lambda: analysis.nearest_experts(store, *chosen, alike, by))
    frame = analysis.table(found).sort_values("distance", kind="stable").dropna(subset=["distance"]).head(_NEAREST)
    names = dict(zip([site.key for site in store.sites], scene.layers, strict=True))
    sites = found["site"].values
    layer_of = {int(layer): names[str(site)] for layer, site in zip(found["layer"].values, sites, strict=True)}
    rows = []
    for row in frame.to_dict("records"):
        layer = names[str(row["site"])] if "site" in row else layer_of[int(row["layer"])]
        there = scene.place.go(layer=layer, expert=int(row["expert"]))
        rows.append(
            html.Tr(
                [
                    html.Td(to(there, there.expert_name)),
                    html.Td(f"{row['ratio']:.2f}", className="number"),
                    html.Td(html.Div(className="bar", style={"width": f"{min(row['ratio'], 1):.0%}"})),
                ]
            )
        )
    head = html.Thead(html.Tr([html.Th("expert"), html.Th("distance", className="number"), html.Td()]))
    page = to(scene.place.go(page="expert", full=None), scene.place.expert_name or "", className="expert-name")
    words = "1: as far as the expert in the middle of all. Distances in the features, not on the map."
    return [
        html.Div([page, to(scene.place.go(page="expert", full=None), "Its page →")], className="chosen-head"),
        html.Table([head, html.Tbody(rows)], className="near"),
        html.P(words, className="dim"),
    ]


def _gate(scene: Scene) -> Any:
    """Where the map by router rows is."""
    words = (
        "Another way to be alike is by router rows: which hidden states call an expert. They are the model's weights, "
        "which a store does not keep; the command line reads the model:"
    )
    return html.Div(
        [html.Span(words, className="dim"), copied("command line", "moescope analyze gate_map MODEL --html map.html")],
        className="gate-map",
    )


def _tokens(scene: Scene) -> Any:
    ink = scene.place.ink or "occurrences"
    if ink not in ("occurrences", "share"):
        raise MoescopeError(f"Tokens are coloured by occurrences or share, not {ink!r}.")
    layer = None if ink == "occurrences" else scene.place.layer or scene.layers[0]
    try:
        found = scene.ask("token_map")
    except CancelledError:
        raise
    except MoescopeError as reason:
        there = scene.place.go(page="analyses", question="token_map", options=None, full=None)
        raise ElsewhereError(str(reason).replace("`", ""), there, "Its parameters are on Analyses →") from reason
    return figures.token_map(found, layer=layer)


def _to_token(place: Place, point: dict[str, Any]) -> Place | None:
    """The text in which a token occurs first, at that token."""
    carried = point.get("customdata")
    if not isinstance(carried, list) or len(carried) < 5 or carried[3] is None or int(carried[3]) < 0:
        return None
    return place.go(page="text", doc=int(carried[3]), full=None).go(token=int(carried[4]))


def _lassoed(scene: Scene, points: Sequence[dict[str, Any]]) -> Place | None:
    """A slice of the documents that hold any of the tokens."""
    carried = [point.get("customdata") for point in points]
    ids = sorted({int(one[1]) for one in carried if isinstance(one, list) and len(one) > 1})
    if not ids:
        return None
    store = scene.store
    key = ("documents of tokens", tuple(ids))
    documents = scene.compute(key, "documents of tokens", lambda: analysis.documents_of_tokens(store, ids), patience=30)
    known = slicing.names(scene.place)
    name = next(name for name in (f"lasso {number}" for number in range(1, len(known) + 2)) if name not in known)
    there = slicing.with_documents(scene.place, name, documents.tolist())
    if len(there.slices or "") > _LONGEST:
        raise MoescopeError(
            f"These {len(ids)} tokens stand in {len(documents):,} documents, more than an address can name; "
            "draw the lasso round fewer or rarer ones."
        )
    return there


_LONGEST = 7_000  # characters of all slices: the address must keep what else is chosen


def _paint_choice(scene: Scene) -> Any:
    return controls.select("paint", "Colour", list(_PAINTS.items()), "layer", width=140)


def _alike_choice(scene: Scene) -> Any:
    kept = scene.store.manifest.activations
    outputs = kept is not None and "outputs" in kept.kinds
    shown = [pair for pair in _ALIKE.items() if pair[0] != "outputs" or outputs]
    if not scene.store.labels:
        shown = [pair for pair in shown if pair[0] != "profile"]
    try:
        default = _unasked(scene)
    except Pending:  # not known yet: none is shown as chosen
        default = ""
    return controls.switch("alike", "Alike in", shown, default)


def _only_choice(scene: Scene) -> Any:
    return controls.select("only", "Only", [], width=150, many=True, placeholder="all experts")


def _ink_choice(scene: Scene) -> Any:
    shown = [("occurrences", "Occurrences"), ("share", "Share with its expert")]
    return controls.switch("ink", "Colour of tokens", shown, "occurrences")


_HOW = (
    "Each point is an expert, near those that are alike: in the labels or token ids it is selected for, or in what it "
    "gives out. "
    + READ_TRUST.format(numbers="(its value, and that of chance, stand over the map)")
    + "\nPreferred label: the largest nPMI of those with q ≤ 0.05. Group: experts linked in the features, each among "
    "the other's three nearest. The map is of all documents; colours follow phase and slice where they can."
)
_HOW_TOKENS = (
    "Each point is a token id, near those that are routed to the same experts in all layers. A click opens the text in "
    "which it occurs first; a lasso makes a slice of all documents that hold any of its tokens. Rare ids are left out, "
    "as the line over the map says: nothing is drawn at random. Share: at how many of a token's occurrences its most "
    "frequent expert of the chosen layer is active. A router blind to the token would give that expert's share of all "
    "tokens, which stands beside it under the pointer; a rare token comes out higher by chance."
)

MAP = Page(
    name="map",
    title="Map",
    question="Which experts are alike, and which tokens go the same way?",
    views=(
        FigureView(
            name="expert-map",
            title="Experts",
            how=_HOW,
            reads=("alike", "paint", "only", *_SELECTION),
            width=8,
            controls=(_alike_choice, _paint_choice, _only_choice),
            draw=_experts,
            click=_to_expert,
        ),
        BlockView(
            name="near",
            title="Nearest to the selected expert",
            how=(
                "Distances in what the map was made from. What is near here but far on the map is what two dimensions "
                "had to tear apart."
            ),
            reads=("alike", "layer", "expert", "by"),
            width=4,
            draw=_near,
        ),
        BlockView(name="gate", title="By router rows", how="", reads=(), draw=_gate, bare=True),
        FigureView(
            name="token-map",
            title="Tokens",
            how=_HOW_TOKENS,
            reads=("ink", "layer"),
            controls=(_ink_choice,),
            draw=_tokens,
            click=_to_token,
            select=_lassoed,
        ),
    ),
    choices=_choices,
)
