"""Acts do what they say on every family, against routing worked out anew from unedited logits; then nothing stays."""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import Any

import pytest
import torch

import moescope as ms
from moescope.hooks import Model, Tap, Want, wrap
from moescope.hooks.choosing import STEP
from moescope.hooks.interventions import Act, Live, Where
from moescope.hooks.readings import SiteReading
from moescope.hooks.semantics import Semantics, within_groups
from tests.zoo import CAPTURED, build, shared

BY_TABLE = {"deepseek_v4", "doge"}  # ids from a table of token ids, or by product keys
# The rules that the self-check could not prove (and so this test's own arithmetic does not know).
UNPROVEN = {"nllb_moe", "nllb_moe+drop", "inkling"}
# Weights are multiplied by one more number for each expert; laguna caps its logits after the linear map that is edited.
SCALED = {"gemma4", "gemma4+text", "diffusion_gemma", "laguna"}
CHOOSING = [name for name in CAPTURED if name not in BY_TABLE | UNPROVEN]
WEIGHED = ["qwen2_moe", "qwen3_moe", "mixtral", "gpt_oss", "deepseek_v3", "glm4_moe", "ernie4_5_moe", "granitemoe",
           "olmoe", "jamba", "minimax", "nemotron_h", "lfm2_moe", "hunyuan_v1_moe", "afmoe", "llama4", "jetmoe",
           "old_mixtral", "old_qwen2_moe", "longcat_flash", "dbrx"]  # fmt: skip
EXPERT = 2


@functools.lru_cache(maxsize=4)
def looked_at(name: str) -> tuple[Model, SiteReading]:
    """A family's shared model and what its first site reads unedited: made once for all kinds of edits."""
    model = wrap(shared(name), name=name)
    return model, reading(model, model.sites[0])


def batch_of(model: Model) -> torch.Tensor:
    return model.check_batch()


def run(model: Model) -> torch.Tensor:
    batch = batch_of(model)
    with torch.no_grad():
        return model.forward(batch, torch.ones_like(batch)).clone()


def reading(model: Model, site: Any) -> SiteReading:
    batch = batch_of(model)
    with torch.no_grad(), Tap(model.hf, model.sites, model.semantics, Want(logits=True)) as tap:
        tap.begin(batch.numel())
        model.forward(batch, torch.ones_like(batch))
        return tap.take().sites[site.key]


def edited_logits(kind: str, semantics: Semantics, logits: torch.Tensor) -> torch.Tensor:
    """The edit as its definition has it, on [T, E]."""
    new = logits.clone()
    if kind == "remove" or (kind == "mask" and semantics.selection_bias is None):
        new[:, EXPERT] = -torch.inf
    elif kind in ("promote", "demote"):
        sign = 1 if kind == "promote" else -1
        others = torch.cat([logits[:, :EXPERT], logits[:, EXPERT + 1 :]], -1) * sign
        edge, own = others.amax(-1), logits[:, EXPERT] * sign
        new[:, EXPERT] = torch.where(own > edge, own, edge + STEP) * sign
    elif kind == "logit":
        new[:, EXPERT] *= 3
    return new


