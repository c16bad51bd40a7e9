"""Capture while generating: the model writes what it would have written, and every row is that of a fresh forward."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import moescope as ms
from moescope.capturing.generating import feels_left_padding
from moescope.hooks import Tap, Want
from moescope.store import Store, check_store
from tests.capturing.texts import model, rows, tokenizer

# Every way of routing and caching: full, sliding and chunked attention, latent attention, linear attention, mamba.
FAMILIES = [
    "qwen2_moe", "qwen3_moe", "mixtral", "olmoe", "gpt_oss", "deepseek_v2", "deepseek_v3", "deepseek_v4+nohash",
    "granitemoe", "granitemoehybrid", "lfm2_moe", "qwen3_next", "jamba", "minimax", "minimax_m2", "nemotron_h", "zaya",
    "gemma4+text", "glm4_moe", "phimoe", "ernie4_5_moe", "hunyuan_v1_moe", "dbrx", "jetmoe", "llama4",
    "longcat_flash", "flex_olmo", "afmoe", "bailing_hybrid", "kimi_linear", "mellum", "granitemoeshared",
    "granitemoe_swa", "mistral4", "lara_mini", "axk1", "beam", "cohere2_moe", "dots1", "exaone_moe", "flint",
    "glm4_moe_lite", "hy_v3", "kolibri1", "laguna", "mimo_v2_flash", "solar_open", "aria", "gemma4", "muse_spark",
    "inkling", "deepseek_ocr2", "unlimited_ocr", "ernie4_5_vl_moe", "glm4v_moe", "glm5_next", "minimax_m3_vl",
    "qwen3_5_moe", "qwen3_omni_moe", "qwen3_vl_moe", "qwen4_exp", "step3p7",
]  # fmt: skip
# What these say of a token depends on the tokens after it, so that no row can be compared with a longer text's: an
# indexer picks keys by scores that tie at zero, and ties fall by place; doge mixes the scores of a batch's tokens.
UNSTEADY = ["axk2", "deepseek_v32", "dots3_note", "glm_moe_dsa", "hy_v4", "hy_v4_vl", "mistral_large4", "doge"]
NEW = 6


def prompts() -> list[dict[str, str]]:
    return rows(6, seed=3, longest=9)


def written(name: str, out: Path, **options: Any) -> Store:
    generate = {"max_new_tokens": NEW, **options}
    return ms.capture(
        model(name), ms.Corpus(prompts(), ["kind"]), out,
        ["routing", "logits", "experts", "outliers"], batch_tokens=128, generate=generate,
    )  # fmt: skip


def by_document(store: Store) -> Iterator[tuple[np.ndarray, Any]]:
    """Row numbers and token columns of each document."""
    tokens = store.tokens().to_pandas()
    for _, part in tokens.groupby("document"):
        yield part.index.to_numpy(), part


@pytest.mark.parametrize("name", FAMILIES)
def test_rows_equal_a_fresh_forward_over_the_whole_text(name: str, tmp_path: Path) -> None:
    store = written(name, tmp_path / "store")
    hf, loaded = model(name).hf, model(name)
    assert check_store(tmp_path / "store") == []
    for mine, part in by_document(store):
        ids = torch.tensor([part["token_id"].tolist()])
        with torch.no_grad(), Tap(hf, loaded.sites, loaded.semantics, Want(logits=True, experts=True)) as tap:
            tap.begin(ids.numel())
            hf(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False)
            fresh = tap.take().sites
        for site in store.sites:
            got, want = store.routing(site.key), fresh[site.key]
            assert want.logits is not None
            assert want.norm is not None
            np.testing.assert_allclose(store.logits(site.key)[mine], want.logits, rtol=1e-3, atol=2e-4)
            same = (np.sort(got.expert[mine]) == want.expert.sort(-1).values.numpy()).all(1)
            assert want.margin is not None
            near_tie = want.margin.numpy() < 1e-4
            assert (same | near_tie).all()
            np.testing.assert_allclose(got.weight[mine][same], want.weight[same], rtol=5e-3, atol=1e-4)
            norm = store.experts(site.key).norm[mine][same]
            np.testing.assert_allclose(norm, want.norm[same], rtol=5e-3, atol=1e-4)


@pytest.mark.parametrize("name", UNSTEADY)
def test_what_cannot_equal_a_fresh_forward_is_the_models_own(name: str) -> None:
    """Plain transformers, nothing of ours: the same prefix, with and without what follows."""
    hf, furthest = model(name).hf, 0.0
    for seed in range(6):
        ids = torch.randint(3, 90, (1, 16), generator=torch.Generator().manual_seed(seed))
        with torch.no_grad():
            whole = hf(input_ids=ids, use_cache=False).logits[0]
            for length in range(5, 16, 2):
                prefix = hf(input_ids=ids[:, :length], use_cache=False).logits[0]
                furthest = max(furthest, float((prefix - whole[:length]).abs().max()))
    assert furthest > 1e-2


@pytest.mark.parametrize("name", ["qwen2_moe", "gpt_oss", "qwen3_next", "granitemoehybrid", "glm5_next"])
def test_most_models_do_not_feel_their_padding(name: str) -> None:
    assert not feels_left_padding(model(name))


@pytest.mark.parametrize("name", ["deepseek_v4+nohash", "deepseek_v32", "hy_v4"])
def test_models_that_feel_their_padding_get_prompts_one_by_one(name: str) -> None:
    assert feels_left_padding(model(name))


@pytest.mark.parametrize("name", ["qwen2_moe", "gpt_oss"])
def test_phases_positions_and_texts(name: str, tmp_path: Path) -> None:
    store = written(name, tmp_path / "store")
    documents = store.documents().to_pandas().set_index("document")
    end = tokenizer().eos_token_id
    for number, (_, part) in enumerate(by_document(store)):
        prompt = tokenizer()(prompts()[number]["text"])["input_ids"]
        assert part["position"].tolist() == list(range(len(part)))
        assert part["phase"].tolist() == ["prefill"] * len(prompt) + ["decode"] * (len(part) - len(prompt))
        assert part["token_id"].tolist()[: len(prompt)] == prompt
        with torch.no_grad():
            plain = (
                model(name)
                .hf.generate(torch.tensor([prompt]), max_new_tokens=NEW, do_sample=False, pad_token_id=0)[0]
                .tolist()
            )
        assert part["token_id"].tolist() == plain[: len(part)]
        assert len(part) == (plain.index(end) if end in plain[len(prompt) :] else len(plain) - 1)
        whole = prompts()[number]["text"] + tokenizer().decode(plain[len(prompt) :], skip_special_tokens=True)
        assert documents.loc[number, "text"] == whole
        for row in part[part["start"] >= 0].itertuples():
            piece = whole[int(row.start) : int(row.end)]
            assert piece == tokenizer().decode([row.token_id]) or row.phase == "prefill"


def test_what_is_written_does_not_depend_on_the_taps(tmp_path: Path) -> None:
    hf, batch = model().hf, tokenizer()([row["text"] for row in prompts()], return_tensors="pt", padding=True,
                                        padding_side="left", return_token_type_ids=False)  # fmt: skip
    options = {"max_new_tokens": NEW, "return_dict_in_generate": True, "output_scores": True, "do_sample": False}
    plain = hf.generate(**batch, **options)
    loaded = model()
    with Tap(hf, loaded.sites, loaded.semantics, Want(logits=True, experts=True, outliers=True)) as tap:
        undo = hf.register_forward_pre_hook(
            lambda module, args, kwargs: tap.begin(kwargs["input_ids"].numel()), with_kwargs=True
        )
        tapped = hf.generate(**batch, **options)
        undo.remove()
    assert torch.equal(plain.sequences, tapped.sequences)
    for a, b in zip(plain.scores, tapped.scores, strict=True):
        assert torch.equal(a, b)


def test_sequences_that_end_early_keep_only_what_was_run_for_them(tmp_path: Path) -> None:
    free = written("qwen2_moe", tmp_path / "free")
    first = [part[part["phase"] == "decode"]["token_id"].iloc[0] for _, part in by_document(free)]
    end = int(first[0])  # what one prompt's answer begins with ends every sequence that writes it
    store = written("qwen2_moe", tmp_path / "ended", eos_token_id=end)
    shorter = 0
    for (_, long), (_, short) in zip(by_document(free), by_document(store), strict=True):
        ids, decoded = long["token_id"].tolist(), long[long["phase"] == "decode"]["token_id"].tolist()
        keep = len(ids) - len(decoded) + (decoded.index(end) if end in decoded else len(decoded))
        assert short["token_id"].tolist() == ids[:keep]
        shorter += keep < len(ids)
    assert shorter > 0


def test_maxima_are_those_of_all_rows(tmp_path: Path) -> None:
    store = written("qwen2_moe", tmp_path / "store")
    outliers = store.outliers().to_pandas()
    tokens = store.tokens().to_pandas()
    for site in store.sites:
        routing, experts = store.routing(site.key), store.experts(site.key)
        for expert in range(site.n_experts):
            hit = routing.expert == expert
            row = outliers[(outliers["site"] == site.key) & (outliers["expert"] == expert)].iloc[0]
            assert row["tokens"] == hit.sum()
            if hit.any():
                assert row["absmax_out"] == experts.absmax[hit].max()
                at = int(np.where(hit, experts.absmax, -1).max(1).argmax())
                for name in ("document", "position", "token_id"):
                    assert row[name] == tokens.loc[at, name]


def test_sampling_is_repeatable_and_really_samples(tmp_path: Path) -> None:
    options = {"do_sample": True, "temperature": 3.0, "top_k": 0, "seed": 7}
    stores = [written("qwen2_moe", tmp_path / str(n), **options) for n in range(2)]
    other = written("qwen2_moe", tmp_path / "other", **{**options, "seed": 8})
    ids = [store.tokens(["token_id"])["token_id"].to_pylist() for store in (*stores, other)]
    assert ids[0] == ids[1]
    assert ids[0] != ids[2]


def test_resumed_equals_uninterrupted(tmp_path: Path) -> None:
    options: dict[str, Any] = {
        "tiers": ["routing"], "batch_tokens": 16, "shard_tokens": 16,
        "generate": {"max_new_tokens": NEW, "do_sample": True, "temperature": 2.0},
    }  # fmt: skip
    corpus = ms.Corpus(prompts(), ["kind"])
    whole = ms.capture(model(), corpus, tmp_path / "whole", **options)

    def stop(done: int) -> None:
        if done > 20:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        ms.capture(model(), corpus, tmp_path / "parts", **options, on_progress=stop)
    parts = ms.capture(model(), corpus, tmp_path / "parts", **options, resume=True)
    assert whole.tokens().equals(parts.tokens())
    for site in whole.sites:
        assert (whole.routing(site.key).expert == parts.routing(site.key).expert).all()
    changed = {**options, "generate": {**options["generate"], "temperature": 1.0}}
    with pytest.raises(ms.MoescopeError, match="generate"):
        ms.capture(model(), corpus, tmp_path / "parts", **changed, resume=True)


def test_experts_that_run_otherwise_while_decoding_are_read_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a GPU `generate` switches grouped_mm to batched_mm after the prompt; here the switch is made by hand."""
    hf = model("qwen3_moe").hf
    seen: list[str] = []

    @contextlib.contextmanager
    def switched() -> Iterator[None]:
        before = hf.get_experts_implementation()
        hf.set_experts_implementation("batched_mm")
        seen.append(model("qwen3_moe").experts_implementation or "")
        try:
            yield
        finally:
            hf.set_experts_implementation(before)

    usual = written("qwen3_moe", tmp_path / "usual")
    monkeypatch.setattr(hf, "_optimize_model_for_decode", switched)
    store = written("qwen3_moe", tmp_path / "switched")
    assert set(seen) == {"batched_mm"}
    assert usual.tokens().equals(store.tokens())
    for site in usual.sites:
        np.testing.assert_allclose(store.experts(site.key).norm, usual.experts(site.key).norm, rtol=1e-4)


