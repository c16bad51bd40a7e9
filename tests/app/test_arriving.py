"""A page is made anew when what it is made from has changed, and only then."""

from __future__ import annotations

import json
import shutil
import time

import numpy as np
import pytest

from moescope.app import build
from moescope.app.arriving import same_page, state
from moescope.app.place import Place
from tests.analysis.made_stores import random_truth, write
from tests.app.made_desk import made_desk, made_shelf


@pytest.fixture
def desk(tmp_path):
    return made_desk(made_shelf(tmp_path / "shelf"))


@pytest.mark.parametrize(("name", "stays"), [("overview", True), ("lab", True), ("compare", False), ("shelf", False)])
def test_only_the_pages_that_show_other_stores_change_with_them(desk, name, stays):
    here = Place(name, None if name == "shelf" else "a")
    before = state(desk, here)
    shutil.copytree(desk.shelf.root / "b", desk.shelf.root / "new")
    assert same_page(state(desk, here), before) is stays


def test_a_store_captured_again_under_its_name_makes_its_page_anew(desk):
    here = Place("overview", "c")
    before = state(desk, here)
    assert same_page(state(desk, here), before)
    shutil.rmtree(desk.shelf.root / "c")
    shutil.copytree(desk.shelf.root / "b", desk.shelf.root / "c")
    now = state(desk, here)
    assert now["layers"] == before["layers"]
    assert not same_page(now, before)


def test_what_is_offered_goes_to_the_browser_once_and_not_back_with_every_callback(tmp_path):
    values = [f"value {number}" for number in range(12)]
    write(tmp_path / "made", random_truth(np.random.default_rng(0), 12, [4], [2]), [4], {"domain": values})
    client = build(tmp_path).server.test_client()
    asked = {"headers": {"Host": "localhost"}}
    outputs = next(
        one["output"] for one in client.get("/_dash-dependencies", **asked).json if one["output"].startswith("..place.")
    )

    def arrive(href, before):
        ids = [name.rpartition(".") for name in outputs.strip(".").split("...")]
        body = {
            "output": outputs,
            "outputs": [{"id": name, "property": what} for name, _, what in ids],
            "inputs": [
                {"id": "url", "property": "href", "value": href},
                {"id": "watch", "property": "n_intervals", "value": 0},
                {"id": "theme", "property": "data", "value": "light"},
            ],
            "state": [{"id": "place", "property": "data", "value": before}],
            "changedPropIds": ["url.href"],
        }
        for _ in range(200):
            answer = client.post("/_dash-update-component", json=body, **asked).json["response"]
            if "choices" not in answer or "label" in answer["choices"]["data"]:
                break
            time.sleep(0.05)  # the labels are being read
        return answer

    first = arrive("/store/made", None)
    assert first["choices"]["data"]["label"] == sorted(values)
    assert "value 3" not in json.dumps(first["place"])
    then = arrive("/store/made?label=value%203", first["place"]["data"])
    assert then["place"]["data"]["label"] == "value 3"
    assert "choices" not in then
    narrowed = arrive("/store/made?layer=0", then["place"]["data"])
    assert narrowed["choices"]["data"]["expert"] == ["0", "1", "2", "3"]
    assert arrive("/store/made?layer=0", narrowed["place"]["data"]) == {}  # nothing new: an answer, and nothing in it
