"""What is written computes what is live, in plain transformers; sources stay as they were, and nothing half stays."""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from safetensors.numpy import load_file, save_file

import moescope as ms
from moescope.edits import Demote, Mask, Promote, Recipe, Route, Rows, Scale, Zero, plan, write
from moescope.edits import changes as changes_module
from moescope.hooks import load
from moescope.hooks.loading import model_class
from moescope.hooks.taps import Tap, Want
from tests.capturing.texts import tokenizer
from tests.zoo import build

FAMILIES = [
    "qwen2_moe", "qwen3_moe", "olmoe", "mixtral", "deepseek_v2", "gpt_oss", "granitemoe", "ernie4_5_moe", "jamba",
    "hunyuan_v1_moe", "flex_olmo", "minimax", "mistral4", "lara_mini", "qwen3_next", "deepseek_v3", "glm4_moe",
    "nemotron_h", "lfm2_moe", "minimax_m2", "kimi_linear", "afmoe", "dots1", "exaone_moe", "glm4_moe_lite", "hy_v3",
    "hy_v4", "kolibri1", "laguna", "solar_open", "llama4", "longcat_flash", "step3p7", "dbrx", "qwen3_vl_moe", "jetmoe",
    "granitemoeshared", "flint",
]  # fmt: skip
BIASED = ["deepseek_v3", "glm4_moe", "ernie4_5_moe", "lfm2_moe", "minimax_m2", "afmoe", "hy_v3", "laguna", "kolibri1"]
EXPERT = 2


def saved(name: str, folder: Path, **options: Any) -> Path:
    hf = build(name)
    hf.config.architectures = [type(hf).__name__]
    hf.save_pretrained(folder, **options)
    tokenizer().save_pretrained(folder)
    return folder


def digest(folder: Path) -> dict[str, str]:
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in sorted(folder.iterdir())}


def logits(folder: Path, recipe: Recipe | None = None) -> torch.Tensor:
    """Of the checkpoint in plain transformers, or live."""
    ids = torch.arange(3, 60).reshape(3, 19)
    if recipe is None:
        config = transformers.AutoConfig.from_pretrained(folder)
        hf = model_class(config, trust_remote_code=False).from_pretrained(folder).eval()
        with torch.no_grad():
            return hf(input_ids=ids, use_cache=False).logits.float()
    model = load(str(folder))
    with torch.no_grad(), model.edited(recipe):
        return model.forward(ids).float()


@pytest.mark.parametrize("name", FAMILIES)
def test_written_equals_live(name: str, tmp_path: Path) -> None:
    source = saved(name, tmp_path / "source")
    before = digest(source)
    layer = [site for site in load(str(source)).sites if not site.key.endswith("attention")][-1].key
    for number, edit in enumerate([Scale(layer=layer, expert=EXPERT, factor=3.0), Zero(layer=layer, expert=EXPERT)]):
        recipe = Recipe([edit])
        done = write(recipe, source, tmp_path / f"out{number}", verify=False)
        got, want = logits(done.path), logits(source, recipe)
        torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)
        assert not torch.equal(got, logits(source))
    assert digest(source) == before


@pytest.mark.parametrize("name", BIASED)
def test_a_mask_is_written_into_the_selection_bias(name: str, tmp_path: Path) -> None:
    source = saved(name, tmp_path / "source")
    recipe = Recipe([Mask(layer=load(str(source)).sites[0].key, expert=EXPERT)])
    done = write(recipe, source, tmp_path / "out", verify=False)
    torch.testing.assert_close(logits(done.path), logits(source, recipe), atol=1e-5, rtol=1e-5)
    assert all(change.value == -np.inf for change in done.changes)


@pytest.mark.parametrize("name", ["qwen3_moe", "mixtral", "deepseek_v3"])
def test_a_scaled_logit_is_the_routers_row(name: str, tmp_path: Path) -> None:
    source = saved(name, tmp_path / "source")
    recipe = Recipe([Scale(layer=load(str(source)).sites[0].key, expert=EXPERT, factor=2.5, stage="logit")])
    done = write(recipe, source, tmp_path / "out")
    assert done.proof is not None
    assert done.proof.largest < 1e-5 < done.proof.changed
    torch.testing.assert_close(logits(done.path), logits(source, recipe), atol=1e-5, rtol=1e-5)


