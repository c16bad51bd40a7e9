"""The largest script of the page: asked for first, and sent with the hint to compile it at once."""

from __future__ import annotations

import pkgutil
import re

import pytest

from moescope.app.plotly_script import PATH
from moescope.app.server import build
from tests.app.made_desk import made_shelf


@pytest.fixture(scope="module")
def client(tmp_path_factory):
    return build(made_shelf(tmp_path_factory.mktemp("shelf"))).server.test_client()


def test_plotly_is_sent_as_it_is_after_one_comment(client):
    hint, _, script = client.get(PATH).data.partition(b"\n")
    assert hint == b"//# allFunctionsCalledOnLoad"
    assert script == pkgutil.get_data("plotly", "package_data/plotly.min.js")


def test_a_browser_that_has_it_is_not_sent_it_again(client):
    again = client.get(PATH, headers={"If-None-Match": client.get(PATH).headers["ETag"]})
    assert (again.status_code, again.data) == (304, b"")


def test_the_page_asks_for_it_before_all_other_scripts_and_once(client):
    scripts = re.findall(r'<script[^>]* src="([^"?]+)', client.get("/store/a").text)
    assert scripts[0] == "/assets/plotly.js"
    assert scripts.count("/assets/plotly.js") == 1
    assert PATH in client.get("/assets/plotly.js").text
