"""Overview, expert and outliers: drawn from made stores, with two routers in a layer, without labels, without work."""

import json
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import typer
from plotly.io.json import to_json_plotly
from plotly.utils import PlotlyJSONEncoder

from moescope import analysis, cli
from moescope.app import arriving, book, drawing, panels
from moescope.app.answers import Answers, Pending
from moescope.app.jobs import Jobs
from moescope.app.place import Place
from moescope.app.scene import Desk
from moescope.app.shelf import Shelf
from moescope.app.steps import stepped
from moescope.app.views import BlockView, FigureView, Partial, TableView
from moescope.errors import MoescopeError
from tests.analysis.made_stores import random_truth, write
from tests.app.made_desk import words as text_of

HOSTILE = "<img src=x onerror=alert(1)>"


@pytest.fixture(scope="module")
def desk(tmp_path_factory):
    """`made`: two routers in layer 2 (5 and 3 experts), expert 4 of the first never selected. `bare`: routing alone."""
    root = tmp_path_factory.mktemp("shelf")
    prefer = np.zeros((40, 3, 5))
    prefer[::2, 0, 1] = 3
    prefer[:, 0, 4] = -1e9
    made = random_truth(np.random.default_rng(0), 40, [5, 3, 5], [2, 1, 2], longest=40, prefer=prefer)
    write(
        root / "made",
        made,
        [5, 3, 5],
        {"domain": ["law", HOSTILE] * 20},
        layers=[2, 2, 4],
        keys=["L002", "L002b", "L004"],
        maxima=np.random.default_rng(1).random((3, 5)) * 100 + 0.1,
        hidden=[1.0] * 5,
        vocabulary={token: f"{HOSTILE}{token} " for token in range(20)},
        texts=[HOSTILE] * 40,
    )
    plain = random_truth(np.random.default_rng(2), 12, [4], [2])
    write(root / "bare", plain, [4], {})
    spoken = np.where(plain.position > 6, "decode", "prefill").astype(object)
    write(root / "spoken", plain, [4], {"domain": list("abc") * 4}, phase=spoken)
    jobs = Jobs()
    return Desk(Shelf(root), jobs, Answers(jobs))


def drawn(desk, name, place):
    """What a view shows once everything it waits for is there."""
    view = book.view(name)
    scene = desk.scene(place)
    for _ in range(20):
        try:
            found = view.frame(scene) if isinstance(view, TableView) else view.draw(scene)  # pyright: ignore
        except Pending as pending:
            pending.job.wait(60)
            continue
        if not isinstance(found, Partial):
            return found
        found.pending.job.wait(60)
    raise TimeoutError(name)


def words(component):
    return json.dumps(component, cls=PlotlyJSONEncoder, ensure_ascii=False)


PLACES = {
    "nothing selected": Place("overview", "made"),
    "an expert": Place("overview", "made", layer="2", expert=1),
    "never selected": Place("overview", "made", layer="2", expert=4),
    "second router": Place("overview", "made", layer="L002b", expert=2),
    "a slice": Place(
        "overview", "made", layer="4", expert=0, slices="odd~documents:1-20", slice="odd", phase="prefill"
    ),
    "no labels": Place("overview", "bare", layer="0", expert=3),
}


@pytest.mark.parametrize("page", ["overview", "expert", "outliers"])
@pytest.mark.parametrize("name", PLACES)
def test_every_panel_draws_or_says_why(desk, page, name):
    place = PLACES[name].go(page=page)
    silent: dict[str, str] = {}
    for view in book.PAGES[page].shown(place, desk.scene(place).store):
        try:
            found = drawn(desk, view.name, place)
        except MoescopeError as reason:
            silent[view.name] = str(reason)
            continue
        if isinstance(view, BlockView):
            assert len(words(found)) > 60
        elif isinstance(view, FigureView):
            assert len(found.data)
            assert "<img" not in words([trace.to_plotly_json() for trace in found.data])
        else:
            assert len(found) or name == "never selected"
    assert all(why.endswith(".") for why in silent.values())
    assert not silent or name in ("no labels", "never selected")


def test_what_a_store_without_outliers_lacks_is_said_once_with_the_capture_that_has_it(desk):
    page = book.PAGES["outliers"]
    shown = [view.name for view in page.shown(Place("outliers", "spoken"), desk.shelf.open("spoken").store)]
    assert shown == ["outliers-missing", "elsewhere"]
    said = text_of(drawn(desk, "outliers-missing", Place("outliers", "spoken")))
    assert "cannot tell super experts, massive activations or attention sinks" in said
    command = said[said.index("moescope capture") :].removesuffix(" Copy").split()
    group = typer.main.get_command(cli.app)
    options = group.get_command(typer.Context(group), "capture").make_context("capture", command[2:]).params
    assert options["tier"] == ["routing", "outliers"]
    assert options["label"] == ["domain"]
    assert options["sinks"]
    whole = [view.name for view in page.shown(Place("outliers", "made"), desk.shelf.open("made").store)]
    assert whole == [view.name for view in page.views if view.name != "outliers-missing"]


