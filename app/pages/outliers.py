"""Outliers: super experts by both definitions, massive activations, attention sinks."""

from __future__ import annotations

import shlex
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import xarray as xr
from dash import html

from moescope import figures
from moescope.analysis.contexts import text_of_token
from moescope.analysis.labelled import expert_name, table
from moescope.analysis.outlier_summary import Rule, massive_finding, rule_of, sink_finding
from moescope.analysis.summary import Finding, outlier_finding
from moescope.app import controls
from moescope.app.expert_words import found_of, of_all
from moescope.app.linestocopy import copied
from moescope.app.links import to
from moescope.app.place import Place
from moescope.app.scene import Scene
from moescope.app.tokens import spelled
from moescope.app.views import BlockView, FigureView, Page, TableView, to_expert, to_texts
from moescope.errors import MoescopeError
from moescope.figures.outliers import READ as READ_SUPER
from moescope.store.sinks import SINKS

if TYPE_CHECKING:
    import pandas as pd

    from moescope.store import Store

_RATIO = 10
"""Times its layer's median, the default of `analysis.super_experts`."""
_SELECTION = ("label", "phase", "slices", "slice")  # followed by words that say that none of it counts here


def _super(scene: Scene, definition: str | None = None) -> xr.Dataset:
    return scene.ask("super_experts", definition=definition or scene.place.definition or "paper")


def _card(ask: Callable[[Scene], xr.Dataset], say: Callable[[xr.Dataset], Finding], empty: str) -> Any:
    def draw(scene: Scene) -> Any:
        try:
            found = say(ask(scene))
        except MoescopeError as reason:
            return found_of(Finding("", empty, str(reason), None), scene)
        return found_of(of_all(found, found.analysis, scene.place), scene)

    return draw


def _sinks(scene: Scene) -> xr.Dataset:
    return scene.ask("attention_sinks")


def _rules(scene: Scene) -> Any:
    """Both published definitions, side by side."""
    rules = [rule_of(_super(scene, definition)) for definition in ("paper", "code")]
    rows: list[tuple[str, Callable[[Rule], Any]]] = [
        ("pools the maxima of layers", lambda rule: f"0 to {rule.depth}"),
        ("because", lambda rule: rule.why),
        ("experts pooled", lambda rule: f"{rule.pooled:,}"),
        ("can name at most", lambda rule: f"{rule.cap:,}"),
        ("above the 99.5th percentile", lambda rule: f"{rule.percentile:.4g}"),
        ("and above the largest / 10", lambda rule: f"{rule.tenth:.4g}"),
        ("names", lambda rule: _names(scene, rule.named)),
        (f"also {_RATIO} times its layer, z beyond chance", lambda rule: _names(scene, rule.believed)),
    ]
    head = html.Tr([html.Td(""), html.Th("the paper's text", scope="col"), html.Th("its released code", scope="col")])
    body = [html.Tr([html.Th(words, scope="row"), *[html.Td(say(rule)) for rule in rules]]) for words, say in rows]
    return html.Table([html.Thead(head), html.Tbody(body)], className="rules")


def _names(scene: Scene, experts: tuple[tuple[str, int], ...]) -> Any:
    if not experts:
        return "none"
    parts: list[Any] = []
    for layer, expert in experts:
        place = scene.place.go(page="expert", layer=layer, expert=expert, full=None)
        parts += [", ", to(place, expert_name(layer, expert))]
    return html.Span(parts[1:])


def _figure(scene: Scene) -> Any:
    return figures.super_experts(_super(scene))


def _clicked(place: Place, point: dict[str, Any]) -> Place | None:
    """A point of either half carries its layer and expert, by name; lines and ticks are of no one expert."""
    about = point.get("customdata")
    return to_expert(place, {"y": about[0], "x": about[1]}) if isinstance(about, list) and len(about) > 1 else None


def _heads(scene: Scene) -> Any:
    return figures.attention_sinks(_sinks(scene))


def _table(scene: Scene) -> pd.DataFrame:
    frame = table(_super(scene))
    frame["token"] = [spelled(text) for text in _texts(scene, frame)]
    frame["super"] = ["yes" if holds else "" for holds in frame["super"]]
    return frame


def _texts(scene: Scene, frame: pd.DataFrame) -> list[str]:
    """The text of each row's token, "" where it is not known."""
    vocabulary, known = scene.store.vocabulary(), frame["token_id"].notna()
    ids = zip(frame["token_id"], known, strict=True)
    return [text_of_token(vocabulary, int(one)) if there else "" for one, there in ids]


def _massive(scene: Scene) -> pd.DataFrame:
    frame = table(_sinks(scene), ["layer"])
    frame["text"] = _texts(scene, frame)
    frame["token"] = [spelled(text) for text in frame["text"]]
    return frame


def _elsewhere(scene: Scene) -> Any:
    """What this page cannot show without the model, and which command does."""
    model, name = scene.store.manifest.model.name, scene.opened.name
    asks = (
        (
            "Weights that stand out of their columns",
            "are read from the model, not from what it did:",
            f"moescope analyze weight_outliers {model}",
        ),
        (
            "Whether super experts cause the sinks",
            "is asked by silencing them, against as many random experts:",
            f"moescope super-experts --store {name} --data texts.jsonl",
        ),
    )
    rows = [html.Li([html.Strong(what), f" {why} ", html.Code(command)]) for what, why, command in asks]
    return html.Ul(rows, className="asks")


def _switch(scene: Scene) -> Any:
    choices = [("paper", "Paper's text"), ("code", "Released code")]
    return controls.switch("definition", "Definition of super experts", choices, "paper")


