"""The lab without a browser: turns at the bench, answers as alone, nothing leaks, files in and out, checkpoints."""

from __future__ import annotations

import base64
import hashlib
import sys
import threading
import time
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import xarray as xr

import moescope as ms
from moescope.app import labanswers, labcheckpoint, labform, labrecipe, recipefiles, recipes
from moescope.app.answers import Answers, Pending
from moescope.app.bench import Bench, Choice, Generated, Question, new_folder
from moescope.app.editbar import adding
from moescope.app.jobs import Job, Jobs
from moescope.app.place import Place, parse
from moescope.app.scene import Desk
from moescope.app.server import build
from moescope.app.shelf import Shelf
from moescope.decoding import Written, generate, self_contrast
from moescope.edits import Mask, Merge, Prune, Recipe, Route, Rows, Scale, plan
from moescope.errors import MoescopeError
from tests.analysis.made_stores import random_truth, write

MODEL = "tiny-qwen-moe"
PROMPT = "Once upon a time"
STRONG = "L0E0.1.2.3.4.5!mask,L5E0.1.2.3.4.5*64"
EDITS = "L2E5*64,L3E2.3!mask"
HERE = Place("lab", "made", prompt=PROMPT, new=8, recipe=EDITS)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A shelf with one small store whose model is the bundled one by name, and another store."""
    root = tmp_path_factory.mktemp("shelf")
    for name, model in (("made", MODEL), ("other", "made/up")):
        made = random_truth(np.random.default_rng(0), 6, [16] * 6, [4] * 6)
        write(root / name, made, [16] * 6, {}, name=model)
    return root


@pytest.fixture(scope="module")
def desk(folder):
    jobs = Jobs()
    return Desk(Shelf(folder), jobs, Answers(jobs), models=("./mine",))


@pytest.fixture(scope="module")
def model(desk):
    """The lab's model, for what can be asked of it directly."""
    job = desk.jobs.start("loading", lambda job: desk.bench.load(job, Choice(MODEL)), free=True)
    assert job.wait(120), "loading takes too long"
    assert job.state == "done", job.error
    return desk.bench.held[1]


def _done(job):
    assert job.wait(60)
    assert job.state == "done", job.error
    return job.result


def _words(component) -> str:
    """All text of a component."""
    if component is None:
        return ""
    if isinstance(component, str | int | float):
        return str(component)
    if isinstance(component, list | tuple):
        return " ".join(map(_words, component))
    return _words(getattr(component, "children", None))


def _classes(component) -> list[str]:
    if isinstance(component, list | tuple):
        return [name for one in component for name in _classes(one)]
    own = [getattr(component, "className", None) or ""] if hasattr(component, "to_plotly_json") else []
    return own + (_classes(component.children) if getattr(component, "children", None) is not None else [])


def test_only_named_models_may_be_loaded(desk):
    scene = desk.scene(HERE)
    assert next(iter(labform.choices(scene))) == MODEL
    assert "./mine" in labform.choices(scene)
    assert "olmoe" in labform.choices(scene)
    for name in ("/etc", "../made", "some/hub-id", "made/up"):
        with pytest.raises(MoescopeError, match="moescope app --model"):
            labform.begun(desk, replace(HERE, model=name))
    assert labform.choice(desk.scene(Place("lab", "other"))) == Choice("made/up")


def test_remote_code_runs_only_of_what_the_command_line_names(desk, monkeypatch):
    trusting = replace(desk, trust_remote_code=True)
    assert not any(one.trust_remote_code for one in labform.choices(desk.scene(HERE)).values())
    # A store names its model itself: that name alone trusts nobody.
    trusted = [name for name, one in labform.choices(trusting.scene(HERE)).items() if one.trust_remote_code]
    assert trusted == ["./mine"]
    # Nor may it choose the revision of a model that is trusted: anybody can propose one on the hub.
    record = trusting.scene(HERE).store.manifest.model.model_copy(update={"revision": "refs/pr/7"})
    monkeypatch.setattr(trusting.scene(HERE).store.manifest, "model", record)
    own = [replace(desk, models=(MODEL,), trust_remote_code=trust) for trust in (False, True)]
    assert [labform.choice(one.scene(HERE)) for one in own] == [Choice(MODEL, "refs/pr/7"), Choice(MODEL, None, True)]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"prompt": None}, "Write a prompt"),
        ({"prompt": "x" * 7_500}, "characters"),
        ({"new": 0}, "tokens"),
        ({"new": 10**9}, "tokens"),
        ({"seed": 10**30}, "seed"),
        ({"recipe": "L3E7"}, "is not an edit"),
        ({"contrast": True, "alpha": 7.0}, "α"),
    ],
)
def test_what_cannot_be_asked_is_said_at_once(desk, changes, words):
    with pytest.raises(MoescopeError, match=words):
        labform.question(desk.scene(replace(HERE, **changes)))


