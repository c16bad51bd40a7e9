"""The manifest says what is wrong with it, and what keeps a capture from being continued."""

import json

import pytest
from pydantic import ValidationError

from moescope.errors import StoreError
from moescope.store.manifest import first_difference, parse_manifest

from .made import a_manifest, a_site


def written(**changes):
    return json.dumps({**a_manifest().model_dump(), **changes})


def test_a_manifest_survives_json():
    manifest = a_manifest([a_site(2, 300, 6, slots_can_miss=True, scaling=2.5)], loss=True)
    assert parse_manifest(manifest.model_dump_json(), "here") == manifest
    assert manifest.sites[0].id_dtype == "uint16"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not JSON"),
        ("[" * 100_000, "not JSON"),
        ("[]", "not a MoEscope store"),
        ('{"format": "zarr"}', "not a MoEscope store"),
        (written(version=2), "format version 2.*Upgrade"),
        (written(version="x"), "field version"),
        (written(tiers=["routing", "smells"]), r"field tiers\.1"),
        (written(tiers=["experts"]), "needs the routing tier"),
        (written(n_tokenz=3), "field n_tokenz"),
        (written(sites=[]), "field sites"),
        (written(settings={"shard_tokens": 0}), "shard_tokens"),
        (written(settings={"logits_compression": "gzip"}), "logits_compression"),
    ],
    ids=lambda value: value[:24] if isinstance(value, str) else None,
)
def test_a_bad_manifest_is_named_by_field(text, message):
    with pytest.raises(StoreError, match=message) as caught:
        parse_manifest(text, "runs/x")
    assert "runs/x" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("label", ["document", "Text", "n_tokens", "source", "id", " "])
def test_labels_may_not_take_fixed_names(label):
    with pytest.raises(ValidationError, match="label"):
        a_manifest(labels=[label])


def test_labels_that_sql_cannot_tell_apart_are_refused():
    with pytest.raises(ValidationError, match="twice"):
        a_manifest(labels=["Domain", "domain"])


@pytest.mark.parametrize(
    "wrong", [{"top_k": 9}, {"key": "3"}, {"key": "L001.x"}, {"id_dtype": "uint16"}, {"n_experts": 70_000}]
)
def test_bad_sites_are_refused(wrong):
    record = {**a_site(1, 8, 2).model_dump(), **wrong}
    with pytest.raises(ValidationError):
        a_site().model_validate(record)


def test_site_keys_are_unique():
    with pytest.raises(ValidationError, match="used twice"):
        a_manifest([a_site(1), a_site(1)])


def test_two_sites_of_one_layer_have_their_own_keys():
    second = a_site(1).model_copy(update={"key": "L001-attention"})
    assert [site.key for site in a_manifest([a_site(1), second]).sites] == ["L001", "L001-attention"]


def test_differences_that_change_the_data_are_found():
    old = a_manifest(versions={"torch": "2.13", "python": "3.12"})
    same = old.model_copy(
        update={"store_id": "other", "status": "interrupted", "versions": {"torch": "2.13", "python": "3.13"}}
    )
    assert first_difference(old, same) is None
    other_model = old.model.model_copy(update={"revision": "abc"})
    assert first_difference(old, old.model_copy(update={"model": other_model})) == "model.revision: None -> 'abc'"
    torch = old.model_copy(update={"versions": {"torch": "2.14"}})
    assert first_difference(old, torch) == "versions.torch: '2.13' -> '2.14'"
    settings = old.model_copy(update={"settings": {"seed": 1}})
    assert first_difference(old, settings) == "settings.seed: None -> 1"
    sites = old.model_copy(update={"sites": [a_site(1), a_site(3, top_k=4)]})
    assert first_difference(old, sites) == "sites[1].top_k: 2 -> 4"
