"""The atlas page: every expert once, offline, and deaf to whatever the corpus says."""

from __future__ import annotations

import json

import pytest

from moescope import report
from tests.report.test_report import BROWSER, OURS, Markup, hostile_store


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    folder = tmp_path_factory.mktemp("atlas")
    return report.write_atlas(hostile_store(folder / "store"), folder / "atlas.html")


def test_every_expert_has_its_card_and_no_text_is_obeyed(page):
    found = Markup(page.read_text(encoding="utf-8"))
    assert {tag for tag, _ in found.tags} <= OURS | {"h4", "code", "blockquote"}
    for tag, attributes in found.tags:
        assert "src" not in attributes
        assert not [name for name in attributes if name.startswith("on")], tag
        assert str(attributes.get("href", "#")).startswith(("#", "data:,"))
    cards = [values["id"] for tag, values in found.tags if values.get("class") == "expert-card"]
    assert cards == [f"L1E{e}" for e in range(8)] + [f"L2E{e}" for e in range(6)]
    assert len(found.scripts) == 5  # one figure, two templates, plotly and our own
    for block in found.scripts[:3]:
        assert not set("<>&\u2028") & set(block)
        json.loads(block)
    assert "window.hacked=1" in "".join(found.words)


@pytest.mark.skipif(BROWSER is None, reason="no Chromium on this machine")
def test_in_a_browser(page):
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    complaints, requests = [], []
    with sync_api.sync_playwright() as player:
        browser = player.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
        tab = browser.new_page(viewport={"width": 1280, "height": 900})
        tab.set_default_timeout(60_000)
        tab.on("console", lambda message: complaints.append(message.text))
        tab.on("pageerror", lambda error: complaints.append(str(error)))
        tab.on("request", lambda request: requests.append(request.url))
        tab.goto(f"{page.as_uri()}#L2E3")
        tab.wait_for_selector("[data-figure] .main-svg")
        assert tab.evaluate("document.documentElement.scrollWidth") <= 1280
        where = "document.getElementById('L2E3').getBoundingClientRect().top"
        for _ in range(1_200):  # the page scrolls smoothly
            if 0 <= tab.evaluate(where) < 900:
                break
            tab.wait_for_timeout(50)
        assert 0 <= tab.evaluate(where) < 900
        assert tab.evaluate("window.hacked") is None
        browser.close()
    assert complaints == []
    assert requests == [f"{page.as_uri()}#L2E3"] or requests == [page.as_uri()]
