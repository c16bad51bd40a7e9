"""Traces against edits run one at a time and hooks written by hand; a prompt's own routing changes nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import cross_entropy

import moescope as ms
from moescope.edits import Mask, Recipe, Rows, Zero
from moescope.effects import Case, read_cases, trace_experts, trace_layers, trace_paths, trace_positions
from moescope.effects import trials as trials_module
from moescope.effects.cases import aligned
from moescope.effects.judging import intervals
from moescope.effects.pathtraces import parsed
from moescope.effects.trials import routing_of
from moescope.hooks import Model
from tests.capturing.texts import model

FAMILIES = ["qwen2_moe", "gpt_oss", "deepseek_v3"]
CASE = Case("sun moon river stone", " bird tree wind", " fire", "rain fire snow road")
OTHER = Case("leaf road sun bird", " moon moon", " tree", "wind wind moon tree")


def ids_of(made: Model, text: str) -> torch.Tensor:
    return torch.tensor(made.tokenizer(text)["input_ids"])


def by_hand(made: Model, case: Case, metric: str = "loss") -> float:
    """The metric of one case, run alone under whatever is live."""
    prompt = ids_of(made, case.prompt)
    whole = prompt if metric == "difference" else ids_of(made, case.prompt + case.answer)
    with torch.no_grad():
        logits = made.forward(whole.unsqueeze(0), torch.ones(1, len(whole), dtype=torch.long))[0]
    if metric == "difference":
        right, wrong = (ids_of(made, case.prompt + str(words))[len(prompt)] for words in (case.answer, case.wrong))
        return float(logits[-1, right] - logits[-1, wrong])
    n = len(whole) - len(prompt)
    return float(cross_entropy(logits[-n - 1 : -1], whole[-n:]))


class Hand:
    """Hooks written by hand: at each site, the routing of these positions is that of another run's positions."""

    def __init__(self, made: Model, source: str, cells: dict[str, list[tuple[int, int]]]) -> None:
        self._made, self._cells = made, cells
        self._kept: dict[str, Any] = {}
        handles = [self._hook(site, self._keep) for site in made.sites]
        ids = ids_of(made, source)
        with torch.no_grad():
            made.forward(ids.unsqueeze(0), torch.ones(1, len(ids), dtype=torch.long))
        for handle in handles:
            handle.remove()

    def _hook(self, site: Any, act: Any) -> Any:
        experts: Any = self._made.hf.get_submodule(site.experts)
        return experts.register_forward_pre_hook(lambda module, args: act(site.key, args))

    def _keep(self, key: str, args: Any) -> None:
        self._kept[key] = [tensor.clone() for tensor in args[1:3]]

    def _give(self, key: str, args: Any) -> Any:
        ids, weights = (tensor.clone() for tensor in args[1:3])
        for own, source in self._cells.get(key, []):
            ids[own], weights[own] = self._kept[key][0][source], self._kept[key][1][source]
        return (args[0], ids, weights)

    def __enter__(self) -> None:
        self._handles = [self._hook(site, self._give) for site in self._made.sites]

    def __exit__(self, *exc: object) -> None:
        for handle in self._handles:
            handle.remove()


@pytest.mark.parametrize("metric", ["loss", "difference"])
@pytest.mark.parametrize("kind", ["mask", "zero"])
def test_a_batched_sweep_equals_one_expert_at_a_time(kind: Any, metric: Any) -> None:
    made = model()
    result = trace_experts(made, [CASE, OTHER], kind=kind, metric=metric, rows=5, layers=[1, 2])
    edit = {"mask": Mask, "zero": Zero}[kind]
    for place, case in enumerate((CASE, OTHER)):
        plain = by_hand(made, case, metric)
        assert result["plain"].values[place] == pytest.approx(plain, abs=1e-5)
        for layer, expert in [(1, 0), (1, 7), (2, 3), (2, 6)]:
            with made.edited(Recipe([edit(layer=layer, expert=expert)])):
                want = by_hand(made, case, metric) - plain
            got = result["by_case"].sel(case=place, layer=layer, expert=expert).item()
            assert got == pytest.approx(want, abs=2e-5)
    assert np.allclose(result["effect"], result["by_case"].mean("case"))
    assert result["low"].isnull().all()  # two cases have no interval
    tokens = sum((routing_of(made, ids_of(made, c.prompt + c.answer))["L001"].ids == 3).sum() for c in (CASE, OTHER))
    if metric == "loss":
        assert result["tokens"].sel(layer=1, expert=3).item() == tokens / 2
    one, p = result["effect"].sel(layer=1).values, result["p"].sel(layer=1).values
    for expert, value in enumerate(one):
        assert p[expert] == sum(abs(other) >= abs(value) for other in one) / len(one)


