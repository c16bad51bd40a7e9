"""Rerouting's gradients against finite differences, its steps against their definition, and nothing else changed."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import cross_entropy
from torch.overrides import TorchFunctionMode

import moescope as ms
from moescope.decoding import Problem, Rerouter, judge
from moescope.decoding.problems import answered, written
from moescope.hooks import Model, wrap
from moescope.hooks.mixing import Mixing, Recording
from tests.capturing.texts import model, tokenizer
from tests.zoo import build

PROMPTS = ["sun moon river", "stone bird tree wind", "rain fire snow", "leaf road sun", "moon wind fire stone"]
FAMILIES = ["qwen2_moe", "gpt_oss", "deepseek_v3"]


def problems(made: Model, wrong: int = 0) -> list[Problem]:
    """Problems whose answer is what the model writes, but for the first few."""
    texts = answered(made, PROMPTS, 4, do_sample=False)
    return [
        Problem(text.prompt, "nothing of the kind" if n < wrong else _line(text.text)) for n, text in enumerate(texts)
    ]


def _line(text: str) -> str:
    return (text.strip().splitlines() or [""])[0].strip().rstrip(".")


def rerouter(made: Model, **options: Any) -> Rerouter:
    return Rerouter(made, problems(made), max_new_tokens=4, **{"neighbours": 3, "steps": 4, **options})


class Double(TorchFunctionMode):
    """float64 throughout: norms, routers and softmaxes that ask for float32 get float64."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        wider = [torch.float64 if value is torch.float32 else value for value in args]
        named = {key: torch.float64 if value is torch.float32 else value for key, value in (kwargs or {}).items()}
        return (torch.Tensor.double if func is torch.Tensor.float else func)(*wider, **named)


@pytest.mark.parametrize("objective", ["answers", "routing"])
@pytest.mark.parametrize("name", FAMILIES)
def test_gradients_are_finite_differences_in_float64(name: str, objective: Any) -> None:
    hf: Any = build(name).double()
    hf.set_experts_implementation("eager")  # the library's grouped products know no float64
    made = wrap(hf, tokenizer(), name=name)
    with Double():
        it = rerouter(made, objective=objective, last=2)
        routing, point = it._look(it._ids("sun stone moon"))
        near = it._nearest(point)
        _, gradient = it.gradient(routing, near)
        rng = np.random.default_rng(0)
        for key, values in routing.items():
            assert values.dtype == torch.float64
            chosen, others = (torch.nonzero((values > 0) == there).tolist() for there in (True, False))
            for token, expert in [chosen[rng.integers(len(chosen))], others[rng.integers(len(others))]]:
                loss = []
                for step in (1e-5, -1e-5):
                    moved = {name: each.clone() for name, each in routing.items()}
                    moved[key][token, expert] += step
                    loss.append(it.gradient(moved, near)[0])
                want = (loss[0] - loss[1]) / 2e-5
                assert float(gradient[key][token, expert]) == pytest.approx(want, rel=1e-6, abs=1e-9)
            assert float(gradient[key].abs().max()) > 1e-6


@pytest.mark.parametrize("name", FAMILIES)
def test_the_loss_is_that_of_each_neighbour_alone_under_hand_written_routing(name: str) -> None:
    made = model(name)
    it = rerouter(made)
    routing, point = it._look(it._ids("sun stone moon"))
    near = it._nearest(point)
    assert sum(weight for _, weight in near) == pytest.approx(1)
    want = 0.0
    for number, weight in near:
        one = it.known[number]
        handles = []
        for site in made.sites:
            k = made.semantics[site.key].top_k
            best = routing[site.key].topk(k, -1)

            def give(module: Any, args: Any, best: Any = best, at: int = len(one.prompt) - 1) -> Any:
                ids, weights = args[1].clone(), args[2].clone()
                ids[at], weights[at] = best.indices[0], best.values[0]
                return (args[0], ids, weights)

            experts: Any = made.hf.get_submodule(site.experts)
            handles.append(experts.register_forward_pre_hook(give))
        ids = torch.cat([one.prompt, one.answer]).unsqueeze(0)
        with torch.no_grad():
            logits = made.forward(ids, torch.ones_like(ids))[0, len(one.prompt) - 1 : -1]
        for handle in handles:
            handle.remove()
        want += weight * float(cross_entropy(logits, one.answer))
    assert it.gradient(routing, near)[0] == pytest.approx(want, rel=1e-4)


