"""Text: a document as tokens in colours, the way of one token through all layers, and the routing as it builds up."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import xarray as xr
from dash import ALL, ClientsideFunction, Dash, Input, html

from moescope import analysis, figures
from moescope.analysis.labelled import layer_name
from moescope.app import controls, textsearch
from moescope.app.aria import named
from moescope.app.links import to
from moescope.app.place import Place
from moescope.app.scene import Scene
from moescope.app.tokens import COLOURS, OF_EXPERT, data, painted, routes_of, spelled, spoken, token
from moescope.app.views import BlockView, FigureView, Page, to_expert
from moescope.errors import MoescopeError
from moescope.figures.replays import READ as READ_REPLAY
from moescope.figures.token_maps import READ as READ_ROUTING

LONG = 256
"""Tokens of a document on one page."""
_SEARCH = ("find", "by", "label", "slices", "slice", "doc", "listed", "word", "hit")


@dataclass(frozen=True)
class Stretch:
    """What is shown of a document: tokens `start` to `stop` of `total`."""

    document: int
    start: int
    stop: int
    total: int


def stretch(scene: Scene) -> Stretch:
    """The document and the part of it that the place asks for; the first document, and the part with its token.

    Raises:
        Pending: the store's documents are being counted.
        MoescopeError: there is no such document or token.
    """
    place = scene.place
    held = textsearch.contents(scene)
    if not held.documents.size:
        raise MoescopeError("This store has no tokens yet.")
    document = place.doc if place.doc is not None else int(held.documents[0])
    total = held.n_tokens(document)
    if place.start is not None:
        start = place.start
    else:
        at = next((n for n in (place.token, place.step) if n is not None), 0)
        start = min(at, total - 1) // LONG * LONG
    if start >= total:
        raise MoescopeError(f"Document {document} has {total:,} tokens; there is none from {start:,} on.")
    return Stretch(document, start, min(start + LONG, total), total)


# --- the document ---------------------------------------------------------------------------------------------------
def _document(scene: Scene) -> Any:
    shown = stretch(scene)
    place, site = scene.place, scene.site()
    found = _passage(scene, shown, site.key)
    colour = _colour(scene)
    chosen = scene.chosen()
    if colour in OF_EXPERT and chosen is None:
        raise MoescopeError("Select an expert, by layer and number above, to see where it fires; or colour by another.")
    paint = painted(found, colour, None if chosen is None else chosen[1], scene.dark)
    ids, weight = found["expert"].values, found["weight"].values
    phases = [str(phase) for phase in found["phase"].values]
    focus = place.token if place.token is not None and shown.start <= place.token < shown.stop else shown.start
    tokens = [
        token(
            str(text),
            number,
            int(found["position"].values[at]),
            number == focus,
            phases[at],
            (paint.backgrounds[at], paint.words[at], not np.isfinite(paint.values[at])),
            routes_of(ids[at], weight[at]),
        )
        for at, (number, text) in enumerate(zip(range(shown.start, shown.stop), found["text"].values, strict=True))
    ]
    if colour == "top":
        for one, value in zip(tokens, paint.values, strict=True):
            one.children = [*one.children, html.Sub("" if np.isnan(value) else str(int(value)), className="top-mark")]
    layer = scene.layers[list(scene.store.sites).index(site)]
    return html.Div(
        [
            _heading(scene, shown),
            html.Div([html.Span(f"layer {layer}"), *_listed_legend(paint.legend)], className="legend"),
            _phases(phases, place.phase),
            html.Div(
                tokens,
                className=f"tokens by-{colour}{f' only-{place.phase}' if place.phase else ''}",
                role="listbox",
                dir="auto",
                **named(
                    f"Tokens {shown.start} to {shown.stop - 1} of document {shown.document}. Arrows move, Enter pins."
                ),
                **data(first=shown.start, last=shown.stop, long=LONG, layer=layer, doc=shown.document),
            ),
            _pages(scene, shown),
        ],
        className="document",
    )


def _listed_legend(legend: Any) -> list[Any]:
    return list(legend) if isinstance(legend, list) else [legend]


def _colour(scene: Scene) -> str:
    colour = scene.place.colour or ("weight" if scene.chosen() is not None else "entropy")
    if colour not in COLOURS:
        raise MoescopeError(f"Tokens cannot be coloured by {colour!r}; choose one of {', '.join(COLOURS)}.")
    if colour == "loss" and not scene.store.manifest.loss:
        raise MoescopeError("This store has no loss; capture again with --loss, or colour by another value.")
    return colour


def _heading(scene: Scene, shown: Stretch) -> Any:
    held = textsearch.contents(scene)
    row = held.row_of(shown.document)
    facts: list[Any] = []
    if row is not None:
        one = held.table.slice(row, 1).to_pylist()[0]
        facts += [spoken(one["id"])] if one["id"] else []
        facts += [f"{spoken(label)}: {spoken(one[label])}" for label in scene.store.labels if one[label] is not None]
        facts += [spoken(one["source"])] if one["source"] else []
    place = int(np.searchsorted(held.documents, shown.document))
    ways = []
    for step, sign, words in ((-1, "←", "Previous document"), (1, "→", "Next document")):
        if 0 <= place + step < held.documents.size:
            there = scene.place.go(doc=int(held.documents[place + step]))
            ways.append(to(there, sign, className="step", title=words, **named(words)))
    facts.append(f"{shown.total:,} tokens")
    return html.Div(
        [
            *ways,
            html.Span(f"Document {shown.document}", className="document-name"),
            html.Span([html.Span(html.Bdi(fact)) for fact in facts], className="dim document-facts"),
        ],
        className="document-head",
    )


def _phases(phases: list[str], only: str | None) -> Any:
    decode = phases.count("decode")
    if not decode:
        words = "All of it was read as a prompt (prefill); nothing here was generated."
    elif decode == len(phases):
        words = "All of it was generated, token by token (decode): underlined."
    else:
        words = f"{len(phases) - decode} tokens of the prompt (prefill), then {decode} generated (decode): underlined."
    faint = f" Those of the other phase than {only} are faint." if only else ""
    return html.P(words + faint, className="dim phases")


def _pages(scene: Scene, shown: Stretch) -> Any:
    if shown.total <= LONG and shown.start == 0:
        return None
    ways: list[Any] = []
    moved = {"token": None, "step": None}
    if shown.start > 0:
        ways.append(to(scene.place.go(start=max(shown.start - LONG, 0), **moved), "← earlier", className="way"))
    ways.append(html.Span(f"tokens {shown.start:,}–{shown.stop - 1:,} of {shown.total:,}", className="dim"))
    if shown.stop < shown.total:
        ways.append(to(scene.place.go(start=shown.stop, **moved), "later →", className="way"))
    return html.Nav(ways, className="pages", **named("Parts of the document"))


def _passage(scene: Scene, shown: Stretch, site: str) -> xr.Dataset:
    key = ("passage", shown.document, site, shown.start, shown.stop)
    return scene.compute(
        key,
        "reading the document",
        lambda: analysis.passage(scene.store, shown.document, site, shown.start, shown.stop),
    )


# --- one token ------------------------------------------------------------------------------------------------------
def _routing(scene: Scene, field: str = "token") -> xr.Dataset:
    number = getattr(scene.place, field)
    if number is None:
        raise MoescopeError("Click a token of the text, or press Enter on it, to see where it goes in every layer.")
    held = textsearch.contents(scene)
    document = scene.place.doc if scene.place.doc is not None else int(held.documents[0])
    total = held.n_tokens(document)
    if number >= total:
        raise MoescopeError(f"Document {document} has {total:,} tokens; there is no token {number:,}.")
    row = next(held.stretches(document, number, number + 1)).first
    return scene.compute(("token routing", row), "reading the token", lambda: analysis.token_routing(scene.store, row))


def _routing_of(field: str) -> Callable[[Scene], Any]:
    return lambda scene: figures.token_routing(_routing(scene, field))


def _select(place: Place, point: dict[str, Any]) -> Place | None:
    """A click on an expert of a token: selects it."""
    data = point.get("customdata")
    if not isinstance(data, list | tuple) or len(data) < 3:
        return None
    site, layer, expert = str(data[0]), str(data[1]), data[2]
    if not isinstance(expert, int | float) or expert < 0:
        return None
    return place.go(layer=layer_name(int(layer), site), expert=int(expert))


def _about(scene: Scene) -> Any:
    place = scene.place
    if place.token is None:
        raise MoescopeError("No token is pinned. Click one in the text, or press Enter on it.")
    found = _routing(scene)
    about = found.attrs
    site = scene.site()
    row = list(found["site"].values).index(site.key)
    layer = scene.layers[row]
    rows = []
    for expert, weight, share in zip(*(found[n].values[row] for n in ("expert", "weight", "share")), strict=True):
        if expert < 0:
            continue
        there = place.go(layer=layer, expert=int(expert), full=None)
        bar = html.Span(className="bar", style={"--w": f"{share:.3f}" if np.isfinite(share) else "0"})
        name = there.expert_name
        rows.append(
            html.Tr(
                [
                    html.Th(to(there, name, title="Select it"), scope="row"),
                    html.Td(bar, className="bar-cell"),
                    html.Td(f"{weight:.3g}", className="number"),
                    html.Td(to(there.go(page="expert"), "its page", **named(f"The page of expert {name}"))),
                ]
            )
        )
    loss = about["loss"]
    facts = [
        f"token {place.token} of the document",
        f"position {about['position']} of its sequence",
        f"id {about['token_id']}",
        str(about["phase"]),
        *([f"loss {loss:.3g} nats"] if isinstance(loss, float) and np.isfinite(loss) else []),
    ]
    ways = [
        to(place.go(word=int(about["token_id"]), hit=None), "Where else it occurs"),
        to(place.go(held=place.token), "Hold it, to compare with another")
        if place.held != place.token
        else html.Span("Held: pin another token to compare.", className="dim"),
    ]
    if place.held is not None:
        ways.append(to(place.go(held=None), "Compare no more"))
    return html.Div(
        [
            html.Div(html.Bdi(spelled(str(about["text"]))), className="token-name"),
            html.P(" · ".join(facts), className="dim"),
            html.Table(
                [html.Caption(f"In layer {layer}, the one most wanted first", className="dim"), html.Tbody(rows)],
                className="token-experts",
            ),
            html.Div(ways, className="token-ways"),
        ],
        className="token-about",
    )


def _replay(scene: Scene) -> Any:
    shown = stretch(scene)
    found = scene.compute(
        ("routes", shown.document, shown.start, shown.stop),
        "reading every layer",
        lambda: analysis.passage_routes(scene.store, shown.document, shown.start, shown.stop),
    )
    step = scene.place.step
    return figures.replay(found, None if step is None else step - shown.start + 1)


def _player(scene: Scene) -> Any:
    def button(do: str, sign: str, words: str) -> Any:
        return html.Button(sign, type="button", className="step", title=words, **data(replay=do), **named(words))

    return html.Div(
        [
            button("begin", "|◂", "Begin again"),
            button("back", "◂", "One token back"),
            button("play", "▶", "Play or pause (p)"),
            button("on", "▸", "One token on"),
            button("end", "▸|", "To the end: no replay"),
            html.Span(className="replay-word dim", role="status"),
        ],
        className="player",
    )


def _register(app: Dash, desk: Any) -> None:
    """The page's script follows the place, and what was drawn anew."""
    app.clientside_callback(
        ClientsideFunction("moescopeText", "follow"),
        Input("place", "data"),
        Input({"type": "body", "of": "block", "view": ALL}, "children"),
        Input({"type": "graph", "of": "figure", "view": ALL}, "figure"),
    )


