"""A redundant pair planted in a model and captured is found by every way to compare experts; none where none is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import moescope as ms
from moescope.analysis.alignment import output_similarity
from moescope.analysis.matching import neuron_matching
from moescope.analysis.pairwise import redundant_pairs
from moescope.analysis.router_columns import logit_similarity
from moescope.analysis.similarities import gate_similarity, weight_similarity
from moescope.hooks import wrap
from moescope.hooks.weights import expert_weights
from tests.capturing.texts import rows, tokenizer
from tests.zoo import build

PLANTED = (1, 2, 5)  # layer, expert, and its copy


def twins(*, shuffled: bool) -> ms.hooks.Model:
    """A zoo model in which one expert of its first MoE layer is nearly another, called nearly alike."""
    hf: Any = build("qwen2_moe")
    block = hf.model.layers[PLANTED[0]].mlp
    first, second = PLANTED[1:]
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        gate_up, down = block.experts.gate_up_proj, block.experts.down_proj
        neurons = down.shape[-1]
        order = torch.randperm(neurons, generator=draw) if shuffled else torch.arange(neurons)
        gate_up[second] = gate_up[first][torch.cat([order, order + neurons])]
        down[second] = down[first][:, order]
        router = block.gate.weight
        noise = torch.randn(router.shape[1], generator=draw) * router[first].std()
        router[second] = router[first] + 0.02 * noise
    return wrap(hf, tokenizer(), name="twins")


def named(result: Any) -> list[tuple[int, int, int]]:
    pairs = redundant_pairs(result)
    columns = (pairs[name].values.tolist() for name in ("pair_layer", "pair_expert", "pair_other"))
    return list(zip(*columns, strict=True))


def layers(model: ms.hooks.Model) -> dict[int, Any]:
    return {site.layer: expert_weights(model, site.key) for site in model.sites}


def test_a_copy_with_its_neurons_in_another_order_is_found_in_the_weights() -> None:
    held = layers(twins(shuffled=True))
    assert PLANTED[0] in held
    assert len(held) > 1
    assert named(neuron_matching(held)) == [PLANTED]
    assert named(gate_similarity(held)) == [PLANTED]
    assert named(weight_similarity(held)) == []  # which compares neurons by number
    assert named(weight_similarity(layers(twins(shuffled=False)))) == [PLANTED]


def test_the_same_pair_is_found_in_what_was_captured(tmp_path: Path) -> None:
    store = ms.capture(
        twins(shuffled=True),
        ms.Corpus(rows(150), labels=["kind"]),
        tmp_path / "s",
        tiers=["routing", "logits"],
        activations=ms.Activations(["outputs"], sample=1.0),
    )
    # Random experts and router rows read the same hidden states, so that others are related too, but none is a copy.
    outputs = output_similarity(store, min_tokens=20)
    assert named(outputs)[0] == PLANTED
    close = np.sort(outputs["pair_similarity"].values)[::-1]
    assert close[0] > 0.999 > 0.95 > close[1]
    logits = logit_similarity(store)
    assert named(logits)[0] == PLANTED
    correlation = logits["correlation"].where(logits["expert"] < logits["other"])
    assert correlation.sel(layer=PLANTED[0], expert=PLANTED[1], other=PLANTED[2]).item() == float(correlation.max())
    close = np.sort(correlation.values[~np.isnan(correlation.values)])[::-1]
    assert close[0] > 0.99 > 0.9 > close[1]


def experts(rng: np.random.Generator, n: int) -> dict[str, np.ndarray]:
    return {name: rng.normal(size=(n, 8, 5)).astype(np.float32) for name in ("up", "down")}


@pytest.mark.parametrize(
    "find",
    [
        lambda rng, seed: gate_similarity({n: rng.normal(size=(n, 12)) for n in (4, 5, 6, 7)}, draws=19, seed=seed),
        lambda rng, seed: gate_similarity(
            {n: rng.normal(size=(n, 12)) for n in (4, 5, 6, 7)}, null="shuffle", draws=19, seed=seed
        ),
        lambda rng, seed: weight_similarity({n: experts(rng, n) for n in (4, 5, 6, 7)}, draws=19, seed=seed),
    ],
    ids=["gate rows", "gate rows, shuffled", "matrices"],
)
def test_nothing_is_found_in_nothing_more_often_than_it_should(find: Any) -> None:
    """19 draws hold the chance of any redundant pair, in any of the layers, at 1 in 20: 10 of 200 models expected."""
    wrong = sum(bool(find(np.random.default_rng(1000 + seed), seed)["redundant"].any()) for seed in range(200))
    assert wrong <= 20  # binomial(200, 0.05) is above 20 once in a thousand


def test_one_threshold_serves_layers_of_different_spread() -> None:
    """A wide null in one layer must not hide a pair of another, nor a narrow one make pairs of it redundant."""
    rng = np.random.default_rng(3)
    held = {0: experts(rng, 6), 1: {name: 1 + 0.01 * part for name, part in experts(rng, 6).items()}}
    for values in held[1].values():
        values[4] = values[2]
    result = weight_similarity(held)
    assert named(result) == [(1, 2, 4)]
    assert (result["null_extreme"] > result["null_mean"]).all()
    assert float(result["null_extreme"].sel(layer=1)) > 0.99 > float(result["null_extreme"].sel(layer=0))
    assert float(result["p_max"].sel(layer=1, expert=2, other=4)) == pytest.approx(1 / 20)
