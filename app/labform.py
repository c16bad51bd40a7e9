"""The lab's questions: which model, what prompt, how to write; and the buttons that begin and stop."""

from __future__ import annotations

from typing import Any

import dash_mantine_components as dmc
from dash import ALL, ClientsideFunction, Dash, Input, Output, State, ctx, dcc, html, no_update

from moescope.app import controls, recipes
from moescope.app.aria import named
from moescope.app.bench import Bench, Choice, Question
from moescope.app.panels import note
from moescope.app.place import Place, parse
from moescope.app.scene import Desk, Scene
from moescope.errors import MoescopeError

NEW, SEED, BETA, ALPHA = 64, 0, 0.5, 0.1  # as `moescope generate` has them
MOST = 512  # tokens of one answer: what a page of coloured tokens can show
LONGEST_PROMPT = 7_000  # characters, so that the address holds it
_ASKED = ("model", "prompt", "new", "temperature", "seed", "chat", "contrast", "beta", "alpha", "recipe")
"""Fields of the place that say what is generated."""


def draw(scene: Scene) -> Any:
    """The panel: its controls show what the place says."""
    names = choices(scene)
    own = next(iter(names))
    models = [(name, name if name != own else f"{name} (this store's)") for name in names]
    return html.Div(
        [
            html.Div(
                [
                    controls.select("model", "Model", models, own, width=300),
                    dmc.Button("Load", id="lab-load", size="xs", variant="default", n_clicks=0),
                    dmc.Button("Unload", id="lab-unload", size="xs", variant="default", n_clicks=0),
                ],
                className="lab-row",
            ),
            html.Div(id="lab-said", className="dim", role="status"),
            dmc.Textarea(
                id={"type": "set", "field": "prompt", "default": ""},
                label="Prompt",
                placeholder="What the model goes on from",
                value="",
                debounce=True,
                autosize=True,
                size="xs",
                minRows=3,
                maxRows=12,
                attributes={"input": {"maxLength": LONGEST_PROMPT}},
            ),
            html.Div(
                [
                    controls.number("new", "Tokens at most", NEW, 1, MOST, width=104),
                    _fraction("temperature", "Temperature", 0, 0, 5, "0 takes the likeliest token"),
                    controls.number("seed", "Seed", SEED, 0, 2**31 - 1, width=84),
                    controls.switch("chat", "Prompt as", [("false", "text"), ("true", "chat")], "false"),
                ],
                className="lab-row",
            ),
            html.Div(
                [
                    controls.switch("contrast", "Self-contrast", [("false", "off"), ("true", "on")], "false"),
                    _fraction("beta", "β", BETA, 0, 100, "strength of self-contrast"),
                    _fraction("alpha", "α", ALPHA, 0.001, 1, "least share of the likeliest token's probability"),
                ],
                className="lab-row",
            ),
            html.Div(
                [
                    dmc.Button("Generate", id="lab-generate", size="sm", n_clicks=0),
                    html.Div(id="lab-trouble", role="alert"),
                ],
                className="lab-row",
            ),
            dcc.Store(id="lab-go"),
            dcc.Interval(id="lab-watch", interval=1500, max_intervals=1),
        ],
        className="lab-form",
    )


def register(app: Dash, desk: Desk) -> None:
    """Adds the callbacks."""
    # A field that is being left sets the place; the button waits until it has.
    app.clientside_callback(
        ClientsideFunction("moescope_lab", "go"),
        Output("lab-go", "data"),
        Input("lab-generate", "n_clicks"),
        prevent_initial_call=True,
    )

    @app.callback(
        Output("url", "href", allow_duplicate=True),
        Output("lab-trouble", "children"),
        Input("lab-go", "data"),
        State("place", "data"),
        State({"type": "set", "field": ALL, "default": ALL}, "id"),
        State({"type": "set", "field": ALL, "default": ALL}, "value"),
        prevent_initial_call=True,
    )
    def _generate(go: Any, place: Any, names: Any, values: Any) -> Any:
        if not go or not place or place.get("trouble"):
            return no_update, no_update
        try:
            return begun(desk, asked(parse(place["href"])[0], names, values)).href, None
        except MoescopeError as error:
            return no_update, note(desk.shelf.without_root(str(error)), trouble=True)

    @app.callback(
        Output("lab-watch", "n_intervals"),
        Input("lab-load", "n_clicks"),
        Input("lab-unload", "n_clicks"),
        State("lab-watch", "n_intervals"),
        State("place", "data"),
        prevent_initial_call=True,
    )
    def _pressed(load: Any, unload: Any, ticks: Any, place: Any) -> Any:
        if not place or place.get("trouble") or not place.get("store"):
            return no_update
        if ctx.triggered_id == "lab-load" and load:
            chosen = choice(desk.scene(parse(place["href"])[0]))  # what may not be loaded is refused aloud
            desk.bench.started = desk.jobs.start(
                f"loading {chosen.name}", lambda job: desk.bench.load(job, chosen), free=True
            )
        if ctx.triggered_id == "lab-unload" and unload:
            if (coming := desk.bench.coming) is not None:
                coming.cancel()
            else:
                desk.jobs.start("unloading", desk.bench.unload, free=True)
        return (ticks or 0) + 1  # at once, and not at the next tick

    @app.callback(
        Output("lab-said", "children"),
        Output("lab-watch", "max_intervals"),
        Input("lab-watch", "n_intervals"),
        State("place", "data"),
        State("lab-said", "children"),
    )
    def _said(ticks: Any, place: Any, before: Any) -> Any:
        more = (ticks or 0) + 1  # once more, and not before this is answered: see `labanswers`
        if not place or place.get("trouble") or not place.get("store"):
            return no_update, more
        try:
            words = said(desk.scene(parse(place["href"])[0]))
        except MoescopeError as error:
            words = desk.shelf.without_root(str(error))
        return no_update if words == before else words, more


