"""The page of maps: points keep their ids whatever is filtered, a lasso is a slice, a token leads to its text."""

from __future__ import annotations

import json

import numpy as np
import pytest
from plotly.utils import PlotlyJSONEncoder

from moescope import analysis
from moescope.app.answers import Answers, Pending
from moescope.app.book import view
from moescope.app.drawing import guarded
from moescope.app.jobs import Jobs
from moescope.app.pages import map as page
from moescope.app.place import Place, parse
from moescope.app.scene import Desk
from moescope.app.shelf import Shelf
from moescope.app.views import ElsewhereError
from moescope.errors import MoescopeError
from tests.analysis.made_stores import random_truth, write
from tests.app.made_desk import drawn as shown_of


@pytest.fixture(scope="module")
def held(tmp_path_factory):
    pytest.importorskip("umap", reason="umap-learn is not installed")
    folder = tmp_path_factory.mktemp("map")
    truth = random_truth(np.random.default_rng(1), 24, [6, 5], [2, 2], longest=60, vocabulary=15)
    write(folder / "made", truth, [6, 5], {"domain": list("abc") * 8}, layers=[2, 4])
    write(folder / "two", truth, [6, 5], {"domain": list("abc") * 8, "split": list("xy") * 12}, layers=[2, 4])
    jobs = Jobs()
    return truth, Desk(Shelf(folder), jobs, Answers(jobs))


def scene(desk, **place):
    here = desk.scene(Place("map", "made", **place))
    here.ask("expert_map", by=place.get("alike", "profile"), label="domain", patience=120)
    here.ask("token_map", patience=120)
    here.ask("npmi", by="domain", where=None, phase=None, patience=60)
    return here


def carried(figure):
    return [tuple(one[:2]) for trace in figure.data if trace.hoverinfo != "skip" for one in trace.customdata]


def test_points_keep_their_ids_under_filtering(held):
    _, desk = held
    whole = carried(drawn(scene(desk)))
    assert sorted(whole) == sorted([("2", e) for e in range(6)] + [("4", e) for e in range(5)])
    part = drawn(scene(desk, only="layer 4"))
    assert sorted(carried(part)) == [("4", e) for e in range(5)]
    assert sum(len(trace.x) for trace in part.data) == 11  # the others are there, faint
    assert page._to_expert(Place("map", "made"), {"customdata": ["4", 3, 1.0], "pointNumber": 0}).expert_name == "L4E3"
    with pytest.raises(MoescopeError, match="no group"):
        view("expert-map").draw(scene(desk, only="something"))


def test_a_lasso_is_a_slice_of_the_documents_that_hold_the_tokens(held):
    truth, desk = held
    here = scene(desk)
    figure = drawn(here, "token-map")
    points = [{"customdata": list(one)} for one in figure.data[0].customdata[:2]]
    ids = [one["customdata"][1] for one in points]
    there = page._lassoed(here, points)
    wanted = sorted(set(truth.document[np.isin(truth.token_id, ids)].tolist()))
    assert there.slice == "lasso 1"
    assert desk.scene(there).where == {"document": wanted}
    again = page._lassoed(desk.scene(there), points[:1])
    assert again.slice == "lasso 2"
    assert page._lassoed(here, [{"x": 1}]) is None


def test_a_token_leads_to_its_first_place(held):
    truth, desk = held
    figure = drawn(scene(desk), "token-map")
    one = figure.data[0].customdata[3]
    there = parse(page._to_token(Place("map", "made"), {"customdata": list(one)}).href)[0]
    first = int(np.flatnonzero(truth.token_id == one[1])[0])
    assert (there.page, there.doc) == ("text", truth.document[first])
    assert there.token == first - int(np.flatnonzero(truth.document == there.doc)[0])


def test_the_note_says_how_many_are_left_out(held):
    truth, desk = held
    here = scene(desk)
    figure = drawn(here, "token-map")
    result = here.ask("token_map")
    count = np.bincount(truth.token_id)
    assert f"{result.sizes['token']} of {(count > 0).sum()} token ids" in figure.layout.title.text
    assert float(result["covered"]) == pytest.approx(count[count >= 20].sum() / count.sum())


def drawn(here, name="expert-map"):
    """A panel, once what it waits for is there."""
    while True:
        try:
            return view(name).draw(here)
        except Pending as pending:
            pending.job.wait(60)


@pytest.mark.parametrize("paint", page._PAINTS)
def test_every_colour_draws_or_says_which_tier_it_needs(held, paint):
    here = scene(held[1], paint=paint)
    if paint in ("reap", "ean", "absmax"):
        with pytest.raises(MoescopeError, match="tier"):
            drawn(here)
    else:
        assert sorted(carried(drawn(here))) == sorted(carried(drawn(scene(held[1]))))


def test_colours_say_when_they_do_not_follow_the_selection(held):
    def title(**place):
        return drawn(scene(held[1], **place)).layout.title.text

    assert "margin of all documents, whichever are selected" in title(paint="margin", label="a")
    assert "of all documents" not in title(paint="margin")
    assert "of all documents" not in title(paint="relative_load", label="a")


def test_nearest_in_the_page_are_those_of_the_analysis(held):
    _, desk = held
    here = scene(desk, layer="2", expert=1)
    found = analysis.nearest_experts(here.store, "L002", 1)
    rows = analysis.table(found).sort_values("distance").dropna()
    text = str(drawn(here, "near"))
    best = rows.iloc[0]
    assert f"L{best.layer:.0f}E{best.expert:.0f}" in text


def test_a_map_is_first_by_what_can_be_answered(held):
    """The control shows what is drawn, whichever label is selected; two values are no map, and what to do is said."""
    _, desk = held
    for store, by, wanted in (("made", None, "profile"), ("two", None, "tokens"), ("two", "split", "tokens")):
        here = desk.scene(Place("map", store, by=by))
        assert page._alike(here) == page._alike_choice(here).children.value == wanted
    with pytest.raises(MoescopeError, match="Choose Tokens"):
        view("expert-map").draw(desk.scene(Place("map", "two", by="split", alike="profile")))


def test_too_few_tokens_lead_to_the_analyses(tmp_path):
    write(tmp_path / "few", random_truth(np.random.default_rng(1), 3, [4], [2], longest=4), [4], {})
    jobs = Jobs()
    desk = Desk(Shelf(tmp_path), jobs, Answers(jobs))
    with pytest.raises(ElsewhereError, match="lower min_count") as caught:
        shown_of(desk, view("token-map"), Place("map", "few"))
    assert (caught.value.there.page, caught.value.there.question) == ("analyses", "token_map")
    shown, (said, *_) = guarded(
        view("token-map"), desk, lambda: view("token-map").draw(desk.scene(Place("map", "few")))
    )
    assert shown is None
    assert caught.value.there.href in json.dumps(said, cls=PlotlyJSONEncoder)