def chosen(semantics: Semantics, kind: str, logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids [T, k], ascending, and their weights, from edited logits by the family's proven rule."""
    scores = semantics.scores(logits)
    assert scores is not None
    base = logits.float() if semantics.selection == "logit" else scores
    choice = base.clone() if semantics.selection_bias is None else base + semantics.selection_bias
    if kind in ("mask", "remove") and semantics.selection_bias is not None:
        choice[:, EXPERT] = -torch.inf
    if semantics.groups is not None:
        choice = within_groups(choice, semantics.groups, semantics.group_fill)
    if kind in ("mask", "remove"):
        choice = choice.clamp_min(torch.finfo(choice.dtype).min)
        choice[:, EXPERT] = -torch.inf
    if kind == "promote":
        choice[:, EXPERT] = torch.inf
    if kind == "demote":
        choice[:, EXPERT] = choice.masked_fill(choice.isinf(), torch.inf).amin(-1) - 1
    ids = choice.topk(semantics.top_k, -1).indices.sort(-1).values
    weights = scores.gather(-1, ids)
    if semantics.renormalised:
        weights = weights / weights.sum(-1, keepdim=True)
    return ids, weights * (semantics.scaling or 1.0)


@pytest.mark.parametrize("kind", ["mask", "remove", "promote", "demote", "logit"])
@pytest.mark.parametrize("name", CHOOSING)
def test_selection_goes_through_the_familys_own_rule(name: str, kind: str) -> None:
    model, plain = looked_at(name)
    site = model.sites[0]
    semantics = model.semantics[site.key]
    act = Act("scale", (EXPERT,), 3.0, "logit") if kind == "logit" else Act(kind, (EXPERT,))  # type: ignore[arg-type]
    with Live(model, {site.key: [act]}):
        got = reading(model, site)
    ids = got.expert.sort(-1)
    if got.valid is None:
        assert (ids.values[:, 1:] != ids.values[:, :-1]).all()
    assert got.weight[... if got.valid is None else got.valid].isfinite().all()
    if kind == "logit" and plain.logits is not None and got.logits is not None:  # no other logit has changed
        others = [expert for expert in range(site.n_experts) if expert != EXPERT]
        assert torch.equal(got.logits[:, others], plain.logits[:, others])
    if kind in ("mask", "remove"):
        assert not (got.expert == EXPERT)[... if got.valid is None else got.valid].any()
    if kind == "promote" and not semantics.drops:
        assert (got.expert == EXPERT).any(-1).all()
    if plain.logits is None or plain.logits.shape[-1] != site.n_experts + semantics.skips or semantics.can_miss:
        return  # skip classes are cut off what is read, capacity is not a rule of the logits
    if semantics.selection is None or semantics.scaling is None or (name, kind) == ("laguna", "logit"):
        return
    want_ids, want_weights = chosen(semantics, kind, edited_logits(kind, semantics, plain.logits.float()))
    same = (ids.values == want_ids).all(-1)
    assert same.double().mean() > 0.99  # a tie may fall the other way
    if name in SCALED:
        return
    weights = got.weight.float().gather(-1, ids.indices)
    torch.testing.assert_close(weights[same], want_weights[same], atol=2e-5, rtol=1e-3)


def down_projection(model: Model, site: Any, factor: float) -> Model:
    """The same model with expert `EXPERT`'s last matrix (and bias) scaled in its weights."""
    hf: Any = build(model.name)
    experts: Any = hf.get_submodule(site.experts)
    with torch.no_grad():
        if isinstance(experts, torch.nn.ModuleList | torch.nn.ModuleDict):
            part = list(experts.values() if isinstance(experts, torch.nn.ModuleDict) else experts)[EXPERT]
            last = next(getattr(part, n) for n in ("w2", "down_proj", "wo", "fc2") if hasattr(part, n))
            for parameter in last.parameters():
                parameter *= factor
        elif hasattr(experts, "mlp"):  # dbrx: rows of one matrix
            rows = experts.mlp.w2.view(site.n_experts, -1, experts.mlp.w2.shape[-1])
            rows[EXPERT] *= factor
        else:
            holder = experts if site.reader != "plan" else hf.get_submodule(site.block).output_linear
            for name in ("down_proj", "down_proj_bias", "weight"):
                if isinstance(getattr(holder, name, None), torch.Tensor):
                    getattr(holder, name)[EXPERT] *= factor
    return wrap(hf, name=model.name)


@pytest.mark.parametrize("name", WEIGHED)
def test_scaling_an_expert_equals_scaling_its_last_matrix(name: str) -> None:
    model = wrap(shared(name), name=name)
    sites = [site for site in model.sites if not site.key.endswith("attention")]
    for kind, factor in (("scale", 3.0), ("zero", 0.0)):
        site = sites[-1]
        want = run(down_projection(model, site, factor))
        with Live(model, {site.key: [Act(kind, (EXPERT,), factor)]}):  # type: ignore[arg-type]
            got = run(model)
        assert not torch.equal(got, run(model))
        torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["qwen3_moe", "deepseek_v3", "old_mixtral", "jetmoe", "llama4"])
