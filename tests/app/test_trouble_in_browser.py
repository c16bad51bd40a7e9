"""Trouble in a real browser: nonsense, lost and late answers, stores that change or vanish, crowds, hostile texts."""

from __future__ import annotations

import json
import re
import shutil
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest

from moescope import analysis
from moescope.app import arriving, drawing, shell
from moescope.app.book import PAGES
from moescope.app.place import Place
from moescope.app.views import FigureView
from tests.analysis.made_stores import random_truth, write
from tests.app.hostile import TEXTS, write_hostile
from tests.app.visiting import Visitor
from tests.report.test_report import hostile_store


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


def test_long_work_shows_how_far_it_is_and_is_cancelled(visitor, monkeypatch):
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
