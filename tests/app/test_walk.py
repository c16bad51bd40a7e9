"""A person walks through the app: clicks, keys, links, back, a shared address, two themes, full windows."""

from __future__ import annotations

import pytest

from moescope import analysis
from moescope.app.place import parse
from moescope.store import Store
from tests.app.visiting import Visitor


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
    visitor.sees(page.get_by_role("textbox", name="Phase", exact=True).input_value, "")
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


def test_embedded_without_header_and_hidden_panels(visitor):
    visitor.go("/store/demo?embed=1")
    names = [panel.get_attribute("id") for panel in visitor.page.locator(".panel[id]").all()]
    assert not visitor.page.locator(".header").is_visible()
    visitor.go(f"/store/demo?embed=1&hide={names[0].removeprefix('panel-')}")
    assert [panel.get_attribute("id") for panel in visitor.page.locator(".panel[id]").all()] == names[1:]
    visitor.well()


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