def test_afterwards_the_model_is_what_it_was(name: str) -> None:
    hf: Any = build(name)
    model = wrap(hf, name=name)
    before = run(model)
    hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) + ("forward" in m.__dict__) for m in hf.modules()]
    first, last = model.sites[0].key, model.sites[-1].key
    with Live(model, {first: [Act("mask", (1,))]}):
        once = run(model)
        with pytest.raises(ms.MoescopeError), Live(model, {last: [Act("zero", (2,))]}):
            Live(model, {last: [Act("zero", (99,))]})
        assert torch.equal(run(model), once)
    assert torch.equal(run(model), before)
    after = [len(m._forward_hooks) + len(m._forward_pre_hooks) + ("forward" in m.__dict__) for m in hf.modules()]
    assert after == hooks


@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss", "deepseek_v3"])
def test_several_edits_on_different_rows_equal_each_alone(name: str) -> None:
    model = wrap(shared(name), name=name)
    site = model.sites[0].key
    acts = [Act("mask", (1,)), Act("scale", (2,), 5.0), Act("promote", (3,)), Act("scale", (4,), 2.0, "logit")]
    alone = []
    for act in acts:
        with Live(model, {site: [act]}):
            alone.append(run(model))
    with Live(model, {site: [replace(act, where=Where(batch=(row,))) for row, act in enumerate(acts)]}):
        together = run(model)
    for row, result in enumerate(alone):
        torch.testing.assert_close(together[row], result[row], atol=1e-6, rtol=1e-5)


def test_an_edit_from_a_position_on_leaves_what_stands_before() -> None:
    model = wrap(shared("qwen3_moe"), name="m")
    before = run(model)
    with Live(model, {model.sites[0].key: [Act("zero", (1, 2, 3), where=Where(positions=(30, 64)))]}):
        after = run(model)
    assert torch.equal(before[:, :30], after[:, :30])
    assert not torch.equal(before[:, 30:], after[:, 30:])


def test_positions_do_not_count_pads() -> None:
    model = wrap(shared("qwen3_moe"), name="m")
    ids = batch_of(model)[:1, :10]
    padded = torch.cat([torch.zeros(1, 4, dtype=ids.dtype), ids], -1)
    mask = (torch.arange(14) >= 4).long().unsqueeze(0)
    where = Where(positions=(0, 3))
    with Live(model, {model.sites[0].key: [Act("zero", tuple(range(6)), where=where)]}), torch.no_grad():
        alone, left = (
            model.forward(ids, torch.ones_like(ids)),
            model.run(
                {"input_ids": padded, "attention_mask": mask, "position_ids": (mask.cumsum(-1) - 1).clamp_min(0)}
            ),
        )
    torch.testing.assert_close(left[:, 4:], alone, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("phase", ["prefill", "decode"])
def test_phases_while_generating(phase: Any) -> None:
    model = wrap(build("qwen3_moe"), name="m")
    seen: list[tuple[int, bool]] = []
    site = model.sites[0]

    def watch(module: Any, args: Any, kwargs: Any) -> None:
        seen.append((len(args[0]), bool((args[2] == 0).any())))

    ids = batch_of(model)[:1, :8]
    with Live(model, {site.key: [Act("zero", tuple(range(8)), where=Where(phase=phase))]}):
        handle = model.hf.get_submodule(site.experts).register_forward_pre_hook(watch, with_kwargs=True)
        model.hf.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=4, do_sample=False, pad_token_id=0)
        handle.remove()
    assert [rows for rows, _ in seen] == [8, 1, 1, 1]
    assert [zeroed for _, zeroed in seen] == ([True] + [False] * 3 if phase == "prefill" else [False] + [True] * 3)


