"""The shelf: what lies below the folder is found and opened, what lies outside never is."""

from __future__ import annotations

import gc
import os
import shutil
import weakref

import numpy as np
import pytest

from moescope.app.shelf import Shelf
from moescope.errors import StoreError
from tests.analysis.made_stores import random_truth, write


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    path = tmp_path_factory.mktemp("made") / "one"
    write(path, random_truth(np.random.default_rng(0), 6, [4, 4], [2, 2]), [4, 4], {"domain": list("aabbab")})
    return path


@pytest.fixture
def folder(tmp_path, made):
    root = tmp_path / "root"
    shutil.copytree(made, root / "one")
    shutil.copytree(made, root / "deep" / "two")
    (root / "empty").mkdir()
    return root


def test_every_store_is_found_by_its_path(folder):
    shelf = Shelf(folder)
    assert shelf.names() == ["deep/two", "one"]
    assert shelf.open("deep/two").store.n_tokens == shelf.open("one").store.n_tokens
    assert shelf.sole() is None


def test_a_store_alone_has_its_folders_name(folder):
    shelf = Shelf(folder / "one")
    assert shelf.names() == ["one"]
    assert shelf.open("one").store.path == folder / "one"
    assert shelf.sole() == "one"
    with pytest.raises(StoreError):
        shelf.open("shards")


@pytest.mark.parametrize(
    "name",
    [
        "../outside",
        "..",
        ".",
        "",
        "one/../../outside",
        "/etc",
        "one/",
        "deep//two",
        "link",
        ".hidden",
        "a\0b",
        "..\\x",
        "x" * 5000,
        "loop",
    ],
    ids=lambda name: ascii(name[:12]),
)
def test_no_name_leads_out_of_the_folder(folder, made, name):
    shutil.copytree(made, folder.parent / "outside")
    (folder / "link").symlink_to(folder.parent / "outside")
    (folder / "loop").symlink_to(folder / "loop")
    with pytest.raises(StoreError, match="no store"):
        Shelf(folder).open(name)
    assert "no store" in Shelf(folder).changed(name)


def test_a_store_is_opened_again_only_when_it_has_changed(folder):
    shelf = Shelf(folder)
    first = shelf.open("one")
    assert shelf.open("one") is first
    os.utime(folder / "one" / "manifest.json", ns=(1, 1))
    second = shelf.open("one")
    assert second is not first
    assert second.version != first.version


def test_a_deleted_store_and_a_broken_one_say_so(folder):
    shelf = Shelf(folder)
    shelf.open("one")
    shutil.rmtree(folder / "one")
    assert "no store 'one'" in str(shelf.trouble("one"))
    broken = next((folder / "deep" / "two" / "shards").glob("*/*.parquet"))
    broken.write_bytes(broken.read_bytes()[:-7])
    assert "damaged" in str(shelf.trouble("deep/two"))
    assert str(folder) not in str(shelf.trouble("deep/two"))


def test_no_folder_is_refused(tmp_path):
    with pytest.raises(StoreError, match="is no folder"):
        Shelf(tmp_path / "nothing")


def test_a_deleted_store_is_let_go(folder):
    shelf = Shelf(folder)
    held = weakref.ref(shelf.open("deep/two").store)
    assert held() is not None
    shutil.rmtree(folder / "deep")
    assert shelf.names() == ["one"]
    gc.collect()
    assert held() is None