def choices(scene: Scene) -> dict[str, Choice]:
    """Models that may be loaded, the store's own first: what a browser may ask for, and nothing else.

    A store can name any model, and any revision of one: their own code runs only of what the command line names.
    """
    from moescope.hooks.aliases import ALIASES

    record, desk = scene.store.manifest.model, scene.desk
    found = {record.name: Choice(record.name, record.revision)}
    for name in (*desk.models, *ALIASES):
        found.setdefault(name, Choice(name))
    if desk.trust_remote_code:
        found |= {name: Choice(name, trust_remote_code=True) for name in desk.models}
    return found


def choice(scene: Scene) -> Choice:
    """The chosen model.

    Raises:
        MoescopeError: not one that may be loaded.
    """
    known = choices(scene)
    if scene.place.model is None:
        return next(iter(known.values()))
    if scene.place.model not in known:
        raise MoescopeError(
            "The lab loads the store's model, the aliases, and what the command line names (moescope app --model NAME)."
        )
    return known[scene.place.model]


def question(scene: Scene) -> Question:
    """What a place asks for.

    Raises:
        MoescopeError: a model that may not be loaded, no prompt, a number out of its range, or an unreadable recipe.
    """
    here = scene.place
    new = here.new if here.new is not None else NEW
    alpha, beta = (value if value is not None else plain for value, plain in ((here.alpha, ALPHA), (here.beta, BETA)))
    if not here.prompt:
        raise MoescopeError("Write a prompt for the model to go on from.")
    if len(here.prompt) > LONGEST_PROMPT:
        raise MoescopeError(f"The lab takes prompts of up to {LONGEST_PROMPT:,} characters; `moescope generate` any.")
    if not 1 <= new <= MOST:
        raise MoescopeError(f"The lab writes 1 to {MOST} tokens.")
    if (here.seed or 0) >= 2**63:
        raise MoescopeError("The seed is too large.")
    if here.contrast and not 0 < alpha <= 1:
        raise MoescopeError("α of self-contrast lies above 0 and is at most 1.")
    return Question(
        choice(scene),
        here.prompt,
        here.chat,
        recipes.read(here.recipe),
        new,
        here.temperature or None,
        here.seed or SEED,
        (beta, alpha) if here.contrast else None,
    )


def asked(here: Place, names: list[dict[str, str]], values: list[Any]) -> Place:
    """The place with what the lab's controls show: it may not have heard of the last of it yet.

    Args:
        here: as the page knows it.
        names: ids of controls of the page, those of `controls`.
        values: of each.

    Raises:
        MoescopeError: more than an address can hold.
    """
    for name, value in zip(names, values, strict=True):
        if name["field"] in _ASKED:
            here = controls.chosen(here, name["field"], value, name["default"])
    return here


def begun(desk: Desk, here: Place) -> Place:
    """Begins to generate what a place asks for; the place that shows it."""
    wanted = question(desk.scene(here))
    job = desk.jobs.start("generating", lambda job: desk.bench.generate(job, wanted), free=True)
    desk.bench.keep(wanted, job)
    return here.go(run=job.id)


def said(scene: Scene) -> str:
    """What is in memory, in words."""
    bench: Bench = scene.desk.bench
    coming, started, held = bench.coming, bench.started, bench.held
    if coming is not None:
        what = coming.what or coming.title
        share = f": {coming.done:,} of {coming.total:,}" if coming.total else ""
        first = " (weights are fetched the first time)" if coming is bench.loading and not coming.total else ""
        return f"{what[:1].upper()}{what[1:]}{share}{first}. Unload stops it."
    if held is None:
        if started is not None and started.state == "failed":
            return scene.desk.shelf.without_root(started.error)
        return "No model is in memory; Generate loads the chosen one."
    chosen, model = held
    size = f"{model.n_parameters / 1e6:,.1f}M" if model.n_parameters < 1e9 else f"{model.n_parameters / 1e9:,.1f}B"
    words = f"{chosen.name} is in memory: {size} parameters, {str(model.hf.dtype).removeprefix('torch.')} on "
    room = "" if model.max_positions is None else f", {model.max_positions:,} positions for prompt and answer"
    words += f"{model.device}{room}; {_beside(scene, model)}."
    return words if chosen == choice(scene) else f"{words} Generate replaces it by the chosen one."


def _beside(scene: Scene, model: Any) -> str:
    record = scene.store.manifest.model
    if record.weights_fingerprint is not None and model.weights_fingerprint == record.weights_fingerprint:
        return "the model that this store was captured from"
    if model.config_hash != record.config_hash:
        if model.config_hash_in(record.dtype) == record.config_hash:
            return f"the store's configuration in another precision ({record.dtype} there): close choices may differ"
        return "another model than the store's: its experts are not those that the other pages show"
    if record.weights_fingerprint is None:
        return "the store's configuration"
    return "the store's configuration with other weights (another training, precision, or an edit)"


def _fraction(field: str, label: str, default: float, low: float, high: float, title: str) -> Any:
    return dmc.NumberInput(
        id={"type": "set", "field": field, "default": str(default)},
        label=label,
        value=default,
        min=low,
        max=high,
        step=0.1,
        decimalScale=4,
        clampBehavior="strict" if low == 0 else "blur",
        debounce=300,
        size="xs",
        w=88,
        attributes={"root": {"title": title}},
        **named(f"{label}: {title}"),
    )
