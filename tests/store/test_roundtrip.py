"""Whatever is appended is read back, bit for bit, from the store and from each shard."""

import shutil
import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moescope.errors import StoreError
from moescope.store import Batch, Store, StoreWriter

from .compare import assert_holds
from .made import ALL_TIERS, a_manifest, a_site, made_batches

floats = st.sampled_from(["float32", "float16", "bfloat16"])


def write(folder, manifest, batches):
    with StoreWriter.create(folder, manifest) as writer:
        for batch in batches:
            writer.append(batch)
    return Store.open(folder)


@st.composite
def captures(draw):
    """A manifest with one to three sites of any size and type, and the batches of a capture."""
    sites = []
    for layer in draw(st.lists(st.integers(0, 120), min_size=1, max_size=3, unique=True)):
        n_experts = draw(st.one_of(st.integers(1, 600), st.sampled_from([255, 256, 257])))
        top_k = draw(st.integers(1, min(n_experts, 12)))
        dtypes = {"weight_dtype": draw(floats), "logit_dtype": draw(floats)}
        sites.append(a_site(layer, n_experts, top_k, slots_can_miss=draw(st.booleans()), **dtypes))
    tiers = draw(st.sets(st.sampled_from(["logits", "experts", "outliers"])))
    shard_tokens = draw(st.integers(1, 80))
    manifest = a_manifest(
        sites,
        ["routing", *sorted(tiers)],
        settings={"shard_tokens": shard_tokens, "logits_compression": draw(st.sampled_from(["none", "zstd"]))},
    )
    n_batches, rows = draw(st.integers(0, 5)), draw(st.integers(4, 30))
    return manifest, made_batches(manifest, n_batches, rows, draw(st.integers(0, 1000)))


@settings(max_examples=25, deadline=None)
@given(captures())
def test_batches_come_back_bit_for_bit(capture):
    manifest, batches = capture
    folder = Path(tempfile.mkdtemp())
    try:
        store = write(folder / "store", manifest, batches)
        if batches:
            assert_holds(store, batches)
        assert store.status == "complete"
        assert store.check() == []
    finally:
        shutil.rmtree(folder)


def test_large_shards_cross_row_groups(tmp_path):
    manifest = a_manifest([a_site(0, 16, 4, logit_dtype="bfloat16")], ["routing", "logits"])
    batches = made_batches(manifest, 2, rows=9000)
    store = write(tmp_path / "s", manifest, batches)
    assert_holds(store, batches)
    whole = store.logits(0)
    for rows in (
        slice(0, 1),
        slice(8190, 8195),
        slice(8192, 16_384),
        slice(17_999, None),
        slice(5, 5),
        slice(-3, None),
    ):
        np.testing.assert_array_equal(store.logits(0, rows), whole[rows])


def test_logits_slices_cross_shards(tmp_path):
    manifest = a_manifest(settings={"shard_tokens": 20})
    store = write(tmp_path / "s", manifest, made_batches(manifest, 4))
    assert len(store.shards) == 4
    whole = store.logits(1)
    for start in range(0, 80, 7):
        for stop in range(start, 80, 11):
            np.testing.assert_array_equal(store.logits(1, slice(start, stop)), whole[start:stop])


def test_shards_also_close_by_bytes(tmp_path):
    manifest = a_manifest(settings={"shard_bytes": 1})
    assert len(write(tmp_path / "s", manifest, made_batches(manifest, 3)).shards) == 3


def test_an_empty_capture_is_a_store(tmp_path):
    store = write(tmp_path / "s", a_manifest(), [])
    assert store.n_tokens == 0
    assert store.tokens().num_rows == 0
    assert store.documents().num_rows == 0
    assert store.sql("select count(*) as n from tokens")["n"][0] == 0
    with pytest.raises(StoreError, match="no committed shard"):
        _ = store.routing(1).expert


