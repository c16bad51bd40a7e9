"""Every click on every figure leads to what there is, also where a layer has two routers."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from plotly.io.json import to_json_plotly

from moescope import analysis
from moescope.analysis.cards import parsed
from moescope.app import drawing
from moescope.app.book import PAGES
from moescope.app.place import Place, parse
from moescope.app.tables import definitions
from moescope.app.views import FigureView, to_expert
from moescope.errors import MoescopeError
from tests.analysis.made_stores import random_truth, write
from tests.app.made_desk import drawn, made_desk, words

WIDTHS, KEYS, NAMES = [5, 3, 6], ["L002-attention", "L002-mlp", "L004"], ["L002-attention", "L002-mlp", "4"]
EVERY = {(name, expert) for name, width in zip(NAMES, WIDTHS, strict=True) for expert in range(width)}


@pytest.fixture(scope="module")
def desk(tmp_path_factory):
    """`two` and `other`: the same texts, two routers in layer 2, the last layer chosen otherwise in the other."""
    root = tmp_path_factory.mktemp("clicked")
    prefer = np.zeros((40, 3, 6))
    prefer[::2, 1, 1] = 3  # expert 1 of the second router answers to law
    truth = random_truth(np.random.default_rng(0), 40, WIDTHS, [2, 2, 2], longest=40, prefer=prefer)
    maxima = np.random.default_rng(1).random((3, 6)) + 0.5
    maxima[1, 2] = 900.0  # the largest of all is of the second router
    about: Any = {"layers": [2, 2, 4], "keys": KEYS, "vocabulary": {t: f"the{t} " for t in range(20)}}
    labels = {"domain": ["law", "code"] * 20}
    write(root / "two", truth, WIDTHS, labels, maxima=maxima, hidden=[1.0] * 5, **about)
    moved = [*truth.expert[:2], (truth.expert[2] + truth.token_id[:, None] % 2) % 6]
    write(root / "other", type(truth)(**(vars(truth) | {"expert": moved})), WIDTHS, labels, **about)
    return made_desk(root)


def points(desk, view, place: Place) -> Iterator[tuple[Any, dict[str, Any]]]:
    """Every point that the browser could tell of, as dash tells it: maps carry no details of a cell with a click."""
    figure = drawn(desk, view, place)
    travelled = json.loads(to_json_plotly(drawing.sent(view, desk.scene(place), figure)))["data"]
    for number, (trace, sent) in enumerate(zip(figure.data, travelled, strict=True)):
        if trace.hoverinfo == "skip" or trace.type == "sankey":
            continue
        carried = sent.get("customdata")
        if trace.type == "heatmap":
            assert trace.hoverongaps is False  # or a cell that is not there would answer
            for row, column in zip(*np.nonzero(np.isfinite(np.array(trace.z, dtype=float))), strict=True):
                y = trace.y[row] if trace.y is not None else row
                x = trace.x[column] if trace.x is not None else column
                yield trace, {"curveNumber": number, "x": x, "y": y, "z": trace.z[row][column]}
            continue
        for index in range(len(trace.y)):
            based = trace.type == "bar" and trace.base is not None  # a bar's place is where it ends
            x = trace.base[index] + trace.x[index] if based else trace.x[index]
            point = {"curveNumber": number, "x": x, "y": trace.y[index], "pointNumber": index}
            yield trace, point | ({} if carried is None else {"customdata": carried[index]})


def followed(desk, view, place: Place) -> list[Place]:
    """Where all clicks on a figure lead, each through its address; that there is what each selects."""
    found = []
    for _, point in points(desk, view, place):
        there = view.click(place, point) if view.click else view.pick(desk.scene(place), point)
        if there is None:
            continue
        back, notes = parse(there.href)
        assert notes == ()
        scene = desk.scene(back)
        scene.chosen()
        scene.site()
        if back.doc is not None:
            assert back.doc < scene.store.n_documents
        found.append(back)
    return found


def figures_that_answer() -> list[Any]:
    return [
        pytest.param(page, view, id=view.name)
        for page, of in PAGES.items()
        for view in of.views
        if isinstance(view, FigureView) and (view.click or view.pick) and page != "lab"  # its answers need a model
    ]


# Which experts a figure shows, where that is not every one of the store.
SOME: dict[str, set[tuple[str, int]]] = {
    "text-routing": set(),
    "text-held": set(),
    "text-beside": set(),
    "transitions": {("L002-mlp", expert) for expert in range(3)},
    "together": {("L002-mlp", expert) for expert in range(3)},
    "information": set(),
    "token-map": set(),
}


@pytest.mark.parametrize(("page", "view"), figures_that_answer())
def test_clicks_lead_to_what_there_is(desk, page, view):
    if page == "map":
        pytest.importorskip("umap", reason="umap-learn is not installed")
    here = Place(page, "two", layer="L002-mlp", label="law", other="other", doc=0, token=2, held=1)
    there = followed(desk, view, here.go(kinds="tokens") if view.name == "kinds" else here)
    assert there
    reached = {(place.layer, place.expert) for place in there if place.expert is not None}
    if view.name not in SOME:
        assert reached == EVERY
    elif SOME[view.name]:
        assert reached == SOME[view.name]
    elif view.name.startswith("text"):
        assert {layer for layer, _ in reached} == set(NAMES)


def test_the_pair_of_a_bar_is_the_pair_of_layers_it_names(desk):
    view = next(view for view in PAGES["flow"].views if view.name == "information")
    there = followed(desk, view, Place("flow", "two"))  # pyright: ignore[reportArgumentType]
    assert {(place.layer, place.neighbour) for place in there} == {("L002-attention", "L002-mlp"), ("L002-mlp", "4")}


def test_what_is_not_there_answers_to_no_click(desk):
    grid = next(view for view in PAGES["overview"].views if view.name == "grid")
    missing = [point for trace, point in points(desk, grid, Place("overview", "two"))
               if trace.name == "no such expert"]  # fmt: skip
    assert missing
    assert [grid.click(Place("overview", "two"), point) for point in missing] == [None] * len(missing)


def test_headlines_name_the_router_and_lead_to_its_expert(desk):
    place = Place("overview", "two")
    said = {
        "outlying": "names L002-mlpE2",
        "specialised": "In layer L002-mlp, expert 1",
        "even": "L002-mlpE1, does",
    }
    for name, headline in said.items():
        card = drawn(desk, next(view for view in PAGES["overview"].views if view.name == name), place)
        assert headline in words(card)
        assert f"/store/two/L002-mlp/E{2 if name == 'outlying' else 1}" in str(card)
    rules = drawn(desk, next(view for view in PAGES["outliers"].views if view.name == "rules"), place)
    assert "L002-mlpE2" in words(rules)
    assert "/store/two/L002-mlp/E2" in str(rules)


def test_an_expert_of_a_router_is_found_by_its_name():
    assert parsed("L003-mlpE7") == ("L003-mlp", 7)
    assert parsed("L003bE7") == ("L003b", 7)
    assert parsed("l3e7") == (3, 7)


def test_tables_say_which_router_only_where_numbers_do_not(desk):
    for page, name in (
        ("outliers", "maxima"),
        ("specialisation", "cells"),
        ("compare", "shifts"),
        ("expert", "experts"),
    ):
        view = next(view for view in PAGES[page].views if view.name == name)
        frame = drawn(desk, view, Place(page, "two", other="other"))
        assert "site" in [column["field"] for column in definitions(view, frame)]
        alone = frame[frame["layer"] == 4]
        assert "site" not in [column["field"] for column in definitions(view, alone)]
        there = {
            to_expert(Place(page, "two"), {"x": row["expert"], "y": row["site"]}) for row in frame.to_dict("records")
        }
        assert {(place.layer, place.expert) for place in there} == EVERY


def test_figures_tell_two_routers_of_a_layer_apart(desk):
    of = {view.name: view for page in PAGES.values() for view in page.views}
    maxima = drawn(desk, of["super"], Place("outliers", "two"))
    assert maxima.layout.xaxis2.type == "category"  # or plotly would read "4" as a number, and drop the rest
    dots = next(trace for trace in maxima.data if trace.name == "expert")
    assert list(dict.fromkeys(dots.x)) == NAMES
    together = drawn(desk, of["together"], Place("flow", "two", layer="L002-mlp"))
    assert together.layout.xaxis.range == (-0.5, 2.5)  # its 3 experts, though other layers have more


def test_a_placement_that_cannot_be_says_what_can(desk):
    view = next(view for view in PAGES["flow"].views if view.name == "plans")
    with pytest.raises(MoescopeError, match=r"\(3, 5, 6\): `moescope analyze placement --uneven`"):
        drawn(desk, view, Place("flow", "two"))


def test_an_expert_stands_beside_a_pinned_one(desk):
    of = {view.name: view for view in PAGES["expert"].views}
    here = Place("expert", "two", layer="L002-mlp", expert=1)
    assert not {"beside-labels", "beside-known"} & {view.name for view in PAGES["expert"].shown(here)}
    assert "pin=L002-mlpE1" in str(drawn(desk, of["expert-head"], here))
    pinned = here.go(pin="L4E2")
    assert {"beside-labels", "beside-known"} <= {view.name for view in PAGES["expert"].shown(pinned)}
    found = analysis.npmi(desk.shelf.open("two").store, by="domain")
    marks = [trace for trace in drawn(desk, of["beside-labels"], pinned).data if trace.name != "chance"]
    assert [trace.name for trace in marks] == ["L002-mlpE1", "L4E2"]
    for trace, (row, expert) in zip(marks, ((1, 1), (2, 2)), strict=True):
        by_label = dict(zip(trace.text, trace.x, strict=True))
        for label in ("law", "code"):
            assert by_label[label] == float(found["npmi"].sel(label=label)[row, expert])
    assert marks[0].text[-1] == "law"  # at the top what the first prefers more than the second
    table = drawn(desk, of["beside-known"], pinned)
    for place in (here, here.go(layer="4", expert=2)):
        for line in drawn(desk, of["expert-found"], place).children[:5]:
            assert words(line.children[1].children[0]) in words(table)
    assert "/store/two/L4/E2?pin=L002-mlpE1" in str(table)  # the two exchanged
    alone = here.go(pin="L002-mlpE1")  # beside itself: the heading says what to do
    assert not {"beside-labels", "beside-known"} & {view.name for view in PAGES["expert"].shown(alone)}
    assert "Select another" in words(drawn(desk, of["expert-head"], alone))
    with pytest.raises(MoescopeError, match="there is no 99"):
        drawn(desk, of["beside-labels"], here.go(pin="L4E99"))