def test_a_model_that_cannot_be_had_is_one_sentence(desk, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    bench = Bench()
    job = desk.jobs.start("loading", lambda job: bench.load(job, Choice("made/up")), free=True)
    assert job.wait(60)
    assert job.state == "failed"
    assert "Cannot reach the weights of made/up" in job.error
    assert "\n" not in job.error
    assert bench.loading is None
    assert bench.held is None


def test_turns_come_in_order_and_a_waiting_one_can_be_cancelled():
    bench, jobs = Bench(), Jobs(1)
    go, order = threading.Event(), []

    def work(name, hold):
        def run(job):
            with bench.turn(job):
                order.append(name)
                assert not hold or go.wait(60)

        return run

    def until(happens):
        for _ in range(6_000):
            if happens():
                return
            threading.Event().wait(0.01)
        raise AssertionError("it never came to that")

    def queued(n):
        until(lambda: len(bench._queue) == n)

    first = jobs.start("a", work("a", True), free=True)
    queued(1)
    waiting = []
    for place, name in enumerate("bcd"):
        waiting.append(jobs.start(name, work(name, False), free=True))
        queued(place + 2)
    waiting[1].cancel()
    assert waiting[1].wait(60)
    assert waiting[1].state == "cancelled"
    assert not waiting[0].over
    until(lambda: waiting[2].what == "waiting for its turn: 2 before it")
    go.set()
    for job in (first, waiting[0], waiting[2]):
        _done(job)
    assert order == ["a", "b", "d"]
    assert not bench._queue


def test_plain_and_edited_at_once_say_what_they_say_alone(desk, model):
    recipe = recipes.read(STRONG)
    alone = {
        (edits, seed): generate(
            model,
            PROMPT,
            recipe=recipe if edits else None,
            max_new_tokens=8,
            do_sample=True,
            temperature=0.9,
            seed=seed,
        )[0]
        for edits in (False, True)
        for seed in (0, 1)
    }
    places = [
        HERE.go(recipe=edits, temperature=0.9, seed=seed) for edits in (None, STRONG) for seed in (0, 1) for _ in "ab"
    ]
    runs = [labform.begun(desk, place) for place in places]
    for place in runs:
        said = _done(desk.bench.runs[place.run][1]).written
        assert said["plain"].tokens == alone[False, place.seed].tokens
        if place.recipe:
            assert said["edited"].tokens == alone[True, place.seed].tokens
    assert all(alone[False, seed].tokens != alone[True, seed].tokens for seed in (0, 1))
    assert not model.edits


STRUCTURE = [
    Prune(layer=0, expert=3),
    Merge(layer=2, expert=[1, 4]),
    Merge(layer=3, expert=[5, 6], weights=[1, 0], align=False),
    Route(layer=4, top_k=1),
]


def test_pruned_merged_replaced_and_routed_answers_are_what_the_command_line_writes(desk, model, tmp_path):
    here = HERE.go(recipe=None)
    for layer, expert, kind, number in (("0", 3, "prune", None), ("2", 1, "merge", 4), ("3", 6, "copy", 5)):
        here = adding(here.go(layer=layer, expert=expert), kind, number)
    here = adding(here.go(layer="4", expert=0), "top_k", 1)
    there = labform.begun(desk, here)
    said = _done(desk.bench.runs[there.run][1])
    file = Recipe(STRUCTURE).save(tmp_path / "recipe.yaml")
    (alone,) = generate(model, PROMPT, recipe=Recipe.load(file), max_new_tokens=8)
    assert said.written["edited"].tokens == alone.tokens
    assert said.apart["edited_share"].sel(answer="edited", layer=0, expert=3) == 0
    assert recipefiles.for_file(desk.scene(here)).edits == STRUCTURE
    assert recipefiles.uploaded(desk.scene(here.go(recipe=None)), "r.yaml", _data(file.read_text())) == here.recipe
    shown = " ".join(_words(labrecipe.draw(desk.scene(here))).split())
    for line in ("L0E3 prune", "L2E1, 4 merge", "L3E5, 6 copies of E5", "L4 only the top 1"):
        assert line in shown
    assert not model.edits


def test_replace_by_puts_the_other_expert_in_place_and_takes_it_away_again(model):
    place = adding(HERE.go(recipe=None, layer="3", expert=6), "copy", 5)
    of_layer = {
        name: tensor
        for name, tensor in model.hf.named_parameters()
        if tensor.ndim == 3 and model.sites[3].experts in name
    }
    before = {name: tensor.detach().clone() for name, tensor in of_layer.items()}
    assert before
    with model.edited(recipes.read(place.recipe)):
        for name, tensor in of_layer.items():
            assert tensor[6].equal(before[name][5])
            assert tensor[5].equal(before[name][5])
            assert not before[name][6].equal(before[name][5])
    assert all(tensor.equal(before[name]) for name, tensor in of_layer.items())


@pytest.mark.parametrize(
    ("recipe", "words"),
    [("L3E1.99!merge", "experts 0 to 15"), ("L3!top_k:9", "selects 4 experts"), ("L3E99!prune", "experts 0 to 15")],
)
def test_a_structure_that_the_model_does_not_have_is_refused_with_the_reason(desk, model, recipe, words):
    job = desk.bench.runs[labform.begun(desk, HERE.go(recipe=recipe)).run][1]
    assert job.wait(60)
    assert job.state == "failed"
    assert words in job.error
    assert not model.edits


def test_cancelling_leaves_the_model_as_it_was(desk, model):
    (before,) = generate(model, PROMPT, max_new_tokens=8)
    there = labform.begun(desk, HERE.go(new=40))
    _, job = desk.bench.runs[there.run]
    seen = set()
    while "edited" not in seen:  # cancelled while the edits are live
        assert not job.over, job.error
        seen |= {name for name, text in (job.partial or {}).items() if text}
    job.cancel()
    assert job.wait(60)
    assert job.state == "cancelled"
    assert not model.edits
    assert generate(model, PROMPT, max_new_tokens=8)[0].tokens == before.tokens
    # What was written stays to be read; there is nothing to compare.
    assert job.partial["plain"] in _words(labanswers.draw(desk.scene(there)))
    with pytest.raises(MoescopeError, match="cancelled"):
        labanswers.compared(desk.scene(there))


def test_answers_are_drawn_token_by_token_with_both_probabilities(desk, model):
    there = labform.begun(desk, HERE.go(contrast=True, beta=0.7))
    said = _done(desk.bench.runs[there.run][1])
    scene = desk.scene(there)
    (contrast,) = self_contrast(model, PROMPT, beta=0.7, max_new_tokens=8)
    assert said.written["self-contrast"].tokens == contrast.tokens
    drawn = labanswers.draw(scene)
    for one in said.written.values():
        assert one.text.replace(" ", "") in _words(drawn).replace(" ", "")
    change = said.apart["change"].values
    shades = [name for name in _classes(drawn) if name[:2] in ("up", "do")]
    assert len(shades) == (np.abs(change) >= 0.02).sum() + 2  # and the legend's two
    frame = labanswers.tokens(scene)
    assert len(frame) == sum(len(one.tokens) for one in said.written.values())
    assert labanswers.moved(scene).data[0].z.shape == (6, 16)


def test_without_a_recipe_there_is_one_answer_and_a_word_why(desk, model):
    there = labform.begun(desk, HERE.go(recipe=None))
    said = _done(desk.bench.runs[there.run][1])
    assert list(said.written) == ["plain"]
    assert said.written["plain"].text in _words(labanswers.draw(desk.scene(there)))
    with pytest.raises(MoescopeError, match="no recipe"):
        labanswers.tokens(desk.scene(there))


def test_a_generation_on_its_way_is_pending_and_a_forgotten_one_is_said(desk, model):
    with pytest.raises(MoescopeError, match="Nothing is generated"):
        labanswers.moved(desk.scene(HERE))
    with pytest.raises(MoescopeError, match="no longer in memory"):
        labanswers.draw(desk.scene(HERE.go(run="0" * 12)))
    there = labform.begun(desk, HERE.go(new=300))
    with pytest.raises(Pending):
        labanswers.moved(desk.scene(there))
    desk.bench.runs[there.run][1].cancel()
    bench = Bench()
    for number in range(50):
        job = Jobs().start("x", lambda job: None)
        bench.keep(Question(Choice(MODEL), str(number)), job)
    assert [asked.prompt for asked, _ in bench.runs.values()] == [str(n) for n in range(10, 50)]


def test_a_generated_token_does_not_turn_its_table_around(desk, monkeypatch):
    says = {
        name: (("answer", "place"), [["safe \u202e", "\u200b\n"]]) for name in ("text", "plain_says", "edited_says")
    }
    found = xr.Dataset({**says, "plain": (("answer", "place"), [[0.5, 0.5]])}, {"answer": ["plain"]})
    monkeypatch.setattr(labanswers, "compared", lambda scene: found)
    frame = labanswers.tokens(desk.scene(HERE))
    for name in says:
        assert frame[name].tolist() == ["safe␣⟨U+202E⟩", "⟨U+200B⟩↵"]


@pytest.mark.parametrize(
    ("change", "name"),
    [(0.0, ""), (0.019, ""), (-0.02, "down1"), (0.3, "up3"), (-0.9, "down4"), (0.1, "up2"), (float("nan"), "")],
)
def test_shades(change, name):
    assert labanswers.shade(change) == name


def test_what_would_turn_an_answer_around_is_a_mark_in_it():
    text, job = "safe \u202eesrever\nnext", Job("generating")
    job.what, job.partial = "writing the plain answer", {"plain": text}
    compared = xr.Dataset(
        {name: (("answer", "place"), [["safe \u202e"]]) for name in ("text", "plain_says", "edited_says")}
        | {name: (("answer", "place"), [[0.5]]) for name in ("plain", "edited", "change", "plain_best", "edited_best")},
        coords={"answer": ["plain"]},
    )
    one = Written("", text, [7])
    for shown in (
        labanswers._streamed(job, "plain"),
        labanswers._whole(Generated({"plain": one}), "plain"),
        labanswers._whole(Generated({"plain": one}, compared), "plain"),
    ):
        said = shown[0].to_plotly_json()
        assert "\u202e" not in _words(said["props"]["children"])
        assert "U+202E" in _words(said["props"]["children"])
    assert "\nnext" in _words(labanswers._streamed(job, "plain"))


def test_a_recipe_that_the_model_refuses_is_one_sentence(desk, model):
    there = labform.begun(desk, HERE.go(recipe="L2E99*2"))
    _, job = desk.bench.runs[there.run]
    assert job.wait(60)
    assert job.state == "failed"
    assert "experts 0 to 15" in job.error
    assert not model.edits


@pytest.mark.parametrize("chat", [False, True])
def test_a_prompt_without_room_for_its_answer_is_refused_and_not_run_past_the_models_positions(desk, model, chat):
    template = model.tokenizer.chat_template
    model.tokenizer.chat_template = "{{ messages[0].content }}"
    try:
        room = model.max_positions - len(model.tokenizer(PROMPT, add_special_tokens=not chat)["input_ids"])
        for new, state in ((room + 1, "failed"), (room, "done")):
            if new == room and chat:
                continue  # as the text does, and it takes a while
            job = desk.bench.runs[labform.begun(desk, HERE.go(recipe=None, new=new, chat=chat)).run][1]
            assert job.wait(60)
            assert job.state == state, job.error
            if state == "failed":
                assert f"made for {model.max_positions} positions" in job.error
    finally:
        model.tokenizer.chat_template = template


def test_the_same_model_in_another_precision_is_not_another_model(model):
    narrow = ms.load(MODEL, dtype="bfloat16")
    record = SimpleNamespace(config_hash=narrow.config_hash, dtype="bfloat16", weights_fingerprint=None)
    scene: Any = SimpleNamespace(store=SimpleNamespace(manifest=SimpleNamespace(model=record)))
    assert narrow.config_hash != model.config_hash
    assert "the store's configuration in another precision (bfloat16 there)" in labform._beside(scene, model)
    assert labform._beside(scene, narrow) == "the store's configuration"
    record.config_hash = "ff"
    assert "another model" in labform._beside(scene, model)


def test_words_about_the_model(desk, model):
    assert f"{model.max_positions} positions for prompt and answer" in labform.said(desk.scene(HERE))
    assert f"{MODEL} is in memory: 4.4M parameters, float32 on cpu" in labform.said(desk.scene(HERE))
    assert "another model" in labform.said(desk.scene(HERE))  # the made store has another configuration
    assert "replaces it" in labform.said(desk.scene(HERE.go(model="olmoe")))
    assert _words(labform.draw(desk.scene(HERE)))


def _data(text: str) -> str:
    return "data:application/yaml;base64," + base64.b64encode(text.encode()).decode()


@pytest.mark.parametrize("kind", ["yaml", "json"])
def test_a_saved_recipe_is_what_apply_takes_and_comes_back(folder, desk, model, tmp_path, kind):
    answer = build(folder).server.test_client().get(f"/recipe.{kind}", query_string={"at": HERE.href})
    assert answer.status_code == 200
    assert f'filename="recipe.{kind}"' in answer.headers["Content-Disposition"]
    file = tmp_path / f"recipe.{kind}"
    file.write_bytes(answer.data)
    recipe = Recipe.load(file)
    assert recipe.edits == [Scale(layer=2, expert=5, factor=64.0), Mask(layer=3, expert=[2, 3])]
    assert recipe.save(tmp_path / f"again.{kind}").read_bytes() == answer.data
    assert (
        recipefiles.uploaded(Desk(desk.shelf, desk.jobs, desk.answers).scene(HERE), file.name, _data(file.read_text()))
        == EDITS
    )
    # With the model in memory it carries that model's hash, and its checkpoint can be planned.
    own = recipefiles.for_file(desk.scene(HERE.go(recipe="L2E5*64")))
    assert own.config_hash == model.config_hash
    assert len(plan(own, MODEL)) == 1


def test_no_recipe_no_file(folder):
    client = build(folder).server.test_client()
    assert client.get("/recipe.yaml", query_string={"at": "/store/made/lab"}).status_code == 400
    assert client.get("/recipe.exe", query_string={"at": HERE.href}).status_code == 404
    assert client.get("/recipe.yaml", query_string={"at": "/store/none/lab?recipe=L1E1*2"}).status_code == 400


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("edits: [", "neither YAML nor JSON"),
        ("just words", "expected a mapping"),
        ("edits: []", "edits"),
        ("edits: [{kind: scale, layer: 1, expert: 2}]", "factor"),
        ("edits: [{kind: mask, layer: 1, expert: 2}]\nsurprise: 1", "surprise"),
        ("a: &a [1, 2]\nb: [*a, *a]\nedits: [{kind: mask, layer: 1, expert: 2}]", "refers to parts of itself"),
        ("[" * 20_000, "nests more than"),
        ("edits: [{kind: mask, layer: 1, expert: 2}]\nconfig_hash: 'ff'", "another model"),
        ("edits: [{kind: mask, layer: 1, expert: 2}, {kind: promote, layer: 1, expert: 2}]", "contradict"),
        ("!!python/object/apply:os.system ['true']", "neither YAML nor JSON"),
        ("x" * (140 << 10), "larger than"),
    ],
)
def test_an_upload_that_is_no_recipe_is_one_sentence(desk, text, words):
    with pytest.raises(MoescopeError, match=words) as raised:
        recipefiles.uploaded(desk.scene(HERE), "r.yaml", _data(text))
    assert "\n" not in str(raised.value)


