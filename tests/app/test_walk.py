"""A person walks through the app: clicks, keys, links, back, a shared address, two themes, exports, and trouble."""

from __future__ import annotations

import io
import json
import re
import shutil
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest

from moescope import analysis
from moescope.app import arriving, drawing, shell
from moescope.app.book import PAGES
from moescope.app.place import Place, parse
from moescope.app.views import FigureView
from moescope.store import Store
from tests.analysis.made_stores import random_truth, write
from tests.app.hostile import TEXTS, write_hostile
from tests.app.visiting import Visitor
from tests.report.test_report import hostile_store


def _click_cell(visitor, column: float, row: float, panel: str = "") -> None:
    area = visitor.page.locator(f"{panel} .js-plotly-plot .nsewdrag").first
    area.scroll_into_view_if_needed()
    box = area.bounding_box()
    visitor.page.mouse.move(box["x"] + box["width"] * column, box["y"] + box["height"] * row)
    visitor.page.wait_for_timeout(150)
    visitor.page.mouse.click(box["x"] + box["width"] * column, box["y"] + box["height"] * row)
    visitor.settle()


def test_a_click_selects_and_every_control_follows_and_back_undoes(visitor):
    visitor.go("/store/demo")
    _click_cell(visitor, 7.5 / 16, 3.5 / 6)
    place = parse(visitor.href)[0]
    assert (place.layer, place.expert) == ("3", 7)
    expert = visitor.page.get_by_label("Expert", exact=True).first
    visitor.sees(visitor.page.get_by_label("Layer", exact=True).first.input_value, "3")
    visitor.sees(expert.input_value, "7")
    visitor.page.go_back()
    visitor.settle()
    assert parse(visitor.href)[0].expert is None
    visitor.sees(expert.input_value, "")
    visitor.page.go_forward()
    visitor.settle()
    assert parse(visitor.href)[0].expert == 7
    visitor.well()


def test_the_pointer_is_told_the_number_of_its_own_cell(visitor, shelf):
    from moescope.analysis import load

    relative = load(Store.open(shelf / "demo"))["relative_load"].values
    layers, experts = relative.shape
    visitor.go("/store/demo")
    box = visitor.page.locator("#panel-grid .nsewdrag").first.bounding_box()
    for layer, expert in ((0, 7), (1, 0), (layers - 1, 12)):
        at = box["x"] + box["width"] * (expert + 0.5) / experts, box["y"] + box["height"] * (layer + 0.5) / layers
        visitor.page.mouse.move(*at)
        said = f"layer {layer}, expert {expert}{relative[layer, expert]:.2f} × its fair share"
        visitor.page.wait_for_function(
            "(said) => [...document.querySelectorAll('#panel-grid .hovertext')].some((e) => e.textContent === said)",
            arg=said,
        )
    visitor.well()


def test_keys_walk_through_experts_and_layers(visitor):
    visitor.go("/store/demo/L3/E15")
    visitor.page.keyboard.press("j")
    visitor.arrive("/store/demo/L3/E0")
    visitor.page.keyboard.press("k")
    visitor.arrive("/store/demo/L3/E15")
    visitor.page.keyboard.press("Shift+J")
    visitor.arrive("/store/demo/L4/E15")
    visitor.page.keyboard.press("/")
    visitor.page.keyboard.type("L2E9")
    visitor.page.keyboard.press("Enter")
    visitor.arrive("/store/demo/L2/E9")
    # The search lets go of the keyboard, and steps pressed faster than they are answered all count.
    for step in ("j", "j", "Shift+J", "j"):
        visitor.page.keyboard.press(step)
    visitor.arrive("/store/demo/L3/E12")
    visitor.page.keyboard.press("?")
    visitor.page.wait_for_selector("text=next / previous expert")
    visitor.well()


def test_steps_that_are_answered_late_all_count(visitor):
    page = visitor.go("/store/demo/L2/E9").page
    held = visitor.holds("key.data")
    page.keyboard.press("j")
    visitor.sees(lambda: bool(held), True)
    page.wait_for_timeout(3_500)
    page.keyboard.press("Shift+J")
    visitor.sees(lambda: len(held), 2)
    visitor.lets_go()
    visitor.arrive("/store/demo/L3/E10")
    visitor.well()


