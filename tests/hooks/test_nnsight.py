"""nnsight and the native backend give the same store; names inside a trace, here or elsewhere, are what taps read."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import plotly.graph_objects as go
import pytest
import torch

pytest.importorskip("nnsight", reason="the nnsight extra is not installed")

from nnsight import NNsight
from nnsight.intervention.backends.local import LocalSimulationBackend
from nnsight.intervention.backends.remote import RemoteBackend
from nnsight.modeling.mixins.remotable import Remotable
from nnsight.modeling.transformers import TransformersModel
from nnsight.schema.request import RequestModel
from nnsight.tracing import tracer as tracing
from transformers import AutoTokenizer

import moescope as ms
from moescope.data import MODEL
from moescope.hooks import Tap, Want, wrap
from moescope.hooks import nnsight as ns
from moescope.hooks.interventions import Act, Live
from moescope.store import Store
from tests.capturing.texts import rows, tokenizer
from tests.zoo import CAPTURED, build, inputs

FAMILIES = [name for name in CAPTURED if "+" not in name]
CALLED = ["qwen3_moe", "qwen2_moe", "gpt_oss", "deepseek_v3", "mixtral", "dbrx", "step3p7", "longcat_flash", "gemma4"]
MODULES = ["old_mixtral", "old_qwen2_moe", "old_deepseek_v2", "old_deepseek_v3", "switch_transformers", "nllb_moe"]
NAMED = [*CALLED, "zaya", *MODULES, "llama4", "jetmoe", "doge"]


@pytest.fixture(scope="module", params=FAMILIES)
def pair(request: pytest.FixtureRequest) -> tuple[ms.Model, ms.Model]:
    """One family, native and inside nnsight."""
    name = request.param
    return wrap(build(name), tokenizer(), name=name), ns.wrap(NNsight(build(name)), tokenizer(), name=name)


def captured(model: ms.Model, out: Path) -> Store:
    tiers = ["routing", "logits", "experts", "outliers"]
    return ms.capture(model, ms.Corpus(rows(4), ["kind"]), out, tiers, batch_tokens=64)


def require_equal(native: Store, traced: Store) -> None:
    """Two stores hold the same, to the bit."""
    assert native.tokens().equals(traced.tokens())
    assert native.outliers().equals(traced.outliers())
    for a, b in zip(native.sites, traced.sites, strict=True):
        assert a == b
        assert np.array_equal(native.routing(a.key).expert, traced.routing(a.key).expert)
        assert np.array_equal(native.routing(a.key).weight, traced.routing(a.key).weight, equal_nan=True)
        assert np.array_equal(native.logits(a.key), traced.logits(a.key))
        assert np.array_equal(native.experts(a.key).norm, traced.experts(a.key).norm, equal_nan=True)


def test_stores_are_equal(pair: tuple[ms.Model, ms.Model], tmp_path: Path) -> None:
    native, traced = pair
    require_equal(captured(native, tmp_path / "native"), captured(traced, tmp_path / "traced"))


def test_a_rehearsed_remote_run_is_equal(tmp_path: Path) -> None:
    rehearsing = ns.wrap(Remotable(build("qwen3_moe")), tokenizer(), name="qwen3_moe", remote="local")
    native = wrap(build("qwen3_moe"), tokenizer(), name="qwen3_moe")
    require_equal(captured(native, tmp_path / "native"), captured(rehearsing, tmp_path / "rehearsed"))


def said_under(model: ms.Model, *acts: Act) -> torch.Tensor | str:
    """Logits of a batch while acts last at the first site, or why they are refused."""
    try:
        with torch.no_grad(), Live(model, {model.sites[0].key: acts}, check=False):
            return model.run(inputs(model.name))
    except ms.RefusedError as refusal:
        return str(refusal)


def test_edits_are_equal(pair: tuple[ms.Model, ms.Model]) -> None:
    native, traced = pair
    plain, acted = said_under(native), False
    for act in (Act("scale", (0, 1, 2), 3.0), Act("mask", (1,)), Act("promote", (2,))):
        ours, theirs = said_under(native, act), said_under(traced, act)
        if isinstance(ours, str):  # doge's experts are found by product keys, deepseek_v4's first ones in a table
            assert theirs == ours
        else:
            assert isinstance(theirs, torch.Tensor), f"{act}: {theirs}"
            # unchecked, a mask leaves nllb_moe (whose experts are not those that its router selects) nothing but NaN
            torch.testing.assert_close(theirs, ours, rtol=0, atol=0, equal_nan=True)
            acted = acted or not torch.equal(ours, plain)
    assert acted or native.name == "doge"
    assert torch.equal(said_under(traced), plain)


@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss", "switch_transformers", "old_mixtral"])
def test_a_capture_under_edits_is_equal(name: str, tmp_path: Path) -> None:
    native = wrap(build(name), tokenizer(), name=name)
    traced = ns.wrap(NNsight(build(name)), tokenizer(), name=name)
    first, second = native.sites[0].key, native.sites[1].key
    recipe = ms.Recipe([ms.Mask(layer=first, expert=2), ms.Scale(layer=second, expert=1, factor=4.0)])
    stores = []
    for which, model in {"native": native, "traced": traced}.items():
        with model.edited(recipe):
            stores.append(captured(model, tmp_path / which))
    require_equal(*stores)
    assert stores[1].manifest.settings["edits"] == stores[0].manifest.settings["edits"]
    assert 2 not in stores[1].routing(first).expert


@pytest.mark.parametrize("name", NAMED)
def test_names_inside_a_trace_are_what_the_taps_read(name: str) -> None:
    hf: Any = build(name)
    model, batch = wrap(hf), inputs(name)
    site = model.sites[-1]
    everything = Want(logits=True, vectors=frozenset(s.key for s in model.sites))
    with torch.no_grad(), Tap(hf, model.sites, model.semantics, everything) as tap:
        tap.begin(batch["input_ids"].numel())
        plain = hf(**batch).logits
        want = tap.take().sites[site.key]
    lm: Any = NNsight(hf)
    with torch.no_grad(), lm.trace(**batch):
        here = ns.routed(lm, model, site.key)
        logits = here.logits.save()
        ids = here.ids.save()
        weights = here.weights.save()
        outputs = here.expert_outputs.save()
        answer = lm.output.logits.save()
    assert torch.equal(answer, plain)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in hf.modules())
    assert want.vectors is not None
    theirs = want.expert
    if want.valid is not None and site.reader != "call":  # a skipped token of zaya reaches its experts as id 0
        theirs = theirs.masked_fill(~want.valid, -1)
    mine, ranked = (values.sort(dim=-1, stable=True).indices for values in (ids, theirs))
    assert torch.equal(ids.gather(1, mine), theirs.gather(1, ranked))
    assert torch.equal(weights.gather(1, mine), want.weight.gather(1, ranked))
    row = torch.arange(len(ids)).unsqueeze(-1)
    observed = outputs[row, mine], want.vectors[row, ranked]
    assert torch.equal(*(values.nan_to_num() for values in observed))
    assert outputs.isfinite().any()
    if model.semantics[site.key].logits_from == "output":
        assert torch.equal(logits[:, : site.n_experts], want.logits)


def server(monkeypatch: pytest.MonkeyPatch, there: Any) -> list[int]:
    """Stands for a server that has the model and no moescope; gives the sizes of what is sent to it, once sent."""
    sent: list[int] = []

    def answer(backend: RemoteBackend, request: RequestModel, tracer: Any) -> dict[str, Any]:
        blob = backend._serialize(tracer)
        sent.append(len(blob))
        room = LocalSimulationBackend(there)
        hidden = room._hide_local_modules()
        tracing.inc()
        try:
            arrived = RequestModel.deserialize(blob, there._remoteable_persistent_objects(), backend.compress)
            arrived.execute(arrived.info.code)
            saved = tracing._saves()
            kept = {name: value for name, value in arrived.info.frame.f_locals.items() if id(value) in saved}
        finally:
            tracing.dec()
            room._restore(hidden)
        back = io.BytesIO()
        torch.save(kept, back)
        back.seek(0)
        return torch.load(back, weights_only=True)

    monkeypatch.setattr(RemoteBackend, "request", answer)
    monkeypatch.setattr(TransformersModel, "to_model_key", lambda self: "here:there")
    return sent


def bundled(**options: Any) -> Any:
    own = AutoTokenizer.from_pretrained(MODEL)
    return TransformersModel(str(MODEL), task="text-generation", tokenizer=own, **options)


def test_names_travel_to_a_server_that_has_the_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """The model here stays on the meta device; what comes back is what the taps read of the one over there."""
    here, there = bundled(), bundled(dispatch=True)
    sent = server(monkeypatch, there)
    tokens = torch.randint(3, 90, (2, 7), generator=torch.Generator().manual_seed(0))
    named = ns.routed(here, layer=1)
    with here.trace(tokens, remote=True):
        ids = named.ids.save()
        named.scale(expert=5, factor=0.0)
        weights = named.weights.save()
        outputs = named.expert_outputs.save()
        answer = here.output.logits.save()
    assert not here.dispatched
    assert len(sent) == 1
    model = wrap(there._module)
    recipe = ms.Recipe([ms.Scale(layer=1, expert=5, factor=0.0)])
    site = next(site for site in model.sites if site.layer == 1)
    wanted = Want(vectors=frozenset([site.key]))
    with torch.no_grad(), model.edited(recipe), Tap(model.hf, [site], model.semantics, wanted) as tap:
        tap.begin(tokens.numel())
        assert torch.equal(answer, model.hf(tokens).logits)
        want = tap.take().sites[site.key]
    assert want.vectors is not None
    assert (ids == 5).any()
    mine, ranked = ids.argsort(-1), want.expert.argsort(-1)
    row = torch.arange(len(ids)).unsqueeze(-1)
    assert torch.equal(weights[row, mine], want.weight[row, ranked])
    assert torch.equal(outputs[row, mine], want.vectors[row, ranked])


@pytest.mark.parametrize("name", ["old_deepseek_v3", "switch_transformers", "jetmoe", "llama4", "doge"])
def test_names_of_other_blocks_travel_too(name: str) -> None:
    """nnsight's own rehearsal: sent, unpacked where moescope cannot be imported, and run."""
    hf: Any = build(name)
    model, batch = wrap(hf), inputs(name)
    lm: Any = Remotable(hf)
    found = []
    for remote in (False, "local"):
        named = ns.routed(lm, model, model.sites[0].key)
        with torch.no_grad(), lm.trace(**batch, remote=remote):
            outputs = named.expert_outputs.save()
            weights = named.weights.save()
        found.append((outputs, weights))
    assert torch.equal(found[0][0].nan_to_num(), found[1][0].nan_to_num())
    assert torch.equal(found[0][1], found[1][1])
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in hf.modules())