@pytest.mark.parametrize("renormalise", [True, False])
@pytest.mark.parametrize(
    "name", ["qwen3_moe", "gpt_oss", "deepseek_v3", "ernie4_5_moe", "gemma4+text", "longcat_flash"]
)
def test_ranks_keep_the_weights_of_these_ranks(name: str, renormalise: bool) -> None:
    model = wrap(shared(name), name=name)
    site = model.sites[0]
    plain = reading(model, site)
    with Live(model, {site.key: [Act("ranks", ranks=(1,), renormalise=renormalise)]}):
        got = reading(model, site)
    want = torch.zeros_like(plain.weight)
    want[:, 1] = plain.weight.sum(-1) if renormalise else plain.weight[:, 1]
    by_id = lambda r: r.expert.argsort(-1)  # noqa: E731
    assert torch.equal(got.expert.sort(-1).values, plain.expert.sort(-1).values)
    torch.testing.assert_close(got.weight.gather(-1, by_id(got)), want.gather(-1, by_id(plain)))


@pytest.mark.parametrize("p", [0.05, 0.3, 0.6, 1.0])
def test_top_p_keeps_the_first_ranks_that_reach_p(p: float) -> None:
    model = wrap(shared("qwen3_moe"), name="m")
    site = model.sites[0]
    plain = reading(model, site)
    assert plain.logits is not None
    with Live(model, {site.key: [Act("top_p", factor=p, renormalise=False)]}):
        got = reading(model, site)
    for token in range(0, len(plain.expert), 7):
        total, kept = 0.0, set()
        shares = plain.logits[token].softmax(-1)
        for expert in plain.expert[token].tolist():
            if total < p:
                kept.add(expert)
            total += float(shares[expert])
        ran = {e for e, w in zip(got.expert[token].tolist(), got.weight[token].tolist(), strict=True) if w != 0}
        assert ran == kept


def test_a_patch_brings_routing_from_elsewhere() -> None:
    model = wrap(shared("qwen3_moe"), name="m")
    site = model.sites[1]
    batch = batch_of(model)
    plain = reading(model, site)
    other = torch.roll(batch, 1, 0)
    ids, weights = torch.roll(plain.expert.view(4, 64, -1), 1, 0)[0], torch.roll(plain.weight.view(4, 64, -1), 1, 0)[0]
    where = Where(batch=(0,))
    with Live(model, {site.key: [Act("patch", ids=ids, weights=weights, where=where)]}, check=False):
        got = reading(model, site)
    assert torch.equal(got.expert.view(4, 64, -1)[0].sort(-1).values, ids.sort(-1).values)
    assert torch.equal(got.expert.view(4, 64, -1)[1:], plain.expert.view(4, 64, -1)[1:])
    assert other.shape == batch.shape


def test_what_cannot_be_is_refused() -> None:
    model = wrap(shared("qwen3_moe"), name="m")
    key = model.sites[0].key
    for acts, words in [
        ({"L099": [Act("zero", (1,))]}, "No site 'L099'"),
        ({key: [Act("zero", (99,))]}, "no expert 99"),
        ({key: [Act("promote", (0, 1, 2))]}, "cannot all be promoted where 2 are selected"),
        ({key: [Act("mask", tuple(range(7)))]}, "leaves too few to select 2"),
        ({key: [Act("ranks", ranks=(2,))]}, "are not among them"),
    ]:
        with pytest.raises(ms.MoescopeError, match=words):
            Live(model, acts)  # type: ignore[arg-type]
    for name, act, words in [
        ("doge", Act("mask", (1,)), "product keys"),
        ("deepseek_v4", Act("mask", (1,)), "table of token ids"),
        ("llama4", Act("ranks", ranks=(0,)), "never handed ids and weights"),
        ("cohere2_moe", Act("scale", (1,), 2.0, "score"), "cannot be edited"),
    ]:
        refusing = wrap(shared(name), name=name)
        before = run(refusing)
        with pytest.raises(ms.RefusedError, match=words), Live(refusing, {s.key: [act] for s in refusing.sites}):
            pass
        assert torch.equal(run(refusing), before)