def test_controls_set_before_the_first_was_answered_all_count(visitor):
    page = visitor.go("/store/demo/specialisation").page
    held = visitor.holds("chosen.data")

    def choose(label: str, value: str) -> None:
        page.get_by_role("textbox", name=label, exact=True).click()
        page.get_by_role("option", name=value, exact=True).click()

    choose("Layer", "3")
    visitor.sees(lambda: len(held), 1)
    choose("Phase", "prefill")
    visitor.sees(lambda: len(held), 2)
    visitor.lets_go()
    visitor.sees(lambda: (parse(visitor.href)[0].layer, parse(visitor.href)[0].phase), ("3", "prefill"))
    # What was set at a place counts no more after it was left.
    page.go_back()
    visitor.arrive("/store/demo/specialisation")
    choose("Phase", "prefill")
    visitor.arrive("/store/demo/specialisation?phase=prefill")
    visitor.well()


def test_a_very_long_list_shows_its_first_and_says_how_many_more(visitor):
    page = visitor.go("/").page
    names = [f"Value {number}" for number in range(1_200)]
    for typed in ("", " vALUE 1", "value 77", "nowhere"):
        shown = page.evaluate(
            """([names, search]) => window.dashMantineFunctions.firstOptions(
              { options: names.map((label) => ({ value: label, label })), search }).map((one) => one.label)""",
            [names, typed],
        )
        found = [name for name in names if typed.strip().lower() in name.lower()]
        more = [f"{len(found) - 500} more: type to find"] if len(found) > 500 else []
        assert shown == found[:500] + more
    visitor.well()


def test_a_shared_address_shows_the_same_in_another_browser(visitor, chromium, served):
    first, second = visitor, Visitor(chromium.new_context().new_page(), served)
    first.go("/store/demo?layer=3&expert=7")
    _click_cell(first, 2.5 / 16, 1.5 / 6)
    first.page.mouse.move(2, 700)
    first.page.wait_for_function("() => !document.querySelector('.hoverlayer .hovertext')")
    second.go(first.href)
    second.sees(second.page.get_by_label("Expert", exact=True).first.input_value, "2")
    second.sees(lambda: second.page.inner_text("#page"), first.page.inner_text("#page"))
    first.well()
    second.well()
    second.page.context.close()


def test_the_theme_is_switched_and_remembered(visitor):
    visitor.go("/store/demo")
    ground = "() => getComputedStyle(document.body).backgroundColor"
    light = visitor.page.evaluate(ground)
    visitor.page.keyboard.press("t")
    visitor.page.wait_for_function(f"(light) => ({ground})() !== light", arg=light)
    visitor.settle()
    dark = visitor.page.evaluate(ground)
    ink = "() => document.querySelector('.js-plotly-plot')._fullLayout.font.color"
    visitor.sees(lambda: visitor.page.evaluate(ink), "#e4e6ea")
    visitor.page.reload()
    visitor.settle()
    visitor.sees(lambda: visitor.page.evaluate(ground), dark)
    visitor.well()


def test_a_figure_is_saved_as_one_file_that_works_offline(visitor, chromium, tmp_path):
    visitor.go("/store/demo")
    with visitor.page.expect_download() as caught:
        visitor.page.locator("[data-act=save]").first.click()
    file = tmp_path / "figure.html"
    caught.value.save_as(file)
    context = chromium.new_context(offline=True)
    context.set_default_timeout(120_000)
    page = context.new_page()
    troubles: list[str] = []
    page.on("pageerror", lambda error: troubles.append(str(error)))
    page.on("request", lambda request: request.url.startswith("http") and troubles.append(request.url))
    page.goto(file.as_uri())
    page.wait_for_selector(".js-plotly-plot .main-svg")
    assert not troubles
    offered = page.eval_on_selector_all(".modebar-btn", "all => all.map((one) => one.dataset.title)")
    assert "Zoom" in offered
    assert not [title for title in offered if "share" in title.lower() or "cloud" in title.lower()]
    context.close()
    visitor.well()


