"""A person steers the bundled model: experts clicked elsewhere, both answers, a file saved and loaded."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from moescope.app import labanswers
from moescope.app.bench import Bench
from moescope.app.place import parse
from moescope.edits import Mask, Recipe, Scale

axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="axe-playwright-python is not installed")
_RULES = {"runOnly": {"type": "tag", "values": ["wcag2a", "wcag2aa", "wcag21a", "wcag21aa", "wcag22aa"]}}


def test_an_expert_clicked_elsewhere_steers_the_answer(visitor, tmp_path, monkeypatch):
    page = visitor.go("/store/demo?layer=2&expert=5").page
    page.click("#edit-add")
    visitor.settle()
    page.keyboard.press("j")
    visitor.settle()
    page.click("#edit-kind")
    page.get_by_role("option", name="mask").click()
    page.click("#edit-add")
    visitor.settle()
    assert parse(visitor.href)[0].recipe == "L2E5*64,L2E6!mask"
    page.click("a.edit-badge")
    visitor.settle()
    assert parse(visitor.href)[0].page == "lab"

    page.get_by_label("Prompt", exact=True).fill("Once upon a time")
    page.get_by_label("Tokens at most").fill("12")
    page.click("#lab-generate")
    page.wait_for_selector(".legend")
    visitor.settle()
    here = parse(visitor.href)[0]
    assert (here.prompt, here.new) == ("Once upon a time", 12)
    plain, edited = (page.locator(".answer .said").nth(number).inner_text() for number in (0, 1))
    assert plain.strip()
    assert edited.strip()
    assert page.locator("#panel-moved .js-plotly-plot").is_visible()
    visitor.shot("lab-answers-light-1280")
    found = axe.Axe().run(page, options=_RULES)
    assert found.violations_count == 0, found.generate_report()

    with page.expect_download() as saved:
        page.click("text=Save as YAML")
    recipe = Recipe.of_text(Path(saved.value.path()).read_text(encoding="utf-8"))
    assert recipe.edits == [Scale(layer=2, expert=5, factor=64.0), Mask(layer=2, expert=6)]
    file = Recipe([Mask(layer=4, expert=[1, 2])]).save(tmp_path / "other.json")
    with page.expect_file_chooser() as chooser:
        page.click("text=Load from a file")
    chooser.value.set_files(file)
    page.wait_for_url("**recipe=L4E1.2*")
    visitor.settle()

    # A second answer, of a server that takes longer than the page's clock ticks: it comes all the same.
    real = labanswers._columns
    monkeypatch.setattr(labanswers, "_columns", lambda *asked: (time.sleep(0.5), real(*asked))[1])
    page.click("#lab-generate")
    page.get_by_text("under L4E1.2!mask, going on from").wait_for()
    page.wait_for_selector(".legend")
    visitor.settle()
    again = parse(visitor.href)[0]
    assert again.run != here.run
    assert page.locator(".answer .said").first.inner_text() == plain
    page.go_back()
    page.get_by_text("under L2E5*64,L2E6!mask, going on from").wait_for()
    visitor.settle()
    assert [page.locator(".answer .said").nth(number).inner_text() for number in (0, 1)] == [plain, edited]
    visitor.well()


def test_a_checkpoint_in_writing_is_found_again_and_can_be_stopped(visitor, monkeypatch):
    def writes(self, job, choice, recipe, out, approximate):
        for done in range(60_000):  # until it is cancelled
            job.report(f"step {done}", done, 0)
            time.sleep(0.01)

    monkeypatch.setattr(Bench, "write", writes)
    page = visitor.go("/store/demo/lab?recipe=L2E5*64").page
    page.get_by_label("New folder").fill("copied")
    page.click("#write-ask")
    page.click("#write-go")
    page.get_by_text("writing copied: step").wait_for()
    visitor.go("/store/demo/lab")
    page.get_by_text("writing copied: step").wait_for()
    page.click("#write-cancel")
    page.get_by_text("Cancelled; nothing was written.").wait_for()
    page.locator("#write-cancel").wait_for(state="hidden")
    visitor.well()


def test_generate_takes_what_the_controls_show_though_the_server_has_not_heard_of_it(visitor):
    page = visitor.go("/store/demo/lab?new=9&recipe=L2E5*64").page
    held = visitor.holds("chosen.data")
    page.get_by_label("Prompt", exact=True).fill("Once upon a time")
    page.get_by_label("Tokens at most").fill("3")
    page.get_by_label("As text").fill("L4E1!mask")
    page.click("#lab-generate")
    page.get_by_text("under L4E1!mask, going on from “Once upon a time”").wait_for()
    page.wait_for_selector(".legend")
    assert held, "what the controls say went to the server unseen"
    here = parse(visitor.href)[0]
    assert (here.prompt, here.new, here.recipe) == ("Once upon a time", 3, "L4E1!mask")
    visitor.sees(page.get_by_text("3 tokens", exact=True).count, 2)
    visitor.sees(page.get_by_label("Tokens at most").input_value, "3")


def test_an_expert_is_pruned_replaced_by_another_and_its_layer_routed_by_clicks(visitor):
    page = visitor.go("/store/demo?layer=2&expert=5").page

    def add(kind: str, field: str = "", number: str = "") -> None:
        page.click("#edit-kind")
        page.get_by_role("option", name=kind, exact=True).click()
        if field:
            page.get_by_label(field).fill(number)
        before = visitor.href
        page.click("#edit-add")
        page.wait_for_url(lambda url: url.removeprefix(visitor.base) != before)
        visitor.settle()

    add("prune")
    page.get_by_label("Factor").wait_for(state="hidden")
    page.keyboard.press("j")
    visitor.settle()
    add("replace by", "The other expert of this layer", "3")
    add("keep only top", "How many of a token's experts count", "1")
    visitor.sees(page.locator("#edit-adds label").first.inner_text, "Edit layer 2")
    assert parse(visitor.href)[0].recipe == "L2E5!prune,L2E3.6!merge:1:0@unaligned,L2!top_k:1"

    # What contradicts is said, and the recipe stays.
    page.click("#edit-kind")
    page.get_by_role("option", name="mask", exact=True).click()
    page.click("#edit-add")
    page.get_by_text("expert 6: merge and mask contradict").wait_for()
    assert parse(visitor.href)[0].recipe.endswith("L2!top_k:1")

    page.click("a.edit-badge")
    visitor.settle()
    lines = [" ".join(line.split()) for line in page.locator(".edits li").all_inner_texts()]
    assert lines == ["L2E5prune ×", "L2E3, 6copies of E3 ×", "L2only the top 1 ×"]
    visitor.well()


def test_a_place_that_is_late_does_not_take_back_what_has_been_set_since(visitor):
    page = visitor.go("/store/demo/lab").page
    held = []

    def late(route):
        changed = " ".join((route.request.post_data_json or {}).get("changedPropIds", []))
        held.append(route) if "url.href" in changed and not held else route.continue_()

    page.route("**/_dash-update-component**", late)
    prompt = page.get_by_label("Prompt", exact=True)
    prompt.fill("Once upon a time")
    prompt.blur()
    page.wait_for_url("**prompt=Once**")
    visitor.sees(lambda: len(held), 1)
    page.get_by_label("Tokens at most").fill("12")
    page.wait_for_timeout(1_000)  # the control has said 12, and the page does not know the prompt's address yet
    held[0].continue_()
    page.wait_for_url("**new=12**")
    visitor.settle()
    here = parse(visitor.href)[0]
    assert (here.prompt, here.new) == ("Once upon a time", 12)
    visitor.sees(page.get_by_label("Tokens at most").input_value, "12")
    # Back takes both back, one after the other.
    page.go_back()
    page.wait_for_function("() => [...document.querySelectorAll('input')].some((one) => one.value === '64')")
    assert parse(visitor.href)[0].prompt == "Once upon a time"
    visitor.well()
