"""Kept vectors are those that plain hooks see: outputs, neurons and router inputs, of the chosen tokens alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import moescope as ms
from moescope.hooks import Tap, Want
from moescope.store import Store, check_store
from tests.capturing.texts import model, rows, tokenizer
from tests.zoo import reference

KINDS = ("outputs", "neurons", "router_inputs")


def captured(name: str, out: Path, chosen: ms.Activations, **options: Any) -> Store:
    options = {"batch_tokens": 64, **options}
    return ms.capture(model(name), ms.Corpus(rows(8, longest=9)), out, ["routing"], activations=chosen, **options)


def truth(name: str) -> dict[int, dict[int, Any]]:
    """The reference of every document, by document and layer."""
    found = {}
    for number, row in enumerate(rows(8, longest=9)):
        ids = torch.tensor([tokenizer()(row["text"])["input_ids"]])
        layers = reference(model(name).hf, name, {"input_ids": ids, "attention_mask": torch.ones_like(ids)})
        found[number] = {layer.layer: layer for layer in layers.values()}
    return found


@pytest.mark.parametrize("name", ["qwen2_moe", "gpt_oss", "nemotron_h", "deepseek_v3", "llama4", "old_mixtral"])
def test_outputs_are_the_references(name: str, tmp_path: Path) -> None:
    store = captured(name, tmp_path / "s", ms.Activations(["outputs"], sample=1.0))
    assert check_store(tmp_path / "s") == []
    tokens, true = store.tokens().to_pandas(), truth(name)
    for site in store.sites:
        vectors = store.activations("outputs", site.key)
        assert len(vectors) == store.n_tokens * site.top_k
        for row, expert, values in zip(vectors.row, vectors.expert, vectors.values, strict=True):
            layer = true[tokens.loc[row, "document"]][site.layer]
            token = int(tokens.loc[row, "position"])
            slot = layer.ids[token].tolist().index(expert)
            np.testing.assert_allclose(values, layer.outputs[token, slot].numpy(), rtol=2e-3, atol=1e-4)


@pytest.mark.parametrize("name", ["qwen2_moe", "gpt_oss", "nemotron_h", "muse_spark"])
@pytest.mark.parametrize("implementation", ["grouped_mm", "eager", "batched_mm"])
def test_neurons_give_the_outputs_through_the_down_projection(name: str, implementation: str, tmp_path: Path) -> None:
    hf = model(name).hf
    before = hf.get_experts_implementation()
    hf.set_experts_implementation(implementation)
    chosen = ms.Activations(["outputs", "neurons"], sample=1.0)
    try:
        if implementation == "eager" and name in ("qwen2_moe", "muse_spark"):
            # their own forward goes past the gate that is watched
            with pytest.raises(ms.RefusedError, match="experts_implementation='grouped_mm'"):
                captured(name, tmp_path / "s", chosen)
            return
        store = captured(name, tmp_path / "s", chosen)
    finally:
        hf.set_experts_implementation(before)
    assert store.manifest.model.experts_implementation == implementation
    for site in store.sites:
        experts = hf.get_submodule(next(s.experts for s in model(name).sites if s.key == site.key))
        outputs, neurons = store.activations("outputs", site.key), store.activations("neurons", site.key)
        assert (outputs.row == neurons.row).all()
        assert (outputs.expert == neurons.expert).all()
        for expert, before_down, after in zip(neurons.expert, neurons.values, outputs.values, strict=True):
            down = experts.down_proj[int(expert)].detach().numpy()
            got = before_down @ down if experts.is_transposed else down @ before_down
            if experts.has_bias:
                got = got + experts.down_proj_bias[int(expert)].detach().numpy()
            if getattr(experts, "has_post_expert_norm", False):
                assert np.corrcoef(got, after)[0, 1] > 0.9  # a norm with its own scales comes after
                continue
            np.testing.assert_allclose(got, after, rtol=1e-3, atol=1e-4)


def test_router_inputs_give_the_logits(tmp_path: Path) -> None:
    chosen = ms.Activations(["router_inputs"], layers=[1], sample=1.0)
    store = ms.capture(
        model(), ms.Corpus(rows(4)), tmp_path / "s", ["routing", "logits"], activations=chosen, batch_tokens=64
    )
    vectors = store.activations("router_inputs", 1)
    gate = model().hf.get_submodule("model.layers.1.mlp.gate").weight.detach().numpy()
    np.testing.assert_allclose(vectors.values @ gate.T, store.logits(1)[vectors.row], rtol=1e-3, atol=1e-4)
    assert set(vectors.expert) == {-1}
    with pytest.raises(ms.StoreError, match="no router_inputs of L000 were kept"):
        store.activations("router_inputs", 0)


def test_the_sample_is_of_tokens_and_does_not_depend_on_batches(tmp_path: Path) -> None:
    chosen = ms.Activations(["router_inputs"], layers=[0], sample=0.3)
    stores = [captured("qwen2_moe", tmp_path / str(n), chosen, batch_tokens=n) for n in (16, 400)]
    kept = []
    for store in stores:
        tokens = store.tokens().to_pandas().iloc[store.activations("router_inputs", 0).row]
        kept.append(set(zip(tokens["document"], tokens["position"], strict=True)))
        assert 0.15 < len(kept[-1]) / store.n_tokens < 0.45
    assert kept[0] == kept[1]
    other = captured("qwen2_moe", tmp_path / "other", ms.Activations(["router_inputs"], layers=[0], sample=0.3, seed=1))
    assert len(other.activations("router_inputs", 0)) > 0
    tokens = other.tokens().to_pandas().iloc[other.activations("router_inputs", 0).row]
    assert set(zip(tokens["document"], tokens["position"], strict=True)) != kept[0]


def test_only_chosen_experts_are_kept(tmp_path: Path) -> None:
    store = captured("qwen2_moe", tmp_path / "s", ms.Activations(["outputs"], experts=[2, 5], sample=1.0))
    for site in store.sites:
        vectors, routing = store.activations("outputs", site.key), store.routing(site.key)
        assert set(vectors.expert) <= {2, 5}
        assert len(vectors) == np.isin(routing.expert, [2, 5]).sum()
        assert len(store.activations("outputs", site.key, expert=2)) == (routing.expert == 2).sum()


def test_each_layer_may_have_experts_of_its_own(tmp_path: Path) -> None:
    wanted = {0: [2, 5], "L001": [0]}
    store = captured("qwen2_moe", tmp_path / "s", ms.Activations(["outputs"], experts=wanted, sample=1.0))
    for site, experts in {"L000": [2, 5], "L001": [0]}.items():
        vectors = store.activations("outputs", site)
        assert set(vectors.expert) <= set(experts)
        assert len(vectors) == np.isin(store.routing(site).expert, experts).sum() > 0
    assert store.manifest.activations is not None
    assert store.manifest.activations.sites == ["L000", "L001"]
    with pytest.raises(ms.StoreError, match="no outputs of L002 were kept"):
        store.activations("outputs", 2)


@pytest.mark.parametrize("name", ["qwen2_moe", "gpt_oss", "llama4"])
def test_vectors_kept_while_generating_are_those_of_the_written_text(name: str, tmp_path: Path) -> None:
    """The tokens drawn are the same, and their vectors those of a fresh pass over prompt and answer."""
    kinds = ["outputs", "router_inputs"]
    every = captured(name, tmp_path / "every", ms.Activations(kinds, sample=1.0), generate={"max_new_tokens": 5})
    some = captured(name, tmp_path / "some", ms.Activations(kinds, sample=0.4), generate={"max_new_tokens": 5})
    assert check_store(tmp_path / "every") == check_store(tmp_path / "some") == []
    tokens, loaded = every.tokens().to_pandas(), model(name)
    assert (tokens["phase"] == "decode").any()
    assert some.tokens().equals(every.tokens())
    keys = frozenset(site.key for site in every.sites)
    for _, part in tokens.groupby("document"):
        ids = torch.tensor([part["token_id"].tolist()])
        wanted = Want(vectors=keys, router_inputs=keys)
        with torch.no_grad(), Tap(loaded.hf, loaded.sites, loaded.semantics, wanted) as tap:
            tap.begin(ids.numel())
            loaded.forward(ids, torch.ones_like(ids))
            fresh = tap.take().sites
        for site in every.sites:
            vectors, inputs = every.activations("outputs", site.key), every.activations("router_inputs", site.key)
            mine = np.isin(vectors.row, part.index)
            rows_here = vectors.row[mine] - part.index[0]
            true = fresh[site.key]
            assert true.vectors is not None
            assert true.router_input is not None
            same = true.expert.numpy()[rows_here, vectors.slot[mine]] == vectors.expert[mine]
            assert same.mean() > 0.95  # but for near ties
            want = true.vectors.numpy()[rows_here, vectors.slot[mine]]
            np.testing.assert_allclose(vectors.values[mine][same], want[same], rtol=5e-3, atol=2e-4)
            theirs = inputs.values[np.isin(inputs.row, part.index)]
            np.testing.assert_allclose(theirs, true.router_input.numpy(), rtol=5e-3, atol=2e-4)
    for site in every.sites:
        whole, drawn = every.activations("outputs", site.key), some.activations("outputs", site.key)
        assert 0 < len(drawn) < len(whole)
        at = {(row, slot): place for place, (row, slot) in enumerate(zip(whole.row, whole.slot, strict=True))}
        places = [at[pair] for pair in zip(drawn.row, drawn.slot, strict=True)]
        assert np.array_equal(whole.values[places], drawn.values)


def test_bfloat16_vectors_keep_every_bit(tmp_path: Path) -> None:
    from moescope.hooks import wrap
    from tests.zoo import build

    low = wrap(build("qwen2_moe", torch.bfloat16), tokenizer(), name="low")
    chosen = ms.Activations(["outputs"], sample=1.0)
    store = ms.capture(low, ms.Corpus(rows(2)), tmp_path / "s", ["routing", "experts"], activations=chosen)
    vectors = store.activations("outputs", 0)
    assert vectors.dtype == "bfloat16"
    absmax = store.experts(0).absmax[vectors.row, vectors.slot]
    assert (np.abs(vectors.values).max(1) == absmax).all()


def test_resumed_equals_uninterrupted(tmp_path: Path) -> None:
    chosen = ms.Activations(["outputs"], sample=0.5)
    options: dict[str, Any] = {"batch_tokens": 32, "shard_tokens": 32}
    whole = captured("qwen2_moe", tmp_path / "whole", chosen, **options)

    def stop(done: int) -> None:
        if done > 50:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        captured("qwen2_moe", tmp_path / "parts", chosen, **options, on_progress=stop)
    parts = captured("qwen2_moe", tmp_path / "parts", chosen, **options, resume=True)
    for site in whole.sites:
        a, b = whole.activations("outputs", site.key), parts.activations("outputs", site.key)
        assert (a.row == b.row).all()
        assert (a.values == b.values).all()


@pytest.mark.parametrize(
    ("chosen", "sentence"),
    [
        (ms.Activations(["outputs"], sample=1.0, max_bytes=1000), "over their limit"),
        (ms.Activations(["thoughts"]), "Unknown kind"),
        (ms.Activations(layers=[99]), "No MoE layer 99"),
        (ms.Activations(experts=[8]), "No expert 8"),
        (ms.Activations(experts={1: [8]}), "No expert 8 at L001"),
        (ms.Activations(experts={99: [1]}), "No MoE layer 99"),
        (ms.Activations(sample=0.0), r"must lie in \(0, 1\]"),
    ],
)
def test_bad_choices_are_refused_before_anything_runs(chosen: ms.Activations, sentence: str, tmp_path: Path) -> None:
    with pytest.raises(ms.MoescopeError, match=sentence):
        captured("qwen2_moe", tmp_path / "s", chosen)
    assert not (tmp_path / "s").exists()


@pytest.mark.parametrize("name", ["llama4", "old_mixtral", "dbrx", "step3p7"])
def test_neurons_that_cannot_be_seen_are_refused(name: str, tmp_path: Path) -> None:
    def hooks() -> int:
        modules = model(name).hf.modules()
        return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) + ("forward" in m.__dict__) for m in modules)

    before = hooks()
    with pytest.raises(ms.RefusedError, match="cannot be seen"):
        captured(name, tmp_path / "s", ms.Activations(["neurons"]))
    assert hooks() == before


def test_a_changed_vector_file_is_found(tmp_path: Path) -> None:
    store = captured("qwen2_moe", tmp_path / "s", ms.Activations(["outputs"], sample=1.0))
    file = next((store.path / "shards" / "00000").glob("activations.outputs.*"))
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    assert any(file.name in problem.where for problem in check_store(store.path))