def test_an_upload_that_the_lab_cannot_hold_names_what_can(desk):
    some_rows = Mask(layer=1, expert=2, rows=Rows(phase="decode"))
    with pytest.raises(MoescopeError, match="moescope generate"):
        recipefiles.uploaded(desk.scene(HERE), "r.yaml", _data(Recipe([some_rows]).text()))
    with pytest.raises(MoescopeError, match="no text"):
        recipefiles.uploaded(desk.scene(HERE), "r.yaml", "data:;base64,///\x00")


def test_the_recipe_panel_takes_edits_away_one_by_one(desk):
    drawn = labrecipe.draw(desk.scene(HERE))
    assert "L3E2, 3 mask" in " ".join(_words(drawn).split())
    rows = next(one for one in drawn.children if getattr(one, "className", "") == "edits").children
    away = [parse(row.children[1].href)[0].recipe for row in rows]
    assert away == ["L3E2.3!mask", "L2E5*64"]
    assert "is not an edit" in _words(labrecipe.draw(desk.scene(HERE.go(recipe="<b>x</b>"))))
    assert "No edit yet" in _words(labrecipe.draw(desk.scene(HERE.go(recipe=None))))


@pytest.mark.parametrize("name", ["", "..", "a/b", "/tmp/x", "a\\b", ".hidden", "x" * 65, "a\n", "ä", "made"])
def test_a_checkpoint_goes_into_a_new_folder_of_the_app_alone(desk, folder, name):
    with pytest.raises(MoescopeError):
        labcheckpoint.begun(desk, HERE, name, False)
    assert sorted(path.name for path in folder.iterdir()) == ["made", "other"]