def test_text_that_utf8_cannot_hold_keeps_its_length(tmp_path):
    manifest = a_manifest(tiers=["routing"])
    (batch,) = made_batches(manifest, 1)
    document = batch.documents[0]
    broken = type(document)(0, "d\udc80", "ab\ud800cd", "s", {"domain": "x\udfff"}, 20)
    store = write(
        tmp_path / "s", manifest, [Batch(batch.tokens, [broken], {**batch.vocabulary, 3: "\ud800"}, batch.sites)]
    )
    row = store.documents().to_pylist()[0]
    assert row["text"] == "ab?cd"
    assert store.vocabulary()[3] == "?"


def test_reading_ids_leaves_the_weights_alone(tmp_path, monkeypatch):
    from moescope.store.shard import Shard

    manifest = a_manifest()
    store = write(tmp_path / "s", manifest, made_batches(manifest, 1))
    read = []
    original = Shard.table

    def noted(self, name, columns=None, rows=None):
        read.extend(columns or [])
        return original(self, name, columns, rows)

    monkeypatch.setattr(Shard, "table", noted)
    assert store.routing(1).expert.shape == (20, 2)
    assert read == ["L001.expert"]
    routing = store.routing(1, fields=["expert", "valid", "entropy"])
    _ = routing.expert, routing.valid, routing.entropy, routing.entropy
    assert read == ["L001.expert", "L001.expert", "L001.entropy"]


@pytest.mark.parametrize("tier", ALL_TIERS)
def test_a_missing_tier_says_how_to_capture_it(tmp_path, tier):
    have = "outliers" if tier in ("routing", "experts") else "routing"
    manifest = a_manifest(tiers=[have])
    store = write(tmp_path / "s", manifest, made_batches(manifest, 1))
    ask = {
        "routing": lambda: store.routing(1),
        "logits": lambda: store.logits(1),
        "experts": lambda: store.experts(1),
        "outliers": store.outliers,
    }
    with pytest.raises(StoreError, match=rf"no {tier} tier .*capture again with the tiers .*\b{tier}\b"):
        ask[tier]()


def replaced(batch, **changes):
    return Batch(**{**vars(batch), **changes})


def with_site(batch, key, **changes):
    site = batch.sites[key]
    return replaced(batch, sites={**batch.sites, key: type(site)(**{**vars(site), **changes})})


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda b: with_site(b, "L001", expert=np.full((20, 2), 8)), "outside 0..7"),
        (lambda b: with_site(b, "L001", expert=np.full((20, 2), -1)), "outside 0..7"),
        (lambda b: with_site(b, "L001", expert=np.zeros((20, 3), int)), r"shape \(20, 3\), expected \(20, 2\)"),
        (lambda b: with_site(b, "L003", weight=np.zeros((20, 2))), "float64, expected float32"),
        (lambda b: with_site(b, "L003", entropy=None), "L003.entropy is missing"),
        (lambda b: with_site(b, "L003", logits=None), "L003.logits is missing"),
        (lambda b: with_site(b, "L003", valid=np.zeros((20, 2), bool)), "slots_can_miss"),
        (lambda b: replaced(b, sites={"L001": b.sites["L001"]}), "L003 is not in the batch"),
        (lambda b: replaced(b, sites={**b.sites, "L009": b.sites["L001"]}), "L009 is not in the manifest"),
        (lambda b: replaced(b, outliers=None), "has no outliers"),
        (lambda b: replaced(b, vocabulary={0: "a"}), "no text for token id"),
        (lambda b: replaced(b, tokens={**b.tokens, "sentence": b.tokens["document"]}), "unknown token column"),
        (lambda b: replaced(b, tokens={**b.tokens, "phase": np.full(20, "warm-up")}), "prefill"),
        (lambda b: replaced(b, tokens={**b.tokens, "loss": np.zeros(19, np.float32)}), "shape"),
        (
            lambda b: replaced(b, documents=[type(b.documents[0])(0, "a", "b", "c", {"colour": "red"})]),
            "label 'colour'",
        ),
    ],
)
def test_a_batch_that_does_not_fit_is_refused_and_the_others_are_kept(tmp_path, spoil, message):
    manifest = a_manifest()
    batches = made_batches(manifest, 3)
    with pytest.raises(StoreError, match=message):
        write(tmp_path / "s", manifest, [batches[0], spoil(batches[1])])
    store = Store.open(tmp_path / "s")
    assert store.status == "interrupted"
    assert_holds(store, batches[:1])