@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss", "deepseek_v3"])
def test_scaling_inside_a_trace_equals_a_plain_hook(name: str) -> None:
    hf: Any = build(name)
    model, batch = wrap(hf), inputs(name)
    site = model.sites[1]

    def scaled(module: Any, args: Any) -> Any:
        hidden, ids, weights = args
        return hidden, ids, torch.where(ids == 3, weights * 0.0, weights)

    undo = hf.get_submodule(site.experts).register_forward_pre_hook(scaled)
    with torch.no_grad():
        want = hf(**batch).logits
    undo.remove()
    lm: Any = NNsight(hf)
    with torch.no_grad(), lm.trace(**batch):
        ns.routed(lm, model, site.key).scale(expert=3, factor=0.0)
        got = lm.output.logits.save()
    assert torch.equal(got, want)
    with torch.no_grad():
        assert not torch.equal(hf(**batch).logits, want)


def test_a_trace_that_breaks_leaves_no_hook() -> None:
    hf: Any = build("old_mixtral")
    model, lm = wrap(hf), NNsight(hf)
    expert = hf.get_submodule(model.sites[0].experts)[0]
    undo = expert.register_forward_pre_hook(lambda module, args: (args[0][:, :3],)).remove
    with pytest.raises(ms.RefusedError), lm.trace(**inputs("old_mixtral")):
        ids = ns.routed(lm, model, model.sites[0].key).ids.save()  # noqa: F841 - saved by name, if ever
    undo()
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in hf.modules())


def test_what_cannot_be_is_refused() -> None:
    hf: Any = build("llama4")
    lm, model = NNsight(hf), wrap(hf)
    with pytest.raises(ms.MoescopeError, match="No single MoE layer 7"):
        ns.routed(lm, model, 7)
    with pytest.raises(ms.RefusedError, match="put the trace inside"):
        ns.routed(lm, model, 1).scale(0, 2.0)
    with pytest.raises(ms.RefusedError, match="the self-check cannot be made there"):
        ns.wrap(lm, remote=True)
    with pytest.raises(ms.RefusedError, match="has not loaded its weights"):
        ns.wrap(bundled())


def test_a_figure_is_saved_though_nnsight_gives_every_object_a_save(tmp_path: Path) -> None:
    with NNsight(torch.nn.Linear(2, 2)).trace(torch.ones(1, 2)):
        pass
    assert hasattr(object(), "save")
    ms.figures.save(go.Figure(), tmp_path / "figure.html")
    assert "plotly" in (tmp_path / "figure.html").read_text()
