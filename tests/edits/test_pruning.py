"""A pruned checkpoint loads in plain transformers, is smaller, and computes what the live edit does."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import moescope as ms
from moescope.edits import Prune, Recipe, Zero, plan_leaving, write
from moescope.edits.files import tensors_of
from moescope.hooks import load
from tests.edits.test_checkpoint import digest, logits, saved

FAMILIES = [
    "qwen2_moe", "qwen3_moe", "olmoe", "mixtral", "gpt_oss", "granitemoe", "granitemoeshared", "ernie4_5_moe", "jamba",
    "hunyuan_v1_moe", "flex_olmo", "minimax", "lara_mini", "qwen3_next", "lfm2_moe", "minimax_m2", "afmoe", "hy_v3",
    "kolibri1", "laguna", "llama4", "flint", "qwen3_vl_moe", "cohere2_moe",
]  # fmt: skip


def recipe_for(source: Path) -> Recipe:
    """Other experts in each layer, as many in all."""
    sites = load(str(source)).sites
    return Recipe([Prune(layer=site.key, expert=[n % 3, 5 + n % 3]) for n, site in enumerate(sites)])


@pytest.mark.parametrize("name", FAMILIES)
def test_pruned_equals_live(name: str, tmp_path: Path) -> None:
    source = saved(name, tmp_path / "source")
    before = digest(source)
    recipe = recipe_for(source)
    done = write(recipe, source, tmp_path / "out", verify=False)
    torch.testing.assert_close(logits(done.path), logits(source, recipe), atol=1e-5, rtol=1e-4)
    smaller = load(str(done.path))
    assert [site.n_experts for site in smaller.sites] == [6] * len(smaller.sites)
    assert smaller.n_parameters < load(str(source)).n_parameters
    assert digest(source) == before


def test_shards_and_index_are_written_anew(tmp_path: Path) -> None:
    source = saved("qwen3_moe", tmp_path / "source", max_shard_size="20KB")
    done = write(recipe_for(source), source, tmp_path / "out")
    assert done.proof is not None
    assert done.proof.largest < 1e-4 < done.proof.changed
    assert sorted(f.name for f in done.path.glob("*.safetensors")) == sorted(
        f.name for f in source.glob("*.safetensors")
    )
    assert sum(f.stat().st_size for f in done.path.iterdir()) < sum(f.stat().st_size for f in source.iterdir())


@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss"])
def test_what_would_leave_is_what_leaves(name: str, tmp_path: Path) -> None:
    source = saved(name, tmp_path / "source")
    recipe = recipe_for(source)
    lines = dict(line.split(": ", 1) for line in plan_leaving(recipe, source))
    done = write(recipe, source, tmp_path / "out", verify=False)
    before, after = ({key: value.shape for key, value in tensors_of(folder).items()} for folder in (source, done.path))
    gone = {key for key, words in lines.items() if words == "goes"}
    renamed = {key: words.removeprefix("becomes ") for key, words in lines.items() if words.startswith("becomes")}
    cut = {key for key, words in lines.items() if "stay" in words}
    assert len(gone) + len(renamed) + len(cut) == len(lines) > 0
    assert {renamed.get(key, key) for key in before.keys() - gone} == set(after)
    for key in before.keys() - gone:
        assert (before[key] != after[renamed.get(key, key)]) == (key in cut)


def test_what_a_configuration_cannot_hold_is_refused(tmp_path: Path) -> None:
    source = saved("qwen3_moe", tmp_path / "a")
    first, second = (site.key for site in load(str(source)).sites)
    both = [Prune(layer=first, expert=range(7)), Prune(layer=second, expert=range(7))]
    for edits, words in [
        ([Prune(layer=first, expert=1)], "Every MoE layer must lose as many"),
        ([Prune(layer=first, expert=1), Prune(layer=second, expert=1), Zero(layer=first, expert=2)], "on its own"),
        (both, "1 experts would be left where 2 are selected"),
        ([Prune(layer=first, expert=99)], "no expert 99"),
    ]:
        with pytest.raises(ms.MoescopeError, match=words):
            write(Recipe(edits), source, tmp_path / "out")
    grouped = saved("deepseek_v3", tmp_path / "g")
    with pytest.raises(ms.RefusedError, match="in groups"):
        write(recipe_for(grouped), grouped, tmp_path / "out")
    assert not (tmp_path / "out").exists()
