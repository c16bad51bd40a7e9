"""The self-check refuses what would be stored wrongly, and a refusal leaves the model as it was."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import moescope as ms
from moescope.hooks import Semantics, Tap, Want, discover, load, wrap
from moescope.hooks.model import Model
from tests.capturing.texts import tokenizer
from tests.zoo import build, inputs


def hooks_left(hf: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) + ("forward" in m.__dict__) for m in hf.modules())


@pytest.fixture
def hf() -> Any:
    return build("qwen2_moe")


def experts_of(hf: nn.Module) -> nn.Module:
    return hf.get_submodule("model.layers.1.mlp.experts")


def test_experts_whose_output_is_changed_afterwards_are_refused(hf: Any) -> None:
    experts_of(hf).register_forward_hook(lambda module, args, output: output * 1.01)
    before = hooks_left(hf)
    with pytest.raises(ms.RefusedError, match="misses the experts' real output"):
        wrap(hf)
    assert hooks_left(hf) == before


def test_a_looped_layer_is_refused() -> None:
    hf: Any = build("inkling2_loop")
    before = hooks_left(hf)
    with pytest.raises(ms.RefusedError, match="ran twice in one forward pass"):
        wrap(hf)
    assert hooks_left(hf) == before


def test_a_class_that_does_not_run_is_named(hf: Any) -> None:
    def fails(*args: Any, **kwargs: Any) -> None:
        raise AttributeError("'Output' object has no attribute 'image_outputs'")

    hf.forward = fails
    with pytest.raises(ms.RefusedError, match=r"does not run on a batch of text.*no attribute 'image_outputs'"):
        wrap(hf)


def test_a_model_that_draws_random_numbers_is_refused(hf: Any) -> None:
    experts_of(hf).register_forward_hook(lambda module, args, output: output + torch.rand(()))
    with pytest.raises(ms.RefusedError, match="Two plain runs"):
        wrap(hf)


def test_an_expert_named_twice_for_one_token_is_refused(hf: Any) -> None:
    def twice(module: nn.Module, args: Any) -> Any:
        hidden, ids, weights = args
        return hidden, ids[:, :1].expand_as(ids).contiguous(), weights

    experts_of(hf).register_forward_pre_hook(twice)
    with pytest.raises(ms.RefusedError, match="same expert twice"):
        wrap(hf)


def test_a_kernel_that_hides_the_product_loses_the_experts_tier_alone(hf: Any, tmp_path: Path) -> None:
    experts = experts_of(hf)
    plain = type(experts).forward

    def fused(hidden: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        return plain(experts, hidden, ids, weights.as_subclass(torch.Tensor))

    experts.forward = fused  # type: ignore[method-assign]
    model = wrap(hf, tokenizer())
    assert [check.rebuild_error is None for check in model.check.sites].count(True) >= 1
    store = ms.capture(model, ms.Corpus(["sun moon"]), tmp_path / "a", ["routing"])
    assert store.n_tokens > 0
    with pytest.raises(ms.RefusedError, match="routing and logits tiers only"):
        ms.capture(model, ms.Corpus(["sun moon"]), tmp_path / "b", ["experts"])
    assert not (tmp_path / "b").exists()


def test_an_expert_that_gives_nan_stops_the_capture(tmp_path: Path) -> None:
    model = wrap(build("qwen2_moe"), tokenizer())
    with torch.no_grad():
        model.hf.get_submodule("model.layers.2.mlp.experts").down_proj[:] = torch.nan
    with pytest.raises(ms.RefusedError, match="gave NaN"):
        ms.capture(model, ms.Corpus(["sun moon river"]), tmp_path / "s", ["outliers"])


def test_taps_are_removed_when_the_forward_fails(hf: Any) -> None:
    model = wrap(hf)
    before = hooks_left(hf)

    def fail(module: nn.Module, args: Any) -> None:
        raise RuntimeError("stop")

    handle = experts_of(hf).register_forward_pre_hook(fail)
    with Tap(hf, model.sites, model.semantics, Want(experts=True)) as tap:
        tap.begin(1)
        with pytest.raises(RuntimeError, match="stop"):
            hf(input_ids=torch.tensor([[5]]))
    handle.remove()
    assert hooks_left(hf) == before


def test_a_site_that_did_not_run_is_an_error_not_an_empty_result(hf: Any) -> None:
    model = wrap(hf)
    with Tap(hf, model.sites, model.semantics, Want()) as tap:
        tap.begin(1)
        with pytest.raises(ms.RefusedError, match="did not run"):
            tap.take()


def test_layers_of_two_stacks_are_not_mixed_up() -> None:
    """diffusion_gemma's encoder and decoder number their layers alike: no hidden maxima rather than the wrong ones."""
    two = build("diffusion_gemma")
    sites = discover(two)
    assert len({site.layer for site in sites}) < len(sites) == len({site.key for site in sites})
    unread = {site.key: Semantics(2, "none", "probabilities") for site in sites}
    layers = [two.get_submodule(site.layer_path) for site in sites]
    before = [len(layer._forward_hooks) for layer in layers]
    with Tap(two, sites, unread, Want(outliers=True)):
        assert [len(layer._forward_hooks) for layer in layers] == before


