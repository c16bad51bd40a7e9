"""Merged experts: the mean of aligned neurons, live and written alike, as copies or in a smaller checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import xarray as xr

import moescope as ms
from moescope.analysis.grouping import expert_groups_from_usage
from moescope.edits import Mask, Merge, Prune, Recipe, Scale, write
from moescope.hooks import Model, load
from moescope.hooks.weights import expert_weights
from tests.edits.test_checkpoint import digest, logits, saved
from tests.zoo import build

COPIES = [  # split by expert, fused, transposed, interleaved, rows of one matrix, with biases, in groups, apart
    "qwen2_moe", "qwen3_moe", "olmoe", "mixtral", "deepseek_v2", "deepseek_v3", "gpt_oss", "granitemoe", "dbrx",
    "jetmoe", "llama4", "qwen3_vl_moe", "ernie4_5_moe", "jamba", "hunyuan_v1_moe", "minimax", "lfm2_moe", "glm4_moe",
    "nemotron_h", "longcat_flash", "kimi_linear", "dots1",
]  # fmt: skip
SMALLER = [
    "qwen2_moe", "qwen3_moe", "olmoe", "mixtral", "gpt_oss", "granitemoe", "granitemoeshared", "ernie4_5_moe", "jamba",
    "hunyuan_v1_moe", "flex_olmo", "minimax", "lara_mini", "qwen3_next", "lfm2_moe", "minimax_m2", "afmoe", "hy_v3",
    "laguna", "llama4", "qwen3_vl_moe",
]  # fmt: skip


def recipe_for(model: Model, keep: Any) -> Recipe:
    """Other experts in each layer, as many in all."""
    edits = []
    for n, site in enumerate(model.sites):
        if keep == "all" and n:
            break
        edits.append(Merge(layer=site.key, expert=(2, n % 2, 4), weights=(5, 3, 0.5), keep=keep))
        edits.append(Merge(layer=site.key, expert=(3, 5), keep=keep))
    return Recipe(edits)


@pytest.mark.parametrize("name", COPIES)
def test_copies_written_equal_live(name: str, tmp_path: Path) -> None:
    source = saved(name, tmp_path / "source")
    before = digest(source)
    recipe = recipe_for(load(str(source)), "all")
    done = write(recipe, source, tmp_path / "out", verify=False)
    got = logits(done.path)
    torch.testing.assert_close(got, logits(source, recipe), atol=1e-5, rtol=1e-5)
    assert float((got - logits(source)).abs().max()) > 1e-4
    assert digest(source) == before


@pytest.mark.parametrize("name", SMALLER)
def test_smaller_written_equals_live(name: str, tmp_path: Path) -> None:
    source = saved(name, tmp_path / "source")
    recipe = recipe_for(load(str(source)), "first")
    done = write(recipe, source, tmp_path / "out", verify=False)
    torch.testing.assert_close(logits(done.path), logits(source, recipe), atol=1e-5, rtol=1e-4)
    smaller = load(str(done.path))
    assert [site.n_experts for site in smaller.sites] == [5] * len(smaller.sites)
    assert not (done.path / ".merged").exists()
    only = [Prune(layer=edit.layer, expert=edit.gone) for edit in recipe.edits if isinstance(edit, Merge)]
    pruned = write(Recipe(only), source, tmp_path / "pruned", verify=False)
    assert float((logits(done.path) - logits(pruned.path)).abs().max()) > 1e-5  # not merely pruned


@pytest.mark.parametrize("name", ["qwen2_moe", "gpt_oss", "dbrx", "minimax", "nemotron_h", "old_mixtral"])
def test_a_copy_with_its_neurons_in_another_order_merges_into_the_same(name: str) -> None:
    """Neurons carry their biases with them; however a family stores them, aligning undoes any order of them."""
    from moescope.edits.merging import _permuted, merged_tensors
    from moescope.hooks.parts import expert_parts, parameter_of, replace_parts
    from moescope.hooks.weights import expert_layout

    model = ms.wrap(build(name), None)
    site = model.sites[-1]
    layout = expert_layout(model, site.key)
    neurons = layout.down(1)[0].shape[1]
    order = torch.as_tensor(np.random.default_rng(0).permutation(neurons))
    first, second = (expert_parts(model.hf, site, expert) for expert in (1, 4))

    def read() -> list[torch.Tensor]:
        return [part.of(parameter_of(model.hf, part.path)).detach().clone() for part in first]

    own, shuffled = read(), _permuted(layout, 1, order, read)
    assert all(torch.equal(a, b) for a, b in zip(own, read(), strict=True))  # put back to the bit
    assert not torch.equal(own[0], shuffled[0])
    replace_parts(model.hf, {str(part): tensor for part, tensor in zip(second, shuffled, strict=True)})
    aligned = merged_tensors(model, site, [Merge(layer=site.key, expert=(1, 4), weights=(0.3, 0.7))])
    for part, tensor in zip([*first, *second], [*own, *own], strict=True):
        torch.testing.assert_close(aligned[str(part)], tensor)
    plain = merged_tensors(model, site, [Merge(layer=site.key, expert=(1, 4), weights=(0.3, 0.7), align=False)])
    for part, a, b in zip(first, own, shuffled, strict=True):
        torch.testing.assert_close(plain[str(part)], 0.3 * a + 0.7 * b)


def test_the_mean_is_by_usage_and_the_model_comes_back_to_the_bit() -> None:
    model = ms.wrap(build("qwen3_moe"), None)
    before = {key: tensor.clone() for key, tensor in model.hf.state_dict().items()}
    plain = expert_weights(model, 2)
    with model.edited(Recipe([Merge(layer=2, expert=(6, 1, 3), weights=(3, 1, 0), align=False)])):
        merged = expert_weights(model, 2)
        assert len(model.edits) == 1
        assert model.edits[0].startswith("L002: replace experts 6, 1, 3, tensors ")
    for expert in (6, 1, 3):
        np.testing.assert_allclose(merged.up[expert], 0.75 * plain.up[6] + 0.25 * plain.up[1], atol=1e-6)
        np.testing.assert_allclose(merged.down[expert], 0.75 * plain.down[6] + 0.25 * plain.down[1], atol=1e-6)
    np.testing.assert_array_equal(merged.up[0], plain.up[0])
    assert all(torch.equal(before[key], tensor) for key, tensor in model.hf.state_dict().items())


def test_groups_become_a_recipe_and_the_proof_is_kept_in_half_precision(tmp_path: Path) -> None:
    hf: Any = build("qwen3_moe", torch.bfloat16)
    hf.config.architectures = [type(hf).__name__]
    hf.save_pretrained(tmp_path / "source")
    from tests.capturing.texts import tokenizer

    tokenizer().save_pretrained(tmp_path / "source")
    rng = np.random.default_rng(0)
    layers = [site.layer for site in load(str(tmp_path / "source")).sites]
    usage = [rng.integers(1, 90, 8).astype(float) for _ in layers]
    alike = [rng.random((8, 8)) for _ in layers]
    result = expert_groups_from_usage(usage, alike, layers=layers, keep=5, scope="layer")
    recipe = Recipe.from_groups(result, keep="first")
    assert Recipe.load(recipe.save(tmp_path / "recipe.yaml")) == recipe
    for edit in recipe.edits:
        assert isinstance(edit, Merge)
        part = result.sel(layer=edit.layer, expert=list(edit.expert))
        assert (part["group"] == edit.expert[0]).all()
        np.testing.assert_allclose(edit.weights, part["share"])
    done = write(recipe, tmp_path / "source", tmp_path / "out")
    assert done.proof is not None
    assert 0 < done.proof.largest < 0.1 * done.proof.changed
    assert [site.n_experts for site in load(str(done.path)).sites] == [5] * len(layers)


def test_what_cannot_be_merged_is_refused(tmp_path: Path) -> None:
    source = saved("qwen3_moe", tmp_path / "source")
    first, second = (site.key for site in load(str(source)).sites)
    for edits, words in [
        ([Merge(layer=first, expert=(1, 2)), Merge(layer=first, expert=(2, 3))], "in two groups"),
        ([Merge(layer=first, expert=(1, 2)), Mask(layer=first, expert=2)], "contradict"),
        ([Merge(layer=first, expert=(1, 99))], "no expert 99"),
        ([Merge(layer=77, expert=(1, 2))], "no single MoE layer 77"),
        ([Merge(layer=first, expert=(1, 2), keep="first")], 'as many experts; a configuration.*keep="all"'),
        (
            [Merge(layer=key, expert=(1, 2), keep="first") for key in (first, second)]
            + [Scale(layer=first, expert=5, factor=2)],
            "on its own",
        ),
    ]:
        with pytest.raises(ms.MoescopeError, match=words):
            write(Recipe(edits), source, tmp_path / "out")
    assert [file.name for file in tmp_path.iterdir()] == ["source"]
    for fields, words in [
        ({"expert": (1,)}, "at least 2"),
        ({"expert": (1, 1)}, "twice in one group"),
        ({"expert": (1, 2), "weights": (1,)}, "one weight for each"),
        ({"expert": (1, 2), "weights": (0, 0)}, "not all of them 0"),
    ]:
        with pytest.raises(ms.MoescopeError, match=words):
            Recipe([{"kind": "merge", "layer": 2, **fields}])
    with pytest.raises(ms.MoescopeError, match="needs groups"):
        Recipe.from_groups(xr.Dataset())
