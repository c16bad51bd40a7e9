"""What an expert causes: masked in the lab's model on texts of this store, beside others of its layer."""

from __future__ import annotations

import json
import shlex
from collections.abc import Hashable
from typing import TYPE_CHECKING, Any

import dash_mantine_components as dmc
from dash import Dash, Input, Output, State, dcc, html, no_update

from moescope import figures
from moescope.analysis.contents import contents_of
from moescope.analysis.effect_summary import effect_finding
from moescope.app import controls
from moescope.app.answers import Pending
from moescope.app.expert_words import listed, where_of
from moescope.app.jobs import Job
from moescope.app.linestocopy import copied
from moescope.app.links import to
from moescope.app.panels import MODEBAR, note, plot_config
from moescope.app.place import parse
from moescope.app.scene import Desk, Scene
from moescope.errors import MoescopeError
from moescope.figures.effects import READ_ONE

if TYPE_CHECKING:
    import xarray as xr

    from moescope.hooks import Model

NAME = "expert-effect"
HOW = (
    f"{READ_ONE} p is corrected for looking at several labels. The texts are this store's, drawn at random, the same "
    "for every expert: what stands here need not stand on other texts."
)
TEXTS, MOST = 8, 64
"""Documents of each label that are measured on, unless chosen otherwise, and at most."""


def draw(scene: Scene) -> Any:
    """The panel: what was measured, or the way to it.

    Raises:
        Pending: it is being measured.
        MoescopeError: no expert is selected, or these texts cannot be had.
    """
    site, expert = scene.selected()
    _require_texts(scene)
    model, why = model_of(scene)
    if model is None:
        return html.Div([*why, *_ways(scene, site, expert)], className="causes")
    job = scene.desk.bench.measured.get(_asked(scene, model))
    if job is not None and not job.over:
        raise Pending(job)
    if job is not None and job.state == "done":
        return _shown(scene, model, job.result, site, expert)
    trouble = []
    if job is not None and job.state == "failed":
        trouble.append(note(scene.desk.shelf.without_root(job.error), trouble=True))
    button = dmc.Button("Measure", id="effect-measure", size="xs", n_clicks=0)
    return html.Div([*trouble, html.P(_plan(scene), className="dim"), button], className="causes")


def measured(scene: Scene) -> xr.Dataset | None:
    """The effect of the selected expert (`effects.causal_effect`), if it has been measured."""
    model, _ = model_of(scene)
    job = None if model is None else scene.desk.bench.measured.get(_asked(scene, model))
    return job.result if job is not None and job.state == "done" else None


def model_of(scene: Scene) -> tuple[Model | None, list[Any]]:
    """The lab's model if it is this store's, else why there is none, with the way to one."""
    bench, record = scene.desk.bench, scene.store.manifest.model
    held = bench.held  # asked once: somebody may unload it meanwhile
    lab = to(scene.place.go(page="lab", model=None, full=None), f"load {record.name} in the lab")
    if held is None:
        if bench.coming is not None:
            words = ["The lab is loading a model: look again when it is there."]
        else:
            words = ["A store holds no model, and none is in memory: ", lab, ", then come back to measure."]
        return None, [html.P(words)]
    from moescope.effects.causing import require_model

    try:
        require_model(held[1], scene.store)
    except MoescopeError as error:
        return None, [html.P([f"The lab has another model in memory. {error} To measure here, ", lab, "."])]
    return held[1], []


def begun(scene: Scene) -> Job:
    """Begins to measure, unless somebody has.

    Raises:
        MoescopeError: no expert is selected, no model, or these texts cannot be had.
    """
    site, expert = scene.selected()
    _require_texts(scene)
    model, _ = model_of(scene)
    if model is None:
        raise MoescopeError("No model of this store is in memory: load it in the lab.")
    desk, store, by, where, texts = scene.desk, scene.store, scene.by, where_of(scene), _texts(scene)
    weights = model.weights_fingerprint

    def work(job: Job) -> xr.Dataset:
        from moescope.effects import causal_effect

        def on_model(model: Model) -> xr.Dataset:
            return causal_effect(
                model, store, site, expert, by=by, where=where, documents=texts,
                on_progress=lambda done, total: job.report("tokens through the model", done, total),
            )  # fmt: skip

        return desk.bench.measure(job, weights, on_model)

    title = f"Masking {scene.place.expert_name} and others of its layer:"
    return desk.bench.remember(_asked(scene, model), lambda: desk.jobs.start(title, work, free=True))


