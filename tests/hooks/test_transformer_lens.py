"""A TransformerBridge and the native backend give the same store; hook points are named only where they tell."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("transformer_lens", reason="the transformer-lens extra is not installed")

from transformer_lens.model_bridge import TransformerBridge
from transformer_lens.model_bridge.architecture_adapter import ArchitectureAdapter
from transformer_lens.model_bridge.sources.transformers import source
from transformers import AutoTokenizer

import moescope as ms
from moescope.data import MODEL
from moescope.hooks import Tap, Want, wrap
from moescope.hooks import transformer_lens as tl
from moescope.hooks.interventions import Act, Live
from moescope.store import Store
from tests.capturing.texts import rows, tokenizer
from tests.zoo import CAPTURED, build, inputs

SAME = [  # to the bit: 26 families, and the text towers of two of them
    "qwen2_moe", "qwen3_moe", "olmoe", "mixtral", "gpt_oss", "granitemoe", "ernie4_5_moe", "jamba", "flex_olmo",
    "qwen3_next", "deepseek_v3", "deepseek_v4", "glm4_moe", "nemotron_h", "lfm2_moe", "minimax_m2", "afmoe",
    "glm4_moe_lite", "glm_moe_dsa", "laguna", "gemma4", "gemma4+text", "qwen3_5_moe", "qwen3_5_moe+text",
    "qwen3_vl_moe", "jetmoe", "llama4", "switch_transformers",
]  # fmt: skip
# The bridge's own attention rotates by sines and cosines where transformers multiplies complex numbers.
ROUNDED = {"deepseek_v2": 1e-5}
# Its bridge calls a rotary embedding that this model, like Granite 4 itself, does not have.
BROKEN = {"granitemoehybrid": "Original component not set for model.rotary_emb"}
UNKNOWN = [name for name in CAPTURED if "+" not in name and name not in {*SAME, *ROUNDED, *BROKEN}]
POINTED = ["qwen3_moe", "olmoe", "mixtral", "gpt_oss", "qwen3_next", "minimax_m2", "glm4_moe"]


def stay_offline(patch: pytest.MonkeyPatch) -> None:
    """A multimodal bridge asks the hub for a processor, and installs torchvision by itself; text needs neither."""
    patch.setattr(source, "load_modality_processor", lambda *args: None)
    patch.setattr(ArchitectureAdapter, "_check_required_libraries", lambda self: None)


@pytest.fixture(autouse=True)
def without_a_network(monkeypatch: pytest.MonkeyPatch) -> None:
    stay_offline(monkeypatch)


def bridge(name: str) -> Any:
    hf: Any = build(name)
    hf.config.architectures = [type(hf).__name__]
    own = AutoTokenizer.from_pretrained(MODEL)  # a bridge wants one that it can load again; the tests pass another
    return TransformerBridge.boot_transformers(name, hf_model=hf, tokenizer=own, device="cpu")


def captured(model: ms.Model, out: Path) -> Store:
    tiers = ["routing", "logits", "experts", "outliers"]
    return ms.capture(model, ms.Corpus(rows(4), ["kind"]), out, tiers, batch_tokens=64)


def native(name: str) -> ms.Model:
    hf: Any = build(name)
    hf.set_attn_implementation("eager")  # as bridges do
    return wrap(hf, tokenizer(), name=name)


@pytest.fixture(scope="module", params=SAME)
def pair(request: pytest.FixtureRequest) -> tuple[ms.Model, ms.Model]:
    """One family, native and inside a bridge."""
    name = request.param
    with pytest.MonkeyPatch.context() as patch:
        stay_offline(patch)  # a fixture of a module comes before those of a test
        bridged = tl.wrap(bridge(name), tokenizer(), name=name)
    return native(name), bridged


def test_stores_are_equal(pair: tuple[ms.Model, ms.Model], tmp_path: Path) -> None:
    ours, theirs = captured(pair[0], tmp_path / "native"), captured(pair[1], tmp_path / "bridge")
    assert ours.tokens().equals(theirs.tokens())
    assert ours.outliers().equals(theirs.outliers())
    assert ours.manifest.model.weights_fingerprint == theirs.manifest.model.weights_fingerprint
    for a, b in zip(ours.sites, theirs.sites, strict=True):
        assert a == b
        assert np.array_equal(ours.routing(a.key).expert, theirs.routing(a.key).expert)
        assert np.array_equal(ours.routing(a.key).weight, theirs.routing(a.key).weight, equal_nan=True)
        assert np.array_equal(ours.logits(a.key), theirs.logits(a.key))
        assert np.array_equal(ours.experts(a.key).norm, theirs.experts(a.key).norm, equal_nan=True)


def said_under(model: ms.Model, *acts: Act) -> torch.Tensor | str:
    """Logits of a batch while acts last at the first site, or why they are refused."""
    try:
        with torch.no_grad(), Live(model, {model.sites[0].key: acts}, check=False):
            return model.run(inputs(model.name))
    except ms.RefusedError as refusal:
        return str(refusal)


def test_edits_are_equal(pair: tuple[ms.Model, ms.Model]) -> None:
    plain, acted = said_under(pair[0]), False
    for act in (Act("scale", (0, 1, 2), 3.0), Act("mask", (1,)), Act("promote", (2,))):
        ours, theirs = (said_under(model, act) for model in pair)
        if isinstance(ours, str):
            assert theirs == ours
        else:
            assert isinstance(theirs, torch.Tensor), f"{act}: {theirs}"
            assert torch.equal(ours, theirs)
            acted = acted or not torch.equal(ours, plain)
    assert acted
    assert torch.equal(said_under(pair[1]), plain)


@pytest.mark.parametrize("name", ROUNDED)
def test_a_bridge_with_an_attention_of_its_own_is_equal_but_for_rounding(name: str, tmp_path: Path) -> None:
    bridged = bridge(name)
    ours, theirs = captured(native(name), tmp_path / "native"), captured(tl.wrap(bridged, tokenizer()), tmp_path / "b")
    with torch.no_grad():
        off = bridged.original_model(**inputs(name)).logits - native(name).hf(**inputs(name)).logits
    assert 0 < off.abs().max() < ROUNDED[name]  # the bridge alone, nothing of ours
    for site in ours.sites:
        assert np.array_equal(ours.routing(site.key).expert, theirs.routing(site.key).expert)
        assert np.allclose(ours.routing(site.key).weight, theirs.routing(site.key).weight, atol=ROUNDED[name])
        assert np.allclose(ours.logits(site.key), theirs.logits(site.key), atol=ROUNDED[name])
        assert np.allclose(ours.experts(site.key).norm, theirs.experts(site.key).norm, atol=ROUNDED[name])


@pytest.mark.parametrize("name", BROKEN)
def test_a_bridge_that_does_not_run_is_refused(name: str) -> None:
    bridged = bridge(name)
    with pytest.raises(RuntimeError, match=BROKEN[name]):
        bridged.original_model(**inputs(name))
    with pytest.raises(ms.RefusedError, match="with or without MoEscope"):
        tl.wrap(bridged, tokenizer())


@pytest.mark.parametrize("name", UNKNOWN)
def test_other_families_have_no_bridge(name: str) -> None:
    """If TransformerLens learns one, this says so, and the family belongs among the equal ones."""
    with pytest.raises(ValueError, match="Could not determine supported architecture"):
        bridge(name)


@pytest.mark.parametrize("name", POINTED)
def test_a_cache_holds_what_the_points_say(name: str) -> None:
    model = tl.wrap(bridge(name), tokenizer(), name=name)
    found = tl.points(model)
    batch = model.check_batch()[:1]
    for site in model.sites:
        names = found[site.key]
        assert names.logits is not None
        assert names.ids is not None
        assert names.weights is not None
        _, cache = model.bridge.run_with_cache(batch, names_filter=list(vars(names).values()))
        ids, weights = cache[names.ids].reshape(batch.numel(), -1), cache[names.weights].reshape(batch.numel(), -1)
        assert ids.shape[-1] == model.semantics[site.key].top_k
        assert torch.equal((weights != 0).sum(-1), torch.full((batch.numel(),), ids.shape[-1]))
        assert not model.hf.get_submodule(site.experts)._forward_hooks


def runs_of(model: Any, padded: bool) -> list[Any]:
    """Two runs of two texts each, equally long, or padded on the right."""
    lengths = [(7, 4), (9, 9)] if padded else [(6, 6), (9, 9)]
    made = []
    for number, of_rows in enumerate(lengths):
        tokens = torch.randint(3, 90, (2, max(of_rows)), generator=torch.Generator().manual_seed(number))
        mask = (torch.arange(tokens.shape[1]) < torch.tensor(of_rows).unsqueeze(1)).long()
        _, cache = model.bridge.run_with_cache(tokens, names_filter=tl.names(model), attention_mask=mask)
        made.append(ms.CachedRun(tokens, cache, mask if padded else None, [{"kind": "a"}, {"kind": "b"}]))
    return made


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("name", POINTED)
def test_a_cache_becomes_the_store_of_its_tokens(name: str, padded: bool, tmp_path: Path) -> None:
    """Row by row, the same as the taps read in plain forward passes over the same batches."""
    model = tl.wrap(bridge(name), tokenizer(), name=name)
    runs = runs_of(model, padded)
    store = ms.capture_cache(model, runs, tmp_path / "cached")
    assert store.check() == []
    assert store.labels == ["kind"]
    assert store.n_tokens == sum(int(run.real.sum()) for run in runs)
    assert store.tokens()["token_id"].to_pylist() == [t for run in runs for t in run.tokens[run.real].tolist()]
    direct = native(name)
    for site in direct.sites:
        read = []
        for run in runs:
            with torch.no_grad(), Tap(direct.hf, direct.sites, direct.semantics, Want(logits=True)) as tap:
                tap.begin(run.tokens.numel(), run.real.flatten().nonzero().flatten())
                direct.forward(run.tokens, run.real.long())
                read.append(tap.take().sites[site.key])
        routing = store.routing(site.key)
        assert np.array_equal(routing.expert, torch.cat([r.expert for r in read]).numpy())
        assert np.array_equal(routing.weight, torch.cat([r.weight for r in read]).numpy())
        assert np.array_equal(store.logits(site.key), torch.cat([r.logits for r in read]).numpy())
        assert np.allclose(routing.margin, torch.cat([r.margin for r in read]).numpy(), equal_nan=True)


def test_a_cache_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    model = tl.wrap(bridge("qwen3_moe"), tokenizer(), name="cached")
    run = runs_of(model, padded=False)[0]
    name = tl.names(model)[0]
    lacking = {key: value for key, value in run.cache.items() if key != name}
    for wrong, words in [
        (ms.CachedRun(run.tokens, lacking), f"has no {name}"),
        (ms.CachedRun(run.tokens[:, 1:], run.cache), "values for each of 10 tokens"),
        (ms.CachedRun(run.tokens, run.cache, torch.zeros_like(run.tokens)), "leave a token in every row"),
        (ms.CachedRun(run.tokens, run.cache, labels=[{"kind": "a"}]), "labels for 1"),
    ]:
        with pytest.raises(ms.MoescopeError, match=words):
            ms.capture_cache(model, [wrong], tmp_path / "s")
    with pytest.raises(ms.MoescopeError, match="A cache gives the tiers"):
        ms.capture_cache(model, [run], tmp_path / "s", ["routing", "experts"])
    assert not (tmp_path / "s").exists()
    blind = tl.wrap(bridge("granitemoe"), tokenizer(), name="blind")
    with pytest.raises(ms.RefusedError, match="No hook point of this bridge gives the logits"):
        tl.names(blind)


def test_a_bridge_hook_that_reroutes_is_captured(tmp_path: Path) -> None:
    model = tl.wrap(bridge("qwen3_moe"), tokenizer(), name="rerouted")
    site = model.sites[0]
    point = tl.points(model)[site.key].ids
    assert point is not None

    def swap(ids: torch.Tensor, hook: Any) -> torch.Tensor:
        return torch.where(ids == 3, 3, torch.zeros_like(ids).add(torch.arange(ids.shape[-1])))

    with model.bridge.hooks(fwd_hooks=[(point, swap)]):
        store = captured(model, tmp_path / "s")
    assert set(np.unique(store.routing(site.key).expert)) <= {*range(model.semantics[site.key].top_k), 3}


def test_what_is_no_bridge_is_refused() -> None:
    with pytest.raises(ms.RefusedError, match="not a TransformerBridge"):
        tl.wrap(build("qwen3_moe"))
