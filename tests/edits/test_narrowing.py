"""Fewer experts for each token in a configuration: as the family weighs them, or not at all."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import moescope as ms
from moescope.edits import Recipe, Route, Rows, Scale, write
from moescope.hooks import load
from tests.edits.test_checkpoint import logits, saved

RENORMALISES = {
    "qwen2_moe": False, "olmoe": False, "qwen3_moe": True, "mixtral": True, "gpt_oss": True, "granitemoe": True,
    "jamba": False, "hunyuan_v1_moe": True, "deepseek_v3": True, "minimax": True, "qwen3_vl_moe": True,
    "deepseek_v2": False,
}  # fmt: skip


def recipe_for(source: Path, top_k: int, *, renormalise: bool) -> Recipe:
    return Recipe([Route(layer=site.key, top_k=top_k, renormalise=renormalise) for site in load(str(source)).sites])


@pytest.mark.parametrize("name", RENORMALISES)
def test_written_equals_live_and_the_other_weighing_is_refused(name: str, tmp_path: Path) -> None:
    source = saved(name, tmp_path / "source")
    k = load(str(source)).semantics[load(str(source)).sites[0].key].top_k
    good = recipe_for(source, k - 1, renormalise=RENORMALISES[name])
    done = write(good, source, tmp_path / "out", verify=False)
    got = logits(done.path)
    torch.testing.assert_close(got, logits(source, good), atol=1e-5, rtol=1e-5)
    assert float((got - logits(source)).abs().max()) > 1e-4
    assert list(done.settings.values()) == [k - 1]
    assert done.proof is not None  # asked for or not
    smaller = load(str(done.path))
    assert {smaller.semantics[site.key].top_k for site in smaller.sites} == {k - 1}
    with pytest.raises(ms.RefusedError, match="`renormalise` says otherwise"):
        write(recipe_for(source, k - 1, renormalise=not RENORMALISES[name]), source, tmp_path / "other", verify=False)
    assert not (tmp_path / "other").exists()


def test_weights_that_are_divided_by_another_norm_are_refused_either_way(tmp_path: Path) -> None:
    """dbrx, as built here, divides by the weights' Euclidean norm: their sum is neither kept nor left alone."""
    source = saved("dbrx", tmp_path / "source")
    for renormalise in (True, False):
        with pytest.raises(ms.RefusedError, match="differs from the live edit"):
            write(recipe_for(source, 1, renormalise=renormalise), source, tmp_path / "out")


def test_only_the_configuration_changes(tmp_path: Path) -> None:
    source = saved("qwen3_moe", tmp_path / "source")
    ranks = Recipe([Route(layer=site.key, ranks=(0,)) for site in load(str(source)).sites])
    done = write(ranks, source, tmp_path / "out")
    assert done.settings == {"num_experts_per_tok": 1}
    assert done.changes == []
    assert (source / "model.safetensors").stat().st_ino == (done.path / "model.safetensors").stat().st_ino
    before, after = (json.loads((folder / "config.json").read_text()) for folder in (source, done.path))
    assert {key for key in before if before[key] != after[key]} == {"num_experts_per_tok"}
    assert "num_experts_per_tok = 1" in (done.path / "README.md").read_text()


def test_other_rules_of_routing_are_refused(tmp_path: Path) -> None:
    source = saved("qwen3_moe", tmp_path / "source")
    first, second = (site.key for site in load(str(source)).sites)
    for edits, words in [
        ([Route(layer=first, top_k=1)], "one number of experts for all layers; L"),
        ([Route(layer=first, top_k=1), Route(layer=second, top_k=2)], "the same top_k"),
        ([Route(layer=key, ranks=(1,)) for key in (first, second)], "by rank or share"),
        ([Route(layer=key, top_p=0.5) for key in (first, second)], "by rank or share"),
        ([Route(layer=key, top_k=1, rows=Rows(phase="decode")) for key in (first, second)], "no rows"),
        ([Route(layer=key, top_k=5) for key in (first, second)], "the first 5 are not there"),
        (
            [Route(layer=first, top_k=1), Route(layer=second, top_k=1), Scale(layer=first, expert=1, factor=2)],
            "on its own",
        ),
        ([Route(layer=key, top_k=1) for key in (first, second, 77)], "no single MoE layer 77"),
    ]:
        with pytest.raises(ms.MoescopeError, match=words):
            write(Recipe(edits), source, tmp_path / "out")
    assert [file.name for file in tmp_path.iterdir()] == ["source"]
