"""Expert: one expert, from the words about it down to the text it is busy in; and the table of all of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from dash import html

from moescope import figures
from moescope.analysis import expert_summary
from moescope.analysis.cards import absent, neighbours, parsed
from moescope.analysis.contents import contents_of
from moescope.analysis.contexts import Example, examples, top_tokens
from moescope.analysis.counts import labelling
from moescope.analysis.effect_summary import effect_finding
from moescope.analysis.labelled import table
from moescope.analysis.summary import Finding
from moescope.app import beside, causes
from moescope.app.aria import named
from moescope.app.expert_words import atlas_of, listed, result_of, results_of_expert, where_of
from moescope.app.links import goes, to
from moescope.app.place import Place, coerced
from moescope.app.scene import Scene
from moescope.app.steps import stepped
from moescope.app.tokens import spelled
from moescope.app.views import BlockView, FigureView, Page, Partial, TableView, to_texts
from moescope.figures.beside import READ as READ_BESIDE
from moescope.figures.preferences import READ as READ_LABELS
from moescope.store import Store

if TYPE_CHECKING:
    import pandas as pd

_SELECTED = ("layer", "expert")
_PAIR = (*_SELECTED, "pin")
_FILTERS = ("by", "label", "phase", "slices", "slice")
_STRETCHES, _WINDOW, _TOKENS = 6, 48, 60


def _head(scene: Scene) -> Any:
    """Its name, the way to the next, and what it is in one line; or how to select one."""
    chosen = scene.chosen()
    if chosen is None:
        words = "No expert is selected. Choose one in the table, on the overview, or above by layer and number."
        return html.Div(words, className="expert-none")
    place, site = scene.place, scene.site()
    steps = [
        _step(scene, "previous-expert", "←", "Previous expert (k)"),
        html.Span(place.expert_name, className="expert-name"),
        _step(scene, "next-expert", "→", "Next expert (j)"),
        _step(scene, "previous-layer", "↑", "Same expert, previous layer (K)"),
        _step(scene, "next-layer", "↓", "Same expert, next layer (J)"),
        beside.pin(scene),
    ]
    tells = (
        ("load", expert_summary.work_finding),
        ("npmi", expert_summary.preference_finding),
        ("super_experts", expert_summary.outlier_of_expert),
    )
    found, pending = results_of_expert(scene, tells)
    about = (
        f"one of {site.n_experts} experts of layer {place.layer}, {site.top_k} of them active per token"
        f"{f', beside {site.shared_experts} shared' if site.shared_experts else ''}"
    )
    shown = html.Div(
        [
            html.Div([*steps, html.Span(about, className="dim")], className="expert-steps"),
            html.P(" ".join(one.headline for one in found if one.holds is not None), className="expert-line"),
        ],
        className="expert-head",
    )
    return shown if pending is None else Partial(shown, pending)


def _step(scene: Scene, do: str, sign: str, words: str) -> Any:
    return to(stepped(scene.place, scene, do), sign, className="step", title=words, **named(words))


def _labels(scene: Scene) -> Any:
    return figures.expert_labels(result_of(scene, "npmi"), *scene.selected())


def _found(scene: Scene) -> Any:
    tells = (
        ("load", expert_summary.work_finding),
        ("npmi", expert_summary.preference_finding),
        ("importance", expert_summary.importance_of_expert),
        ("margins", expert_summary.margin_of_expert),
        ("super_experts", expert_summary.outlier_of_expert),
    )
    found, pending = results_of_expert(scene, tells)
    if pending is None:
        effect = causes.measured(scene)
        found.append(_EFFECT if effect is None else effect_finding(effect))
    return listed(found) if pending is None else Partial(listed(found), pending)


_EFFECT = Finding(
    "causal_effect",
    "What the model loses without it has not been measured.",
    "A store holds no model. With its model in the lab's memory, the panel below masks this expert and others of its "
    "layer; `moescope importance --store … --data texts.jsonl --alone` masks every expert on texts of your own.",
    None,
)


def _links(scene: Scene) -> Any:
    """Where its tokens come from and go to, and who is scored like it."""
    found = atlas_of(scene)
    site, expert = scene.selected()
    near, missing = neighbours(found, site, expert), absent(found)
    link_reason = missing.get("predecessor, successor")
    row, last = scene.layers.index(str(scene.place.layer)), len(scene.layers) - 1
    before = link_reason or ("This is the first MoE layer." if row == 0 else "None beyond chance.")
    after = link_reason or ("This is the last MoE layer." if row == last else "None beyond chance.")
    like = missing.get("similar", "None closer than chance brings any pair of its layer.")
    before, after, like = (f"{words[:1].upper()}{words[1:].rstrip('.')}." for words in (before, after, like))
    return html.Div(
        [
            _column(scene, "Comes after", near["predecessors"], "lift {:.2f}", before),
            _column(scene, "Goes on to", near["successors"], "lift {:.2f}", after),
            _column(scene, "Scored alike", near["similar"], "similarity {:.2f}", like),
        ],
        className="link-columns",
    )


def _column(scene: Scene, title: str, pairs: Sequence[tuple[str, float]], form: str, empty: str) -> Any:
    rows: list[Any] = [
        html.Li([to(_place_of(scene, name), name), html.Span(form.format(value), className="dim")])
        for name, value in pairs
    ]
    return html.Div([html.H3(title), html.Ul(rows) if rows else html.P(empty, className="dim")])


def _place_of(scene: Scene, name: str) -> Place:
    layer, expert = parsed(name)
    return scene.place.go(page="expert", layer=str(layer), expert=expert, full=None)


def _tokens(scene: Scene) -> pd.DataFrame:
    import pandas as pd

    site, expert = scene.selected()
    phase: Any = scene.place.phase
    scene.ask("load", where=None, phase=phase)
    width = range(scene.site().n_experts)
    # Of the whole layer at once: the next expert's are at hand.
    found = scene.compute(
        ("top tokens", site, phase),
        "counting tokens",
        lambda: top_tokens(scene.store, site, width, _TOKENS, phase=phase),
    )
    columns = ("token", "active", "occurrences", "expected", "npmi", "token_id", "text")
    rows = [
        (spelled(one.text), one.active, one.occurrences, one.expected, one.npmi, one.token_id, one.text)
        for one in found[expert]
    ]
    return pd.DataFrame(rows, columns=list(columns))


def _contexts(scene: Scene) -> Any:
    site, expert = scene.selected()
    where, place = where_of(scene), scene.place
    key = ("stretches", site, expert, place.slices, place.slice, place.by, place.label, place.phase)
    found = scene.compute(
        key, "reading where it is busiest", lambda: _stretches(scene.store, site, expert, where, place.phase)
    )
    if not found:
        of = f" at a token of the {place.phase}" if place.phase else ""
        return html.P(f"It is selected nowhere in these documents{of}.", className="dim")
    return html.Ol([_stretch(scene, example, start) for example, start in found], className="stretches")


def _stretches(
    store: Store, site: str, expert: int, where: dict[str, Any] | None, phase: Any
) -> list[tuple[Example, int]]:
    """Its busiest stretches, each with the place in its document of its first token."""
    documents = None if where is None else labelling(store, None, where).documents.tolist()
    found = examples(store, site, expert, documents, n=_STRETCHES, window=_WINDOW, phase=phase)
    contents = contents_of(store)
    return [(one, contents.place_of(one.document, one.row)) for one in found]


def _stretch(scene: Scene, example: Example, start: int) -> Any:
    largest = max((token.weight for token in example.tokens if token.weight is not None), default=0) or 1
    first = next((token.offset for token in example.tokens if token.weight is not None), 0)
    there = scene.place.go(page="text", doc=example.document, full=None)
    parts: list[Any] = []
    for token in example.tokens:
        at = goes(there.go(token=start + token.offset))
        if token.weight is None:
            parts.append(html.Span(token.text, **at))
            continue
        share = min(max(token.weight / largest, 0), 1)
        words = f"routing weight {token.weight:.3f}"
        parts.append(html.Mark(token.text, title=words, style={"--w": f"{share:.2f}"}, **at))
    before, after = "… " if example.cut_before else "", " …" if example.cut_after else ""
    name = f"document {example.document}" + (f" ({example.id})" if example.id else "")
    return html.Li(
        [
            to(there.go(token=start + first), name, className="stretch-name"),
            html.Div(html.Bdi([before, *parts, after]), className="stretch"),
        ]
    )


def _experts(scene: Scene) -> pd.DataFrame:
    frame = table(atlas_of(scene))
    if "super" in frame:
        frame["super"] = ["yes" if rule else "" for rule in frame["super"]]
    return frame


def _to_row(place: Place, row: dict[str, Any]) -> Place | None:
    return place.go(layer=coerced("layer", str(row.get("site") or row["layer"])), expert=int(row["expert"]))


EXPERT = Page(
    name="expert",
    title="Expert",
    question="What does this expert do, and what does it answer to?",
    views=(
        BlockView(name="expert-head", title="The expert", how="", reads=(*_PAIR, *_FILTERS), draw=_head, bare=True),
        FigureView(
            name="beside-labels",
            title="Both and the labels",
            how=READ_BESIDE.replace("first expert's", "selected expert's").replace("second one's", "pinned one's")
            + " j and k walk on while the pinned one stays.",
            reads=(*_PAIR, *_FILTERS),
            width=6,
            needs=_PAIR,
            fits=beside.two,
            draw=beside.labels,
        ),
        BlockView(
            name="beside-known",
            title="Beside the pinned expert",
            how="A filled circle: the line stands against its null, an empty one: it does not; the numbers are on the "
            "expert's own page, and under the pointer. That one stands and the other does not is no test of their "
            "difference.",
            reads=(*_PAIR, *_FILTERS),
            width=6,
            needs=_PAIR,
            fits=beside.two,
            draw=beside.known,
        ),
        FigureView(
            name="expert-labels",
            title="What it prefers",
            how=READ_LABELS,
            reads=(*_SELECTED, *_FILTERS),
            width=6,
            needs=_SELECTED,
            draw=_labels,
        ),
        BlockView(
            name="expert-found",
            title="What is known of it",
            how="A filled circle: the line stands against its null, which the small print names. An empty one: it does "
            "not. A dash: there is no test.",
            reads=(*_SELECTED, *_FILTERS),
            width=6,
            needs=_SELECTED,
            draw=_found,
        ),
        BlockView(
            name=causes.NAME,
            themed=True,
            title="What it causes",
            how=causes.HOW,
            reads=(*_SELECTED, "by", "label", "slices", "slice", "texts"),
            needs=_SELECTED,
            controls=(causes.how_many,),
            draw=causes.draw,
        ),
        TableView(
            name="expert-tokens",
            title="Tokens it answers to",
            how="`Active` of a token's occurrences selected the expert; one blind to the token would be at `chance` of "
            "them. Ordered by nPMI of token and expert, over all documents, of the selected phase; an illustration, "
            "not a test: the evidence is the labels' null. A click finds the token in the texts.",
            reads=(*_SELECTED, "phase"),
            width=5,
            needs=_SELECTED,
            frame=_tokens,
            columns={
                "token": ("Token", ""),
                "active": ("Active", ",.0f"),
                "occurrences": ("Of", ",.0f"),
                "expected": ("Chance", ",.1f"),
                "npmi": ("nPMI", ".3f"),
            },
            go=to_texts,
            height=560,
        ),
        BlockView(
            name="expert-contexts",
            title="Where it is busiest",
            how="The stretches of text, one per document, in which it is selected most often, a selection of much "
            "routing weight counting for up to two; the darker, the more weight. Chosen for it: they show what it may "
            "answer to, and cannot show that it answers to nothing else. Of the selected phase alone, if one is: the "
            "rest of a stretch is left plain. A click on a token leads to it in its document.",
            reads=(*_SELECTED, *_FILTERS),
            width=7,
            needs=_SELECTED,
            draw=_contexts,
        ),
        BlockView(
            name="expert-links",
            title="Its neighbours",
            how="Experts of the MoE layers before and after whose tokens it shares more than when one layer is moved "
            "against the other inside each sequence (q ≤ 0.05), counted where both come first; lift is how many times "
            "the usual share. Scored alike: "
            "the router scores them for the same tokens, closer than any pair of the layer in any draw of the null.",
            reads=(*_SELECTED, "by"),
            needs=_SELECTED,
            draw=_links,
        ),
        TableView(
            name="experts",
            title="All experts",
            how="One row is one expert, over all documents. `prefers` is empty unless the preference stands against "
            "dealing the labels anew over documents (q ≤ 0.05); compare norms inside a layer. A click selects.",
            reads=("by",),
            frame=_experts,
            columns={
                "layer": ("Layer", ""),
                "site": ("Router", ""),
                "expert": ("Expert", ""),
                "relative_load": ("× fair share", ".2f"),
                "count": ("Selections", ",.0f"),
                "prefers": ("Prefers", ""),
                "npmi": ("nPMI", ".3f"),
                "npmi_null": ("Chance (99th)", ".3f"),
                "label_q": ("q", ".2g"),
                "reap": ("REAP", ".3g"),
                "ean": ("EAN", ".3g"),
                "absmax": ("Largest output", ".3g"),
                "super": ("Super (rule)", ""),
            },
            go=_to_row,
            height=520,
        ),
    ),
    register=causes.register,
)
