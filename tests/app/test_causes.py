"""What an expert causes, on its page: measured on the lab's model, or a word of why not."""

from __future__ import annotations

import gc
import json
import shlex
import threading
import weakref

import numpy as np
import pytest
from torch.nn.functional import cross_entropy

from moescope.app import book, causes
from moescope.app.answers import Answers, Pending
from moescope.app.bench import Choice
from moescope.app.jobs import Jobs
from moescope.app.place import Place, parse
from moescope.app.scene import Desk
from moescope.app.shelf import Shelf
from moescope.errors import MoescopeError
from tests.analysis.made_stores import random_truth, write
from tests.app.made_desk import drawn, words
from tests.cli.running import moescope

HERE = Place("expert", "real", layer="5", expert=1, texts=2)


@pytest.fixture(scope="module")
def desk(tmp_path_factory):
    """`real`: six texts through the bundled model; `silent`: its routing made up, without texts; `other`: another's."""
    import moescope as ms
    from moescope.data import CORPUS, MODEL

    if not MODEL.is_dir():
        pytest.skip("the bundled model is not here: nothing can be masked")
    root = tmp_path_factory.mktemp("shelf")
    lines = [json.loads(line) for line in CORPUS.read_text(encoding="utf-8").splitlines()]
    texts = [row for kind in ("python", "german") for row in [line for line in lines if line["domain"] == kind][:3]]
    ms.capture(ms.load("tiny-qwen-moe"), ms.Corpus(texts, ["domain"]), root / "real", ["routing"])
    made = random_truth(np.random.default_rng(0), 6, [16] * 6, [4] * 6)
    write(root / "silent", made, [16] * 6, {}, name="tiny-qwen-moe", texts=[""] * 6)
    write(root / "other", made, [16] * 6, {}, name="made/up", texts=["some words"] * 6)
    jobs = Jobs()
    return Desk(Shelf(root), jobs, Answers(jobs))


@pytest.fixture
def loaded(desk):
    """The desk with the bundled model in the lab."""
    job = desk.jobs.start("loading", lambda job: desk.bench.load(job, Choice("tiny-qwen-moe")), free=True)
    assert job.wait(120)
    assert job.state == "done", job.error
    yield desk
    assert desk.jobs.start("unloading", desk.bench.unload, free=True).wait(60)


def panel(desk, place=HERE):
    return drawn(desk, book.view(causes.NAME), place)


def parts(component, kind):
    """All components of one kind."""
    if isinstance(component, list | tuple):
        return [found for part in component for found in parts(part, kind)]
    own = [component] if type(component).__name__ == kind else []
    return own + (parts(component.children, kind) if getattr(component, "children", None) is not None else [])


def test_without_a_model_it_says_so_and_leads_to_the_lab(desk):
    shown = panel(desk, HERE.go(model="olmoe"))
    assert "none is in memory" in words(shown)
    (link,) = parts(shown, "A")
    there = parse(link.href)[0]
    assert (there.page, there.store, there.model, there.expert) == ("lab", "real", None, 1)
    assert "moescope expert real L5E1 --model tiny-qwen-moe --by domain --documents 2" in words(shown)
    with pytest.raises(MoescopeError, match="load it in the lab"):
        causes.begun(desk.scene(HERE))


def test_without_texts_it_says_so(loaded):
    with pytest.raises(MoescopeError, match="no texts to measure a loss on"):
        panel(loaded, HERE.go(store="silent", layer="5", expert=1))


def test_the_model_of_another_store_is_not_measured(loaded):
    there = HERE.go(store="other", layer="5", expert=1)
    shown = panel(loaded, there)
    assert "another model in memory" in words(shown)
    assert "load made/up in the lab" in words(shown)
    assert not parts(shown, "Button")[1:]  # the line's own, and none to measure
    with pytest.raises(MoescopeError, match="load it in the lab"):
        causes.begun(loaded.scene(there))


