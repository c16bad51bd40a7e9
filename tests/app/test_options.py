"""Parameters in the URL: what is written comes back, what is wrong is said, and the command shown gives the answer."""

from __future__ import annotations

import shlex

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moescope import analysis
from moescope.analysis import ANALYSES
from moescope.app import optioncontrols, options
from moescope.app.answers import Answers
from moescope.app.jobs import Jobs
from moescope.app.place import Place, parse
from moescope.app.scene import Desk
from moescope.app.shelf import Shelf
from moescope.errors import MoescopeError
from tests.analysis.made_stores import random_truth, write

_TEXT = st.text(st.characters(codec="utf-8", exclude_characters=",", exclude_categories=["C"]), min_size=1, max_size=12)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("options")
    rng = np.random.default_rng(0)
    truth = random_truth(rng, 12, [6, 6], [2, 2], longest=60)
    maxima = rng.gamma(2.0, size=(2, 6)).astype(np.float32)
    write(folder / "made one", truth, [6, 6], {"domain": list("abcabcabcabc")}, maxima=maxima, hidden=[1.0, 1.0])
    return folder


def scene(root, **place):
    jobs = Jobs()
    return Desk(Shelf(root), jobs, Answers(jobs)).scene(Place("analyses", "made one", **place))


@given(_TEXT.filter(lambda text: text == text.strip()), st.integers(0, 10**6))
def test_what_is_written_comes_back_through_the_url(text, number):
    written = options.with_option(options.with_option(None, "classes", text), "seed", str(number))
    back, notes = parse(Place("analyses", "demo", question="npmi_classes", options=written).href)
    assert not notes
    assert options.read(ANALYSES["npmi_classes"], back.options) == {"classes": [text], "seed": number}
    assert options.with_option(options.with_option(written, "seed", None), "classes", "") is None


@pytest.mark.parametrize(
    ("question", "text", "words"),
    [
        ("npmi", "seed:x", "seed is a whole number, not 'x'"),
        ("npmi", "seed:1.5", "whole number"),
        ("npmi", "layers:1,two", "layers is a whole number, not 'two'"),
        ("npmi", "alternative:less", "one of greater, two-sided"),
        ("npmi", "nothing:1", "no parameter 'nothing'"),
        ("affinity", "cells:maybe", "yes or no"),
        ("super_experts", "ratio:ten", "ratio is a number"),
        ("super_experts", "ratio:nan", "ratio is a number"),
        ("npmi", "permutations:1000001", "at most 1,000,000"),
        ("caches", "windows:16,99999999", "windows is at most 1,000,000"),
    ],
)
def test_a_wrong_value_is_said(question, text, words):
    with pytest.raises(MoescopeError, match=words):
        options.read(ANALYSES[question], text)


def test_a_new_question_forgets_the_old_ones_parameters():
    place = Place("analyses", "demo", question="npmi", options="seed:3")
    assert place.go(question="load").options is None
    assert place.go(layer="3").options == "seed:3"


def test_the_selection_is_followed_where_the_analysis_would_take_the_first_label(root):
    here = scene(root, phase=None, slices="few~documents:0-2", slice="few")
    label = here.store.labels[0]
    assert options.parameters(here, ANALYSES["npmi"]) == {"by": label, "where": {"document": [0, 1, 2]}}
    assert options.parameters(here, ANALYSES["load"]) == {"where": {"document": [0, 1, 2]}}
    assert options.command(ANALYSES["load"], ["s"], {"where": {"document": [0, 1, 2]}}) is None


def test_each_first_label_rule_agrees_with_the_analysis(root):
    """Where `follows_label` says the store's first label is the default, naming it changes nothing."""
    store = scene(root).store
    named = [q for q in ANALYSES.values() if any(options.follows_label(p) for p in q.parameters)]
    assert {"npmi", "domain_specialisation", "risk_difference", "atlas"} <= {q.name for q in named}
    assert not any(
        options.follows_label(p) for name in ("load", "importance", "caches") for p in ANALYSES[name].parameters
    )
    plain = analysis.npmi(store, permutations=0, resamples=0)
    assert plain.attrs["by"] == store.labels[0]


@pytest.mark.parametrize(
    ("question", "text"),
    [
        ("load", "draws:20;layers:0"),
        ("npmi", "permutations:50;resamples:0;alternative:two-sided"),
        ("affinity", "cells:no;permutations:9"),
        ("super_experts", "ratio:2.5"),
    ],
)
def test_the_command_shown_gives_the_rows_shown(root, tmp_path, monkeypatch, question, text):
    from moescope.cli import analyze

    here = scene(root, options=text)
    asked = ANALYSES[question]
    if options.unasked(here, asked) is not None:
        pytest.skip(f"the made store has no {asked.tier} tier")
    given_ = options.parameters(here, asked)
    shown = analysis.table(asked.run(here.store, **given_))
    words = shlex.split(options.command(asked, [here.opened.name], given_) or "")
    assert words[:3] == ["moescope", "analyze", question]
    monkeypatch.chdir(root)
    with pytest.raises(SystemExit) as ended:
        analyze.run(question, [*words[3:], "--csv", str(tmp_path / "rows.csv")], str)
    assert ended.value.code == 0
    shown.to_csv(tmp_path / "shown.csv", index=False)
    pd.testing.assert_frame_equal(pd.read_csv(tmp_path / "rows.csv"), pd.read_csv(tmp_path / "shown.csv"))
    import moescope as ms

    again = analysis.table(eval(options.python(asked, [here.opened.name], given_), {"ms": ms}))  # noqa: S307
    pd.testing.assert_frame_equal(again, shown)


def test_the_page_answers_and_says_what_it_cannot(root):
    from moescope.app.book import view

    here = scene(root, question="npmi", options="permutations:20;resamples:0")
    here.ask("npmi", patience=60, **options.parameters(here, ANALYSES["npmi"]))
    assert len(view("rows").frame(here)) > 0
    assert view("answer").draw(here).data
    for name in ("asked", "same", "questions"):
        assert view(name).draw(here) is not None
    for question, words in (("compare", "second store"), ("gate_map", "weights"), ("nonsense", "no analysis")):
        with pytest.raises(MoescopeError, match=words):
            view("answer").draw(scene(root, question=question))


def test_what_was_typed_for_one_question_is_no_parameter_of_the_next(root):
    def controls(here):
        drawn = optioncontrols.of(scene(root, question=here.question), ANALYSES[here.question or "load"])
        return {one.id["name"]: one.id for one in drawn.children}

    first, other = Place("analyses", "made one"), Place("analyses", "made one", question="npmi")
    for here, elsewhere in ((first, other), (other, first)):
        (name, control), *_ = controls(here).items()
        assert optioncontrols.chosen(here, control, 12).options == f"{name}:12"
        assert optioncontrols.chosen(elsewhere, control, 12) == elsewhere
