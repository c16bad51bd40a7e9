"""The lab's answers: streamed side by side while they are written, then token by token with both probabilities."""

from __future__ import annotations

from typing import Any

import dash_mantine_components as dmc
import numpy as np
from dash import MATCH, Dash, Input, Output, State, dcc, html, no_update

from moescope import analysis, figures
from moescope.app import recipes
from moescope.app.answers import Pending
from moescope.app.aria import named
from moescope.app.bench import Generated, Question
from moescope.app.jobs import Job
from moescope.app.panels import HIDDEN, SHOWN
from moescope.app.scene import Desk, Scene
from moescope.app.tokens import marked, spelled, spoken
from moescope.errors import MoescopeError

FAINT = 0.02  # of probability: smaller changes stay plain
_BOUNDS = (FAINT, 0.1, 0.25, 0.5)
_ABOUT = {
    "plain": "the model as it is",
    "edited": "under the recipe",
    "self-contrast": "plain against weaker routing",
}


def draw(scene: Scene) -> Any:
    """The panel."""
    if scene.place.run is None:
        return html.P(
            "Write a prompt and press Generate: the answers appear here as they are written.", className="dim"
        )
    asked, job = run(scene)
    return html.Div(
        [
            dcc.Store(id=_part("seen", job.id), data=[]),
            dcc.Interval(id=_part("clock", job.id), interval=200, max_intervals=0 if job.over else 1),
            html.Div(
                [
                    html.Div(_progress(scene.desk, job), id=_part("progress", job.id), role="status"),
                    dmc.Button(
                        "Cancel",
                        id=_part("cancel", job.id),
                        size="compact-xs",
                        variant="default",
                        n_clicks=0,
                        style=HIDDEN if job.over else SHOWN,
                    ),
                ],
                className="lab-progress",
            ),
            html.P(_asked(asked), className="dim"),
            html.Div(_columns(asked, job), id=_part("columns", job.id), className="answers"),
        ]
    )


def _part(kind: str, run: Any) -> dict[str, Any]:
    """The id of a part of one generation's panel: a late answer about another generation finds no such part."""
    return {"type": f"lab-{kind}", "run": run}


def _asked(asked: Question) -> str:
    """To what these are the answers: what the page asks for now may have changed since."""
    edits = "" if asked.recipe is None else f" under {recipes.written(asked.recipe)}"
    prompt = spoken(asked.prompt, 80)
    return f"{asked.choice.name}{edits}, going on from “{prompt}”{' (chat)' if asked.chat else ''}."


def register(app: Dash, desk: Desk) -> None:
    """Adds the callbacks."""

    @app.callback(
        Output(_part("progress", MATCH), "children"),
        Output(_part("columns", MATCH), "children"),
        Output(_part("clock", MATCH), "max_intervals"),
        Output(_part("cancel", MATCH), "style"),
        Output(_part("seen", MATCH), "data"),
        Input(_part("clock", MATCH), "n_intervals"),
        Input(_part("cancel", MATCH), "n_clicks"),
        State(_part("clock", MATCH), "id"),
        State(_part("seen", MATCH), "data"),
        prevent_initial_call=True,
    )
    def _polled(ticks: Any, cancels: Any, name: Any, seen: Any) -> Any:
        if name["run"] not in desk.bench.runs:
            return no_update
        asked, job = desk.bench.runs[name["run"]]
        if cancels and not job.over:
            job.cancel()
        over = job.over  # asked first: what is shown then is the end
        # Once more, and not before this is answered (see `drawing.once_more`): on a busy machine an answer takes longer
        # than a tick, and a clock that ran on would never see one.
        clock = 0 if over else (ticks or 0) + 1
        now = [over, job.state, job.what, job.done, sum(map(len, (job.partial or {}).values()))]
        if now == seen:
            return no_update, no_update, clock, no_update, no_update
        return _progress(desk, job), _columns(asked, job), clock, HIDDEN if over else SHOWN, now


def run(scene: Scene) -> tuple[Question, Job]:
    """The generation that a place shows.

    Raises:
        MoescopeError: there is none, or it is no longer in memory.
    """
    if scene.place.run is None:
        raise MoescopeError("Nothing is generated yet: write a prompt and press Generate.")
    found = scene.desk.bench.runs.get(scene.place.run)
    if found is None:
        raise MoescopeError("What this address showed is no longer in memory; press Generate to have it again.")
    return found