@pytest.mark.parametrize("name", FAMILIES)
def test_everything_patched_equals_hooks_written_by_hand(name: str) -> None:
    made = model(name)
    n = len(ids_of(made, CASE.prompt))
    with Hand(made, str(CASE.source) + CASE.answer, {s.key: [(t, t) for t in range(n)] for s in made.sites}):
        want = by_hand(made, CASE)
    plain = by_hand(made, CASE)
    whole = trace_layers(made, [CASE], window=len(made.sites), controls=0)
    assert whole["effect"].values[0] == pytest.approx(want - plain, abs=1e-5)
    assert abs(want - plain) > 1e-4
    way = by_hand(made, Case(str(CASE.source), CASE.answer)) - plain
    assert whole["recovered"].values[0] == pytest.approx((want - plain) / way, rel=1e-2)


@pytest.mark.parametrize("metric", ["loss", "difference"])
@pytest.mark.parametrize("name", FAMILIES)
def test_a_prompts_own_routing_is_an_exact_no_op(name: str, metric: Any) -> None:
    made = model(name)
    own = Case(CASE.prompt, CASE.answer, CASE.wrong, CASE.prompt)
    cells = trace_positions(made, own, metric=metric, rows=1)
    assert (cells["effect"].values == 0).all()
    assert (trace_layers(made, [own], metric=metric, rows=1, controls=0)["effect"].values == 0).all()
    assert (trace_experts(made, [own], kind="patch", metric=metric, rows=1)["tokens"].values == 0).all()


def test_a_cell_is_one_token_in_one_layer() -> None:
    made = model()
    source = str(CASE.source) + CASE.answer
    result = trace_positions(made, CASE, rows=7)
    plain = by_hand(made, CASE)
    for layer, position in [(1, 0), (1, 4), (2, 2)]:
        key = next(site.key for site in made.sites if site.layer == layer)
        with Hand(made, source, {key: [(position, position)]}):
            want = by_hand(made, CASE) - plain
        assert result["effect"].sel(layer=layer, position=position).item() == pytest.approx(want, abs=1e-5)
    wide = trace_positions(made, CASE, span=2, window=2, rows=4, controls=3)
    keys = [site.key for site in made.sites if site.layer in (1, 2)]
    with Hand(made, source, {key: [(2, 2), (3, 3)] for key in keys}):
        want = by_hand(made, CASE) - plain
    assert wide["effect"].sel(layer=1, position=2).item() == pytest.approx(want, abs=1e-5)
    assert set(wide["p"].values.ravel()) <= {0.25, 0.5, 0.75, 1.0}
    zeroed = trace_positions(made, CASE, kind="zero")
    n = made.sites[0].n_experts
    with made.edited(Recipe([Zero(layer=2, expert=range(n), rows=Rows(positions=(3, 4)))])):
        want = by_hand(made, CASE) - plain
    assert zeroed["effect"].sel(layer=2, position=3).item() == pytest.approx(want, abs=1e-5)


def test_an_expert_is_patched_where_the_runs_disagree_on_it() -> None:
    made = model()
    result = trace_experts(made, [CASE], kind="patch", layers=[1])
    own, source = (routing_of(made, ids_of(made, text))["L001"] for text in (CASE.prompt, str(CASE.source)))
    plain = by_hand(made, CASE)
    for expert in (0, 3, 5):
        cells = [
            (t, t) for t in range(len(own.ids)) if (expert in own.ids[t].tolist()) != (expert in source.ids[t].tolist())
        ]
        assert result["tokens"].sel(layer=1, expert=expert).item() == len(cells)
        with Hand(made, str(CASE.source) + CASE.answer, {"L001": cells}):
            want = by_hand(made, CASE) - plain
        assert result["effect"].sel(layer=1, expert=expert).item() == pytest.approx(want, abs=1e-5)


def test_paths_are_experts_together() -> None:
    made = model()
    result = trace_paths(made, [CASE], paths=[[(1, 3), (2, 5)], [(2, 0)]], controls=4, rows=3)
    plain = by_hand(made, CASE)
    with made.edited(Recipe([Mask(layer=1, expert=3), Mask(layer=2, expert=5)])):
        want = by_hand(made, CASE) - plain
    assert list(result["path"].values) == ["L1E3 → L2E5", "L2E0"]
    assert result["effect"].values[0] == pytest.approx(want, abs=2e-5)
    alone = trace_experts(made, [CASE])["effect"]
    parts = alone.sel(layer=1, expert=3) + alone.sel(layer=2, expert=5)
    assert result["parts"].values == pytest.approx([parts.item(), alone.sel(layer=2, expert=0).item()], abs=2e-5)
    assert result["effect"].values[1] == pytest.approx(result["parts"].values[1], abs=2e-5)
    found = trace_paths(made, [CASE, OTHER], length=2, top=4, controls=0)
    tops = [
        {site: r.ids.gather(-1, r.weights.argmax(-1, keepdim=True))[:, 0].tolist() for site, r in routing.items()}
        for routing in (routing_of(made, ids_of(made, c.prompt)) for c in (CASE, OTHER))
    ]
    first = str(found["path"].values[np.argmax(found["travelled"].values)])
    counted = {}
    for one in tops:
        for a, b in zip(made.sites, made.sites[1:], strict=False):
            for pair in zip(one[a.key], one[b.key], strict=True):
                name = f"L{a.layer}E{pair[0]} → L{b.layer}E{pair[1]}"
                counted[name] = counted.get(name, 0) + 1
    assert counted[first] == max(counted.values()) == found["travelled"].values.max()
    assert parsed("1:3, 2:7") == [(1, 3), (2, 7)]