def test_a_single_store_has_no_room_for_checkpoints(folder):
    shelf = Shelf(folder / "made")
    with pytest.raises(MoescopeError, match="single store"):
        new_folder(shelf.root, shelf.alone, "fine")


def test_a_checkpoint_is_written_proven_and_never_overwritten(desk, model, folder):
    from moescope.data import MODEL as source

    def bytes_of(path):
        return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in path.iterdir() if file.is_file()}

    before, here = bytes_of(source), HERE.go(recipe="L2E5*64")
    assert "L2E5 × 64" in labcheckpoint.words(desk, here, "edited")
    done = _done(labcheckpoint.begun(desk, here, "edited", False))
    assert done.path == folder / "edited"
    assert "It holds the edits exactly" in labcheckpoint.report(done)
    assert "--model edited --out edited-store`" in labcheckpoint.onward(done)
    assert bytes_of(source) == before
    assert Recipe.load(folder / "edited" / "recipe.yaml").edits == [Scale(layer=2, expert=5, factor=64.0)]
    written = bytes_of(folder / "edited")
    with pytest.raises(MoescopeError, match="exists already"):
        labcheckpoint.begun(desk, here, "edited", False)
    assert bytes_of(folder / "edited") == written
    # Pruned alike in every layer it is smaller; in one layer alone that is refused.
    done = _done(
        labcheckpoint.begun(desk, HERE.go(recipe=",".join(f"L{n}E{n}!prune" for n in range(6))), "less", False)
    )
    assert "every MoE layer has 1 expert fewer than in the source. It holds the edits exactly" in labcheckpoint.report(
        done
    )
    job = labcheckpoint.begun(desk, HERE.go(recipe="L3E2!prune"), "one-less", False)
    assert job.wait(60)
    assert "Every MoE layer must lose as many experts" in job.error
    # What weights cannot hold is refused with the reason, and nothing is left.
    job = labcheckpoint.begun(desk, HERE.go(recipe="L3E2!promote"), "promoted", False)
    assert job.wait(60)
    assert job.state == "failed"
    assert "Layer 3" in job.error
    assert not (folder / "promoted").exists()
    # What they hold nearly is an option of the command line, and a box here.
    job = labcheckpoint.begun(desk, HERE.go(recipe="L3E2!mask"), "nearly", False)
    assert job.wait(60)
    assert "--approximate" in job.error
    assert _words(labcheckpoint.draw(desk.scene(HERE))).count("The box above is that option here.") == 1


