"""A capture holds what a plain forward pass of each document shows, whatever the batching, interrupted or not."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import moescope as ms
from moescope.capturing.run import token_losses
from moescope.hooks.model import Model
from moescope.store import Store, check_store
from tests.capturing.texts import model, rows, tokenizer

TIERS = ["routing", "logits", "experts", "outliers"]


def captured(out: Path, **options: Any) -> Store:
    options = {"tiers": TIERS, "loss": True, "batch_tokens": 128, "max_length": 16, **options}
    return ms.capture(model(), ms.Corpus(rows(), ["kind"]), out, **options)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return captured(tmp_path_factory.mktemp("capture") / "store")


def contexts(max_length: int = 16) -> Iterator[tuple[int, list[int]]]:
    """Every model context by hand: document number and token ids."""
    for number, row in enumerate(rows()):
        ids = tokenizer()(row["text"])["input_ids"]
        for start in range(0, len(ids), max_length):
            yield number, ids[start : start + max_length]


def by_sequence(store: Store) -> dict[int, np.ndarray]:
    """Row numbers of each sequence."""
    sequence = store.tokens(["sequence"])["sequence"].to_numpy()
    return {int(number): np.flatnonzero(sequence == number) for number in np.unique(sequence)}


def test_tokens_are_those_of_the_texts_and_no_pads(store: Store) -> None:
    tokens, places = store.tokens().to_pandas(), by_sequence(store)
    for number, (document, ids) in enumerate(contexts()):
        here = tokens.iloc[places[number]]
        assert here["token_id"].tolist() == ids
        assert here["position"].tolist() == list(range(len(ids)))
        assert set(here["document"]) == {document}
    assert len(tokens) == sum(len(ids) for _, ids in contexts())


def test_every_row_equals_a_plain_forward_of_its_context_alone(store: Store) -> None:
    hf = model().hf
    places = by_sequence(store)
    routing = {site.layer: store.routing(site.layer) for site in store.sites}
    logits = {site.layer: store.logits(site.layer) for site in store.sites}
    loss = store.tokens(["loss"])["loss"].to_numpy(zero_copy_only=False)
    for number, (_, ids) in enumerate(contexts()):
        batch = torch.tensor([ids])
        with torch.no_grad():
            output = hf(batch, output_router_logits=True, use_cache=False)
        for ordinal, site in enumerate(store.sites):
            mine = places[number]
            np.testing.assert_allclose(logits[site.layer][mine], output.router_logits[ordinal], rtol=1e-4, atol=1e-5)
            probabilities = output.router_logits[ordinal].softmax(-1)
            best = probabilities.topk(site.top_k)
            assert (np.sort(routing[site.layer].expert[mine]) == best.indices.sort(-1).values.numpy()).all()
            np.testing.assert_allclose(routing[site.layer].weight[mine], best.values, rtol=1e-3, atol=1e-5)
            entropy = -(probabilities * probabilities.log()).sum(-1)
            np.testing.assert_allclose(routing[site.layer].entropy[mine], entropy, rtol=1e-3, atol=1e-5)
            lse = output.router_logits[ordinal].logsumexp(-1)
            np.testing.assert_allclose(routing[site.layer].logsumexp[mine], lse, rtol=1e-3, atol=1e-5)
            ranked = probabilities.sort(-1, descending=True).values
            margin = ranked[:, site.top_k - 1] - ranked[:, site.top_k]
            np.testing.assert_allclose(routing[site.layer].margin[mine], margin, rtol=1e-2, atol=1e-5)
        want = -output.logits[0].log_softmax(-1)[torch.arange(len(ids) - 1), batch[0, 1:]]
        np.testing.assert_allclose(loss[places[number]][1:], want, rtol=1e-3, atol=1e-4)
        assert np.isnan(loss[places[number]][0])


def test_spans_and_labels_lead_back_to_the_text(store: Store) -> None:
    documents = {row["document"]: row for row in store.documents().to_pylist()}
    assert [documents[n]["kind"] for n in sorted(documents)] == [row["kind"] for row in rows()]
    assert [documents[n]["id"] for n in sorted(documents)] == [row["id"] for row in rows()]
    for token in store.tokens().to_pylist():
        if token["token_id"] == tokenizer().bos_token_id:
            assert token["start"] is None
            continue
        piece = documents[token["document"]]["text"][token["start"] : token["end"]]
        assert piece
        assert token["start"] < token["end"]


def test_outliers_are_the_maxima_of_the_rows(store: Store) -> None:
    outliers = store.outliers().to_pandas()
    tokens = store.tokens().to_pandas()
    for site in store.sites:
        experts, ids = store.experts(site.layer), store.routing(site.layer).expert
        for expert in range(site.n_experts):
            row = outliers[(outliers.layer == site.layer) & (outliers.expert == expert)].iloc[0]
            chosen = ids == expert
            assert row.tokens == chosen.sum()
            if not chosen.any():
                assert np.isnan(row.absmax_out)
                continue
            values = np.where(chosen, experts.absmax, -np.inf)
            assert row.absmax_out == values.max()
            where = tokens[(tokens.document == row.document) & (tokens.position == row.position)].index
            assert values[where].max() == row.absmax_out


def test_store_is_whole_and_says_what_it_is(store: Store) -> None:
    assert check_store(store.path) == []
    manifest = store.manifest
    assert manifest.status == "complete"
    assert manifest.corpus.labels == ["kind"]
    assert manifest.self_check is not None
    assert manifest.self_check["logits_identical"] is True
    assert manifest.n_tokens == store.n_tokens == sum(len(ids) for _, ids in contexts())


def content(store: Store) -> dict[str, Any]:
    tokens = store.tokens().to_pydict()
    order = np.lexsort((tokens["position"], tokens["sequence"]))
    picked: dict[str, Any] = {name: [values[i] for i in order] for name, values in tokens.items()}
    for site in store.sites:
        routing = store.routing(site.layer)
        picked[site.key] = (routing.expert[order].tolist(), routing.weight[order].tolist())
    picked["outliers"] = store.outliers().to_pylist()
    return picked


class Stop(Exception):
    """Stands for whatever ends a capture in the middle."""


@pytest.mark.parametrize("batches_done", [1, 2, 4])
def test_interrupted_and_resumed_equals_uninterrupted(store: Store, tmp_path: Path, batches_done: int) -> None:
    seen = 0

    def interrupt(tokens: int) -> None:
        nonlocal seen
        seen += 1
        if seen == batches_done:
            raise Stop

    with pytest.raises(Stop):
        captured(tmp_path / "s", on_progress=interrupt)
    half = Store.open(tmp_path / "s")
    assert half.status == "interrupted"
    assert 0 < half.n_tokens < store.n_tokens
    assert check_store(tmp_path / "s") == []
    resumed = captured(tmp_path / "s", resume=True)
    a, b = content(resumed), content(store)
    for name in b:
        assert str(a[name]) == str(b[name]), name  # as text: nan equals nan


def test_ctrl_c_leaves_a_store_that_opens(tmp_path: Path) -> None:
    def press(tokens: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        captured(tmp_path / "s", on_progress=press)
    assert Store.open(tmp_path / "s").n_tokens > 0


def test_bfloat16_weights_and_logits_are_stored_to_the_bit(tmp_path: Path) -> None:
    from moescope.hooks import wrap
    from tests.zoo import build

    half = wrap(build("olmoe", torch.bfloat16), tokenizer(), name="olmoe")
    store = ms.capture(half, ms.Corpus(rows(3), ["kind"]), tmp_path / "s", tiers=["routing", "logits"])
    site = store.sites[0]
    assert (site.weight_dtype, site.logit_dtype) == ("bfloat16", "bfloat16")
    kept: list[torch.Tensor] = []
    gate = half.hf.get_submodule(half.sites[0].router)
    handle = gate.register_forward_hook(lambda module, args, output: kept.append(output[0].float()))
    order = by_sequence(store)
    longest = max(order, key=lambda number: len(order[number]))  # stands alone in front: no padding before it
    ids = torch.tensor([store.tokens()["token_id"].to_numpy()[order[longest]].tolist()])
    with torch.inference_mode():
        half.forward(ids)
    handle.remove()
    got = store.logits(0)[order[longest]]
    assert set(np.unique(got)) <= set(np.unique(torch.from_numpy(got).bfloat16().float().numpy()))
    np.testing.assert_allclose(got, kept[0].numpy(), rtol=0.05, atol=0.05)


def test_a_skipped_token_is_null_and_not_expert_0(tmp_path: Path) -> None:
    """zaya sends a token to no expert as id 0 with weight 0."""
    store = ms.capture(model("zaya"), ms.Corpus(rows(12)), tmp_path / "s", TIERS)
    assert check_store(store.path) == []
    skipped = 0
    for site in store.sites:
        assert site.slots_can_miss
        routing, experts = store.routing(site.layer), store.experts(site.layer)
        assert routing.valid is not None
        missing = ~routing.valid
        skipped += int(missing.sum())
        assert np.isnan(experts.norm[missing]).all()
        assert not np.isnan(experts.norm[~missing]).any()
        assert (routing.weight[~missing] > 0).all()
        outliers = store.outliers().to_pandas().query(f"layer == {site.layer}")
        assert outliers.tokens.sum() == (~missing).sum()
    assert skipped > 0
    counted = ms.analysis.load(store)["count"]
    assert int(counted.sum()) == store.n_tokens * len(store.sites) - skipped


def test_routing_alone_writes_nothing_else(tmp_path: Path) -> None:
    store = ms.capture(model(), ms.Corpus(rows(4)), tmp_path / "s", tiers=["routing"])
    assert store.tiers == ["routing"]
    with pytest.raises(ms.StoreError, match="logits"):
        store.logits(0)


def test_token_losses_equal_log_softmax() -> None:
    logits, ids = torch.randn(2, 7, 11), torch.randint(0, 11, (2, 7))
    want = -logits.log_softmax(-1)[:, :-1].gather(-1, ids[:, 1:, None])[..., 0]
    torch.testing.assert_close(token_losses(logits, ids)[:, 1:], want)
    assert torch.isnan(token_losses(logits, ids)[:, 0]).all()


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"tiers": ["routing", "colour"]}, "Unknown tier 'colour'"),
        ({"tiers": []}, "at least one tier"),
        ({"max_length": 10_000}, "exceeds"),
        ({"max_length": 0}, "at least 1"),
    ],
)
def test_bad_options_write_nothing(tmp_path: Path, options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ms.MoescopeError, match=sentence):
        captured(tmp_path / "s", **options)
    assert not (tmp_path / "s").exists()


def test_an_occupied_folder_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("keep")
    with pytest.raises(ms.MoescopeError, match="already exists"):
        captured(tmp_path)
    assert [f.name for f in tmp_path.iterdir()] == ["mine.txt"]


def test_another_corpus_cannot_be_resumed(tmp_path: Path) -> None:
    def press(tokens: int) -> None:
        raise Stop

    with pytest.raises(Stop):
        captured(tmp_path / "s", on_progress=press)
    with pytest.raises(ms.StoreError, match="corpus"):
        ms.capture(model(), ms.Corpus(rows(5), ["kind"]), tmp_path / "s", tiers=TIERS, loss=True, batch_tokens=128,
                   max_length=16, resume=True)  # fmt: skip


def test_a_model_without_tokenizer_is_refused(tmp_path: Path) -> None:
    bare = Model(model().hf, None, "bare")
    with pytest.raises(ms.MoescopeError, match="tokenizer"):
        ms.capture(bare, ms.Corpus(rows(2)), tmp_path / "s")


def test_a_forecast_that_does_not_fit_the_disk_stops_before_it_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("moescope.capturing.forecast._free", lambda out: 10)
    with pytest.raises(ms.MoescopeError, match="free"):
        captured(tmp_path / "s")
    assert not (tmp_path / "s").exists()


def test_the_forecast_counts_small_corpora_exactly(tmp_path: Path) -> None:
    seen = []
    store = captured(tmp_path / "s", on_forecast=seen.append)
    assert seen[0].tokens == store.n_tokens
    assert seen[0].exact
    assert json.loads((tmp_path / "s" / "manifest.json").read_text())["n_tokens"] == store.n_tokens