def test_a_panel_fills_the_window_and_leaves_it(visitor):
    visitor.go("/store/demo")
    height = "() => document.querySelector('#panel-grid .js-plotly-plot')._fullLayout.height"
    own = visitor.page.evaluate(height)
    assert own < 400
    visitor.page.locator("[data-act=full]").first.click()
    visitor.settle()
    panel = visitor.page.locator(".panel.full")
    visitor.sees(lambda: panel.bounding_box()["width"], 1280)
    assert parse(visitor.href)[0].full == panel.get_attribute("id").removeprefix("panel-") == "grid"
    visitor.sees(lambda: visitor.page.evaluate(height) > 650, True)
    visitor.sees(lambda: panel.evaluate("full => full.scrollHeight <= full.clientHeight"), True)
    visitor.page.keyboard.press("Escape")
    visitor.sees(panel.count, 0)
    visitor.sees(lambda: visitor.page.evaluate(height), own)
    visitor.well()


def test_a_table_fills_the_window_and_leaves_it(visitor):
    visitor.go("/store/demo/specialisation?full=cells")
    table = visitor.page.locator("#panel-cells .panel-grid")
    visitor.sees(lambda: table.bounding_box()["height"] > 650, True)
    visitor.page.keyboard.press("Escape")
    visitor.sees(lambda: table.bounding_box()["height"], 400)
    visitor.well()


def test_embedded_without_header_and_hidden_panels(visitor):
    visitor.go("/store/demo?embed=1")
    names = [panel.get_attribute("id") for panel in visitor.page.locator(".panel[id]").all()]
    assert not visitor.page.locator(".header").is_visible()
    visitor.go(f"/store/demo?embed=1&hide={names[0].removeprefix('panel-')}")
    assert [panel.get_attribute("id") for panel in visitor.page.locator(".panel[id]").all()] == names[1:]
    visitor.well()


@pytest.mark.parametrize(
    ("href", "words"),
    [
        ("/store/demo/L99/E1", "no MoE layer 99"),
        ("/store/demo/L3/E99", "experts 0 to 15"),
        ("/store/demo?by=nothing", "no label 'nothing'"),
        ("/store/nothing", "no store 'nothing'"),
        ("/store/broken", "damaged"),
        ("/store/..%2Fdemo", "no store '../demo'"),
        ("/store/demo?slice=x", "no slice 'x'"),
        ("/store/demo?nonsense=%00%ff&layer=zz", "cannot be"),
        ("/%F0%9F%98%80/..//x?y", "no page"),
    ],
)
def test_nonsense_gets_words_and_no_crash(visitor, href, words):
    visitor.go(href)
    assert words in visitor.page.inner_text("main")
    visitor.well()


def test_a_store_deleted_and_one_written_while_they_are_viewed(visitor, shelf):
    shutil.copytree(shelf / "masked", shelf / "passing")
    try:
        visitor.go("/store/passing")
        shutil.rmtree(shelf / "passing")
        visitor.page.wait_for_selector("text=no store 'passing'")
        visitor.sees(visitor.page.locator(".js-plotly-plot").count, 0)
        visitor.well()
    finally:
        shutil.rmtree(shelf / "passing", ignore_errors=True)


def test_ten_browsers_at_once_see_the_same(visitor, served):
    # Ten tabs: to the app each is a browser of its own.
    visitors = [visitor, *(Visitor(visitor.page.context.new_page(), served) for _ in range(9))]
    for number, visitor in enumerate(visitors):
        visitor.page.goto(f"{served}/store/demo?layer={number % 6}&expert={number}")
    texts = set()
    for visitor in visitors:
        visitor.settle().well()
        texts.add(visitor.page.evaluate("() => document.querySelectorAll('.js-plotly-plot').length"))
    assert len(texts) == 1


def test_ten_askers_at_once_get_the_same_file(served):
    import urllib.error
    import urllib.request

    view = next(view.name for view in PAGES["overview"].views if isinstance(view, FigureView))

    def ask(_):
        while True:
            try:
                with urllib.request.urlopen(f"{served}/file/{view}.html?at=/store/demo") as answer:
                    return len(answer.read())
            except urllib.error.HTTPError as refusal:
                if refusal.code != 503:  # it is still being computed
                    raise
                time.sleep(0.1)

    ask(0)
    with ThreadPoolExecutor(10) as threads:
        assert len(set(threads.map(ask, range(10)))) <= 2  # plotly gives each page an id of its own


