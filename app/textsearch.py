"""Finding one's way to a text: documents by words and label, tokens of the vocabulary, and where a token occurs."""

from __future__ import annotations

from typing import Any

from dash import html

from moescope import analysis
from moescope.analysis.contents import contents_of
from moescope.app.aria import named
from moescope.app.expert_words import where_of
from moescope.app.links import goes, to
from moescope.app.place import Place
from moescope.app.scene import Scene
from moescope.app.tokens import marked, spelled, spoken

_LISTED, _HITS, _WORDS = 25, 10, 12


def contents(scene: Scene) -> Any:
    """Where everything is in the store (`analysis.contents`), counted once.

    Raises:
        Pending: it is being counted.
    """

    def index() -> bool:
        contents_of(scene.store).index()
        return True  # not the contents, which go with the store

    scene.compute("contents", "counting where every document and token is", index)
    return contents_of(scene.store)


def draw(scene: Scene) -> Any:
    """The panel: tokens that have the words, where a token occurs, and the documents."""
    contents(scene)
    parts = []
    place = scene.place
    if place.find:
        parts.append(_words(scene, place.find))
    if place.word is not None:
        parts.append(_occurrences(scene, place.word))
    parts.append(_documents(scene))
    return html.Div(parts, className="search")


def _words(scene: Scene, text: str) -> Any:
    found = scene.compute(
        ("words", text), "searching the vocabulary", lambda: analysis.tokens_matching(scene.store, text, _WORDS)
    )
    if not found:
        return html.P("No single token of the vocabulary has these characters.", className="dim")
    chips = [
        to(
            scene.place.go(word=one.token_id, hit=None),
            [html.Bdi(spelled(one.text, 40)), html.Span(f" {one.occurrences:,}×", className="dim")],
            className="chip current" if scene.place.word == one.token_id else "chip",
        )
        for one in found
    ]
    return html.Div([html.H3("Tokens"), html.Div(chips, className="chips")])


def _occurrences(scene: Scene, word: int) -> Any:
    place, offset = scene.place, scene.place.hit or 0
    found = scene.compute(
        ("occurrences", word, offset),
        "reading where the token occurs",
        lambda: analysis.token_occurrences(scene.store, word, offset, _HITS),
    )
    rows = [
        html.Li(
            [
                to(place.go(doc=one.document).go(token=one.place), f"document {one.document}, token {one.place}"),
                html.Div(
                    html.Bdi([
                        *marked(_one_line(one.context.before)), html.Mark(marked(one.context.token)),
                        *marked(_one_line(one.context.after)),
                    ]),
                    className="hit",
                    **goes(place.go(doc=one.document).go(token=one.place)),
                ),
            ]
        )
        for one in found.occurrences
    ]  # fmt: skip
    name = html.Bdi(spelled(found.text, 40))
    empty = html.P("It does not occur in this store.", className="dim")
    narrowed = place.slice is not None or place.label is not None
    return html.Div(
        [
            html.Div(
                [html.H3(["Where ", name, " occurs"]), to(place.go(word=None, hit=None), "close")],
                className="search-head",
            ),
            html.P("In all documents, whichever are selected.", className="dim") if narrowed else None,
            html.Ul(rows, className="hits") if rows else empty,
            _turn(place, "hit", offset, _HITS, found.total),
        ]
    )


def _one_line(text: str) -> str:
    return text.replace("\n", " ")


def _documents(scene: Scene) -> Any:
    place, offset = scene.place, scene.place.listed or 0
    where = where_of(scene)
    found = scene.compute(
        ("documents", place.find, str(where), offset),
        "searching the texts",
        lambda: analysis.find_documents(scene.store, place.find, where, offset=offset, limit=_LISTED),
    )
    rows = []
    for one in found.documents:
        there = place.go(doc=one.document)
        labels = " · ".join(spoken(value, 24) for value in one.labels.values() if value is not None)
        said = [" · ", html.Bdi(labels)] if labels else []
        rows.append(
            html.Li(
                [
                    to(there, html.Bdi(spoken(one.opening, 90) or "(no text)"), className="opening"),
                    html.Div([str(one.document), *said, f" · {one.n_tokens:,} tokens"], className="dim"),
                ],
                className="current" if one.document == place.doc else "",
            )
        )
    if not rows:
        words = f"No document has “{spoken(place.find, 60)}” in it." if place.find else "No document is left."
        return html.Div([html.H3("Documents"), html.P(words, className="dim")])
    return html.Div(
        [
            html.H3(f"Documents: {found.total:,}"),
            html.Ul(rows, className="documents"),
            _turn(place, "listed", offset, _LISTED, found.total),
        ]
    )


def _turn(place: Place, field: str, offset: int, size: int, total: int) -> Any:
    if total <= size and offset == 0:
        return None
    ways: list[Any] = []
    if offset > 0:
        ways.append(to(place.go(**{field: max(offset - size, 0) or None}), "←", **named("Previous page")))
    ways.append(html.Span(f"{min(offset + 1, total):,}–{min(offset + size, total):,} of {total:,}", className="dim"))
    if offset + size < total:
        ways.append(to(place.go(**{field: offset + size}), "→", **named("Next page")))
    return html.Div(ways, className="pages")