@pytest.mark.parametrize("name", FAMILIES)
def test_the_optimised_weights_are_what_the_experts_got_and_nothing_else_changed(name: str) -> None:
    made = model(name)
    state = {key: value.clone() for key, value in made.hf.state_dict().items()}
    it = rerouter(made, rate=0.5)
    passes: list[dict[str, Any]] = []
    prompt = "sun stone moon"
    n = len(it._ids(prompt))
    done = it(prompt, 3)
    with Recording(made) as own:
        made.forward(it._ids(prompt).unsqueeze(0))
    plain = dict(own.routed)
    from moescope.hooks.interventions import Live

    with Live(made, it.acts(done.after, n), check=False), Recording(made) as seen:
        handle = made.hf.register_forward_hook(lambda *args: passes.append(dict(seen.routed)))
        (text,) = written(made, [prompt], 3, do_sample=False)
        handle.remove()
    assert text.tokens == done.written.tokens
    for site in made.sites:
        got = passes[0][site.key].dense(site.n_experts)
        torch.testing.assert_close(got[-1:], done.after[site.key])
        assert torch.equal(done.before[site.key], plain[site.key].dense(site.n_experts)[-1:])
        first = made.sites[0].key
        assert torch.equal(passes[0][first].ids[:-1], plain[first].ids[:-1])
        assert torch.equal(passes[0][first].weights[:-1], plain[first].weights[:-1])
        k = made.semantics[site.key].top_k
        assert int((done.after[site.key] > 0).sum()) <= k
        assert float(done.after[site.key].sum()) == pytest.approx(float(done.before[site.key].sum()), rel=1e-5)
    assert len(passes) == 3
    assert passes[1][first].ids.shape[0] == 1
    assert 0 < done.moved <= 1
    assert done.losses[-1] < done.losses[0]
    assert all(torch.equal(value, state[key]) for key, value in made.hf.state_dict().items())
    assert all(parameter.grad is None for parameter in made.hf.parameters())
    assert not made.edits
    assert torch.equal(made.forward(it._ids(prompt).unsqueeze(0)), made.forward(it._ids(prompt).unsqueeze(0)))


@pytest.mark.parametrize("name", FAMILIES)
def test_mixing_in_the_own_weights_changes_nothing_and_other_rows_keep_theirs(name: str) -> None:
    made = model(name)
    ids = made.check_batch()[:1, :9]
    site = made.sites[0]
    outputs: list[torch.Tensor] = []
    experts: Any = made.hf.get_submodule(site.experts)
    with torch.no_grad(), Recording(made) as seen:
        plain = made.forward(ids)
    dense = {s.key: seen.routed[s.key].dense(s.n_experts) for s in made.sites}
    rows = torch.tensor([2, 7])
    with torch.no_grad(), Mixing(made, {s.key: (rows, dense[s.key][rows]) for s in made.sites}):
        torch.testing.assert_close(made.forward(ids), plain, atol=1e-5, rtol=1e-4)
    with torch.no_grad():
        handle = experts.register_forward_hook(lambda module, args, output: outputs.append(output.clone()))
        made.forward(ids)
        handle.remove()
        with Mixing(made, {site.key: (rows, dense[site.key][rows] * 3)}):
            handle = experts.register_forward_hook(lambda module, args, output: outputs.append(output.clone()))
            made.forward(ids)
            handle.remove()
    before, after = (output.reshape(9, -1) for output in outputs)
    others = [n for n in range(9) if n not in (2, 7)]
    assert torch.equal(before[others], after[others])
    torch.testing.assert_close(after[rows], 3 * before[rows], atol=1e-5, rtol=1e-4)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.floats(-2, 2, width=32), min_size=8, max_size=8), st.floats(0.01, 2))