def test_maps_of_many_layers_scroll_in_their_panel_by_keyboard(visitor, shelf):
    width, depth, domain = 64, 40, [f"d{document % 6}" for document in range(24)]
    truth = random_truth(np.random.default_rng(2), len(domain), [width] * depth, [2] * depth, longest=8)
    write(shelf / "deep", truth, [width] * depth, {"domain": domain})
    size = "(body) => [body.clientHeight, body.scrollHeight, body.tabIndex]"
    try:
        maps = visitor.page.locator("#panel-labels .panel-figure")
        visitor.go("/store/deep/specialisation?hide=cells,kinds,vocabulary")
        seen, whole, stop = maps.evaluate(size)
        assert seen == 720
        assert whole > 2 * seen
        assert stop == 0
        maps.focus()
        visitor.page.keyboard.press("PageDown")
        visitor.page.wait_for_function("() => document.querySelector('#panel-labels .panel-figure').scrollTop > 300")
        visitor.go("/store/deep/specialisation?hide=cells,kinds,vocabulary&full=labels")
        visitor.page.wait_for_selector("#panel-labels.full")
        visitor.sees(lambda: maps.evaluate("(body) => body.clientHeight"), whole)
        visitor.go("/store/demo/specialisation?hide=cells,kinds,vocabulary")
        seen, whole, stop = maps.evaluate(size)
        assert seen == whole
        assert stop == -1
        visitor.well()
    finally:
        shutil.rmtree(shelf / "deep")


def test_a_table_is_exported_as_it_is_shown(visitor):
    visitor.go("/store/demo/expert")
    table = visitor.page.locator("[data-act=csv]").first
    if table.count() == 0:
        pytest.fail("the page of experts has no table")
    with visitor.page.expect_download() as caught:
        table.click()
    rows = pd.read_csv(io.BytesIO(caught.value.path().read_bytes()))
    assert len(rows) == 6 * 16
    with visitor.page.expect_download() as caught:
        visitor.page.locator("[data-act=parquet]").first.click()
    assert len(pd.read_parquet(io.BytesIO(caught.value.path().read_bytes()))) == len(rows)
    visitor.page.get_by_label("Choose columns of All experts").click()
    visitor.page.get_by_role("checkbox", name="EAN", exact=True).uncheck()
    visitor.arrive("/store/demo/expert?without=experts.ean")
    headings = visitor.page.locator("#panel-experts .ag-header-cell-text")
    visitor.sees(lambda: {"EAN", "REAP"} & set(headings.all_inner_texts()), {"REAP"})
    visitor.page.locator("body").click(position={"x": 2, "y": 400})
    with visitor.page.expect_download() as caught:
        table.click()
    assert list(pd.read_csv(io.BytesIO(caught.value.path().read_bytes()))) == [name for name in rows if name != "ean"]
    visitor.well()


def test_columns_are_listed_though_the_table_comes_after_the_list_was_opened(visitor):
    held = []
    visitor.page.route("**/dash_ag_grid/async*", lambda route: held.append(route))
    visitor.page.goto(
        f"{visitor.base}/store/demo/expert", wait_until="domcontentloaded"
    )  # what is held is not waited for
    visitor.page.get_by_label("Choose columns of All experts").click()
    visitor.sees(lambda: bool(held), True)
    visitor.page.unroute("**/dash_ag_grid/async*")  # lets them go
    visitor.page.get_by_role("checkbox", name="REAP", exact=True).uncheck()
    visitor.arrive("/store/demo/expert?without=experts.reap")
    visitor.well()


