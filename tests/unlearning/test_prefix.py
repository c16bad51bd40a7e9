"""Beginning at the first trained layer is the full computation: logits, gradients and a whole run, or not done."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import moescope as ms
from moescope.hooks.parts import expert_parts, router_parts
from moescope.hooks.watching import override_forward
from moescope.unlearning import unlearn_expert
from moescope.unlearning.batching import batch_of
from moescope.unlearning.examples import Tokens
from moescope.unlearning.prefix import Prefix
from moescope.unlearning.trained import Trained
from tests.unlearning.test_objectives import InDouble, in_double, tokens
from tests.unlearning.test_training import FAST, FORGET, RETAIN, tiny

ROWS = ([4, 0], [1, 2, 3], [0, 1, 2, 3, 4])  # batches of other rows, lengths and orders than those that were kept


def sums(model: ms.Model, prefix: Prefix, some: list[Tokens], rows: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits at the real tokens, and a number that hangs on all of them."""
    batch = batch_of(model, some, rows)
    logits = prefix.logits("some", batch)[batch.real]
    return logits, logits.log_softmax(-1)[:, 5].sum()


@pytest.mark.parametrize("name", ["qwen2_moe", "deepseek_v3", "old_mixtral"])
def test_logits_and_gradients_are_those_of_the_full_computation(name: str) -> None:
    model = in_double(name)
    site, some = model.sites[-1], tokens(5, 6, 0)
    assert site.layer > 0
    parts = [*expert_parts(model.hf, site, 1), *router_parts(model.hf, site)]
    ran = []
    stack: Any = model.hf.get_submodule(site.layer_path.rpartition(".")[0])
    hook = next(stack[0].children()).register_forward_hook(lambda *_: ran.append(1))
    with InDouble(), Trained(model.hf, parts, [site.experts]) as trained:
        found: dict[bool, list[Any]] = {}
        for active in (True, False):
            with Prefix(model, [site], {"some": some}) as prefix:
                assert prefix.active
                prefix.active = active
                ran.clear()
                found[active] = []
                for number, rows in enumerate(ROWS):
                    for leaf in trained.leaves.values():  # as training changes it, the layers below do not
                        leaf.data = leaf.detach() + 0.01 * number
                    trained.write_back()
                    logits, total = sums(model, prefix, some, rows)
                    total.backward()
                    trained.complete()
                    found[active] += [logits.detach(), *(leaf.grad for leaf in trained.leaves.values())]
                    for leaf in trained.leaves.values():
                        leaf.grad, leaf.data = None, leaf.detach() - 0.01 * number
                assert len(ran) == (0 if active else len(ROWS))
    hook.remove()
    for fast, full in zip(found[True], found[False], strict=True):
        torch.testing.assert_close(fast, full, atol=1e-10, rtol=1e-10)


def test_a_run_from_the_first_trained_layer_on_is_the_full_run(monkeypatch: pytest.MonkeyPatch) -> None:
    options: dict[str, Any] = FAST | {"target": (tiny().sites[-1].layer, 2), "check_every": 9}
    fast = unlearn_expert(tiny(), FORGET, RETAIN, **options)
    entered = Prefix.__enter__
    seen = []

    def off(self: Prefix) -> Prefix:
        seen.append(self.active)
        self.active = False
        return entered(self)

    monkeypatch.setattr(Prefix, "__enter__", off)
    full = unlearn_expert(tiny(), FORGET, RETAIN, **options)
    assert seen == [True]
    for name, tensor in full.tensors.items():
        torch.testing.assert_close(fast.tensors[name], tensor, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("how", ["first layer", "shared state", "several stacks"])
def test_where_it_would_not_be_the_same_every_layer_runs(how: str) -> None:
    model = tiny("jetmoe" if how == "several stacks" else "qwen2_moe")
    stack: Any = model.hf.get_submodule(model.sites[0].layer_path.rpartition(".")[0])
    handed: dict[str, torch.Tensor] = {}

    def first(original: Any, *args: Any, **kwargs: Any) -> Any:
        handed["mean"] = original(*args, **kwargs).mean(-1, keepdim=True)
        return original(*args, **kwargs)

    def last(original: Any, *args: Any, **kwargs: Any) -> Any:
        return original(*args, **kwargs) + handed["mean"]

    undo = []
    if how == "shared state":  # beside the hidden states, as gemma's layers share keys and values
        undo = [override_forward(stack[0], first), override_forward(stack[-1], last)]
    some = tokens(5, 6, 0)
    site = model.sites[0] if how == "first layer" else model.sites[-1]
    with Prefix(model, [site], {"some": some}) as prefix:
        if how != "several stacks":
            assert not prefix.active
        for rows in ROWS:
            batch = batch_of(model, some, rows)
            full = model.forward(batch.ids, batch.real.long())[batch.real]
            got = sums(model, prefix, some, rows)[0]
            torch.testing.assert_close(got, full, atol=1e-5, rtol=1e-4)
    for back in undo:
        back()
    assert "forward" not in vars(stack[0])