def test_a_killed_run_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = model()
    want = trace_experts(made, [CASE, OTHER], rows=3)
    real, batches = trials_module.outcomes, []

    def dies(*args: Any) -> Any:
        batches.append(args)
        if len(batches) == 8:
            raise KeyboardInterrupt
        return real(*args)

    monkeypatch.setattr(trials_module, "outcomes", dies)
    monkeypatch.setattr("moescope.effects.keeping.TOGETHER", 2)
    with pytest.raises(KeyboardInterrupt):
        trace_experts(made, [CASE, OTHER], rows=3, out=tmp_path / "t")
    done = len(batches)
    batches.clear()
    monkeypatch.setattr(trials_module, "outcomes", lambda *args: batches.append(args) or real(*args))
    seen: list[tuple[int, int]] = []
    got = trace_experts(made, [CASE, OTHER], rows=3, out=tmp_path / "t", on_progress=lambda *n: seen.append(n))
    cells = 2 * sum(site.n_experts for site in made.sites)
    assert len(batches) == 2 * -(-cells // 2 // 3) + 2 - (done - 1) // 2 * 2  # and two plain runs
    assert seen[-1] == (cells, cells)
    assert got.equals(want)
    batches.clear()
    trace_experts(made, [CASE, OTHER], rows=3, out=tmp_path / "t")
    assert len(batches) == 2
    with pytest.raises(ms.MoescopeError, match="another question"):
        trace_experts(made, [CASE], rows=3, out=tmp_path / "t")


def test_intervals_hold_the_mean_and_shrink_to_it() -> None:
    change = np.random.default_rng(0).normal(size=(12, 4))
    low, high = intervals(change, 0)
    assert ((low < change.mean(0)) & (change.mean(0) < high)).all()
    normal = 1.96 * change.std(0) / np.sqrt(12)
    assert np.allclose((high - low) / 2, normal, rtol=0.1)
    low, high = intervals(np.ones((5, 2)), 0)
    assert (low == 1).all()
    assert (high == 1).all()


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 3), max_size=8), st.lists(st.integers(0, 3), max_size=8))
def test_alignments_keep_order_and_never_pair_a_position_twice(own: list[int], source: list[int]) -> None:
    for align in ("start", "end", "tokens"):
        pairs = aligned(own, source, align)
        assert (np.diff(pairs, axis=0) > 0).all()
        if len(pairs):
            assert (pairs.min(0) >= 0).all()
            assert (pairs.max(0) < (len(own), len(source))).all()
        if own == source:
            assert pairs.tolist() == [[n, n] for n in range(len(own))]


def test_alignments() -> None:
    assert aligned([5, 6, 7], [9, 5, 6, 8], "tokens").tolist() == [[0, 1], [1, 2], [2, 3]]
    assert aligned([5, 6], [9, 5, 6], "end").tolist() == [[0, 1], [1, 2]]
    assert aligned([5, 6, 7], [9], "start").tolist() == [[0, 0]]
    with pytest.raises(ms.MoescopeError, match="has 2 tokens and its source 1"):
        aligned([1, 2], [1], "same")


def test_mistakes_are_said(tmp_path: Path) -> None:
    made = model()
    for call, words in [
        (lambda: trace_layers(made, [Case("sun", " moon")]), "give each case a `source`"),
        (lambda: trace_layers(made, [CASE], kind="mask"), "cannot be masked"),
        (lambda: trace_experts(made, [Case("sun", " moon")], metric="difference"), "what should not follow"),
        (lambda: trace_experts(made, [Case("sun", " moon", " moon")], metric="difference"), "same token"),
        (lambda: trace_experts(made, [Case("su", "n moon")]), "token of its own"),
        (lambda: trace_experts(made, [CASE], layers=[9]), "no MoE layer 9"),
        (lambda: trace_experts(made, []), "no case"),
        (lambda: trace_paths(made, [CASE], paths=[[(2, 0), (1, 0)]]), "consecutive"),
        (lambda: trace_paths(made, [CASE], paths=[[(1, 99)]]), "no single expert 99"),
        (lambda: trace_paths(made, [CASE], length=9), "Paths have 1 to"),
        (lambda: parsed("1-3"), "is not a path"),
        (lambda: trace_experts(model("doge"), [CASE]), "cannot share a batch"),
        (lambda: trace_experts(model("llama4"), [CASE]), "never handed ids"),
    ]:
        with pytest.raises(ms.MoescopeError, match=words):
            call()
    file = tmp_path / "c.jsonl"
    file.write_text('{"prompt": "a", "answer": "b", "source": "c"}\n{}\n')
    with pytest.raises(ms.CorpusError, match="line 2"):
        read_cases(file)
    file.write_text('{"prompt": "a", "answer": "b", "source": "c"}\n')
    assert read_cases(file) == [Case("a", "b", None, "c")]
