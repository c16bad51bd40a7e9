"""Slices made from what is selected and from words, and the word on panels that take none."""

from __future__ import annotations

import json
import threading
import time

import numpy as np
import pytest

from moescope import analysis
from moescope.app import book, panels, slicebar
from moescope.app.answers import Pending
from moescope.app.place import longest, parse
from moescope.app.slicing import active
from moescope.errors import MoescopeError
from tests.analysis.made_stores import random_truth, write
from tests.app.made_desk import made_desk, words


@pytest.fixture(scope="module")
def desk(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sliced")
    made = random_truth(np.random.default_rng(3), 3000, [4, 4], [1, 1], longest=2)
    texts = ["with needle" if d % 7 in (1, 2) else "nothing" for d in range(3000)]
    texts[0] = "a Rare word"
    domain = ["code" if d < 20 else "prose" for d in range(3000)]
    write(folder / "s", made, [4, 4], {"domain": domain}, texts=texts)
    return made_desk(folder)


def made(desk, href, name, text):
    return slicebar.made(desk.scene(parse(href)[0], patience=60), name, text)


def test_a_slice_of_the_selected_value(desk):
    there = made(desk, "/store/s?label=code", "", "")
    assert (there.slice, active(there), there.label) == ("code", {"domain": ["code"]}, None)
    assert parse(there.href) == (there, ())


def test_a_slice_of_a_search_counts_in_every_analysis(desk):
    there = made(desk, "/store/s?label=code", "mine", "NEEDLE")
    numbers = [d for d in range(20) if d % 7 in (1, 2)]
    assert active(there) == {"document": numbers}
    store = desk.shelf.open("s").store
    document = store.tokens(["document"])["document"].to_numpy()
    found = analysis.load(store, where=active(there))
    first = store.routing(layer=0).expert[np.isin(document, numbers), 0]
    np.testing.assert_array_equal(found["count"].values[0].squeeze(), np.bincount(first, minlength=4))
    inside = made(desk, there.href, "less", "needle")
    assert active(inside) == {"document": numbers}
    both = made(desk, there.go(label="code").href, "both", "")
    assert active(both) == {"document": numbers}


def test_texts_are_searched_as_other_long_work_is(desk):
    go = threading.Event()
    busy = [desk.jobs.start("long", lambda job: go.wait(60)) for _ in range(2)]
    while any(job.state != "running" for job in busy):
        time.sleep(0.01)
    scene = desk.scene(parse("/store/s?label=code")[0])
    with pytest.raises(Pending) as pending:
        slicebar.made(scene, "later", "rare")
    go.set()
    assert all(job.wait(60) for job in (*busy, pending.value.job))
    assert active(slicebar.made(scene, "later", "rare")) == {"document": [0]}


@pytest.mark.parametrize(
    ("href", "name", "text", "said"),
    [
        ("/store/s", "x", "", "Select a value"),
        ("/store/s", "x", "absent", "No document that counts here has 'absent'"),
        ("/store/s", "x|y", "rare", "name may have"),
    ],
)
def test_what_cannot_be_a_slice_is_refused(desk, href, name, text, said):
    with pytest.raises(MoescopeError, match=said):
        made(desk, href, name, text)


def test_what_an_address_cannot_hold_is_refused(desk):
    one = made(desk, "/store/s", "one", "needle").go(slice=None)
    two = made(desk, one.href, "two", "needle").go(slice=None)
    assert len(two.slices) < longest() < 1.5 * len(two.slices)
    with pytest.raises(MoescopeError, match="too scattered"):
        made(desk, two.href, "three", "needle")


def test_slices_are_listed_and_removed(desk):
    there = made(desk, "/store/s?label=code", "mine", "needle")
    assert words(slicebar.listed(there)) == "mine active remove"
    assert "remove all" in words(slicebar.listed(there.go(slices="bad~rule")))
    assert slicebar.of_what(there) == "A slice of the documents of slice mine"


def test_panels_say_that_they_take_no_slice(desk):
    scene = desk.scene(parse("/store/s")[0])
    for page in book.PAGES.values():
        for view in page.views:
            said = "not sliced" in json.dumps(
                panels.panel(view, scene).to_plotly_json(), default=lambda c: c.to_plotly_json()
            )
            bare = getattr(view, "bare", False)
            assert said == ("slice" not in view.reads and not bare), view.name
