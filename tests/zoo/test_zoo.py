"""Every family builds, its slow reference agrees with what ran, and no family of transformers is missing."""

from __future__ import annotations

import functools
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from . import CAPTURED, FAMILIES, VARIANTS, ZOO, LayerReference, build, inputs, reference, shared
from .reference import find_blocks, submodule

MODELS = Path(str(transformers.__file__)).parent / "models"
# A vision backbone whose caller supplies the expert's number: no router, no text model.
NOT_ROUTED = {"vitpose_backbone"}
# Families where a slot can stay empty with the inputs used here.
WITH_EMPTY_SLOTS = {"zaya", "switch_transformers", "nllb_moe+drop"}


@functools.cache
def truth(name: str, padding: str | None = None, shift: int = 0) -> dict[str, LayerReference]:
    """The reference of the shared model, computed once per test session."""
    return reference(shared(name), name, inputs(name, padding=padding), shift)


def disagreement(layer: LayerReference) -> float:
    """Relative L2 distance between the recomposed sum and what the experts returned."""
    return float((layer.recomposed - layer.experts_output).norm() / layer.experts_output.norm())


@pytest.mark.parametrize("name", CAPTURED)
@pytest.mark.parametrize("padding", [None, "left"])
def test_the_reference_recomposes_what_the_experts_returned(name: str, padding: str | None) -> None:
    layers = truth(name, padding)
    assert layers
    for layer in layers.values():
        assert disagreement(layer) < 1e-5, layer.path


@pytest.mark.parametrize("name", CAPTURED)
def test_the_next_experts_do_not_recompose_it(name: str) -> None:
    for layer in truth(name, shift=1).values():
        assert disagreement(layer) > 0.3, layer.path


@pytest.mark.parametrize("name", CAPTURED)
def test_ids_are_distinct_known_and_in_selection_order(name: str) -> None:
    for layer in truth(name).values():
        tokens, experts = layer.logits.shape
        assert layer.ids.shape == layer.weights.shape == layer.norm.shape == layer.absmax.shape
        assert layer.outputs.shape == (*layer.ids.shape, layer.hidden.shape[-1])
        assert len(layer.ids) == tokens
        assert int(layer.ids.max()) < experts
        for token in range(tokens):
            present = [int(e) for e in layer.ids[token] if e >= 0]
            assert len(set(present)) == len(present)
            assert set(layer.by_expert(token)) == set(present)
            if layer.intended is None and ZOO[name].routing.kind != "hash_or_topk":
                scores = layer.selection[token, present].tolist()
                assert scores == sorted(scores, reverse=True)


@pytest.mark.parametrize("name", CAPTURED)
def test_empty_slots_occur_where_expected(name: str) -> None:
    empty = [layer.ids < 0 for layer in truth(name).values()]
    assert any(bool(e.any()) for e in empty) == (name in WITH_EMPTY_SLOTS)
    for layer, gone in zip(truth(name).values(), empty, strict=True):
        assert not layer.weights[gone].any()
        assert not layer.outputs[gone].any()


def selects_otherwise(name: str) -> bool:
    """Whether the row says that selection is more than the k largest logits."""
    routing, text = ZOO[name].routing, shared(name).config.get_text_config()
    groups = routing.groups is not None and getattr(text, "n_group", None) is not None
    greedy = routing.groups == "max" and text.topk_method == "greedy"
    return routing.bias is not None or routing.kind == "hash_or_topk" or (groups and not greedy)


@pytest.mark.parametrize("name", [name for name in CAPTURED if ZOO[name].routing.kind != "capacity_top2"])
def test_biases_groups_and_tables_change_the_selection(name: str) -> None:
    changed = total = 0
    for layer in truth(name).values():
        plain = layer.logits.topk(layer.ids.shape[1]).indices
        for token, row in enumerate(layer.ids):
            if (row >= 0).all():
                changed += set(row.tolist()) != set(plain[token].tolist())
                total += 1
    assert (changed > 0) == selects_otherwise(name), f"{changed} of {total}"


def without_logits(name: str) -> bool:
    """Routers that return no per-expert logits: doge's product keys, and DeepSeek's remote gate."""
    return ZOO[name].routing.kind == "product_keys" or name.startswith("old_deepseek")