def test_shards_that_do_not_change_are_links_and_the_card_says_what_was_done(tmp_path: Path) -> None:
    source = saved("qwen3_moe", tmp_path / "source", max_shard_size="20KB")
    (source / "README.md").write_text("# A model\n")
    (source / "pytorch_model.bin").write_bytes(b"pickle")
    before = digest(source)
    done = write(Recipe([Scale(layer=2, expert=3, factor=2.0)]), source, tmp_path / "out")
    changed = {change.tensor.file for change in done.changes}
    shards = sorted(file.name for file in source.glob("*.safetensors"))
    assert len(shards) > 3
    assert len(changed) == 1
    for name in shards:
        same_file = (source / name).stat().st_ino == (done.path / name).stat().st_ino
        assert same_file == (name not in changed)
    assert (done.path / "README.md").read_text().startswith("# A model\n\n\n## Edited with MoEscope")
    assert Recipe.load(done.path / "recipe.yaml").edits[0].factor == 2.0
    assert not (done.path / "pytorch_model.bin").exists()
    assert digest(source) == before
    a, b = (
        {k: v for file in folder.glob("*.safetensors") for k, v in load_file(file).items()}
        for folder in (source, done.path)
    )
    different = [name for name in a if not np.array_equal(a[name], b[name])]
    assert different == ["model.layers.2.mlp.experts.3.down_proj.weight"]
    assert np.array_equal(b[different[0]], a[different[0]] * 2)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_is_rounded_to_the_nearest(dtype: str, tmp_path: Path) -> None:
    hf: Any = build("qwen3_moe", getattr(torch, dtype))
    hf.config.architectures = [type(hf).__name__]
    hf.save_pretrained(tmp_path / "source")
    tokenizer().save_pretrained(tmp_path / "source")
    done = write(Recipe([Scale(layer=2, expert=3, factor=1.7)]), tmp_path / "source", tmp_path / "out")
    name = "model.layers.2.mlp.experts.3.down_proj.weight"
    from safetensors.torch import load_file as load_torch

    old, new = (load_torch(folder / "model.safetensors")[name] for folder in (tmp_path / "source", done.path))
    assert torch.equal(new, (old.double() * 1.7).to(old.dtype))
    assert done.proof is not None
    assert done.proof.largest > 0  # rounding, said and not hidden


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (Mask(layer=2, expert=1), "no selection bias"),
        (Promote(layer=2, expert=1), "cannot hold promote"),
        (Scale(layer=2, expert=1, factor=2, stage="weight_renormalised"), "depends on the other scores"),
        (Zero(layer=2, expert=1, rows=Rows(phase="decode")), "no rows, positions or phases"),
        (Route(layer=2, top_p=0.5), "no property of a checkpoint"),
        (Zero(layer=2, expert=99), "no expert 99"),
        (Zero(layer=77, expert=1), "no single MoE layer 77"),
    ],
)
def test_what_a_checkpoint_cannot_hold_is_refused(edit: Any, words: str, tmp_path: Path) -> None:
    source = saved("qwen3_moe", tmp_path / "source")
    with pytest.raises(ms.MoescopeError, match=words):
        write(Recipe([edit]), source, tmp_path / "out")
    assert [file.name for file in tmp_path.iterdir()] == ["source"]


def test_approximate_zeroes_and_says_by_how_much(tmp_path: Path) -> None:
    source = saved("qwen3_moe", tmp_path / "source")
    done = write(Recipe([Mask(layer=2, expert=1)]), source, tmp_path / "out", approximate=True)
    assert not any(change.exact for change in done.changes)
    assert done.proof is not None
    assert done.proof.divergence > 0


def test_approximate_promotion_sets_the_selection_bias(tmp_path: Path) -> None:
    """The selection is nearly the live one; the score that becomes the weight is the expert's own."""
    source = saved("glm4_moe", tmp_path / "source")
    key = load(str(source)).sites[0].key
    with pytest.raises(ms.RefusedError, match="cannot hold demote: a checkpoint's bias changes"):
        write(Recipe([Demote(layer=key, expert=1)]), source, tmp_path / "out", approximate=True)
    recipe = Recipe([Promote(layer=key, expert=1)])
    with pytest.raises(ms.RefusedError, match="approximate sets that bias"):
        write(recipe, source, tmp_path / "out")
    done = write(recipe, source, tmp_path / "out", approximate=True)
    assert not done.exact
    assert done.proof is not None
    assert "differ by" in (done.path / "README.md").read_text()
    ids = torch.arange(3, 60).reshape(3, 19)

    def selected(model: Any) -> torch.Tensor:
        site = model.sites[0]
        with torch.no_grad(), Tap(model.hf, [site], model.semantics, Want()) as tap:
            tap.begin(ids.numel())
            model.forward(ids)
            return tap.take().sites[site.key].expert.sort(-1).values

    plain = load(str(source))
    with plain.edited(recipe):
        live = selected(plain)
    written = selected(load(str(done.path)))
    assert bool((written == 1).any(-1).all())
    assert bool((live == 1).any(-1).all())
    assert float((written == live).all(-1).float().mean()) > 0.9
    assert float((selected(plain) == live).all(-1).float().mean()) < 0.5