def test_measured_it_is_the_loss_with_the_expert_masked(loaded, monkeypatch):
    from moescope.edits import Mask, Recipe

    assert "17 runs of the same texts" in words(panel(loaded))
    job = causes.begun(loaded.scene(HERE))
    assert causes.begun(loaded.scene(HERE)) is job  # whoever presses: it is measured once
    with pytest.raises(Pending):
        book.view(causes.NAME).draw(loaded.scene(HERE))
    shown = panel(loaded)
    result = causes.measured(loaded.scene(HERE))
    model = loaded.bench.held[1]

    def loss(text):
        ids = model.tokenizer(text, return_tensors="pt")["input_ids"]
        logits = model.forward(ids)[0].detach()
        return float(cross_entropy(logits[:-1], ids[0, 1:], reduction="sum")), ids.shape[1] - 1

    documents = loaded.scene(HERE).store.documents(["text", "domain"]).to_pylist()
    for domain in ("python", "german"):
        few = [row["text"] for row in documents if row["domain"] == domain]
        plain = [loss(text) for text in few]
        with model.edited(Recipe([Mask(layer=5, expert=1)])):
            edited = [loss(text) for text in few]
        # Two of the three were drawn: one of the three ways to leave one out is the panel's.
        ways = [
            sum(e[0] - p[0] for p, e, kept in zip(plain, edited, keep, strict=True) if kept)
            / sum(p[1] for p, kept in zip(plain, keep, strict=True) if kept)
            for keep in ((1, 1, 0), (1, 0, 1), (0, 1, 1))
        ]
        assert min(abs(float(result["change"].sel(label=domain)) - way) for way in ways) < 1e-5
    (graph,) = parts(shown, "Graph")
    assert graph.figure.data[0].x.tolist() == result["change"].values.tolist()
    assert "4 documents" in words(shown)
    assert "all 15 others of its layer" in words(shown)
    # The line beside it gives the same numbers outside the app.
    (line,) = parts(shown, "Code")
    monkeypatch.chdir(loaded.shelf.root)
    done = moescope(*shlex.split(line.children)[1:], "--json")
    assert done.returncode == 0, done.stderr
    rows = {row["label"]: row for row in json.loads(done.stdout)["causal_effect"]["rows"]}
    for domain in ("python", "german"):
        assert rows[domain]["change"] == pytest.approx(float(result["change"].sel(label=domain)), abs=1e-6)
    # What is known of the expert tells it too; another expert, and other documents, are not measured yet.
    assert effect_words(loaded) in words(drawn(loaded, book.view("expert-found"), HERE))
    assert causes.measured(loaded.scene(HERE.go(expert=2))) is None
    assert causes.measured(loaded.scene(HERE.go(label="python"))) is None
    assert "where={'domain': ['python']}" in words(causes._ways(loaded.scene(HERE.go(label="python")), "L005", 1))


def effect_words(desk):
    from moescope.analysis.effect_summary import effect_finding

    return effect_finding(causes.measured(desk.scene(HERE))).headline


def test_cancelled_it_can_be_begun_again_and_the_model_is_what_it_was(loaded):
    there = HERE.go(expert=3)
    job = causes.begun(loaded.scene(there))
    job.cancel()
    assert job.wait(60)
    assert job.state == "cancelled"
    assert not loaded.bench.held[1].edits
    assert "Measure" in words(panel(loaded, there))
    assert causes.begun(loaded.scene(there)) is not job


def _queued(bench, n):
    """Waits until so many wait for the model, or have it."""
    while len(bench._queue) < n:
        threading.Event().wait(0.01)


def test_a_model_that_is_unloaded_before_its_turn_is_said(loaded):
    hold, bench = threading.Event(), loaded.bench

    def holds(job):
        with bench.turn(job):
            assert hold.wait(60)

    loaded.jobs.start("holding", holds, free=True)
    _queued(bench, 1)
    loaded.jobs.start("unloading", bench.unload, free=True)
    _queued(bench, 2)
    waits = causes.begun(loaded.scene(HERE.go(expert=4)))
    _queued(bench, 3)
    hold.set()
    assert waits.wait(60)
    assert waits.state == "failed"
    assert "unloaded while this waited" in waits.error


def test_a_measurement_that_waits_does_not_keep_an_unloaded_model_in_memory(loaded):
    hold, bench = threading.Event(), loaded.bench

    def holds(job):
        with bench.turn(job):
            assert hold.wait(60)

    loaded.jobs.start("holding", holds, free=True)
    _queued(bench, 1)
    waits = causes.begun(loaded.scene(HERE.go(expert=8)))
    _queued(bench, 2)
    chosen, model = bench.held
    forgotten = weakref.ref(model)
    del model
    bench.held = None
    gc.collect()
    assert forgotten() is None
    # The same weights in memory again are the model that was asked about.
    assert loaded.jobs.start("loading", lambda job: bench._ready(job, chosen), free=True).wait(60)
    hold.set()
    assert waits.wait(60)
    assert waits.state == "done", waits.error


def test_a_model_that_goes_while_a_panel_is_drawn_is_not_asked_for_again(loaded, monkeypatch):
    from moescope.effects import causing

    bench, held = loaded.bench, loaded.bench.held
    monkeypatch.setattr(causing, "require_model", lambda *asked: setattr(bench, "held", None))
    try:
        assert causes.model_of(loaded.scene(HERE)) == (held[1], [])
    finally:
        bench.held = held


def test_a_failure_is_said_beside_the_button(loaded, monkeypatch):
    import moescope.effects

    def refuses(*args, **more):
        raise MoescopeError(f"This family's experts cannot be masked ({loaded.shelf.root}/model).")

    monkeypatch.setattr(moescope.effects, "causal_effect", refuses, raising=False)
    there = HERE.go(expert=9)
    assert causes.begun(loaded.scene(there)).wait(60)
    shown = words(panel(loaded, there))
    assert "cannot be masked (model)" in shown
    assert "Measure" in shown
