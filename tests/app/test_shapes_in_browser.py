"""Stores of unusual shape in a real browser: very many layers, generated tokens, two routers to a layer, no labels."""

from __future__ import annotations

import shutil

import numpy as np
import pytest

from moescope.app.place import Place
from tests.analysis.made_stores import random_truth, write


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