def test_approximate_scaling_scales_the_weight_where_that_comes_nearer_than_nothing(tmp_path: Path) -> None:
    source = saved("qwen2_moe", tmp_path / "source")  # weights are the scores themselves
    key = load(str(source)).sites[0].key
    recipe = Recipe([Scale(layer=key, expert=3, factor=1.5, stage="score")])
    done = write(recipe, source, tmp_path / "out", approximate=True)
    plain = write(Recipe([Scale(layer=key, expert=3, factor=1.5)]), source, tmp_path / "plain")
    assert torch.equal(logits(done.path), logits(plain.path))
    assert plain.exact
    assert not done.exact
    assert done.proof is not None
    assert 0 < done.proof.divergence < done.proof.unedited
    divided = saved("qwen3_moe", tmp_path / "divided")  # by their sum: the other expert's weight changes as much
    kept = Recipe([Scale(layer=2, expert=3, factor=1.5, stage="weight_renormalised")])
    with pytest.raises(ms.RefusedError, match="no nearer to the live edit"):
        write(kept, divided, tmp_path / "other", approximate=True)
    assert not (tmp_path / "other").exists()


def test_a_norm_after_the_expert_is_refused(tmp_path: Path) -> None:
    source = saved("muse_spark", tmp_path / "source")
    with pytest.raises(ms.RefusedError, match="norm after its last matrix"):
        plan(Recipe([Scale(layer=load(str(source)).sites[0].key, expert=1, factor=2.0)]), source)


def test_a_failed_proof_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = saved("qwen3_moe", tmp_path / "source")
    real = changes_module.multiply
    monkeypatch.setattr(changes_module, "multiply", lambda f, s, i, factor: real(f, s, i, factor * 1.5))
    with pytest.raises(ms.RefusedError, match="differs from the live edit"):
        write(Recipe([Scale(layer=2, expert=3, factor=3.0)]), source, tmp_path / "out")
    assert [file.name for file in tmp_path.iterdir()] == ["source"]


def test_a_full_disk_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = saved("qwen3_moe", tmp_path / "source")

    def full(*args: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(shutil, "copyfile", full)
    with pytest.raises(ms.MoescopeError, match="No space left on device; nothing is left"):
        write(Recipe([Zero(layer=2, expert=3)]), source, tmp_path / "out")
    assert [file.name for file in tmp_path.iterdir()] == ["source"]


def test_bad_checkpoints_and_targets(tmp_path: Path) -> None:
    source = saved("qwen3_moe", tmp_path / "source")
    recipe = Recipe([Zero(layer=2, expert=3)])
    (tmp_path / "there").mkdir()
    with pytest.raises(ms.MoescopeError, match="already exists"):
        write(recipe, source, tmp_path / "there")
    with pytest.raises(ms.MoescopeError, match="inside its source"):
        write(recipe, source, source / "out")
    short = shutil.copytree(source, tmp_path / "short")
    data = (short / "model.safetensors").read_bytes()
    (short / "model.safetensors").write_bytes(data[:-100])
    with pytest.raises(ms.MoescopeError, match="cut off"):
        plan(recipe, short)
    (short / "model.safetensors").write_bytes(b"no")
    with pytest.raises(ms.MoescopeError, match="cut off or no safetensors"):
        plan(recipe, short)
    (short / "model.safetensors").unlink()
    with pytest.raises(ms.MoescopeError, match="holds no safetensors checkpoint"):
        plan(recipe, short)
    save_file({"x": np.zeros(3, np.float32)}, short / "model.safetensors")
    with pytest.raises(ms.RefusedError, match="has no tensor"):
        plan(recipe, short)
