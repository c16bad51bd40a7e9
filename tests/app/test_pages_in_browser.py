"""Every page on a real store in a real browser, both themes: drawn, quiet, within the window, readable by a machine.

Screenshots go to build/screenshots, to be looked at.
"""

from __future__ import annotations

import pytest

from moescope.app import drawing
from moescope.app.book import PAGES
from moescope.app.place import Place

axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="axe-playwright-python is not installed")

# Rules of WCAG 2.0 to 2.2, levels A and AA; the tables' own markup is their library's.
_RULES = {
    "runOnly": {"type": "tag", "values": ["wcag2a", "wcag2aa", "wcag21a", "wcag21aa", "wcag22aa"]},
    "resultTypes": ["violations"],
}
_BUTTONS = {"Zoom", "Pan", "Box Select", "Lasso Select", "Zoom in", "Zoom out", "Reset axes", "Reset view"}
_PLACES = {
    name: Place(name, "demo", layer="3", expert=7, other="masked" if name == "compare" else None) for name in PAGES
} | {"expert": Place("expert", "demo", layer="3", expert=7, pin="L5E2")}


@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("name", PAGES)
def test_a_page(visitor, name, theme):
    visitor.page.emulate_media(color_scheme=theme)
    visitor.go(_PLACES[name].href)
    visitor.shot(f"{name}-{theme}-1280")
    assert not visitor.overflow()
    assert visitor.page.locator(".page-title > :last-child").bounding_box()["height"] < 30  # one line
    assert visitor.buttons() <= _BUTTONS  # and none that sends a figure anywhere
    found = axe.Axe().run(visitor.page, options=_RULES)
    assert found.violations_count == 0, found.generate_report()
    visitor.page.set_viewport_size({"width": 1920, "height": 1080})
    visitor.settle().shot(f"{name}-{theme}-1920")
    assert not visitor.overflow()
    visitor.well()


def test_the_shelf(visitor):
    visitor.go("/")
    visitor.shot("shelf-light-1280")
    text = visitor.page.inner_text("#page")
    assert "demo" in text
    assert "damaged" in text
    found = axe.Axe().run(visitor.page, options=_RULES)
    assert found.violations_count == 0, found.generate_report()
    visitor.well()


def test_the_first_screen_says_what_the_model_does_without_a_click(visitor, shelf):
    from moescope.analysis import findings
    from moescope.store import Store

    visitor.go("/store/demo")
    seen = visitor.page.evaluate(
        """() => [...document.querySelectorAll('#page *')]
          .filter((e) => e.children.length === 0 && e.getBoundingClientRect().top < window.innerHeight)
          .map((e) => e.textContent).join(' ')"""
    )
    assert findings(Store.open(shelf / "demo"))[0].headline in seen
    assert visitor.page.locator(".js-plotly-plot").first.bounding_box()["y"] < 800


def test_what_is_at_hand_comes_with_the_page_and_is_not_asked_for_again(visitor, monkeypatch):
    monkeypatch.setattr(drawing, "_AT_ONCE", 60.0)  # how fast this machine is does not matter here
    asked, scripts = [], []

    def note(request):
        if "/_dash-update-component" in request.url:
            asked.extend(prop for prop in request.post_data_json["changedPropIds"] if '"wanted"' in prop)
        elif "plotly.min.js" in request.url:
            scripts.append(request.url)

    visitor.go("/store/demo")
    visitor.page.on("request", note)
    visitor.go("/store/demo")
    assert not asked
    assert len(scripts) == 1
    assert visitor.page.inner_text("#panel-even").strip()
    assert visitor.page.locator("#panel-grid .heatmaplayer").count()
    visitor.well()