@pytest.mark.parametrize("name", [name for name in CAPTURED if not without_logits(name)])
def test_logits_are_among_what_the_router_returned(name: str) -> None:
    model, returned = shared(name), {}
    handles = []
    for path, block in find_blocks(model, ZOO[name]):

        def keep(module: Any, args: Any, output: Any, path: str = path) -> None:
            returned[path] = [o for o in (output if isinstance(output, tuple) else (output,)) if isinstance(o, Tensor)]

        handles.append(submodule(block, ZOO[name].router).register_forward_hook(keep))
    try:
        with torch.no_grad():
            model(**inputs(name))
    finally:
        for handle in handles:
            handle.remove()
    for path, layer in truth(name).items():
        wanted = layer.logits.softmax(-1) if ZOO[name].routing.kind == "gemma" else layer.logits
        same_size = [tensor.double() for tensor in returned[path] if tensor.numel() == wanted.numel()]
        assert any(torch.allclose(tensor.reshape(wanted.shape), wanted, atol=1e-4) for tensor in same_size), path


@pytest.mark.parametrize("name", [name for name in CAPTURED if name not in VARIANTS])
def test_builds_are_repeatable_and_finite(name: str) -> None:
    first, second, other = shared(name).state_dict(), build(name).state_dict(), build(name, seed=1).state_dict()
    for key, tensor in first.items():
        assert torch.isfinite(tensor).all(), key
        assert torch.equal(tensor, second[key]), key
    assert any(not torch.equal(tensor, other[key]) for key, tensor in first.items())


@pytest.mark.parametrize("name", [name for name in CAPTURED if name not in VARIANTS])
def test_every_selection_bias_is_non_zero_and_varies(name: str) -> None:
    bias = ZOO[name].routing.bias
    for _, block in find_blocks(shared(name), ZOO[name]):
        tensor = None if bias is None else submodule(block, bias)
        if tensor is None:  # no bias in this family, or a hash layer
            continue
        assert tensor.float().std() > 0.01


@pytest.mark.parametrize("name", [name for name in CAPTURED if name not in VARIANTS])
def test_bfloat16_models_run_and_are_the_rounded_float32_ones(name: str) -> None:
    # A model of its own: nllb_moe and switch_transformers widen their classifier in place when they run.
    low, full = build(name, torch.bfloat16), dict(shared(name).named_parameters())
    for key, parameter in low.named_parameters():
        assert torch.equal(parameter, full[key].to(parameter.dtype)), key
    layers = reference(low, name, inputs(name))
    assert layers.keys() == truth(name).keys()
    # A near-tie may fall the other way in bfloat16, so only most tokens need to agree.
    far = [(r.recomposed - r.experts_output).norm(dim=-1) / r.experts_output.norm(dim=-1) for r in layers.values()]
    assert float((torch.cat(far).nan_to_num() < 0.05).double().mean()) > 0.8


def test_inkling2_keeps_its_router_in_float32() -> None:
    model = shared("inkling2", torch.bfloat16)
    weights = [p for name, p in model.named_parameters() if name.endswith("mlp.gate.weight")]
    assert weights
    assert all(p.dtype is torch.float32 for p in weights)


def test_padding_is_on_the_asked_side() -> None:
    for side in ("left", "right"):
        values = inputs("mixtral", batch=3, length=7, padding=side)
        assert values["attention_mask"].sum(1).tolist() == [7, 5, 3]
        edge = values["attention_mask"][2, 0 if side == "left" else -1]
        assert int(edge) == 0
        assert not values["input_ids"][values["attention_mask"] == 0].any()


@functools.cache
def sources() -> dict[str, str]:
    """Transformers' modeling files by model type."""
    return {path.parent.name: path.read_text(encoding="utf-8") for path in sorted(MODELS.glob("*/modeling_*.py"))}


def having(pattern: str) -> set[str]:
    """Model types whose modeling file matches."""
    return {name for name, text in sources().items() if re.search(pattern, text, re.M)}


def test_every_family_that_declares_router_logits_is_in_the_zoo() -> None:
    declared = having(r"_can_record_outputs[^=\n]*= \{[^}]*\"router_logits\":")
    assert declared - NOT_ROUTED == set(FAMILIES)


def test_every_class_that_looks_like_experts_is_in_a_known_family() -> None:
    named = having(r"^class \w*(?:MoE|Moe(?!l)|Experts)\w*\([^)]*Module")
    assert named - NOT_ROUTED <= set(FAMILIES)


def test_the_dispatched_flag_is_transformers_own() -> None:
    decorated = having(r"^@use_experts_implementation")
    assert decorated == {name for name, row in FAMILIES.items() if row.dispatched}


def test_variants_belong_to_families() -> None:
    assert {row.model_type for row in VARIANTS.values()} <= set(FAMILIES)
