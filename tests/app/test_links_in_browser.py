"""Links, files and lines to copy in a real browser: the page stays where it is, whatever becomes of them."""

from __future__ import annotations


def test_a_link_to_the_same_page_leaves_it_where_it_is_and_shift_opens_a_window(visitor):
    visitor.go("/store/demo/text?layer=3&expert=7")
    visitor.page.set_viewport_size({"width": 1280, "height": 300})
    link = visitor.page.locator(".documents a[data-go]").nth(3)
    link.scroll_into_view_if_needed()
    before = visitor.page.evaluate("() => window.scrollY")
    assert before > 0
    with visitor.page.context.expect_page() as opened:
        link.click(modifiers=["Shift"])
    opened.value.close()
    assert "doc=" not in visitor.href
    link.click()
    visitor.page.wait_for_url("**doc=**")
    assert visitor.page.evaluate("() => window.scrollY") == before
    visitor.settle()
    assert visitor.page.evaluate("() => window.scrollY") == before
    visitor.well()


def test_a_file_that_cannot_be_made_leaves_the_app_and_says_why(visitor):
    visitor.go("/store/plain")
    visitor.page.route(
        "**/file/**", lambda route: route.fulfill(status=400, content_type="text/plain", body="Not <b>yet</b>.")
    )
    visitor.page.locator("[data-act=save]").first.click()
    visitor.page.wait_for_selector("#alarm >> text=Not <b>yet</b>.")
    assert visitor.href == "/store/plain"
    assert visitor.page.locator(".js-plotly-plot").count()


def test_a_line_is_copied_twice_and_without_a_clipboard_it_is_selected(visitor):
    visitor.page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    visitor.go("/store/plain/analyses")
    copy = visitor.page.locator(".copied").first
    line, button = copy.locator("code").inner_text(), copy.locator("button")
    for _ in range(2):
        button.click()
        visitor.page.wait_for_selector("text=Copied")
    assert visitor.page.evaluate("() => navigator.clipboard.readText()") == line
    visitor.sees(button.inner_text, "Copy")
    visitor.page.evaluate("() => Object.defineProperty(navigator, 'clipboard', { value: undefined })")
    button.click()
    assert visitor.page.evaluate("() => window.getSelection().toString()") == line
    visitor.well()