def register(app: Dash, desk: Desk) -> None:
    """Adds the callback of the button."""

    @app.callback(
        Output({"type": "act", "of": "block", "view": NAME}, "data"),
        Input("effect-measure", "n_clicks"),
        State("place", "data"),
        prevent_initial_call=True,
    )
    def _measure(clicks: Any, place: Any) -> Any:
        if not clicks or not place or place.get("trouble"):
            return no_update
        begun(desk.scene(parse(place["href"])[0]))
        return {"do": "retry", "at": clicks}  # the panel looks again


def how_many(scene: Scene) -> Any:
    """The control: documents of each label."""
    options = [(str(n), f"{n} a label") for n in (2, 4, 8, 16, 32, 64)]
    return controls.select("texts", "Documents of each label", options, str(TEXTS), width=112)


def _asked(scene: Scene, model: Model) -> Hashable:
    where = json.dumps(where_of(scene), sort_keys=True)
    return (scene.opened.version, model.weights_fingerprint, *scene.selected(), scene.by, where, _texts(scene))


def _texts(scene: Scene) -> int:
    return min(max(scene.place.texts if scene.place.texts is not None else TEXTS, 1), MOST)


def _plan(scene: Scene) -> str:
    """What would be run, at most."""
    from moescope.effects.causing import LABELS, length_of, others_of

    texts, by, site = _texts(scene), scene.by, scene.site()
    others, length = others_of(site), length_of(scene.store)
    which = (
        f"{others} others of its layer" if others < site.n_experts - 1 else f"each of the {others} others of its layer"
    )
    of = "of this store" if by is None else f"of each {by} (the {LABELS} with the most documents, if there are more)"
    return (
        f"Masks this expert, and then {which} instead, on {texts} documents {of}, and tells how the loss moves beside "
        f"the plain model's: {2 + others} runs of the same texts, of each its first {length} tokens at most."
    )


def _shown(scene: Scene, model: Model, result: xr.Dataset, site: str, expert: int) -> Any:
    figure = figures.causal_effect(result)
    figure = figures.dark(figure) if scene.dark else figure
    figure.update_layout(modebar=MODEBAR)
    layout: Any = figure.layout
    graph = dcc.Graph(figure=figure, config=plot_config(), style={"height": f"{layout.height}px"})
    facts = result.attrs
    said = [
        f"{facts['documents']:,} documents, {facts['tokens']:,} tokens of them, with {model.name} in "
        f"{str(model.hf.dtype).removeprefix('torch.')}."
    ]
    if facts["weights"] != "the store's":
        said.append(
            "Its weights are not those that the store was captured from: another training, precision or an edit."
        )
    if facts["store_edits"] != "none":
        said.append(f"The store was captured under edits ({facts['store_edits']}); here they are not live.")
    if facts["labels_left_out"]:
        said.append(f"{facts['labels_left_out']:,} labels with fewer documents are left out.")
    words = html.P(" ".join(said), className="dim")
    return html.Div([listed([effect_finding(result)]), graph, words, *_ways(scene, site, expert)], className="causes")


def _ways(scene: Scene, site: str, expert: int) -> list[Any]:
    """The line that measures the same outside the app."""
    by, where, name, model = scene.by, where_of(scene), scene.opened.name, scene.store.manifest.model.name
    held = scene.desk.bench.held
    model = held[0].name if held is not None and model_of(scene)[0] is not None else model
    texts = _texts(scene)
    if where is None:
        parts = ["moescope", "expert", name, scene.place.expert_name or "", "--model", model]
        parts += ([] if by is None else ["--by", by]) + ["--documents", str(texts)]
        return [copied("command line", shlex.join(parts))]
    layer = scene.site().layer if scene.layers.count(str(scene.site().layer)) else site
    line = (
        f"moescope.effects.causal_effect(moescope.load({model!r}), moescope.open({name!r}), {layer!r}, {expert}, "
        f"by={by!r}, where={where!r}, documents={texts})"
    )
    return [copied("Python line", line)]


def _require_texts(scene: Scene) -> None:
    if not scene.compute("has texts", "looking for texts", lambda: contents_of(scene.store).has_texts):
        raise MoescopeError(
            "This store holds no texts to measure a loss on. `moescope steer --recipe … --data texts.jsonl` measures "
            "the same on texts of your own."
        )