def test_reading_in_grad_mode_and_of_one_token(hf: Any) -> None:
    model = wrap(hf)
    with Tap(hf, model.sites, model.semantics, Want(logits=True, experts=True)) as tap:
        tap.begin(1)
        hf(input_ids=torch.tensor([[5]]))
        reading = tap.take()
    assert all(site.expert.shape == (1, 2) and not site.weight.requires_grad for site in reading.sites.values())


def test_first_row_input_and_hidden_maxima_by_hand(hf: Any) -> None:
    """METHODS 4: maxima over tokens, and over the first routed token of the batch alone."""
    model, batch = wrap(hf), inputs("qwen2_moe", padding="right")
    rows = batch["attention_mask"].flatten().nonzero().flatten()
    entering: dict[str, torch.Tensor] = {}
    leaving: dict[int, torch.Tensor] = {}
    for site in model.sites:
        experts = hf.get_submodule(site.experts)
        experts.register_forward_pre_hook(lambda m, args, key=site.key: entering.__setitem__(key, args[0][rows]))
        layer = hf.get_submodule(site.layer_path)
        layer.register_forward_hook(
            lambda m, args, output, n=site.layer: leaving.__setitem__(n, output.reshape(-1, output.shape[-1])[rows])
        )
    with torch.no_grad(), Tap(hf, model.sites, model.semantics, Want(experts=True, outliers=True)) as tap:
        tap.begin(batch["attention_mask"].numel(), rows)
        hf(**batch)
        reading = tap.take()
    for site in model.sites:
        got = reading.sites[site.key]
        assert got.outliers is not None
        assert got.absmax is not None
        for expert in range(site.n_experts):
            mine = [(t, s) for t in range(len(rows)) for s in range(2) if got.expert[t, s] == expert]
            assert got.outliers.tokens[expert] == len(mine)
            if not mine:
                assert got.outliers.output[expert] == -torch.inf
                continue
            outputs = [got.absmax[t, s].item() for t, s in mine]
            assert got.outliers.output[expert].item() == max(outputs)
            assert got.outliers.first[expert].item() == outputs[0]
            assert got.outliers.row[expert].item() == mine[outputs.index(max(outputs))][0]
            largest = max(entering[site.key][t].abs().max().item() for t, _ in mine)
            assert got.outliers.input[expert].item() == largest
        hidden, want = reading.hidden[site.layer], leaving[site.layer].abs()
        assert hidden.absmax.item() == want.max().item()
        assert want[hidden.row, hidden.channel].item() == want.max().item()


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint")
    build("qwen2_moe").save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


def copy_without(checkpoint: Path, folder: Path, part: str) -> Path:
    shutil.copytree(checkpoint, folder)
    tensors = {name: tensor for name, tensor in load_file(folder / "model.safetensors").items() if part not in name}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def test_a_checkpoint_without_all_tensors_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    broken = copy_without(checkpoint, tmp_path / "broken", "layers.1.mlp.experts")
    with pytest.raises(ms.MoescopeError, match=r"lacks model\.layers\.1\.mlp\.experts"):
        load(str(broken))


def test_a_truncated_checkpoint_is_one_sentence(checkpoint: Path, tmp_path: Path) -> None:
    folder = tmp_path / "short"
    shutil.copytree(checkpoint, folder)
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:2000])
    with pytest.raises(ms.MoescopeError, match="Cannot load") as caught:
        load(str(folder))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [({"device": "cuda:99"}, "no device 'cuda:99'"), ({"dtype": "int3"}, "Unknown dtype 'int3'")],
)
def test_bad_options_of_load(checkpoint: Path, options: dict[str, str], sentence: str) -> None:
    with pytest.raises(ms.MoescopeError, match=sentence):
        load(str(checkpoint), **options)  # type: ignore[arg-type]


def test_weights_of_another_training_have_another_fingerprint(checkpoint: Path) -> None:
    same, other = load(str(checkpoint)), Model(build("qwen2_moe", seed=1), None, "other")
    assert same.weights_fingerprint == wrap(build("qwen2_moe")).weights_fingerprint
    assert same.weights_fingerprint != other.weights_fingerprint
    one_expert = build("qwen2_moe")
    with torch.no_grad():
        one_expert.get_submodule("model.layers.0.mlp.experts").down_proj[3] *= 0
    assert wrap(one_expert).weights_fingerprint != same.weights_fingerprint


def test_a_configuration_is_the_same_wherever_it_lies(checkpoint: Path, tmp_path: Path) -> None:
    moved = shutil.copytree(checkpoint, tmp_path / "elsewhere")
    here = load(str(checkpoint))
    assert load(str(moved)).config_hash == here.config_hash
    assert wrap(build("qwen2_moe+sparse2")).config_hash != here.config_hash


def test_no_pickle_is_ever_loaded(tmp_path: Path) -> None:
    hf = build("qwen2_moe")
    hf.config.save_pretrained(tmp_path)
    torch.save(hf.state_dict(), tmp_path / "pytorch_model.bin")
    tokenizer().save_pretrained(tmp_path)
    with pytest.raises(ms.MoescopeError, match="safetensors"):
        load(str(tmp_path))
