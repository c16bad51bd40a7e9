"""Nearest experts, groups, and places of tokens, against brute force over the truth of made stores."""

from __future__ import annotations

import numpy as np
import pytest
import xarray as xr

from moescope.analysis.maps import expert_features
from moescope.analysis.nearest import linked, map_groups, nearest_experts, preferred_labels
from moescope.analysis.token_places import documents_of_tokens, first_places
from moescope.errors import MoescopeError
from tests.analysis.made_stores import random_truth, write


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    rng = np.random.default_rng(3)
    truth = random_truth(rng, 15, [6, 4], [2, 2], longest=50)
    store = write(
        tmp_path_factory.mktemp("near") / "s", truth, [6, 4], {"domain": list("abc") * 5}, layers=[1, 3], cuts=4
    )
    return truth, store


def test_distances_are_of_the_shares_by_hand(made):
    truth, store = made
    label = truth.document % 3
    size = np.bincount(label)
    rows = []
    for width, expert, valid in zip([6, 4], truth.expert, truth.valid, strict=True):
        for one in range(width):
            count = np.bincount(label, weights=((expert == one) & valid).any(axis=1), minlength=3) / size
            rows.append(np.sqrt(count / count.sum()))
    away = np.linalg.norm(np.array(rows) - rows[6 + 2], axis=1)
    found = nearest_experts(store, "L003", 2)
    flat = np.concatenate([found["distance"].values[0], found["distance"].values[1, :4]])
    assert np.isnan(flat[8])
    np.testing.assert_allclose(np.delete(flat, 8), np.delete(away, 8), atol=1e-12)
    np.testing.assert_allclose(np.nanmedian(found["ratio"]), 1)
    with pytest.raises(MoescopeError, match="there is no 5"):
        nearest_experts(store, "L003", 5)
    with pytest.raises(MoescopeError, match="no layer L009"):
        nearest_experts(store, "L009", 0)


def test_groups_are_links_of_mutual_neighbours():
    rng = np.random.default_rng(0)
    rows = np.concatenate([rng.normal(size=(n, 4)) * 0.1 + 10 * where for where, n in enumerate((9, 6, 4))])
    rows = np.concatenate([rows, [[99.0, 0, 0, 0]]])
    group = linked(rows, 3)
    away = np.linalg.norm(rows[:, None] - rows[None], axis=2)
    np.fill_diagonal(away, np.inf)
    near = [set(np.argsort(each)[:3].tolist()) for each in away]
    reached = np.arange(len(rows))
    for _ in rows:  # the smallest number that spreads along the links, by hand
        for i in range(len(rows)):
            for j in near[i]:
                if i in near[j]:
                    reached[[i, j]] = min(reached[i], reached[j])
    same = reached[:, None] == reached[None]
    alone = same.sum(axis=1) == 1
    np.testing.assert_array_equal(group == 0, alone)
    together = (group[:, None] == group[None])[~alone][:, ~alone]
    np.testing.assert_array_equal(together, same[~alone][:, ~alone])
    assert group[-1] == 0
    sizes = np.bincount(group)[1:]
    assert (np.diff(sizes) <= 0).all()


def test_groups_of_a_store_lie_in_its_layers(made):
    _, store = made
    found = map_groups(store)
    assert np.isnan(found["group"].values[1, 4:]).all()
    axis, tables, _ = expert_features(store, "profile", None, None, 500)
    np.testing.assert_array_equal(found["group"].values[0], linked(np.concatenate(tables))[:6])
    assert axis.sites == ("L001", "L003")


def test_the_preferred_label_stands():
    result = xr.Dataset(
        {
            "npmi": (("layer", "expert", "label"), [[[0.5, 0.4], [0.9, 0.2], [-0.3, 0.1], [np.nan, np.nan]]]),
            "q": (("layer", "expert", "label"), [[[0.01, 0.01], [0.5, 0.01], [0.01, 0.2], [np.nan, np.nan]]]),
        },
        coords={"layer": [2], "expert": range(4), "label": ["x", "y"], "site": ("layer", ["L002"])},
    )
    assert preferred_labels(result).values.tolist() == [["x", "y", "", ""]]


def test_where_tokens_stand(made):
    truth, store = made
    ids = [3, 7, 12, 999]
    document, place = first_places(store, ids)
    assert (document[3], place[3]) == (-1, -1)
    for one, number, where in zip(ids[:3], document, place, strict=False):
        first = int(np.flatnonzero(truth.token_id == one)[0])
        assert number == truth.document[first]
        assert where == first - int(np.flatnonzero(truth.document == number)[0])
    assert documents_of_tokens(store, [3, 12]).tolist() == sorted(
        set(truth.document[np.isin(truth.token_id, [3, 12])].tolist())
    )
    assert documents_of_tokens(store, [999]).size == 0
