"""Specialisation: which experts go with which texts and tokens, and which of that is more than chance."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from dash import html

from moescope import figures
from moescope.analysis.labelled import table
from moescope.analysis.markers import occurring
from moescope.analysis.standing import beyond_chance
from moescope.analysis.summary import floor_words, specialisation_finding
from moescope.app import controls
from moescope.app.expert_words import found_of, known_label, where_of
from moescope.app.links import to
from moescope.app.place import Place
from moescope.app.scene import Scene
from moescope.app.views import BlockView, FigureView, Page, TableView, to_expert
from moescope.errors import MoescopeError
from moescope.figures.domains import READ as READ_SHARES
from moescope.figures.specialisation import READ as READ_LABELS
from moescope.figures.vocabulary import READ as READ_VOCABULARY

if TYPE_CHECKING:
    import pandas as pd
    import xarray as xr

_TEXTS = ("by", "phase", "slices", "slice")
_SETS = (*_TEXTS, "label")
_MEASURES = {"npmi": "nPMI", "share": "Share of tokens"}
_OF_TOKENS = {"classes": "Classes", "markers": "Markers", "tokens": "Frequent tokens"}
_MOST_TOKENS = 12
_SMALL, _MOST_LABELS = 1024, {True: 48, False: 12}  # maps of labels: of a small model a browser takes more
_TALLEST = 720  # maps of a large model, one below the other, fill ten screens: they scroll in less than one
_COMMON = (".", ",")  # markers that stand in nearly every corpus, for models that do not think aloud


def _preferences(scene: Scene) -> xr.Dataset:
    """nPMI of every expert with every label, whichever is selected."""
    return scene.ask("npmi", by=scene.by, where=scene.where, phase=scene.place.phase)


def _beyond(scene: Scene) -> Any:
    """How many cells stand beyond chance, of which labels; and the strongest of them."""
    result = _preferences(scene)
    found = beyond_chance(result)
    labels = [
        to(
            scene.place.go(label=None if name == scene.place.label else name),
            [html.Strong(f"{count:,}"), f" {name}"],
            className="tally chosen" if name == scene.place.label else "tally",
            title=f"{count} experts prefer {name} beyond chance; click to select it",
        )
        for name, count in found.by_label.items()
    ]
    words = (
        f"{found.experts:,} of {found.of:,} experts prefer some {result.attrs['by']} beyond chance"
        if found.tested
        else "Nothing could be tested"
    )
    detail = (
        f"{found.standing:,} of {found.tested:,} (layer, expert, {result.attrs['by']}) cells stand at q ≤ "
        f"{found.level:g}, of which about {found.false_alarms:.0f} are false "
        f"alarms. The null: {result.attrs.get('permutations', 0):,} dealings of the labels over the "
        f"documents.{floor_words(result)}"
    )
    counts = html.Article(
        [
            html.Div(html.Strong(words), className="finding-head"),
            html.Div(detail, className="dim"),
            html.Div(labels, className="tallies"),
        ],
        className="panel finding counted",
    )
    return html.Div(
        [counts, found_of(specialisation_finding(result, label=known_label(result, scene)), scene)],
        className="two-findings",
    )


def _labels(scene: Scene) -> Any:
    if scene.place.measure == "share":
        found = scene.ask("domain_specialisation", by=scene.by, where=scene.where, phase=scene.place.phase)
        return figures.domain_specialisation(found, most=_MOST_LABELS[found["exists"].size <= _SMALL])
    found = _preferences(scene)
    small = found["exists"].size <= _SMALL
    return figures.npmi(found, most=_MOST_LABELS[small])


def _to_cell(scene: Scene, point: dict[str, Any]) -> Place | None:
    """Selects the expert and the label of a map's cell; the last number of the map's details says which label."""
    there, traces = to_expert(scene.place, point), _labels(scene).data
    try:
        index = int(traces[int(point["curveNumber"])].customdata[0][0][-1])
    except (KeyError, IndexError, TypeError, ValueError):
        return there
    return None if there is None else there.go(by=scene.by, label=str(_preferences(scene)["label"].values[index]))


def _cells(scene: Scene) -> pd.DataFrame:
    """Rows (layer, expert, label) of the chosen label, or of all."""
    found = _preferences(scene)
    frame = scene.compute(
        ("cells", scene.by, str(scene.where), scene.place.phase), "listing the cells", lambda: table(found)
    )
    label = known_label(found, scene)
    return frame if label is None else frame[frame["label"] == label]


def _of_tokens(scene: Scene) -> xr.Dataset:
    """The result about kinds of tokens: classes, markers, or the most frequent ones."""
    kinds = scene.place.kinds or "classes"
    if kinds not in _OF_TOKENS:
        raise MoescopeError(f"Tokens are told apart by one of {', '.join(_OF_TOKENS)}, not {kinds!r}.")
    asked: dict[str, Any] = {"where": where_of(scene), "phase": scene.place.phase}
    if kinds == "markers":
        asked["markers"] = tuple(markers_of(scene))
    if kinds == "tokens":
        asked["most"] = _MOST_TOKENS
    return scene.ask(f"npmi_{kinds}", **asked)


def markers_of(scene: Scene) -> list[str]:
    """The markers asked for; by default RICE's where they occur, else what stands in most texts."""
    if scene.place.markers is not None:
        found = [part.strip() for part in scene.place.markers.split("|")]
        return list(dict.fromkeys(part for part in found if part))
    found = scene.compute("thinking markers", "looking for markers", lambda: occurring(scene.store))
    return found or list(_COMMON)


