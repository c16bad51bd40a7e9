"""Replaced tensors: live and written alike to the bit, nothing else touched, and only with the file that was meant."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import moescope as ms
from moescope.edits import Recipe, Scale, write
from moescope.edits.replacing import replacement
from moescope.hooks import Model, load
from moescope.hooks.parts import Part, expert_parts, parameter_of, router_parts
from tests.capturing.texts import model as small_model
from tests.edits.test_checkpoint import EXPERT, digest, logits, saved
from tests.zoo import build

FAMILIES = [  # split by expert, fused, transposed, in rows of one matrix, beside shared experts, apart
    "qwen2_moe", "mixtral", "deepseek_v3", "gpt_oss", "granitemoe", "dbrx", "jetmoe", "llama4", "qwen3_vl_moe",
    "minimax", "nemotron_h",
]  # fmt: skip


def scrambled(model: Model, key: str, expert: int = EXPERT, file: str = "new.safetensors") -> Recipe:
    """A recipe with random tensors for one expert and its router."""
    site = next(site for site in model.sites if site.key == key)
    draw = torch.Generator().manual_seed(0)
    new = {}
    for part in [*expert_parts(model.hf, site, expert), *router_parts(model.hf, site)]:
        old = part.of(parameter_of(model.hf, part.path)).detach()
        new[str(part)] = (old + 0.1 * torch.randn(old.shape, generator=draw)).to(old.dtype)
    edit, tensors = replacement(key, (expert,), new, file)
    return Recipe([edit]).holding({file: tensors})


@pytest.mark.parametrize("name", FAMILIES)
def test_written_equals_live(name: str, tmp_path: Path) -> None:
    source = saved(name, tmp_path / "source")
    before = digest(source)
    model = load(str(source))
    key = [site for site in model.sites if not site.key.endswith("attention")][-1].key
    scrambled(model, key).save(tmp_path / "recipe.yaml")
    recipe = Recipe.load(tmp_path / "recipe.yaml")
    done = write(recipe, source, tmp_path / "out", verify=False)
    assert torch.equal(logits(done.path), logits(source, recipe))
    assert not torch.equal(logits(done.path), logits(source))
    assert digest(source) == before
    assert sorted(file.name for file in done.path.glob("*.safetensors")) == ["model.safetensors"]


def test_other_tensors_are_another_edit() -> None:
    made = ms.wrap(build("qwen2_moe"), None)
    one, said = scrambled(made, made.sites[-1].key), []
    (tensors,) = one._held.values()
    other = {name: tensor.clone() for name, tensor in tensors.items()}
    next(iter(other.values()))[0] += 1
    for held in (tensors, other, tensors):
        with made.edited(one.holding({one.edits[0].file: held})):
            said.append(list(made.edits))
    assert said[0] == said[2] != said[1]


def test_an_edit_before_a_replacement_is_not_written_over(tmp_path: Path) -> None:
    source = saved("qwen2_moe", tmp_path / "source")
    model = load(str(source))
    plain = scrambled(model, model.sites[-1].key)
    scale = [
        Scale(layer=model.sites[-1].key, expert=EXPERT, factor=3.0),
        Scale(layer=model.sites[-1].key, expert=EXPERT, factor=2.0, stage="logit"),
    ]
    recipe = Recipe([*scale, *plain.edits]).holding(plain._held)
    done = write(recipe, source, tmp_path / "out", verify=False)
    torch.testing.assert_close(logits(done.path), logits(source, recipe), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["qwen2_moe", "mixtral", "dbrx", "gpt_oss", "old_mixtral"])
def test_only_the_parts_change_and_come_back_to_the_bit(name: str) -> None:
    hf = build(name)
    model = ms.wrap(hf, None)
    before = {key: tensor.clone() for key, tensor in hf.state_dict().items()}
    recipe = scrambled(model, model.sites[-1].key)
    print_of = model.weights_fingerprint
    with model.edited(recipe):
        changed = {key for key, tensor in hf.state_dict().items() if not torch.equal(tensor, before[key])}
        (tensors,) = recipe._held.values()
        assert changed == {Part.parse(part).path for part in tensors}
        for text, new in tensors.items():
            part = Part.parse(text)
            rest = parameter_of(hf, part.path).detach().clone()
            assert torch.equal(part.of(rest), new)
            part.of(rest).copy_(part.of(before[part.path]))
            assert torch.equal(rest, before[part.path])
    assert all(torch.equal(tensor, before[key]) for key, tensor in hf.state_dict().items())
    assert model.weights_fingerprint == print_of


def test_files_that_are_absent_or_not_the_one_meant_are_told(tmp_path: Path) -> None:
    model = small_model()
    recipe = scrambled(model, model.sites[0].key)
    with pytest.raises(ms.MoescopeError, match="made without the tensors"):
        Recipe(recipe.edits).acts(model)
    recipe.save(tmp_path / "recipe.yaml")
    (tmp_path / "new.safetensors").write_bytes(b"other")
    with pytest.raises(ms.MoescopeError, match="digest differs"):
        Recipe.load(tmp_path / "recipe.yaml").acts(model)
    (tmp_path / "new.safetensors").unlink()
    with pytest.raises(ms.MoescopeError, match="keep them beside the recipe"):
        Recipe.load(tmp_path / "recipe.yaml").acts(model)
    elsewhere = (tmp_path / "elsewhere").resolve()
    elsewhere.mkdir()
    recipe.save(tmp_path / "recipe.yaml")
    Recipe.load(tmp_path / "recipe.yaml").save(elsewhere / "r.json")
    assert Recipe.load(elsewhere / "r.json").acts(model)


@pytest.mark.parametrize(
    ("file", "words"), [("../x.safetensors", "file"), ("x.bin", "file"), (".x.safetensors", "file")]
)
def test_a_recipe_names_files_beside_it_alone(file: str, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        ms.Replace(layer=0, expert=1, file=file, digest="0" * 32)


def test_tensors_of_another_layer_or_shape_are_refused() -> None:
    model = small_model()
    first, second = model.sites[:2]
    (tensors,) = scrambled(model, first.key)._held.values()
    edit, held = replacement(second.key, (1,), tensors, "x.safetensors")
    with pytest.raises(ms.MoescopeError, match="does not belong to layer"):
        model.edited(Recipe([edit]).holding({"x.safetensors": held})).__enter__()
    name, tensor = next(iter(tensors.items()))
    edit, held = replacement(first.key, (1,), {name: tensor[..., :-1]}, "y.safetensors")
    with pytest.raises(ms.MoescopeError, match="has the shape"):
        model.edited(Recipe([edit]).holding({"y.safetensors": held})).__enter__()


def test_half_precision_takes_what_it_can_hold_and_refuses_to_round(tmp_path: Path) -> None:
    hf: Any = build("qwen3_moe", torch.bfloat16)
    hf.config.architectures = [type(hf).__name__]
    hf.save_pretrained(tmp_path / "source")
    from tests.capturing.texts import tokenizer

    tokenizer().save_pretrained(tmp_path / "source")
    fine = load(str(tmp_path / "source"), dtype="float32")
    recipe = scrambled(fine, fine.sites[0].key)
    with pytest.raises(ms.RefusedError, match="would round"):
        write(recipe, tmp_path / "source", tmp_path / "out")
    done = write(recipe, tmp_path / "source", tmp_path / "out", approximate=True)
    assert not any(change.exact for change in done.changes)
    (tensors,) = recipe._held.values()
    rounded = {name: tensor.bfloat16() for name, tensor in tensors.items()}
    edit, held = replacement(fine.sites[0].key, (EXPERT,), rounded, "z.safetensors")
    exact = write(Recipe([edit]).holding({"z.safetensors": held}), tmp_path / "source", tmp_path / "out2")
    assert exact.proof is not None
    assert exact.proof.largest == 0 < exact.proof.changed
    a, b = (load_file(folder / "model.safetensors") for folder in (tmp_path / "source", exact.path))
    touched = sorted(key for key in a if not torch.equal(a[key], b[key]))
    layer = fine.sites[0].layer_path
    assert touched == sorted(
        [f"{layer}.mlp.experts.{EXPERT}.{n}_proj.weight" for n in ("gate", "up", "down")] + [f"{layer}.mlp.gate.weight"]
    )


def test_there_is_no_random_control_of_replaced_tensors() -> None:
    import numpy as np

    from moescope.effects import matched

    model = small_model()
    with pytest.raises(ms.MoescopeError, match="fit no other"):
        matched(scrambled(model, model.sites[0].key), model, np.random.default_rng(0))
    assert Recipe([Scale(layer=0, expert=1, factor=2.0)])._folder is None