def test_chosen_columns_are_in_the_address(visitor, chromium, served):
    asked = []
    visitor.go("/store/demo/specialisation?hide=kinds,vocabulary")
    visitor.page.on("request", lambda request: "_dash-update" in request.url and asked.append(request.post_data))
    visitor.page.get_by_label("Choose columns of Every expert and label").click()
    headings = visitor.page.locator("#panel-cells .ag-header-cell-text")
    whole = headings.all_inner_texts()
    for name in ("Lift", "q"):
        visitor.page.get_by_role("checkbox", name=name, exact=True).uncheck()
        visitor.settle()
    left = [name for name in whole if name not in ("Lift", "q")]
    visitor.sees(headings.all_inner_texts, left)
    assert "without=cells.lift,cells.q" in visitor.href
    # The address and what hangs on it are told; no panel is drawn again, and no row is asked for.
    outputs = {json.loads(one)["output"] for one in asked}
    assert outputs
    assert not [one for one in outputs if any(part in one for part in ("figure", "columnDefs", "rowData", '"block"'))]
    second = Visitor(chromium.new_context().new_page(), served).go(visitor.href)
    shown = second.page.locator("#panel-cells .ag-header-cell-text")
    second.sees(shown.all_inner_texts, left)
    second.page.context.close()
    visitor.page.go_back()
    visitor.sees(lambda: set(headings.all_inner_texts()), {name for name in whole if name != "Lift"})
    visitor.sees(visitor.page.get_by_role("checkbox", name="q", exact=True).is_checked, True)
    visitor.go("/store/demo/specialisation?hide=kinds,vocabulary&without=cells.lift,cells.klingon,load.p")
    assert "'cells.klingon', which no table has" in visitor.page.inner_text("main")
    visitor.sees(headings.all_inner_texts, [name for name in whole if name != "Lift"])
    visitor.well()


def test_long_work_shows_how_far_it_is_and_is_cancelled(visitor, monkeypatch):
    from moescope import analysis
    from moescope.analysis.watching import report

    asked = analysis.ANALYSES["affinity"]
    let_it = threading.Event()

    def slow(*stores, **parameters):
        for step in range(600):
            report("steps", step, 600)
            if let_it.wait(0.5):
                break
        return asked.run(*stores, **parameters)

    monkeypatch.setitem(analysis.ANALYSES, "affinity", replace(asked, run=slow))
    # Documents chosen so that nobody has asked this before.
    hidden = "hide=said,placement,plans"  # solvers take their seconds, and turns
    visitor.page.goto(f"{visitor.base}/store/demo/flow?slices=a~domain:german,python&slice=a&layer=1&{hidden}")
    panel = visitor.page.locator("#panel-transitions")
    panel.get_by_text(re.compile(r"steps: \d+ of 600")).wait_for()
    panel.get_by_text("Cancel").click()
    again = panel.get_by_role("button", name="Try again")
    again.wait_for()
    let_it.set()
    again.click()
    panel.locator(".js-plotly-plot").wait_for()
    visitor.settle()
    visitor.well()


def test_an_app_that_does_not_answer_is_said_and_a_panel_that_waited_meanwhile_comes(visitor, monkeypatch):
    from moescope import analysis

    asked, let_it = analysis.ANALYSES["affinity"], threading.Event()

    def slow(*stores, **parameters):
        assert let_it.wait(300)
        return asked.run(*stores, **parameters)

    monkeypatch.setitem(analysis.ANALYSES, "affinity", replace(asked, run=slow))
    hidden = "hide=said,placement,plans"
    visitor.page.goto(f"{visitor.base}/store/demo/flow?slices=b~domain:german,records&slice=b&layer=1&{hidden}")
    visitor.page.locator(".note.pending").first.wait_for()
    alarm = visitor.page.locator("#alarm")
    visitor.page.route("**/_dash-update-component*", lambda route: route.abort())
    alarm.get_by_text("does not answer").wait_for()
    let_it.set()
    visitor.page.unroute("**/_dash-update-component*")
    alarm.get_by_text("does not answer").wait_for(state="hidden")
    visitor.settle()
    visitor.page.locator("#panel-transitions .js-plotly-plot").wait_for()
    assert all("ERR_FAILED" in said or "did not respond" in said for said in visitor.trouble)


def test_panels_whose_first_question_is_lost_come_when_the_app_is_there_again(visitor, monkeypatch):
    monkeypatch.setattr(drawing, "_AT_ONCE", 0)  # nothing comes with its page: every panel asks
    lost = []

    def away(route):
        changed = " ".join((route.request.post_data_json or {}).get("changedPropIds", []))
        if '"type":"wanted"' in changed:
            lost.append(changed)
            route.abort()
        else:
            route.continue_()

    visitor.page.route("**/_dash-update-component*", away)
    visitor.page.goto(f"{visitor.base}/store/demo/specialisation?hide=kinds,vocabulary")
    visitor.sees(lambda: any('"table"' in one for one in lost) and any('"figure"' in one for one in lost), True)
    visitor.page.unroute("**/_dash-update-component*")
    visitor.settle()
    visitor.page.locator("#panel-labels .js-plotly-plot").wait_for()
    visitor.page.locator("#panel-cells .ag-header-cell-text").first.wait_for()
    assert all("ERR_FAILED" in said or "did not respond" in said for said in visitor.trouble)


