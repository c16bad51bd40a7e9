"""One expert, and findings, in words: results asked for as the place says, findings as components."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any

import xarray as xr
from dash import html

from moescope.analysis.summary import Finding
from moescope.app.answers import Pending
from moescope.app.aria import SILENT
from moescope.app.links import to
from moescope.app.place import Place
from moescope.app.scene import Scene
from moescope.errors import MoescopeError

Says = Callable[[xr.Dataset, str, int], Finding]

ASKS = {
    "relative_load": "load",
    "npmi": "npmi",
    "reap": "importance",
    "ean": "importance",
    "absmax": "super_experts",
    "margin": "margins",
}
"""Which question's answer has which value of every expert."""


def where_of(scene: Scene) -> dict[str, Any] | None:
    """The documents that count: those of the slice, and of the chosen label value."""
    where = scene.where
    if scene.place.label is None or scene.by is None:
        return where
    kept = (where or {}).get(scene.by)
    if kept is not None and scene.place.label not in kept:
        raise MoescopeError(f"The slice {scene.place.slice!r} has no document with {scene.by} {scene.place.label!r}.")
    return (where or {}) | {scene.by: [scene.place.label]}


def result_of(scene: Scene, question: str) -> xr.Dataset:
    """The result of one analysis for what is chosen: label, phase and slice, as far as it takes them.

    Raises:
        Pending: it is being computed.
        MoescopeError: this store does not allow it.
    """
    phase = scene.place.phase
    if question == "load":
        return scene.ask("load", where=where_of(scene), phase=phase)
    # Load first, whatever else is asked: it is there at once, and what takes long must not stand before it in the line.
    # That it cannot be told of this selection is not this question's answer: it may not follow the selection at all.
    with suppress(MoescopeError):
        scene.ask("load", where=where_of(scene), phase=phase)
    if question == "npmi":
        return scene.ask("npmi", by=scene.by, where=scene.where, phase=phase)
    if question == "importance":
        return scene.ask("importance", where=where_of(scene), phase=phase, splits=0, permutations=0)
    if question == "margins":
        return scene.ask("margins", phase=phase)
    return scene.ask(question)


def result_with(scene: Scene, value: str) -> xr.Dataset:
    """The result that has this value of every expert, one of `ASKS`.

    Raises:
        Pending: it is being computed.
        MoescopeError: this store does not allow it.
    """
    result = result_of(scene, ASKS[value])
    if value not in result:
        raise MoescopeError(
            "REAP and EAN need the norms of outputs: this store has no experts tier; capture again with "
            "--tiers routing,experts."
        )
    return result


def known_label(result: xr.Dataset, scene: Scene) -> str | None:
    """The selected value of the label, None if none is.

    Raises:
        MoescopeError: the result counts no document that has it.
    """
    label = scene.place.label
    if label is not None and label not in result["label"].values:
        raise MoescopeError(f"No document that counts here has the {scene.by} {label!r}.")
    return label


def atlas_of(scene: Scene) -> xr.Dataset:
    """The atlas, after the quicker answers.

    Raises:
        Pending: it, or one of them, is being computed.
    """
    scene.ask("load", where=None, phase=None)
    return scene.ask("atlas", by=scene.by)


def results_of_expert(scene: Scene, tells: Sequence[tuple[str, Says]]) -> tuple[list[Finding], Pending | None]:
    """What each question says of the selected expert, as far as it is known, and the answer that is on its way."""
    chosen = scene.selected()
    found: list[Finding] = []
    waits: Pending | None = None
    for question, say in tells:
        try:
            found.append(of_all(say(result_of(scene, question), *chosen), question, scene.place))
        except Pending as pending:
            waits = waits or pending
        except MoescopeError as reason:
            found.append(Finding(question, _CANNOT[question], str(reason), None))
    return found, waits


def unselected(question: str, place: Place) -> str:
    """What an answer is of where it does not follow the selection; "" where it does, or nothing is selected."""
    narrowed = place.slice is not None or place.label is not None
    if question == "margins" and narrowed:
        return "of all documents, whichever are selected"
    if question in ("super_experts", "attention_sinks") and (narrowed or place.phase is not None):
        return "of the whole capture, whatever is selected"
    return ""


def of_all(finding: Finding, question: str, place: Place) -> Finding:
    """The finding, with a word of what is selected and does not count in it."""
    words = unselected(question, place)
    return replace(finding, detail=f"{finding.detail} {words.capitalize()}.") if words else finding


_CANNOT = {
    "load": "Its load cannot be told here.",
    "npmi": "What it prefers cannot be told here.",
    "importance": "How it ranks cannot be told here.",
    "super_experts": "Its outliers cannot be told from this store.",
    "margins": "Its margin cannot be told here.",
}
_SIGN = {True: "●", False: "○", None: "–"}
_SAID = {True: "stands against its null", False: "does not stand against its null", None: "not tested"}


def found_of(finding: Finding, scene: Scene) -> Any:
    """One finding as a small card: its headline, and the numbers with their null."""
    expert = _expert_of(finding, scene)
    head = [html.Span(finding.headline)] if expert is None else [to(expert, finding.headline)]
    return html.Article(
        [
            html.Div([sign(finding), html.Div(head)], className="finding-head"),
            html.Div(finding.detail, className="dim"),
        ],
        className="panel finding",
    )


def listed(findings: Sequence[Finding]) -> Any:
    """Findings on one expert, one under the other."""
    rows = []
    for finding in findings:
        words = [html.Div(finding.headline), html.Div(worded(finding.detail), className="dim")]
        rows.append(html.Li([sign(finding), html.Div(words)]))
    return html.Ul(rows, className="finding-list")


def sign(finding: Finding) -> Any:
    """Whether it stands, also for those who do not see the sign."""
    kind = {True: "stands", False: "falls", None: "untested"}[finding.holds]
    return html.Span(
        [html.Span(_SIGN[finding.holds], **SILENT), html.Span(f"({_SAID[finding.holds]}) ", className="unseen")],
        className=f"sign {kind}",
        title=_SAID[finding.holds],
    )


def _expert_of(finding: Finding, scene: Scene) -> Place | None:
    keys = [site.key for site in scene.store.sites]
    site, expert = finding.values.get("site"), finding.values.get("expert")
    if expert is None or site not in keys:
        return None
    return scene.place.go(page="expert", layer=scene.layers[keys.index(site)], expert=int(expert), full=None)


def worded(text: str) -> list[Any]:
    """Words with what stands between backticks as code."""
    return [html.Code(part) if place % 2 else part for place, part in enumerate(text.split("`"))]