def test_panels_of_an_expert_come_with_it():
    page = book.PAGES["expert"]
    none = [view.name for view in page.shown(Place("expert", "made"))]
    assert none == ["expert-head", "experts"]
    assert len(page.shown(Place("expert", "made", layer="4", expert=0, pin="L4E1"))) == len(page.views)
    assert "experts" not in [view.name for view in page.shown(Place("expert", "made", hide=("experts",)))]


def test_an_expert_that_is_not_there_is_named(desk):
    with pytest.raises(MoescopeError, match="there is no 3"):
        drawn(desk, "expert-head", Place("expert", "made", layer="L002b", expert=3))
    with pytest.raises(MoescopeError, match="no MoE layer 7"):
        drawn(desk, "chosen", Place("overview", "made", layer="7", expert=0))


def test_grid_follows_its_switch(desk):
    place = Place("overview", "made")
    load = analysis.load(desk.shelf.open("made").store)["relative_load"].values
    z = drawn(desk, "grid", place).data[0].z
    np.testing.assert_allclose(np.exp2(z[np.isfinite(z)]), load[load > 0])
    outliers = drawn(desk, "grid", place.go(value="absmax")).data[0]
    assert outliers.name == "absmax"
    with pytest.raises(MoescopeError, match="not 'nonsense'"):
        drawn(desk, "grid", place.go(value="nonsense"))
    with pytest.raises(MoescopeError, match="no experts tier"):
        drawn(desk, "grid", place.go(value="reap"))


def test_a_label_value_narrows_the_load_and_the_preference(desk):
    store = desk.shelf.open("made").store
    place = Place("overview", "made", by="domain", label="law")
    load = analysis.load(store, where={"domain": "law"})["relative_load"].values
    z = drawn(desk, "grid", place).data[0].z
    np.testing.assert_allclose(np.exp2(z[np.isfinite(z)]), load[load > 0])
    cells = drawn(desk, "grid", place.go(value="npmi")).data[0]
    found = analysis.npmi(store, by="domain").sel(label="law")
    stands = (found["q"].values <= 0.05) & (found["npmi"].values > 0)
    np.testing.assert_array_equal(np.isfinite(cells.z), stands)
    with pytest.raises(MoescopeError, match="No document"):
        drawn(desk, "grid", place.go(value="npmi").go(label="nowhere"))
    with pytest.raises(MoescopeError, match="has no document"):
        drawn(desk, "grid", place.go(slices="s~domain:x", slice="s"))


def test_tokens_and_contexts_lead_to_the_text(desk):
    place = Place("expert", "made", layer="2", expert=1)
    frame = drawn(desk, "expert-tokens", place)
    row = frame.iloc[0].to_dict()
    go = book.view("expert-tokens").go  # pyright: ignore[reportAttributeAccessIssue]
    there = go(place, row)
    assert (there.page, there.find, there.expert) == ("text", row["text"].strip(), 1)
    assert go(place, row | {"text": "\n"}) is None
    store = desk.shelf.open("made").store
    shown = words(drawn(desk, "expert-contexts", place))
    example = analysis.examples(store, "L002", 1, n=1)[0]
    passage = analysis.passage(store, example.document, "L002")
    first = next(token for token in example.tokens if token.weight is not None)
    at = int(np.flatnonzero(passage["row"].values == example.row + first.offset)[0])
    assert 1 in passage["expert"].values[at]  # the link leads to a token that the expert was selected at
    assert f"/store/made/text?layer=2&expert=1&doc={example.document}&token={at}" in shown


def test_rows_and_points_lead_to_experts():
    here = Place("expert", "made")
    go = book.view("experts").go  # pyright: ignore[reportAttributeAccessIssue]
    assert go(here, {"layer": 2, "site": "L002b", "expert": 1.0}).expert_name == "L002bE1"
    assert go(here, {"layer": 4, "expert": 3}).expert_name == "L4E3"
    click = book.view("super").click  # pyright: ignore[reportAttributeAccessIssue]
    assert click(here, {"x": 7, "y": 1.0, "customdata": ["L002b", 1, 1.2, 0.1]}).expert_name == "L002bE1"
    for point in ({"x": 1}, {"x": 4, "customdata": [None, None]}, {"customdata": "abc"}):
        assert click(here, point) is None


def test_steps_go_round(desk):
    scene = desk.scene(Place("expert", "made", layer="L002b", expert=2))
    here = scene.place
    assert stepped(here, scene, "next-expert").expert_name == "L002bE0"
    assert stepped(here, scene, "previous-expert").expert_name == "L002bE1"
    assert stepped(here, scene, "next-layer").expert_name == "L4E2"
    assert stepped(here.go(layer="4", expert=4), scene, "previous-layer").expert_name == "L002bE2"  # it has 3
    assert "/store/made/L002b/E0" in words(drawn(desk, "expert-head", here))


def test_both_definitions_stand_side_by_side(desk):
    shown = words(drawn(desk, "rules", Place("outliers", "made")))
    store = desk.shelf.open("made").store
    for definition in ("paper", "code"):
        result = analysis.super_experts(store, definition=definition)
        assert f"{float(result['percentile']):.4g}" in shown


