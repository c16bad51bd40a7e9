"""Runs on tiny models: only the targets change, a resumed run is the uninterrupted one, and mistakes are told."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import pytest
import torch

import moescope as ms
from moescope.edits import Recipe, write
from moescope.hooks import Model, load
from moescope.hooks.parts import Part, expert_parts, parameter_of, router_parts
from moescope.unlearning import unlearn_expert
from moescope.unlearning.trained import Trained
from tests.capturing.texts import tokenizer
from tests.edits.test_checkpoint import logits, saved
from tests.zoo import build

WORDS = "sun moon river stone bird tree wind rain".split()  # noqa: SIM905
FORGET = [{"prompt": f"{word} is", "answer": "fire"} for word in WORDS]
RETAIN = [{"prompt": f"{word} was", "answer": "snow"} for word in WORDS] + [
    {"text": f"the {word} of road"} for word in WORDS
]
FAST: dict[str, Any] = {"steps": 4, "batch": 3, "retain_batch": 4, "check_every": 2, "learning_rate": 1e-2}


def tiny(name: str = "qwen2_moe", dtype: torch.dtype = torch.float32) -> Model:
    hf = build(name, dtype)
    return ms.wrap(hf, tokenizer(), name=name)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("qwen2_moe", {"method": "npo"}),  # fused experts beside a shared one
        ("old_mixtral", {"method": "gd"}),  # a list of modules
        ("deepseek_v3", {"method": "ga", "definition": "code"}),
        ("gpt_oss", {"method": "rmu"}),  # transposed, with biases
        ("dbrx", {"method": "npo", "retention": "loss"}),  # rows of one matrix
        ("granitemoe", {"method": "npo", "top": 2}),
        ("jetmoe", {"method": "npo", "target": ("L000-mlp", 1)}),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_nothing_but_the_targets_tensors_changes(name: str, options: dict[str, Any]) -> None:
    model = tiny(name)
    if name == "jetmoe":
        options = options | {"target": (next(s.key for s in model.sites if "attention" not in s.key), 1)}
    before = {key: tensor.clone() for key, tensor in model.hf.state_dict().items()}
    flags = [parameter.requires_grad for parameter in model.hf.parameters()]
    done = unlearn_expert(model, FORGET, RETAIN, **(FAST | options))
    after = model.hf.state_dict()
    assert all(torch.equal(after[key], before[key]) for key in before)
    assert [parameter.requires_grad for parameter in model.hf.parameters()] == flags
    assert all(parameter.grad is None for parameter in model.hf.parameters())
    own = []
    for key, expert in done.targets:
        site = next(site for site in model.sites if site.key == key)
        own += [*expert_parts(model.hf, site, expert), *router_parts(model.hf, site)]
    assert set(done.tensors) == {str(part) for part in own}
    assert done.recipe is not None
    with model.edited(done.recipe):
        for path in {part.path for part in own}:
            rest = parameter_of(model.hf, path).detach().clone()
            assert not torch.equal(rest, before[path])
            for part in own:
                if part.path == path:
                    part.of(rest).copy_(part.of(before[path]))
            assert torch.equal(rest, before[path])
        assert all(
            torch.equal(tensor, before[key])
            for key, tensor in model.hf.state_dict().items()
            if key not in {part.path for part in own}
        )
    assert len(done.log) == 4
    assert done.n_trained == sum(part.of(before[part.path]).numel() for part in {str(p): p for p in own}.values())


def test_gradients_and_moments_exist_for_the_trained_parts_alone() -> None:
    model = tiny()
    site = model.sites[1]
    parts = expert_parts(model.hf, site, 2)
    ids = torch.arange(3, 43).reshape(2, 20)
    with Trained(model.hf, parts) as trained:
        model.forward(ids).logsumexp(-1).sum().backward()
        assert all(parameter.grad is None for parameter in model.hf.parameters())
        got = {name: leaf.grad for name, leaf in trained.leaves.items()}
        optimizer = torch.optim.AdamW(trained.leaves.values())
        optimizer.step()
        moments = sum(state["exp_avg"].numel() for state in optimizer.state.values())
        assert moments == trained.n_parameters == sum(leaf.numel() for leaf in trained.leaves.values())
    model.hf.requires_grad_(True)
    model.forward(ids).logsumexp(-1).sum().backward()
    for name, gradient in got.items():
        part = Part.parse(name)
        whole = parameter_of(model.hf, part.path).grad
        assert gradient is not None
        assert whole is not None
        torch.testing.assert_close(gradient, part.of(whole))


def test_the_written_checkpoint_is_the_live_model_in_plain_transformers(tmp_path: Path) -> None:
    source = saved("qwen2_moe", tmp_path / "source")
    model = load(str(source))
    out = tmp_path / "recipe"
    unlearn_expert(model, FORGET, RETAIN, out=out, **FAST)
    assert {file.name for file in out.iterdir()} >= {"recipe.yaml", "log.csv"}
    recipe = Recipe.load(out / "recipe.yaml")
    done = write(recipe, source, tmp_path / "written")
    assert done.proof is not None
    assert done.proof.largest == 0 < done.proof.changed
    assert torch.equal(logits(done.path), logits(source, recipe))
    assert recipe.suggested_by["recipe"] == "unlearn_expert"


def test_what_is_stored_in_half_precision_is_rounded_to_it(tmp_path: Path) -> None:
    hf: Any = build("qwen3_moe", torch.bfloat16)
    hf.config.architectures = [type(hf).__name__]
    hf.save_pretrained(tmp_path / "source")
    tokenizer().save_pretrained(tmp_path / "source")
    model = load(str(tmp_path / "source"), dtype="float32")
    done = unlearn_expert(model, FORGET, RETAIN, **FAST)
    assert all(torch.equal(tensor, tensor.bfloat16().float()) for tensor in done.tensors.values())
    written = write(done.require_recipe(), tmp_path / "source", tmp_path / "out")
    assert written.proof is not None
    assert written.proof.largest == 0


def test_an_interrupted_run_goes_on_to_the_same_end(tmp_path: Path) -> None:
    options = FAST | {"steps": 6, "method": "npo", "patience": 3}
    whole = unlearn_expert(tiny(), FORGET, RETAIN, out=tmp_path / "whole", **options)

    def stop(row: dict[str, Any]) -> None:
        if row["step"] == 5:
            raise KeyboardInterrupt

    model, out = tiny(), tmp_path / "cut"
    before = {key: tensor.clone() for key, tensor in model.hf.state_dict().items()}
    with pytest.raises(KeyboardInterrupt):
        unlearn_expert(model, FORGET, RETAIN, out=out, on_step=stop, **options)
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.hf.state_dict().items())
    with pytest.raises(ms.MoescopeError, match="unfinished run; go on with it by resume"):
        unlearn_expert(model, FORGET, RETAIN, out=out, **options)
    with pytest.raises(ms.MoescopeError, match="is of another run"):
        unlearn_expert(model, FORGET, RETAIN, out=out, resume=True, **(options | {"seed": 9}))
    with model.edited(ms.Recipe([ms.Zero(layer=1, expert=0)])), pytest.raises(ms.MoescopeError, match="another run"):
        unlearn_expert(model, FORGET, RETAIN, out=out, resume=True, **options)
    again = unlearn_expert(model, FORGET, RETAIN, out=out, resume=True, **options)
    assert all(torch.equal(again.tensors[name], tensor) for name, tensor in whole.tensors.items())
    rows = list(csv.DictReader((out / "log.csv").open()))
    assert [row["step"] for row in rows] == [str(step) for step in range(1, 7)]
    assert not (out / "state.safetensors").exists()
    with pytest.raises(ms.MoescopeError, match="not empty and holds no unfinished run"):
        unlearn_expert(model, FORGET, RETAIN, out=out, **options)


@pytest.mark.parametrize("changes", [{"accumulate": 3}, {"checkpointing": True}], ids=["accumulated", "checkpointed"])
def test_a_step_in_parts_or_with_activations_again_is_the_same_step(changes: dict[str, Any]) -> None:
    options = FAST | {"steps": 2, "batch": 6, "retain_batch": 6}
    plain = unlearn_expert(tiny(), FORGET, RETAIN, **options)
    other = unlearn_expert(tiny(), FORGET, RETAIN, **(options | changes))
    for name, tensor in plain.tensors.items():
        torch.testing.assert_close(other.tensors[name], tensor, atol=2e-5, rtol=1e-4)


def test_bf16_arithmetic_trains_single_precision_copies() -> None:
    done = unlearn_expert(tiny(), FORGET, RETAIN, **(FAST | {"precision": "bf16"}))
    assert all(tensor.dtype == torch.float32 for tensor in done.tensors.values())
    assert any(bool((tensor != tensor.bfloat16().float()).any()) for tensor in done.tensors.values())


def test_a_run_whose_utility_falls_stops_and_goes_back() -> None:
    alike = [{"prompt": f"{word} was", "answer": "fire"} for word in WORDS]  # forgotten with the rest
    options = FAST | {"method": "ga", "anchor": 0.0, "steps": 12, "warmup": 0, "learning_rate": 0.3, "check_every": 1}
    free = unlearn_expert(tiny(), FORGET, alike, **options, held_out=0.5)
    looks = [row["utility"] for row in free.log]
    start = unlearn_expert(tiny(), FORGET, alike, **(options | {"learning_rate": 1e-9}), held_out=0.5).log[-1][
        "utility"
    ]
    bad = [utility > start * 1.02 for utility in looks]
    end = next(step for step in range(1, 12) if bad[step - 1] and bad[step]) + 1
    done = unlearn_expert(tiny(), FORGET, alike, **options, held_out=0.5, patience=2, tolerance=0.02)
    assert len(done.log) == end < 12
    assert "2 looks in a row" in done.stopped
    best = [step for step in range(end) if not bad[step]]
    if best:
        again = unlearn_expert(tiny(), FORGET, alike, **(options | {"tolerance": 0.02}), held_out=0.5)
        assert any(not torch.equal(again.tensors[name], tensor) for name, tensor in done.tensors.items())


@pytest.mark.parametrize(
    ("forget", "retain", "options", "words"),
    [
        ([{"text": ""}], RETAIN, {}, "has no text in it"),
        ([{"prompt": "sun", "answer": " "}], RETAIN, {}, "no example in it"),
        (FORGET, RETAIN, {"max_length": 1}, "forget set has no token to predict"),
        (FORGET, [*RETAIN, {"text": "sun  is fire"}], {}, "are in the retain set too"),
        (FORGET, None, {}, "keeps a retain set"),
        (FORGET, RETAIN, {"target": (99, 0)}, "target's layer 99 is no MoE layer"),
        (FORGET, RETAIN, {"target": (1, 99)}, "target's expert 99 is not in layer 1"),
        (FORGET, RETAIN, {"target": [(1, 2), (1, 2)]}, "named twice"),
        (FORGET, RETAIN, {"top": 0}, "top is between 1"),
        (FORGET, RETAIN, {"method": "dpo"}, "method is one of"),
        (FORGET, RETAIN, {"colour": 1}, "no setting 'colour'"),
        (FORGET, RETAIN, {"accumulate": 9}, "cannot be gathered"),
        (FORGET, RETAIN, {"scope": "model", "out": "x"}, "baseline to compare with"),
        ([{"colour": 1}], RETAIN, {}, "its fields are colour"),
        ("nowhere.jsonl", RETAIN, {}, "nowhere.jsonl"),
    ],
)
def test_mistakes_are_told_in_a_sentence(forget: Any, retain: Any, options: dict[str, Any], words: str) -> None:
    with pytest.raises(ms.MoescopeError, match=words):
        unlearn_expert(tiny(), forget, retain, **(FAST | options))


def test_a_model_without_a_tokenizer_is_told() -> None:
    with pytest.raises(ms.MoescopeError, match="without a tokenizer"):
        unlearn_expert(ms.wrap(build("qwen2_moe"), None), FORGET, RETAIN, **FAST)
