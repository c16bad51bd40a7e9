"""Writing the recipe into a copy of the checkpoint: named, asked for twice, and told how exactly it holds the edits."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any, cast

import dash_mantine_components as dmc
from dash import Dash, Input, Output, State, ctx, dcc, html, no_update

from moescope.app import labform, recipefiles, recipes
from moescope.app.aria import named
from moescope.app.bench import Choice, new_folder
from moescope.app.expert_words import worded
from moescope.app.jobs import Job
from moescope.app.panels import HIDDEN, SHOWN, note
from moescope.app.place import Place, parse
from moescope.app.scene import Desk, Scene
from moescope.edits import Recipe
from moescope.errors import MoescopeError


def draw(scene: Scene) -> Any:
    """The panel."""
    words = "A copy of the model's checkpoint with the recipe in its weights, as `moescope apply` writes it."
    job = scene.desk.bench.writing
    over = job is None or job.over
    return html.Div(
        [
            html.P(worded(words), className="dim"),
            html.Div(
                [
                    dmc.TextInput(id="write-name", label="New folder", placeholder="edited-model", size="xs", w=220),
                    dmc.Button("Write…", id="write-ask", size="xs", variant="default", n_clicks=0),
                ],
                className="lab-row",
            ),
            dmc.Checkbox(
                id="write-near",
                label="also what a checkpoint can hold only nearly (it then says how near)",
                checked=False,
                size="xs",
            ),
            html.Div(None if job is None else _told(scene.desk, job), id="write-said", role="status"),
            dmc.Modal(
                [
                    html.P(id="write-words"),
                    dmc.Group(
                        [
                            dmc.Button("Write it", id="write-go", size="xs", n_clicks=0),
                            dmc.Button("Not now", id="write-no", size="xs", variant="default", n_clicks=0),
                        ]
                    ),
                ],
                id="write-modal",
                title="Write a checkpoint?",
                opened=False,
                closeButtonProps=cast("Any", named("Close")),
            ),
            dcc.Interval(id="write-clock", interval=500, max_intervals=0 if over else 1),
            dmc.Button(
                "Cancel",
                id="write-cancel",
                size="compact-xs",
                variant="default",
                n_clicks=0,
                style=HIDDEN if over else SHOWN,
            ),
        ],
        className="checkpoint",
    )


def register(app: Dash, desk: Desk) -> None:
    """Adds the callbacks."""

    @app.callback(
        Output("write-modal", "opened"),
        Output("write-words", "children"),
        Output("write-clock", "max_intervals", allow_duplicate=True),
        Output("write-said", "children", allow_duplicate=True),
        Input("write-ask", "n_clicks"),
        Input("write-go", "n_clicks"),
        Input("write-no", "n_clicks"),
        State("write-name", "value"),
        State("write-near", "checked"),
        State("write-clock", "n_intervals"),
        State("place", "data"),
        prevent_initial_call=True,
    )
    def _asked(ask: Any, go: Any, no: Any, name: Any, near: Any, ticks: Any, place: Any) -> Any:
        if not place or place.get("trouble") or not ctx.triggered[0]["value"]:
            return no_update
        if ctx.triggered_id == "write-no":
            return False, no_update, no_update, no_update
        here = parse(place["href"])[0]
        try:
            if ctx.triggered_id == "write-ask":
                return True, words(desk, here, str(name or "")), no_update, None
            job = begun(desk, here, str(name or ""), bool(near))
        except MoescopeError as error:
            return False, no_update, no_update, note(desk.shelf.without_root(str(error)), trouble=True)
        return False, no_update, (ticks or 0) + 1, _told(desk, job)

    @app.callback(
        Output("write-said", "children"),
        Output("write-clock", "max_intervals"),
        Output("write-cancel", "style"),
        Input("write-clock", "n_intervals"),
        Input("write-cancel", "n_clicks"),
        prevent_initial_call=True,
    )
    def _polled(ticks: Any, cancels: Any) -> Any:
        job = desk.bench.writing
        if job is None:
            return no_update, 0, HIDDEN
        if ctx.triggered_id == "write-cancel" and cancels:
            job.cancel()
        over = job.over
        # Asks once more, and not before this is answered: see `labanswers`.
        return _told(desk, job), 0 if over else (ticks or 0) + 1, HIDDEN if over else SHOWN


def words(desk: Desk, here: Place, name: str) -> str:
    """What would be written, where and from what.

    Raises:
        MoescopeError: there is no recipe, no such folder can be made, or another checkpoint is being written.
    """
    model, recipe, folder = _wanted(desk, here, name)
    edits = ", ".join(f"{recipes.named(one)} {recipes.said(one)}" for one in recipe.edits[:6])
    more = f" and {len(recipe.edits) - 6} more" if len(recipe.edits) > 6 else ""
    return (
        f"A full copy of {model.name} goes into the new folder {folder.name} of {desk.shelf.root.name}, with: "
        f"{edits}{more}. Its source is not touched. It is kept only if it computes what the live edits do."
    )


def begun(desk: Desk, here: Place, name: str, approximate: bool) -> Job:
    """Begins to write.

    Raises:
        MoescopeError: as `words`.
    """
    model, recipe, folder = _wanted(desk, here, name)
    desk.bench.writing = desk.jobs.start(
        f"writing {name}", lambda job: desk.bench.write(job, model, recipe, folder, approximate), free=True
    )
    return desk.bench.writing


def _wanted(desk: Desk, here: Place, name: str) -> tuple[Choice, Recipe, Path]:
    """What is written, with which edits, and where."""
    if (writing := desk.bench.writing) is not None and not writing.over:
        raise MoescopeError(f"The lab is {writing.title} now: wait until it is done, or cancel it.")
    scene = desk.scene(here)
    recipe = recipefiles.for_file(scene)
    return labform.choice(scene), recipe, new_folder(desk.shelf.root, desk.shelf.alone, name)


def report(done: Any) -> str:
    """What was written and how exactly it holds the edits, from the writing's own proof."""
    said = f"{done.path.name} is written: {done.difference}. "
    proof = done.proof
    if proof is None:
        return said + "It was not compared with the live edits."
    if done.exact:
        said += "It holds the edits exactly: "
    else:
        inexact = sum(not change.exact for change in done.changes)
        said += (
            f"{inexact} of them hold their edit only nearly; next-token distributions differ by "
            f"{proof.divergence:.3g} nats from the live edits: "
        )
    return said + (
        f"live and written differ by at most {proof.largest:.2g} in a logit over {proof.tokens} tokens, where the "
        f"edits themselves change up to {proof.changed:.2g}."
    )


def onward(done: Any) -> str:
    """How a written checkpoint gets a store of its own, to be compared with its source's."""
    name = shlex.quote(done.path.name)
    return (
        "What it does to texts: run `moescope capture --data TEXTS "
        f"--model {name} --out {name}-store` in the folder of this app, with the texts of the source's store, and "
        "choose the new store on Compare."
    )


def _told(desk: Desk, job: Job) -> Any:
    if job.state == "done":
        return [note(report(job.result)), html.P(worded(onward(job.result)), className="dim")]
    if job.state == "failed":
        here = " The box above is that option here." if "--approximate" in job.error else ""
        return note(f"{desk.shelf.without_root(job.error)}{here}", trouble=True)
    if job.state == "cancelled":
        return note("Cancelled; nothing was written.")
    return dmc.Text(f"{job.title}: {job.what or 'beginning'}", size="sm")