def compared(scene: Scene) -> Any:
    """What the models think of the answers: `decoding.answers_apart`.

    Raises:
        Pending: they are being written.
        MoescopeError: there is nothing to compare, in a sentence.
    """
    _, job = run(scene)
    if not job.over:
        raise Pending(job)
    if job.state != "done":
        raise MoescopeError(job.error or "The generation was cancelled before its answers could be compared.")
    if job.result.apart is None:
        raise MoescopeError(
            job.result.trouble or "There was no recipe, so there is nothing to compare: add an edit, then generate."
        )
    return job.result.apart


def moved(scene: Scene) -> Any:
    """The figure of the routing."""
    return figures.answers_apart(compared(scene))


def tokens(scene: Scene) -> Any:
    """Every token of every answer, with both probabilities."""
    frame = analysis.table(compared(scene), ["answer", "place"])
    seen = {name: [spelled(str(text)) for text in frame[name]] for name in ("text", "plain_says", "edited_says")}
    return frame.assign(**seen)[frame["plain"].notna()].reset_index(drop=True)


def shade(change: float) -> str:
    """The class of a token's colour: "up1" … "up4", "down1" … "down4", or none."""
    step = int(np.searchsorted(_BOUNDS, abs(change), side="right"))
    return f"{'up' if change > 0 else 'down'}{step}" if abs(change) >= FAINT else ""


def _progress(desk: Desk, job: Job) -> Any:
    if job.state == "done":
        return None
    if job.state == "failed":
        return dmc.Alert(desk.shelf.without_root(job.error), color="red", variant="light", className="note")
    if job.state == "cancelled":
        return dmc.Text("Cancelled; what was written until then stays.", size="sm", c="dimmed")
    words = f"{job.what}: {job.done:,} of {job.total:,}" if job.total else job.what or "beginning"
    return [
        dmc.Text(words, size="sm"),
        dmc.Progress(
            value=100 * job.done / job.total if job.total else 100,
            striped=not job.total,
            animated=not job.total,
            size="xs",
            **named("Generating"),
        ),
    ]


def _columns(asked: Question, job: Job) -> list[Any]:
    said: Generated | None = job.result if job.state == "done" else None
    return [
        html.Section(
            [
                html.H3([name, html.Span(_ABOUT[name], className="dim")]),
                *(_streamed(job, name) if said is None else _whole(said, name)),
            ],
            className="answer",
            **named(f"{name} answer"),
        )
        for name in asked.answers
    ] + ([_legend()] if said is not None and said.apart is not None else [])


def _streamed(job: Job, name: str) -> list[Any]:
    text = (job.partial or {}).get(name, "")
    words = marked(text, blanks=False)
    return [html.P(words, className="said writing" if f"the {name} answer" in job.what and not job.over else "said")]


def _whole(said: Generated, name: str) -> list[Any]:
    one = said.written[name]
    if said.apart is None:
        body: list[Any] = marked(one.text, blanks=False)
        below = f"{len(one.tokens)} tokens. {said.trouble}"
    else:
        part = said.apart.sel(answer=name).isel(place=slice(len(one.tokens)))
        columns = {str(name): part[name].values for name in part if part[name].dims == ("place",)}
        rows = [{name: values[place] for name, values in columns.items()} for place in range(len(one.tokens))]
        body = [_token(place, row, one.steps) for place, row in enumerate(rows)]
        below = f"{len(one.tokens)} tokens"
    return [html.P(body or html.Span("(nothing)", className="dim"), className="said"), html.Div(below, className="dim")]


def _token(place: int, values: dict[str, Any], steps: list[Any]) -> Any:
    """One token, its colour and what a pointer says of it."""
    lines = [
        f"token {place + 1}: {values['text']!r}",
        "plain {plain:.1%}, edited {edited:.1%} ({change:+.1%})".format(**values),
        "likeliest: plain {plain_says!r} {plain_best:.1%}, edited {edited_says!r} {edited_best:.1%}".format(**values),
    ]
    if place < len(steps):
        lines.append(f"self-contrast chose it at {steps[place].contrast:.1%}; weak routing {steps[place].weak:.1%}")
    return html.Span(
        marked(values["text"], blanks=False), title="\n".join(lines), className=shade(values["change"]) or None
    )


def _legend() -> Any:
    chips = [html.Span("less likely under the edits", className="down3"), html.Span("likelier", className="up3")]
    return html.Div([*chips, html.Span("point at a token for its probabilities")], className="legend dim")
