"""A specialist planted in a model's own router is what the analyses of a capture find, with its marker and recipe."""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import torch

import moescope as ms
from moescope import analysis
from moescope.edits import Recipe
from moescope.hooks import wrap
from tests.capturing.texts import model, rows, tokenizer

LAYER, EXPERT, WORD = 1, 3, " moon"


def planted() -> ms.Model:
    """A copy of the model whose router of one layer answers to one token with one expert."""
    hf = copy.deepcopy(model().hf)
    gate = hf.model.layers[LAYER].mlp.gate
    seen: list[torch.Tensor] = []
    handle = gate.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].reshape(-1, inputs[0].shape[-1])))
    token = []
    for row in rows(60):
        ids = tokenizer()(row["text"], return_tensors="pt")["input_ids"]
        with torch.no_grad():
            hf(ids)
        token.append(ids[0])
    handle.remove()
    inputs, is_word = torch.cat(seen).double(), torch.cat(token) == tokenizer().convert_tokens_to_ids("Ġmoon")
    design = torch.cat([inputs, torch.ones(len(inputs), 1).double()], dim=1)
    # The direction that tells the word's router inputs from all others best, long enough to win where it is met.
    direction = torch.linalg.lstsq(design, is_word.double()[:, None]).solution[:-1, 0]
    apart = (inputs[is_word] @ direction).mean() - (inputs[~is_word] @ direction).mean()
    with torch.no_grad():
        gate.weight[EXPERT] += (12 / apart * direction).to(gate.weight.dtype)
    return wrap(hf, tokenizer(), name="planted")


def test_the_planted_specialist_is_found_and_no_other_is_new(tmp_path: Path) -> None:
    corpus = ms.Corpus(rows(60), ["kind"])
    before = ms.capture(model(), corpus, tmp_path / "before", tiers=["routing"])
    after = ms.capture(planted(), corpus, tmp_path / "after", tiers=["routing"])
    found = {name: analysis.npmi_tokens(store, [WORD]) for name, store in (("before", before), ("after", after))}
    here = {"layer": LAYER, "expert": EXPERT, "label": "␣moon"}
    cell = found["after"].sel(here)
    assert cell["p_active"] > 0.95
    assert cell["q"] < 1e-3
    assert cell["npmi"] > found["before"].sel(here)["npmi"] + 0.1
    row = found["after"]["npmi"].sel(layer=LAYER, label="␣moon").values
    assert int(np.argmax(row)) == EXPERT
    # The layers before it did not change, and so does nothing that is said of them.
    earlier = [layer for layer in before.layers if layer < LAYER]
    for name in ("npmi", "p"):
        np.testing.assert_array_equal(*(found[run][name].sel(layer=earlier) for run in ("before", "after")))
    marked = analysis.npmi_markers(after, [WORD], layers=[LAYER], permutations=2000, resamples=0)
    assert [edit.expert for edit in Recipe.from_cognitive_experts(marked, top=1).edits] == [(EXPERT,)]
    assert marked["q"].sel(here | {"label": WORD}) <= 0.05
