"""Super experts silenced: a planted one stands out by loss, sinks and residual; where there is none, nothing does."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import moescope as ms
from moescope import analysis
from moescope.capturing.batches import batches
from moescope.edits import Recipe, Zero
from moescope.effects import effect, super_expert_effects
from moescope.hooks import Model, wrap
from tests.capturing.texts import model, rows, tokenizer
from tests.zoo import build

TEXTS = rows(12, longest=14)


def corpus() -> ms.Corpus:
    return ms.Corpus(TEXTS, ["kind"])


def planted() -> Model:
    hf = build("qwen2_moe")
    with torch.no_grad():
        hf.model.layers[0].mlp.experts.down_proj[3] *= 60
    return wrap(hf, tokenizer(), name="planted")


def found_in(loaded: Model, folder, depth: int = 1):
    store = ms.capture(loaded, corpus(), folder, ["routing", "outliers"])
    return analysis.super_experts(store, depth=depth)


def test_a_planted_super_expert_makes_what_it_is_said_to(tmp_path) -> None:
    loaded = planted()
    found = found_in(loaded, tmp_path / "s")
    assert found["super"].values.nonzero()[1].tolist() == [3]
    assert found["by_ratio"].values.nonzero()[1].tolist() == [3]
    result = super_expert_effects(loaded, corpus(), found, controls=20)
    assert result.attrs["controls"] == 7  # no more other experts in the layer
    assert result.attrs["edits"] == "layer 0 zero 3"
    # Without it the residual of its layer is that of the model it was not planted in, zeroed alike.
    assert result["massive_after"].values[0] < result["massive_before"].values[0] / 5
    np.testing.assert_allclose(result["massive_control"].values[:, 0], result["massive_before"].values[0], rtol=0.1)
    assert abs(result["decay"].values[1:]).max() > 4 * np.median(abs(result["decay_control"].values[:, 1:]))
    want = effect(loaded, corpus(), Recipe([Zero(layer=0, expert=3)]), controls=0)
    assert result["change"].item() == pytest.approx(want["change"].item(), abs=1e-5)
    assert result["divergence"].item() > 0


def test_sinks_are_those_of_eager_attention(tmp_path) -> None:
    loaded = planted()
    result = super_expert_effects(loaded, corpus(), found_in(loaded, tmp_path / "s"), controls=1)
    eager = build("qwen2_moe")
    eager.set_attn_implementation("eager")
    masses = []
    for silent in (False, True):
        with torch.no_grad():
            eager.model.layers[0].mlp.experts.down_proj[3] *= 0 if silent else 60
        mass, queries, largest = 0, 0, np.zeros(3)
        for batch in batches(corpus(), tokenizer(), max_length=64, batch_tokens=1):
            ids = torch.from_numpy(batch.sequences[0].ids)[None]
            with torch.no_grad():
                out = eager(ids, output_attentions=True, output_hidden_states=True, use_cache=False)
            mass = mass + np.stack([a[0, :, 1:, 0].double().sum(-1).numpy() for a in out.attentions])
            queries += ids.shape[1] - 1
            largest = np.fmax(largest, [float(h.abs().max()) for h in out.hidden_states[1:]])
        masses.append(mass)
        np.testing.assert_allclose(result["sink_after" if silent else "sink_before"], mass.mean(1) / queries, rtol=1e-3)
        # The last hidden state that transformers returns is after the final norm.
        name = "massive_after" if silent else "massive_before"
        np.testing.assert_allclose(result[name].values[:2], largest[:2], rtol=1e-3)
    np.testing.assert_allclose(result["decay"], 1 - (masses[1] / masses[0]).mean(1), atol=2e-3)
    assert result["decay"].values[0] == pytest.approx(0, abs=1e-6)  # attention of layer 0 comes before any expert


def test_where_there_is_none_nothing_stands_out(tmp_path) -> None:
    """The published rule names one of any model; the controls show that it is like the others."""
    found = found_in(model(), tmp_path / "s")
    assert found["super"].sum() >= 1
    assert not found["by_ratio"].any()
    result = super_expert_effects(model(), corpus(), found, by="kind", controls=7)
    assert (abs(result["decay"]) < 0.5).all()
    assert (result["decay_p"].values[1:] > 1 / 8).any()
    assert (result["massive_after"] > 0.6 * result["massive_before"]).all()


def test_mistakes_are_named(tmp_path) -> None:
    found = found_in(model(), tmp_path / "s")
    with pytest.raises(ms.MoescopeError, match="no super expert"):
        super_expert_effects(model(), corpus(), found.assign(super=found["super"] & False))
    with pytest.raises(ms.MoescopeError, match="not of"):
        super_expert_effects(planted(), corpus(), found)