def test_a_checkpoint_in_writing_is_seen_by_whoever_comes_and_is_the_only_one(desk, monkeypatch):
    go, elsewhere = threading.Event(), replace(desk, bench=Bench())

    def writes(self, job, choice, recipe, out, approximate):
        job.report(f"copying into {out.name}", 0, 0)
        assert go.wait(60)
        job.check()

    monkeypatch.setattr(Bench, "write", writes)
    here = HERE.go(recipe="L2E5*64")
    job = labcheckpoint.begun(elsewhere, here, "copied", False)
    try:
        with pytest.raises(MoescopeError, match="writing copied"):
            labcheckpoint.words(elsewhere, here, "another")
        with pytest.raises(MoescopeError, match="writing copied"):
            labcheckpoint.begun(elsewhere, here, "another", False)
        assert "writing copied" in _words(labcheckpoint.draw(elsewhere.scene(HERE)))
        job.cancel()
    finally:
        go.set()
    assert job.wait(60)
    assert "nothing was written" in _words(labcheckpoint.draw(elsewhere.scene(HERE)))
    assert labcheckpoint.words(elsewhere, here, "another")


def test_what_failed_says_no_path_of_the_server(desk, model, folder, monkeypatch):
    from moescope import hooks

    def fails(*asked, **more):
        raise MoescopeError(f"There is no config.json in {folder}/gone.")

    bench = Bench()
    elsewhere = replace(desk, bench=bench)
    with monkeypatch.context() as patched:
        patched.setattr(hooks, "load", fails)
        bench.started = desk.jobs.start("loading", lambda job: bench.load(job, Choice("gone")), free=True)
        assert bench.started.wait(60)
        there = labform.begun(elsewhere, HERE)
        assert bench.runs[there.run][1].wait(60)
    said = "There is no config.json in gone."
    assert labform.said(elsewhere.scene(HERE)) == said
    assert said in _words(labanswers.draw(elsewhere.scene(there)))
    # Once another model was in memory, that is no longer news.
    monkeypatch.setattr(hooks, "load", lambda *asked, **more: model)
    _done(desk.jobs.start("loading", lambda job: bench.load(job, Choice(MODEL)), free=True))
    _done(desk.jobs.start("unloading", bench.unload, free=True))
    assert "No model is in memory" in labform.said(elsewhere.scene(HERE))


