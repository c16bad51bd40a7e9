"""`store.explore()`: the app in a frame of the notebook's page, and of no other."""

from __future__ import annotations

import threading
from html import unescape
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest

from moescope.app.inline import Explorer
from moescope.errors import MoescopeError
from moescope.store import Store
from tests.analysis.made_stores import random_truth, write

HUB = "https://hub.example"


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    path = tmp_path_factory.mktemp("inline") / "one"
    write(path, random_truth(np.random.default_rng(0), 6, [4, 4], [2, 2]), [4, 4], {"domain": list("aabbab")})
    return Store.open(path)


@pytest.fixture
def notebook():
    """A port whose pages show what is put into the list: http://localhost, as notebooks do, or any name below it."""
    shown: list[Explorer] = []

    class Page(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200)
            self.send_header("Content-Type", "text/html; charset=utf-8")
            self.end_headers()
            self.wfile.write(shown[-1]._repr_html_().encode())

        def log_message(self, *said):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Page)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield shown, server.server_port
    server.shutdown()
    server.server_close()


def test_a_notebooks_page_shows_the_app_and_one_from_elsewhere_only_where_it_is_named(chromium, store, notebook):
    shown, port = notebook
    hub = f"http://hub.localhost:{port}"
    context = chromium.new_context()
    try:
        page = context.new_page()
        troubles: list[str] = []
        page.on("pageerror", lambda error: troubles.append(str(error)))
        for address, framing in ((f"http://localhost:{port}", ()), (hub, hub)):
            shown.append(store.explore("expert", layer=1, expert=3, framed_by=framing))
            page.goto(address)
            # Of another site than its frame: the browser keeps storage shut there, and the app stands all the same.
            head = page.frame_locator("iframe").locator("#panel-expert-head", has_text="fair share of the work")
            head.wait_for(timeout=120_000)
            assert "L1E3" in head.inner_text()
        assert not troubles
        shown.append(store.explore("expert", layer=1, expert=3))
        with page.expect_console_message(lambda one: "frame-ancestors" in one.text, timeout=60_000):
            page.goto(hub)
        assert page.frame_locator("iframe").locator("#frame").count() == 0
        # The sentence beside it leads to the same address, in a tab of its own.
        link = page.locator("p a")
        assert link.get_attribute("href") == link.inner_text() == page.locator("iframe").get_attribute("src")
        assert link.is_visible()
    finally:
        context.close()


def test_a_second_look_asks_the_same_server_unless_others_may_frame_it(store):
    def port(shown):
        return shown.url.split("/")[2]

    assert port(store.explore()) == port(store.explore("text"))
    assert port(store.explore(framed_by=[HUB])) == port(store.explore(framed_by=HUB)) != port(store.explore())
    assert unescape(store.explore()._repr_html_()).count(store.explore().url) == 3


@pytest.mark.parametrize(
    "wrong", ["*", "https://*", "https://*.example", "https://a.example/lab", "'none'", "x; y", ""]
)
def test_what_is_no_origin_lets_nobody_in(store, wrong):
    with pytest.raises(MoescopeError, match="no origin"):
        store.explore(framed_by=wrong)