def test_what_is_not_known_is_no_number_in_a_table(desk):
    store = desk.shelf.open("made").store
    result = analysis.attention_sinks(store).copy(deep=True)
    for name in ("token_id", "position", "channel"):
        result[name][1] = -1
    scene: Any = SimpleNamespace(ask=lambda *_, **__: result, store=store, place=Place("outliers", "made"))
    massive = book.view("massive").frame(scene)
    assert massive["channel"].isna().tolist() == massive["position"].isna().tolist() == [False, True] + [False] * 3
    assert [bool(text) for text in massive["token"]] == [True, False] + [True] * 3


def test_points_travel_as_lists(desk):
    here = Place("outliers", "made")
    figure = drawn(desk, "super", here)
    sent = json.loads(to_json_plotly(drawing.sent(book.view("super"), desk.scene(here), figure)))["data"]
    assert any(isinstance(trace.customdata, np.ndarray) for trace in figure.data)
    for trace, part in zip(figure.data, sent, strict=True):
        if trace.customdata is not None:
            assert part["customdata"] == json.loads(to_json_plotly(trace.customdata.tolist()))


def test_what_follows_no_selection_is_told_whatever_is_selected(desk):
    nowhere = Place("overview", "made", label="law", slices="s~domain:x", slice="s")
    everywhere = drawn(desk, "outlying", Place("overview", "made"))
    said = " Of the whole capture, whatever is selected."
    assert text_of(drawn(desk, "outlying", nowhere)) == text_of(everywhere) + said
    verdict = text_of(drawn(desk, "super-verdict", Place("outliers", "made")))
    assert text_of(drawn(desk, "super-verdict", Place("outliers", "made", phase="prefill"))) == verdict + said
    assert {"label", "phase", "slice"} <= set(book.view("super-verdict").reads)
    with pytest.raises(MoescopeError, match="has no document"):
        drawn(desk, "grid", nowhere)


def test_who_specialises_is_of_the_selected_value(desk):
    assert "klingon" in text_of(drawn(desk, "specialised", Place("overview", "made", label="klingon")))
    there = analysis.npmi(desk.shelf.open("made").store, by="domain")
    for label in ("law", HOSTILE):
        told = text_of(drawn(desk, "specialised", Place("overview", "made", label=label)))
        values = there["npmi"].where(there["q"] <= 0.05).sel(label=label)
        best = values.argmax(["layer", "expert"])
        assert values.max() > 0
        assert f"expert {int(best['expert'])} fires for “{label}”" in told


def test_what_is_not_of_the_slice_says_so(desk):
    place = Place("expert", "made", layer="2", expert=1)
    plain = words(drawn(desk, "expert-found", place))
    assert "whichever are selected" not in plain
    assert "whatever is selected" not in plain
    sliced = words(drawn(desk, "expert-found", place.go(slices="odd~documents:1-20", slice="odd")))
    assert sliced.count("whichever are selected") == 1  # the margin
    assert sliced.count("whatever is selected") == 1  # the outlier
    facts = words(drawn(desk, "facts", place.go(label="law", phase="prefill")))
    assert "domain law only; margins: all documents" in facts
    assert "prefill only; outliers: the whole capture" in facts


def test_the_expert_page_follows_the_phase_or_says_that_it_does_not(desk):
    place = Place("expert", "spoken", layer="0", expert=2)
    store = desk.shelf.open("spoken").store
    decode = store.tokens(["phase"])["phase"].to_numpy() == "decode"
    chosen = (store.routing(0).expert == 2).any(axis=1)
    for phase, counts in (("decode", decode), ("prefill", ~decode), (None, decode | ~decode)):
        frame = drawn(desk, "expert-tokens", place.go(phase=phase))
        ids = store.tokens(["token_id"])["token_id"].to_numpy()
        for row in frame.to_dict("records"):
            here = (ids == row["token_id"]) & counts
            assert (row["active"], row["occurrences"]) == ((chosen & here).sum(), here.sum())
        marks = json.dumps(drawn(desk, "expert-contexts", place.go(phase=phase)), cls=PlotlyJSONEncoder)
        shown = analysis.examples(store, 0, 2, n=6, window=48, phase=phase)
        assert marks.count('"type": "Mark"') == sum(t.weight is not None for one in shown for t in one.tokens) > 0
    page = book.PAGES["expert"]
    scene = desk.scene(place)
    said = {view.name for view in page.views if "both phases" in words(panels.panel(view, scene))}
    assert said >= {"expert-links", "experts"}
    assert not said & {"expert-labels", "expert-found", "expert-tokens", "expert-contexts"}
    assert arriving._frame(place.go(phase="decode")) == "of-phase"
    assert arriving._frame(place.go(label="a", slices="s~domain:a", slice="s")) == "of-slice of-label"
    assert arriving._frame(place) == ""
    every = {view.name for view in page.views if "all values" in words(panels.panel(view, scene))}
    assert every == {"expert-tokens", "expert-links", "experts"}