def test_a_load_is_seen_while_it_waits_and_while_torch_is_imported(desk, model, monkeypatch):
    bench = Bench()
    elsewhere = replace(desk, bench=bench)
    begun, done, seen = threading.Event(), threading.Event(), []

    def busy(job):
        with bench.turn(job):
            begun.set()
            done.wait(60)

    class Hooks:
        @property
        def load(self):  # where the import of torch would take its time
            seen.append(labform.said(elsewhere.scene(HERE)))
            return lambda *asked, **more: model

    monkeypatch.setitem(sys.modules, "moescope.hooks", Hooks())
    first = desk.jobs.start("generating", busy, free=True)
    assert begun.wait(60)
    bench.started = desk.jobs.start("loading", lambda job: bench.load(job, Choice(MODEL)), free=True)
    while not bench.started.what:
        time.sleep(0.01)
    assert labform.said(elsewhere.scene(HERE)) == "Waiting for its turn: 1 before it. Unload stops it."
    bench.coming.cancel()
    assert bench.started.wait(60)
    assert "No model is in memory" in labform.said(elsewhere.scene(HERE))
    assert not seen
    done.set()
    _done(first)
    _done(desk.jobs.start("loading", lambda job: bench.load(job, Choice(MODEL)), free=True))
    assert seen == [f"Loading {MODEL} (weights are fetched the first time). Unload stops it."]


def test_unloading_forgets_the_model(desk, model):
    _done(desk.jobs.start("unloading", desk.bench.unload, free=True))
    assert desk.bench.held is None
    assert "No model is in memory" in labform.said(desk.scene(HERE))


def test_answers_say_to_what_they_are_answers():
    asked = Question(Choice(MODEL), "Once\nupon", recipe=recipes.read(EDITS))
    assert labanswers._asked(asked) == f"{MODEL} under {EDITS}, going on from “Once upon”."
    assert labanswers._asked(Question(Choice(MODEL), "Hi", chat=True)) == f"{MODEL}, going on from “Hi” (chat)."
