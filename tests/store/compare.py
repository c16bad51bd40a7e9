"""What a store must give back: the batches that were appended, bit for bit."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from moescope.store import Batch, Shard, SiteRecord, Store


def exact_float32(values: np.ndarray, name: str) -> np.ndarray:
    """float32 by Python's own conversion of each bit pattern: slow, and independent of the store's."""
    if name == "bfloat16":
        return np.frombuffer(b"".join(b"\0\0" + int(v).to_bytes(2, "little") for v in values.ravel()), "<f4").reshape(
            values.shape
        )
    return values.astype(np.float32)


def assert_bits(got: np.ndarray, wanted: np.ndarray, what: str) -> None:
    assert got.dtype == wanted.dtype, what
    assert got.shape == wanted.shape, what
    np.testing.assert_array_equal(
        np.ascontiguousarray(got).view(np.uint8), np.ascontiguousarray(wanted).view(np.uint8), what
    )


def assert_site_holds(source: Store | Shard, site: SiteRecord, batches: Sequence[Batch], tiers: Sequence[str]) -> None:
    """`source` (a store or one shard) gives exactly the arrays of these batches for one site."""
    arrays = [batch.sites[site.key] for batch in batches]

    def joined(name: str) -> np.ndarray:
        return np.concatenate([getattr(one, name) for one in arrays])

    present = joined("valid") if site.slots_can_miss else np.ones(joined("expert").shape, bool)
    if "routing" in tiers:
        routing = source.routing(site.layer)
        assert routing.expert.dtype.name == site.id_dtype
        np.testing.assert_array_equal(routing.expert[present], joined("expert")[present])
        wanted = exact_float32(joined("weight"), site.weight_dtype)
        assert_bits(routing.weight[present], wanted[present], f"{site.key}.weight")
        if site.slots_can_miss:
            assert routing.valid is not None
            np.testing.assert_array_equal(routing.valid, present)
            assert (routing.expert[~present] >= site.n_experts).all()  # never an expert, so never expert 0
            assert np.isnan(routing.weight[~present]).all()
        else:
            assert routing.valid is None
        for name in ("logsumexp", "entropy", "margin"):
            assert_bits(getattr(routing, name), joined(name), f"{site.key}.{name}")
    if "logits" in tiers:
        wanted = exact_float32(joined("logits"), site.logit_dtype)
        assert_bits(source.logits(site.key), wanted, f"{site.key}.logits")
    if "experts" in tiers:
        for name in ("norm", "absmax"):
            got = getattr(source.experts(site.key), name)
            assert_bits(got[present], joined(name)[present], f"{site.key}.{name}")
            assert np.isnan(got[~present]).all()


def assert_holds(store: Store, batches: Sequence[Batch]) -> None:
    """The whole store, and each of its shards, give back exactly these batches."""
    tiers = store.manifest.tiers
    assert store.n_tokens == sum(len(batch) for batch in batches)
    start = 0
    for shard in store.shards:
        part = batches[start : shard.commit.batches]
        assert shard.n_tokens == sum(len(batch) for batch in part)
        for site in store.sites:
            assert_site_holds(shard, site, part, tiers)
        start = shard.commit.batches
    assert start == len(batches)
    table = store.tokens()
    for name in ("document", "sequence", "position", "token_id", "start", "end"):
        wanted = np.concatenate([batch.tokens[name] for batch in batches])
        assert table[name].to_pylist() == [None if v < 0 and name in ("start", "end") else v for v in wanted.tolist()]
    assert table["phase"].to_pylist() == [str(p) for batch in batches for p in batch.tokens["phase"]]
    losses = np.concatenate([batch.tokens["loss"] for batch in batches])
    assert table["loss"].to_pylist() == [None if np.isnan(v) else v for v in losses.tolist()]
    rows = sorted((row for batch in batches for row in batch.documents), key=lambda row: row.document)
    expected = [
        {"document": r.document, "id": r.id, "text": r.text, "source": r.source, "n_tokens": r.n_tokens, **r.labels}
        for r in rows
    ]
    assert store.documents().to_pylist() == expected
    for site in store.sites:
        assert_site_holds(store, site, batches, tiers)


def assert_same_data(left: Store, right: Store) -> None:
    """Two stores hold the same data, however it is cut into shards."""
    assert left.tokens().to_pylist() == right.tokens().to_pylist()
    assert left.documents().equals(right.documents())
    assert left.vocabulary() == right.vocabulary()
    assert left.outliers().equals(right.outliers())
    assert left.hidden_outliers().equals(right.hidden_outliers())
    for site in left.sites:
        a, b = left.routing(site.key), right.routing(site.key)
        for name in ("expert", "weight", "logsumexp", "entropy", "margin"):
            assert_bits(getattr(a, name), getattr(b, name), f"{site.key}.{name}")
        assert_bits(left.logits(site.key), right.logits(site.key), f"{site.key}.logits")
        assert_bits(left.experts(site.key).norm, right.experts(site.key).norm, f"{site.key}.norm")