def _has_maxima(store: Store) -> bool:
    return "outliers" in store.tiers


def _has_sinks(store: Store) -> bool:
    return bool(store.manifest.setting(SINKS, 0))


def _has_either(store: Store) -> bool:
    return _has_maxima(store) or _has_sinks(store)


def _missing(scene: Scene) -> Any:
    """What a store without the outliers tier cannot tell, and the capture that can: said once for all its panels."""
    manifest = scene.store.manifest
    lost = ["super experts", "massive activations", *([] if _has_sinks(scene.store) else ["attention sinks"])]
    tiers = [tier for tier in scene.store.tiers if tier != "activations"]  # its vectors are chosen by options of theirs
    line = ["moescope", "capture", "--model", manifest.model.name, "--data", "texts.jsonl"]
    line += [part for label in scene.store.labels for part in ("--label", label)]
    line += [part for tier in (*tiers, "outliers") for part in ("--tier", tier)]
    line += ["--sinks", "--out", f"{scene.opened.name}-outliers"]
    return html.Article(
        [
            html.Div(
                html.Strong(f"This store cannot tell {', '.join(lost[:-1])} or {lost[-1]}."), className="finding-head"
            ),
            html.Div(
                "It was captured without the outliers tier, the largest output of each expert and value of each "
                "layer. Capture the same texts again with it:",
                className="dim",
            ),
            copied("command", shlex.join(line)),
        ],
        className="panel finding counted",
    )


def _verdict(
    name: str, title: str, ask: Any, say: Any, empty: str, held: Callable[[Store], bool], reads: tuple[str, ...] = ()
) -> BlockView:
    draw, reads = _card(ask, say, empty), (*reads, *_SELECTION)
    return BlockView(name=name, title=title, how="", reads=reads, held=held, width=4, draw=draw, bare=True)


OUTLIERS = Page(
    name="outliers",
    title="Outliers",
    question="Which experts, activations and heads stand out?",
    views=(
        BlockView(
            name="outliers-missing",
            title="What this store does not hold",
            how="",
            reads=(),
            held=lambda store: not _has_maxima(store),
            draw=_missing,
            bare=True,
        ),
        _verdict(
            "super-verdict",
            "Super experts",
            _super,
            outlier_finding,
            "Super experts cannot be told from this store.",
            _has_maxima,
            ("definition",),
        ),
        _verdict(
            "massive-verdict",
            "Massive activations",
            _sinks,
            massive_finding,
            "Massive activations cannot be told from this store.",
            _has_maxima,
        ),
        _verdict(
            "sink-verdict",
            "Attention sinks",
            _sinks,
            sink_finding,
            "Attention sinks cannot be told from this store.",
            _has_either,
        ),
        FigureView(
            name="super",
            title="Largest output of every expert",
            how=f"{READ_SUPER.format(ratio=_RATIO)} A click selects the expert. All documents count, whatever the "
            "slice: maxima are kept over the whole capture.",
            reads=("definition",),
            held=_has_maxima,
            controls=(_switch,),
            draw=_figure,
            click=_clicked,
        ),
        BlockView(
            name="rules",
            title="Two definitions",
            how="The paper's text and its released code define super experts differently. Either always names at least "
            "the largest expert of any model, so an expert is worth believing only where it is also far out of its "
            "own layer: so many times the median, and a robust z beyond what one normal distribution reaches in 1 "
            "layer of 100.",
            reads=(),
            held=_has_maxima,
            width=5,
            draw=_rules,
        ),
        TableView(
            name="maxima",
            title="Experts by their largest output",
            how="`× median` is against the experts of the same layer; `robust z` of the log maxima, with what chance "
            "reaches in 1 layer of 100 in the words above. The token is the one at which the maximum was written. A "
            "click selects the expert.",
            reads=("definition",),
            held=_has_maxima,
            width=7,
            frame=_table,
            columns={
                "layer": ("Layer", ""),
                "site": ("Router", ""),
                "expert": ("Expert", ""),
                "absmax": ("Largest", ".4g"),
                "ratio_to_median": ("× median", ".2f"),
                "robust_z": ("Robust z", ".2f"),
                "super": ("Rule", ""),
                "token": ("At token", ""),
                "position": ("Position", ",.0f"),
            },
            height=340,
        ),
        FigureView(
            name="heads",
            title="Attention on the first token, and the residual stream",
            how="Left: the share of each head's attention that goes to a sequence's first token; the colour scale "
            "begins at what attending to all tokens alike would put there. Right: the largest value of the residual "
            "stream after each layer, on a logarithmic axis: massive activations form where it jumps and stays.",
            reads=(),
            held=_has_either,
            draw=_heads,
        ),
        TableView(
            name="massive",
            title="Largest value of the residual stream, by layer",
            how="`× before` is against the layer before; the same token and channel layer after layer, and a jump by "
            "orders of magnitude, are what massive activations look like. A click finds the token in the texts.",
            reads=(),
            held=_has_either,
            width=7,
            frame=_massive,
            columns={
                "layer": ("Layer", ""),
                "absmax": ("Largest", ".4g"),
                "jump": ("× before", ".2f"),
                "token": ("At token", ""),
                "position": ("Position", ",.0f"),
                "channel": ("Channel", ",.0f"),
                "mean_share": ("Mean on first token", ".1%"),
            },
            go=to_texts,
            height=340,
        ),
        BlockView(name="elsewhere", title="What needs the model", how="", reads=(), width=5, draw=_elsewhere),
    ),
)