def test_a_page_comes_though_it_takes_longer_than_the_clock_that_asks_for_it(visitor, monkeypatch):
    def slow(*asked):
        time.sleep(1.2 * shell.WATCH / 1000)
        return state(*asked)

    state = arriving.state
    monkeypatch.setattr(arriving, "state", slow)
    visitor.page.goto(f"{visitor.base}/store/plain")
    visitor.page.wait_for_selector(".page-head")
    visitor.well()


def test_a_store_grows_while_it_is_viewed(visitor, shelf, tmp_path):
    rng = np.random.default_rng(1)
    whole = write(
        tmp_path / "whole", random_truth(rng, 30, [6, 6], [2, 2]), [6, 6], {"domain": ["a", "b"] * 15}, cuts=2
    )
    growing = shelf / "growing"
    shutil.copytree(whole.path, growing)
    try:
        manifest = json.loads((growing / "manifest.json").read_text())
        part = manifest | {"status": "capturing", "shards": [], "files": {}, "n_tokens": None, "n_documents": None}
        (growing / "manifest.json").write_text(json.dumps(part))
        shutil.move(growing / "shards" / "00001", tmp_path / "later")
        visitor.go("/store/growing")
        first = f"{whole.shards[0].n_tokens:,} tokens"
        assert first in visitor.page.inner_text("#page")
        assert "being captured" in visitor.page.inner_text("main")
        shutil.move(tmp_path / "later", growing / "shards" / "00001")
        visitor.page.wait_for_function(
            "(words) => document.querySelector('#page').innerText.includes(words)",
            arg=f"{whole.n_tokens:,} tokens",
        )
        visitor.settle().well()
    finally:
        shutil.rmtree(growing)


_UNUSUAL = {
    "decoded": ("overview", "expert"),
    "twins": ("overview", "expert", "text", "specialisation", "flow", "outliers"),
    "plain": ("overview", "text", "specialisation", "flow"),
}


@pytest.mark.parametrize("store", _UNUSUAL)
def test_stores_of_unusual_shape_fill_their_pages(visitor, store):
    """Generated tokens, two routers to a layer, no label and layers of unequal width."""
    layer = "L001-encoder" if store == "twins" else "1"
    for name in _UNUSUAL[store]:
        hidden = ("said", "placement", "plans") if name == "flow" else ()  # solvers take their seconds
        visitor.go(Place(name, store, layer=layer, expert=3, hide=hidden).href)
        assert not visitor.overflow(), name
        if store == "twins":
            assert layer in visitor.page.inner_text("main"), name
    visitor.well()


def test_generated_tokens_are_underlined_in_both_themes(visitor):
    visitor.go("/store/decoded/text?layer=1&expert=3")
    for _ in ("light", "dark"):
        lines = visitor.page.evaluate(
            """() => [...document.querySelectorAll('.tokens .token')].map((token) => {
              const { borderBottomWidth, borderBottomColor, backgroundClip } = getComputedStyle(token);
              return [token.classList.contains('decode'), borderBottomWidth, borderBottomColor, backgroundClip];
            })"""
        )
        ground = visitor.page.evaluate("() => getComputedStyle(document.querySelector('.panel')).backgroundColor")
        assert {one[1] for one in lines if not one[0]} == {"0px"}
        assert {one[1] for one in lines if one[0]} == {"2px"}
        # The line stands on the page, in a colour of its own, whatever the token's.
        assert {one[3] for one in lines if one[0]} == {"padding-box"}
        assert ground not in {one[2] for one in lines if one[0]}
        visitor.page.keyboard.press("t")
        visitor.settle()
    visitor.well()


@pytest.mark.parametrize("name", [page for page in PAGES if page != "lab"])
def test_hostile_texts_labels_and_names_are_only_text(visitor, shelf, name):
    hostile_store(shelf / "hostile")
    try:
        visitor.go(Place(name, "hostile", layer="2", expert=1, doc=3 if name == "text" else None).href)
        assert visitor.page.evaluate("() => window.hacked") is None
        assert visitor.page.locator("#page script, #page iframe, #page img, #page svg[onload]").count() == 0
        visitor.well()
    finally:
        shutil.rmtree(shelf / "hostile")