def _colours(scene: Scene) -> Any:
    words = "as selected"
    return controls.select("colour", "Coloured by", list(COLOURS.items()), width=210, placeholder=words)


TEXT = Page(
    name="text",
    title="Text",
    question="Where does each token go, and how sure is the router?",
    views=(
        BlockView(
            name="text-find",
            title="Find",
            how="Words as written, whatever the case of their letters; no pattern. Tokens of the vocabulary that have "
            "these characters come first, with how often they occur; then the documents. The list follows the label "
            "and the slice chosen above.",
            reads=_SEARCH,
            width=3,
            controls=(lambda scene: controls.text("find", "Find in the texts", "words", width=150),),
            draw=textsearch.draw,
        ),
        BlockView(
            name="text-tokens",
            themed=True,
            title="Tokens",
            how="Each token in the colour of its value in the chosen layer; point at one to see its experts, click or "
            "press Enter to pin it. Arrows move. Underlined tokens were generated (decode), the rest was read "
            "(prefill). Hatched: the value is not defined there. These are captured values of single tokens: they show "
            "and do not test; compare an expert's share of a label with its null on its page.",
            reads=("doc", "start", "layer", "expert", "colour", "phase"),
            width=5,
            controls=(_colours,),
            draw=_document,
        ),
        FigureView(
            name="text-routing",
            title="One token, every layer",
            how=READ_ROUTING + " A click selects the expert.",
            reads=("doc", "token"),
            width=4,
            draw=_routing_of("token"),
            click=_select,
        ),
        FigureView(
            name="text-held",
            title="The token held",
            how=READ_ROUTING,
            reads=("doc", "held"),
            width=6,
            needs=("held",),
            draw=_routing_of("held"),
            click=_select,
        ),
        FigureView(
            name="text-beside",
            title="The token pinned",
            how=READ_ROUTING,
            reads=("doc", "token"),
            width=6,
            needs=("held",),
            draw=_routing_of("token"),
            click=_select,
        ),
        BlockView(
            name="text-player",
            title="Replay",
            how="",
            reads=("doc", "start"),
            bare=True,
            draw=_player,
        ),
        FigureView(
            name="text-replay",
            title="The routing as it builds up",
            how=READ_REPLAY,
            reads=("doc", "start"),
            width=8,
            draw=_replay,
            click=to_expert,
            marks="cell",
        ),
        BlockView(
            name="text-token",
            title="The token pinned",
            how="Its experts in the chosen layer; the bar is the share of the token's routing weight there.",
            reads=("doc", "token", "layer", "held"),
            width=4,
            draw=_about,
        ),
    ),
    register=_register,
)