def test_a_step_keeps_the_sum_and_what_is_kept_is_a_routing(slope: list[float], rate: float) -> None:
    it = object.__new__(Rerouter)
    it.model = model()
    k = it.model.semantics["L001"].top_k
    before = torch.tensor([[0.5, 0, 0.25, 0, 0, 0.125, 0, 0.125]], dtype=torch.float64)
    gradient = torch.tensor([slope], dtype=torch.float64)
    got = it._step({"L001": before}, {"L001": gradient}, {"L001": before}, rate)["L001"]
    assert (got >= 0).all()
    size = float(gradient.norm())
    want = (before - rate * before.norm() * gradient / max(size, 1e-20)).clamp_min(0)
    if float(want.sum()) > 1e-6:
        assert float(got.sum()) == pytest.approx(1, rel=1e-6)
        torch.testing.assert_close(got, want / want.sum())
        kept = it.sparse("L001", got)
        assert int((kept > 0).sum()) <= k
        assert float(kept.sum()) == pytest.approx(1, rel=1e-6)
        assert float(got[kept > 0].min()) >= float(got.flatten().sort(descending=True).values[k - 1])


def test_toward_one_neighbours_routing_it_gets_there() -> None:
    made = model()
    it = rerouter(made, objective="routing", neighbours=1, steps=60, rate=0.2)
    done = it("sun stone moon", 2)
    ((number, weight),) = done.neighbours
    assert weight == 1
    assert done.losses[-1] < 0.05 * done.losses[0]
    for key, values in it.known[number].routing.items():
        assert set(values[0].nonzero().flatten().tolist()) == set(done.after[key][0].nonzero().flatten().tolist())


@pytest.mark.parametrize("space", ["routing", "embedding"])
def test_neighbours_are_the_nearest_that_were_right(space: Any) -> None:
    made = model()
    it = Rerouter(made, problems(made, wrong=2), neighbours=2, space=space, max_new_tokens=4)
    assert [made.tokenizer.decode(one.prompt[1:]) for one in it.known] == PROMPTS[2:]
    _, point = it._look(it._ids(PROMPTS[3]))
    near = it._nearest(point)
    distances = [float(np.linalg.norm(one.point - point)) for one in it.known]
    assert [number for number, _ in near] == sorted(range(3), key=distances.__getitem__)[:2]
    assert near[0][0] == 1
    assert distances[1] == pytest.approx(0, abs=1e-6)
    assert near[0][1] > near[1][1]


def test_no_steps_are_plain_decoding() -> None:
    made = model()
    for prompt in ("sun stone moon", "wind road"):
        (plain,) = written(made, [prompt], 4, do_sample=False)
        done = rerouter(made, steps=0)(prompt, 4)
        assert done.written == plain
        assert done.moved == 0


def test_judging_counts_what_was_gained_and_lost() -> None:
    made = model()
    texts = answered(made, ["wind road", "sun stone moon", "fire leaf"], 4, do_sample=False)
    asked = [Problem(text.prompt, _line(text.text)) for text in texts[:2]] + [Problem("fire leaf", "no such answer")]
    result = judge(rerouter(made, rate=1.0), asked, max_new_tokens=4)
    assert result["solved"].sel(decoding="plain").item() == pytest.approx(2 / 3)
    for name in ("nearest", "random"):
        row = result.sel(decoding=name)
        assert row["solved"].item() * 3 == pytest.approx(2 + row["gained"].item() - row["lost"].item())
        assert row["low"] <= row["solved"] <= row["high"]
    with pytest.raises(ms.MoescopeError, match="among the references"):
        judge(rerouter(made), problems(made), max_new_tokens=4)


def test_what_cannot_be_is_refused() -> None:
    made = model()
    for call, words in [
        (lambda: Rerouter(made, problems(made, wrong=4), max_new_tokens=4), "1 of 5 references"),
        (lambda: rerouter(made, neighbours=0), "needs a neighbour"),
        (lambda: rerouter(made, layers=[9]), "none of the MoE layers 9"),
        (lambda: rerouter(made, last=50), "no last 50"),
        (lambda: rerouter(model("doge")), "cannot share a batch"),
        (lambda: rerouter(model("llama4")), "never handed ids"),
        (lambda: judge(rerouter(made), []), "no problems"),
    ]:
        with pytest.raises(ms.MoescopeError, match=words):
            call()