def test_round_from_expert_to_token_to_document_to_expert(visitor):
    visitor.go("/store/demo/L3/E7")
    visitor.page.locator(".stretch mark").first.click()
    visitor.arrive("/store/demo/text")
    there = parse(visitor.href)[0]
    assert there.doc is not None
    assert there.token is not None
    pinned = visitor.page.locator(".token.pinned")
    visitor.sees(pinned.count, 1)
    assert pinned.get_attribute("data-token") == str(there.token)
    last = visitor.page.locator(".token-experts tr").last
    name = last.locator("th a").inner_text().strip()
    last.locator("td a").click()
    visitor.arrive(f"/store/demo/{name.replace('E', '/E')}")
    visitor.page.go_back()
    visitor.arrive("/store/demo/text")
    assert parse(visitor.href)[0].token == there.token
    visitor.well()


def test_a_recipe_made_since_a_link_was_drawn_is_kept(visitor):
    visitor.go("/store/demo/L3/E7")
    visitor.page.click("#edit-add")
    visitor.page.wait_for_url("**recipe=**")
    visitor.settle()
    visitor.page.locator(".stretch mark").first.click()
    visitor.arrive("/store/demo/text")
    assert parse(visitor.href)[0].recipe == "L3E7*64"
    visitor.well()


def test_each_hostile_document_is_only_text(visitor, shelf):
    write_hostile(shelf / "cruel")
    try:
        for number in range(len(TEXTS)):
            visitor.go(f"/store/cruel/text?layer=1&expert=2&doc={number}&token=1")
            assert visitor.page.evaluate("() => window.hacked") is None
            assert visitor.page.locator("#page script, #page iframe, #page img").count() == 0
            assert not visitor.overflow()
        visitor.well()
    finally:
        shutil.rmtree(shelf / "cruel")


_MIDDLES = """(panel) => {
  const plot = document.querySelector(`#panel-${panel} .js-plotly-plot`), layout = plot._fullLayout;
  const shapes = layout.shapes.filter((one) => one.name === 'selected');
  const pink = (path) => path.style.stroke === 'rgb(214, 51, 108)';
  const paths = [...plot.querySelectorAll('.shapelayer path')].filter(pink);
  return shapes.length !== paths.length ? [] : paths.map((path, i) => {
    const axis = (of) => layout[of.replace(' domain', '').replace(/^([xy])/, '$1axis')];
    const x = axis(shapes[i].xref), y = axis(shapes[i].yref), box = path.getBBox();
    const at = (axis, pixel) => axis.p2d(pixel - axis._offset);
    return [at(x, box.x + box.width / 2), at(y, box.y + box.height / 2), box.width / x._length, box.width / box.height];
  });
}"""
"""Of each outline as it is drawn: its middle in the units of its axes, its share of the width, its shape."""


@pytest.mark.parametrize(
    ("page", "panel"),
    [
        ("overview?", "grid"),
        ("compare?with=masked&", "agreement"),
        ("text?doc=3&", "text-replay"),
        ("flow?", "transitions"),
        ("flow?", "together"),
        ("outliers?", "super"),
    ],
)
def test_the_selected_expert_is_outlined_where_it_is_drawn(visitor, shelf, page, panel):
    visitor.go(f"/store/demo/{page}layer=3&expert=7")
    some = f"(panel) => {{ const all = ({_MIDDLES})(panel); return all.length && all; }}"
    outlines = visitor.page.wait_for_function(some, arg=panel).json_value()
    if panel == "super":
        largest = float(analysis.super_experts(Store.open(shelf / "demo"))["absmax"].values[3, 7])
        assert len(outlines) == 2
        for _, y, _, shape in outlines:
            assert y == pytest.approx(largest, rel=0.01)
            assert shape == pytest.approx(1, abs=0.01)  # round, also on a logarithmic axis
        return
    ((x, y, wide, _),) = outlines
    if page == "flow?":
        assert (y, wide) == (pytest.approx(7, abs=0.05), pytest.approx(1, abs=0.01))  # its row
    else:
        assert (x, y, wide) == (pytest.approx(7, abs=0.05), "3", pytest.approx(1 / 16, abs=0.01))
    visitor.well()