def _tokens(scene: Scene) -> Any:
    result = _of_tokens(scene)
    return figures.npmi(result, most=_MOST_TOKENS)


def _vocabulary(scene: Scene) -> Any:
    asked = {"where": where_of(scene), "phase": scene.place.phase}
    return figures.vocabulary_specialisation(scene.ask("vocabulary_specialisation", by=None, **asked), strongest=16)


def _row(place: Place, row: dict[str, Any]) -> Place | None:
    """The expert and the label of a row."""
    there = to_expert(place, {"x": row.get("expert"), "y": row.get("site") or row.get("layer")})
    return None if there is None else there.go(label=str(row["label"]))


def _measure(scene: Scene) -> Any:
    return controls.switch("measure", "What a cell shows", list(_MEASURES.items()), "npmi")


def _kind(scene: Scene) -> Any:
    return controls.switch("kinds", "Which tokens", list(_OF_TOKENS.items()), "classes")


def _words(scene: Scene) -> Any:
    return controls.text("markers", "Markers", placeholder="markers, with | between", width=210)


SPECIALISATION = Page(
    name="specialisation",
    title="Specialisation",
    question="Which experts go with which texts and tokens, beyond chance?",
    views=(
        BlockView(
            name="beyond",
            title="Beyond chance",
            how="",
            reads=_SETS,
            draw=_beyond,
            bare=True,
        ),
        FigureView(
            name="labels",
            title="Experts and labels",
            how="A click selects the expert and the label. One map for every label, whichever is selected.\n"
            f"nPMI: {READ_LABELS.format(level=0.05, reach=1).replace('±1.00', 'the largest preference')}\n"
            f"Share: {READ_SHARES}",
            reads=("measure", *_TEXTS),
            controls=(_measure,),
            draw=_labels,
            pick=_to_cell,
            marks="cell",
            tallest=_TALLEST,
        ),
        TableView(
            name="cells",
            title="Every expert and label",
            how="One row for each layer, expert and label (of the selected label, if one is). nPMI with its 95 % "
            "interval over documents; the null's 99th percentile is what dealing the labels anew reaches in that cell "
            "once in a hundred times; q is held over all cells, so that of those with q ≤ 0.05 about 1 in 20 is a "
            "false alarm; family-wise p is for the largest of all. A click selects the expert and the label.",
            reads=_SETS,
            frame=_cells,
            columns={
                "layer": ("Layer", ""),
                "site": ("Router", ""),
                "expert": ("Expert", ""),
                "label": ("Label", ""),
                "npmi": ("nPMI", ".3f"),
                "npmi_low": ("low", ".3f"),
                "npmi_high": ("high", ".3f"),
                "null_p99": ("null p99", ".3f"),
                "lift": ("Lift", ".2f"),
                "p_active": ("Active at", ".1%"),
                "p": ("p", ".2~g"),
                "q": ("q", ".2~g"),
                "p_max": ("family p", ".2~g"),
                "count": ("Selections", ",.0f"),
            },
            go=_row,
            height=400,
        ),
        FigureView(
            name="kinds",
            title="Kinds of tokens",
            how="The same for tokens: classes by their spelling, markers that you name (separated by |), or the most "
            "frequent tokens. Classes and tokens are held against the other tokens of the same documents, markers "
            "against other texts' tokens at the same places: full colour stands at q ≤ 0.05, pale is what chance "
            "explains. Of the selected label and slice alone. A click selects the expert.",
            reads=("kinds", "markers", *_SETS),
            controls=(_kind, _words),
            draw=_tokens,
            click=to_expert,
            marks="cell",
            tallest=_TALLEST,
        ),
        FigureView(
            name="vocabulary",
            title="Vocabulary",
            how=READ_VOCABULARY + " Of the selected label and slice alone.",
            reads=_SETS,
            draw=_vocabulary,
        ),
    ),
)
