"""Watched text is the text that is not watched; probabilities and routing are those of plain forward passes."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from moescope import figures
from moescope.decoding import SelfContrast, answers_apart, generate, pieces, self_contrast, watched
from moescope.decoding.apart import _moved
from moescope.edits import Mask, Recipe, Route, Rows, Scale
from moescope.errors import MoescopeError
from moescope.hooks import Model, load
from moescope.hooks.taps import Tap, Want

PROMPT = "Once upon a time"
RECIPE = Recipe([Scale(layer=2, expert=5, factor=16.0), Mask(layer=3, expert=[1, 2, 3])])


@pytest.fixture(scope="module")
def bundled() -> Model:
    return load("tiny-qwen-moe")


@pytest.mark.parametrize("recipe", [None, RECIPE], ids=["plain", "edited"])
@pytest.mark.parametrize("temperature", [None, 0.8], ids=["greedy", "sampled"])
def test_watching_changes_nothing_and_tells_of_every_token(bundled, recipe, temperature):
    seen: list[list[int]] = []
    one = watched(bundled, PROMPT, seen.append, recipe=recipe, max_new_tokens=12, temperature=temperature, seed=3)
    (want,) = generate(
        bundled, PROMPT, recipe=recipe, max_new_tokens=12, do_sample=temperature is not None,
        temperature=temperature or 1.0, seed=3,
    )  # fmt: skip
    assert (one.text, one.tokens) == (want.text, want.tokens)
    assert seen == [one.tokens[:n] for n in range(1, len(one.tokens) + 1)]


def test_self_contrast_is_watched_too(bundled):
    seen: list[list[int]] = []
    one = watched(bundled, PROMPT, seen.append, contrast=SelfContrast(bundled, beta=0.7, steps=True), max_new_tokens=8)
    (want,) = self_contrast(bundled, PROMPT, beta=0.7, max_new_tokens=8)
    assert (one.tokens, one.steps) == (want.tokens, want.steps)
    assert seen[-1] == one.tokens


def test_the_end_of_a_text_is_not_told_as_a_token(bundled, monkeypatch):
    (plain,) = generate(bundled, PROMPT, max_new_tokens=8)
    monkeypatch.setattr(bundled.hf.generation_config, "eos_token_id", plain.tokens[4])
    seen: list[list[int]] = []
    one = watched(bundled, PROMPT, seen.append, max_new_tokens=8)
    before = plain.tokens[: plain.tokens.index(plain.tokens[4])]
    assert one.tokens == seen[-1] == before


def test_what_the_watcher_raises_ends_it_and_leaves_no_edit(bundled):
    (plain,) = generate(bundled, PROMPT, max_new_tokens=8)

    def stop(ids):
        if len(ids) == 3:
            raise MoescopeError("enough")

    with pytest.raises(MoescopeError, match="enough"):
        watched(bundled, PROMPT, stop, recipe=RECIPE, max_new_tokens=8)
    assert not bundled.edits
    assert generate(bundled, PROMPT, max_new_tokens=8)[0].tokens == plain.tokens


def test_a_chat_template_is_asked_for_by_name(bundled):
    with pytest.raises(MoescopeError, match="has no chat template"):
        watched(bundled, PROMPT, lambda ids: None, chat=True)
    with pytest.raises(MoescopeError, match="prompt is empty"):
        watched(bundled, "", lambda ids: None)


def test_a_chat_template_writes_its_own_special_tokens(bundled, monkeypatch):
    monkeypatch.setattr(bundled.tokenizer, "chat_template", "Q: {{ messages[0]['content'] }}\nA:")
    one = watched(bundled, "What is 8 + 3?", lambda ids: None, chat=True, max_new_tokens=8)
    ids = bundled.tokenizer("Q: What is 8 + 3?\nA:", return_tensors="pt", add_special_tokens=False)["input_ids"]
    with torch.no_grad():
        whole = bundled.hf.generate(ids, max_new_tokens=8, do_sample=False)[0, ids.shape[1] :].tolist()
    assert one.tokens == whole[: len(one.tokens)]
    assert one.prompt == "What is 8 + 3?"


@given(st.text(st.characters(exclude_categories=["Cs", "Cc"]), min_size=1, max_size=30))
def test_pieces_make_the_text(text):
    tokenizer = load_tokenizer()
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    found = pieces(tokenizer, ids)
    assert len(found) == len(ids)
    assert "".join(found) == tokenizer.decode(ids, clean_up_tokenization_spaces=False)


def load_tokenizer(held=[]):  # noqa: B006
    if not held:
        held.append(load("tiny-qwen-moe").tokenizer)
    return held[0]


def test_probabilities_and_selections_are_those_of_forward_passes(bundled):
    answers = {"plain": generate(bundled, PROMPT, max_new_tokens=10)[0]}
    answers["edited"] = generate(bundled, PROMPT, recipe=RECIPE, max_new_tokens=6)[0]
    found = answers_apart(bundled, PROMPT, answers, RECIPE)
    start = bundled.tokenizer(PROMPT)["input_ids"]
    for name, one in answers.items():
        ids = torch.tensor([start + one.tokens])
        part = found.sel(answer=name)
        for edits, column in ((None, "plain"), (RECIPE, "edited")):
            # One position at a time, each from the text before it alone.
            for place, token in enumerate(one.tokens):
                with torch.no_grad():
                    if edits is None:
                        said = bundled.forward(ids[:, : len(start) + place])[0, -1]
                    else:
                        with bundled.edited(edits, check=False):
                            said = bundled.forward(ids[:, : len(start) + place])[0, -1]
                p = said.float().softmax(-1)
                assert part[column].values[place] == pytest.approx(float(p[token]), abs=1e-5)
                assert part[f"{column}_best"].values[place] == pytest.approx(float(p.max()), abs=1e-5)
        assert np.isnan(part["change"].values[len(one.tokens) :]).all()
        assert "".join(part["text"].values) == one.text
    # What is masked is selected no more; before the first edited layer nothing moves.
    assert float(found["edited_share"].sel(layer=3, expert=[1, 2, 3]).max()) == 0
    assert float(found["changed"].sel(layer=[0, 1, 2]).max()) == 0
    assert float(found["changed"].sel(layer=3).min()) > 0
    np.testing.assert_allclose(found["plain_share"].sum("expert"), 1)
    figure = figures.draw(found)
    np.testing.assert_array_equal(figure.data[0].z, found["share_change"].values[0])
    np.testing.assert_array_equal(figure.data[1].x, found["changed"].values[0])
    assert [trace.visible for trace in figure.data] == [True] * 3 + [False] * 3


def test_selections_that_an_edit_gives_no_weight_do_not_count(bundled):
    recipe = Recipe([Route(layer=4, top_k=1)])
    written = generate(bundled, PROMPT, max_new_tokens=8)
    found = answers_apart(bundled, PROMPT, {"plain": written[0]}, recipe).isel(answer=0).sel(layer=4)
    ids = torch.tensor([bundled.tokenizer(PROMPT)["input_ids"] + written[0].tokens])
    with torch.no_grad():
        logits = bundled.hf(ids, output_router_logits=True).router_logits[4]
    first = torch.bincount(logits.argmax(-1), minlength=16) / ids.numel()  # nothing before layer 4 is edited
    np.testing.assert_allclose(found["edited_share"], first, atol=1e-12)
    assert float(found["changed"]) == pytest.approx(1 - 1 / 4)


def test_shares_moved_by_hand(bundled):
    ids = torch.tensor([bundled.tokenizer(PROMPT)["input_ids"]])
    rng = np.random.default_rng(0)
    plain, edited = (np.zeros((9, 7), bool) for _ in range(2))
    for chosen in (plain, edited):
        for row in chosen:
            row[rng.choice(7, 3, replace=False)] = True
    changed, control, before, after = _moved(plain, edited)
    gone = [len(set(np.flatnonzero(a)) - set(np.flatnonzero(b))) for a, b in zip(plain, edited, strict=True)]
    assert changed == pytest.approx(sum(gone) / 27)
    pairs = [
        len(set(np.flatnonzero(a)) - set(np.flatnonzero(b))) / 3
        for i, a in enumerate(plain)
        for j, b in enumerate(edited)
        if i != j
    ]
    assert control == pytest.approx(np.mean(pairs))
    np.testing.assert_allclose(before, plain.sum(0) / 27)
    np.testing.assert_allclose(after, edited.sum(0) / 27)
    with torch.no_grad(), Tap(bundled.hf, bundled.sites, bundled.semantics, Want()) as tap:
        tap.begin(ids.numel())
        bundled.forward(ids)
        reading = tap.take().sites[bundled.sites[0].key]
    assert reading.expert.shape == (ids.numel(), bundled.semantics[bundled.sites[0].key].top_k)


def test_an_edit_of_one_phase_is_not_compared_wrongly(bundled):
    answers = {"plain": generate(bundled, PROMPT, max_new_tokens=2)[0]}
    recipe = Recipe([Mask(layer=3, expert=1, rows=Rows(phase="decode"))])
    with pytest.raises(MoescopeError, match="cannot be compared"):
        answers_apart(bundled, PROMPT, answers, recipe)
