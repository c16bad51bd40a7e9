"""Slices in the URL: what is put in comes out, what cannot be read is said."""

from __future__ import annotations

import tracemalloc

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moescope.app.place import Place, parse
from moescope.app.slicing import active, names, where_of_slice, with_documents, with_values, without_slice
from moescope.errors import MoescopeError


@given(st.sets(st.integers(0, 3000), min_size=1, max_size=60))
def test_documents_survive_the_url(numbers):
    place = with_documents(Place("overview", "demo"), "some", numbers)
    back, notes = parse(place.href)
    assert not notes
    assert active(back) == {"document": sorted(numbers)}


def test_several_slices_one_active_and_gone_again():
    place = with_values(Place("overview", "demo"), "code", "domain", ["code", "math"])
    place = with_documents(place, "few", [1, 2, 3, 9])
    assert names(place) == ["code", "few"]
    assert where_of_slice(place, "code") == {"domain": ["code", "math"]}
    assert where_of_slice(place, "few") == {"document": [1, 2, 3, 9]}
    assert "few~documents:1-3,9" in place.href
    assert active(place.go(slice="code")) == {"domain": ["code", "math"]}
    assert active(without_slice(place, "few")) is None
    assert without_slice(without_slice(place, "few"), "code").slices is None


@pytest.mark.parametrize(
    ("slices_text", "name", "words"),
    [
        ("a~domain:x", "b", "no slice 'b'"),
        ("a~domain", "a", "cannot be read"),
        ("a~documents:1-x", "a", "names '1-x' as documents"),
        ("a~documents:0-99999999999", "a", "as documents"),
    ],
)
def test_a_slice_that_cannot_be_read_says_so(slices_text, name, words):
    with pytest.raises(MoescopeError, match=words):
        active(Place("overview", "demo", slices=slices_text, slice=name))


@pytest.mark.parametrize(("name", "values"), [("", ["x"]), ("a|b", ["x"]), ("ok", []), ("ok", ["a,b"])])
def test_a_slice_that_the_url_cannot_hold_is_refused(name, values):
    with pytest.raises(MoescopeError):
        with_values(Place("overview", "demo"), name, "domain", values)


@pytest.mark.parametrize("column", ["documents", "a:b", "a~b", "a|b"])
def test_a_label_whose_name_would_be_read_otherwise_is_refused(column):
    with pytest.raises(MoescopeError, match="rename it"):
        with_values(Place("overview", "demo"), "some", column, ["3"])


@pytest.mark.parametrize("rule", ["9-3", ",".join(["0-4999999"] * 400), "0-4999999,7"])
def test_a_short_address_cannot_fill_the_memory(rule):
    with pytest.raises(MoescopeError, match="as documents"):
        active(Place("overview", "demo", slices=f"a~documents:{rule}", slice="a"))


def test_names_of_slices_are_known_without_writing_out_what_is_in_them():
    place = Place("overview", "demo", slices="|".join(f"s{n}~documents:0-4999999" for n in range(40)))
    tracemalloc.start()
    assert len(names(place)) == 40
    assert active(place) is None
    assert tracemalloc.get_traced_memory()[1] < 1 << 20
    tracemalloc.stop()
    with pytest.raises(MoescopeError, match="slice 'b' cannot be read"):
        names(Place("overview", "demo", slices="a~domain:x|b~domain"))
