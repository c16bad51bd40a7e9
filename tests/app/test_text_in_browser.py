"""The page of texts under a pointer: the bars of a hovered token, and a replay that is played and paused."""

from __future__ import annotations

import re
import time

import numpy as np
import pytest

import moescope as ms
from moescope.app.place import parse

DOC, LAYER, EXPERT = 3, 2, 5
_TIP = """(facts) => {
  const tip = document.querySelector('.token-tip');
  if (!tip || tip.querySelector('.tip-facts').innerText !== facts) return null;
  const box = tip.getBoundingClientRect();
  return {
    layer: tip.querySelector('.tip-layer').innerText,
    inside: box.left >= 0 && box.top >= 0 && box.right <= window.innerWidth && box.bottom <= window.innerHeight,
    rows: [...tip.querySelectorAll('.tip-row')].map((row) => ({
      expert: Number(row.querySelector('.tip-expert').innerText),
      weight: Number(row.querySelector('.number').innerText),
      bar: Number(getComputedStyle(row.querySelector('.bar')).getPropertyValue('--w')),
      chosen: row.classList.contains('chosen'),
    })),
  };
}"""
_FILLED = """(token) => {
  const plot = document.querySelector('#panel-text-replay .js-plotly-plot');
  return plot?.data?.[0]?.meta?.filled === token;
}"""
_PAST = """(last) => {
  const said = document.querySelector('.replay-word').innerText.match(/^token (\\d+),/);
  return said && Number(said[1]) > last;
}"""
_REPLAY = """() => {
  const plot = document.querySelector('#panel-text-replay .js-plotly-plot');
  const [counts, now] = plot._fullData;
  return {
    word: document.querySelector('.replay-word').innerText, counts: counts.z.map((row) => [...row]),
    now: [...now.x].map((expert, i) => [now.y[i], expert]),
    marked: [...document.querySelectorAll('.tokens .token.now')].map((token) => Number(token.dataset.token)),
    ahead: document.querySelectorAll('.tokens .token.ahead').length,
    pressed: document.querySelector('[data-replay=play]').getAttribute('aria-pressed'),
  };
}"""


@pytest.fixture(scope="module")
def routed(shelf):
    """What the store holds of the document: experts and their weights, both [layer, token, rank]."""
    store = ms.open(shelf / "demo")
    at = np.flatnonzero(np.asarray(store.tokens()["document"]) == DOC)
    layers = [store.routing(layer=site.layer) for site in store.sites]
    return np.stack([layer.expert[at] for layer in layers]), np.stack([layer.weight[at] for layer in layers])


def test_a_hovered_token_shows_its_experts_and_their_weights(visitor, routed):
    experts, weights = (values[LAYER] for values in routed)
    page = visitor.go(f"/store/demo/text?doc={DOC}&layer={LAYER}&expert={EXPERT}").page
    fires = int(np.flatnonzero((experts == EXPERT).any(axis=1))[0])
    for number in (fires, 9, 1):
        page.locator(f".token[data-token='{number}']").hover()
        tip = page.wait_for_function(_TIP, arg=f"token {number} · position {number} · prefill").json_value()
        assert tip["layer"] == f"experts of layer {LAYER}"
        assert [row["expert"] for row in tip["rows"]] == experts[number].tolist()
        np.testing.assert_allclose([row["weight"] for row in tip["rows"]], weights[number], rtol=6e-3)
        np.testing.assert_allclose([row["bar"] for row in tip["rows"]], weights[number] / weights[number].max(), 1e-3)
        assert [row["chosen"] for row in tip["rows"]] == (experts[number] == EXPERT).tolist()
        assert tip["inside"]
    page.mouse.move(2, 2)
    page.locator(".token-tip").wait_for(state="detached")
    visitor.well()


def _is_at(shown, step: int, experts: np.ndarray) -> None:
    """The counts are those of the tokens up to this one, and this one's experts and itself are marked."""
    layers, tokens, _ = experts.shape
    counts = [np.bincount(experts[layer, : step + 1].ravel(), minlength=16) for layer in range(layers)]
    np.testing.assert_array_equal(shown["counts"], counts)
    assert sorted((int(re.sub(r"\D", "", layer)), expert) for layer, expert in shown["now"]) == sorted(
        (layer, expert) for layer in range(layers) for expert in experts[layer, step].tolist()
    )
    assert shown["marked"] == [step]
    assert shown["ahead"] == tokens - 1 - step


def test_a_replay_is_played_and_paused_and_fills_the_map(visitor, routed):
    experts, _ = routed
    page = visitor.go(f"/store/demo/text?doc={DOC}&layer={LAYER}").page
    assert np.sum(page.evaluate(_REPLAY)["counts"]) == experts.size
    play = page.get_by_role("button", name="Play or pause (p)")
    play.click()
    seen = []
    while len(seen) < 3:
        page.wait_for_function(_PAST, arg=seen[-1] if seen else -1)
        shown = page.evaluate(_REPLAY)
        seen.append(int(re.match(r"token (\d+), ", shown["word"])[1]))
        assert shown["pressed"] == "true"
        _is_at(shown, seen[-1], experts)

    play.click()
    visitor.settle()
    paused = page.evaluate(_REPLAY)
    assert paused["pressed"] == "false"
    step = parse(visitor.href)[0].step
    assert step >= seen[-1]
    _is_at(paused, step, experts)
    page.wait_for_timeout(1000)
    assert page.evaluate(_REPLAY) == paused

    page.get_by_role("button", name="One token on").click()
    visitor.settle()
    _is_at(page.evaluate(_REPLAY), step + 1, experts)
    assert parse(visitor.href)[0].step == step + 1
    # Another browser at this address stands where this one does, and playing goes on from there.
    # The map's library comes late there, after everything else.
    late = []
    page.route("**/*plotly*", lambda route: (late.append(route.request.url), time.sleep(1.5), route.continue_()))
    page.reload()
    page.wait_for_function("() => document.querySelector('.tokens .token.now')")
    page.wait_for_function(_FILLED, arg=step + 1)
    assert late  # its request was held
    visitor.settle()
    _is_at(page.evaluate(_REPLAY), step + 1, experts)
    page.keyboard.press("p")
    page.wait_for_function(_PAST, arg=step + 2)
    page.get_by_role("button", name="To the end: no replay").click()
    visitor.settle()
    done = page.evaluate(_REPLAY)
    assert np.sum(done["counts"]) == experts.size
    assert (done["marked"], done["ahead"], done["now"], done["pressed"]) == ([], 0, [], "false")
    assert parse(visitor.href)[0].step is None
    visitor.well()
