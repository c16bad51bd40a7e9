"""Tables in a real browser: their window, their columns, what they export."""

from __future__ import annotations

import io
import json

import pandas as pd
import pytest

from tests.app.visiting import Visitor


def test_a_table_fills_the_window_and_leaves_it(visitor):
    visitor.go("/store/demo/specialisation?full=cells")
    table = visitor.page.locator("#panel-cells .panel-grid")
    visitor.sees(lambda: table.bounding_box()["height"] > 650, True)
    visitor.page.keyboard.press("Escape")
    visitor.sees(lambda: table.bounding_box()["height"], 400)
    visitor.well()


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