def test_a_one_token_prompt_and_one_new_token(tmp_path: Path) -> None:
    store = ms.capture(
        model(), ms.Corpus([{"text": ""}, {"text": "sun"}]), tmp_path / "s", generate={"max_new_tokens": 1}
    )
    assert set(store.tokens(["phase"])["phase"].to_pylist()) == {"prefill"}  # the one token written is never run


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({}, "needs max_new_tokens"),
        ({"max_new_tokens": 0}, "at least 1"),
        ({"max_new_tokens": 4, "num_beams": 2}, "does not know the generation option 'num_beams'"),
        ({"max_new_tokens": 10_000}, "leave no room for a prompt"),
    ],
)
def test_bad_options_are_refused_before_anything_runs(options: dict[str, Any], sentence: str, tmp_path: Path) -> None:
    with pytest.raises(ms.MoescopeError, match=sentence):
        ms.capture(model(), ms.Corpus(prompts()), tmp_path / "s", generate=options)
    assert not (tmp_path / "s").exists()


@pytest.mark.parametrize("name", ["switch_transformers", "openai_privacy_filter", "diffusion_gemma"])
def test_models_that_cannot_are_refused_by_name(name: str, tmp_path: Path) -> None:
    with pytest.raises(ms.RefusedError, match=r"no row is one token of both|cannot generate"):
        ms.capture(model(name), ms.Corpus(prompts()), tmp_path / "s", generate={"max_new_tokens": 2})


@pytest.mark.parametrize(("name", "more"), [("qwen2_moe", {}), ("gpt_oss", {"use_cache": False}),
                                            ("qwen3_next", {"do_sample": True, "temperature": 2.0})])  # fmt: skip
def test_the_loss_of_what_is_written_is_that_of_a_fresh_forward(name: str, more: Any, tmp_path: Path) -> None:
    store = ms.capture(
        model(name), ms.Corpus(prompts(), ["kind"]), tmp_path / "s", ["routing"], batch_tokens=128,
        loss=True, generate={"max_new_tokens": NEW, **more},
    )  # fmt: skip
    assert store.check() == []
    for _, part in by_document(store):
        ids = torch.tensor([part["token_id"].tolist()])
        with torch.no_grad():
            logits = model(name).hf(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits
        want = torch.nn.functional.cross_entropy(logits[0, :-1], ids[0, 1:], reduction="none").numpy()
        decoded = (part["phase"] == "decode").to_numpy()
        assert decoded.any()
        np.testing.assert_allclose(part["loss"].to_numpy()[decoded], want[decoded[1:]], rtol=1e-3, atol=1e-4)
        assert part["loss"][~decoded].isna().all()
