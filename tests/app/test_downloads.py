"""What leaves as a file: rows that no spreadsheet runs, and a line of why where there is nothing to send."""

from __future__ import annotations

import csv
import io
import json
import shutil
from urllib.parse import quote

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from moescope.app import build
from moescope.store import Store
from tests.analysis.made_stores import random_truth, write


def read(text):
    return list(csv.reader(io.StringIO(text, newline="")))


@pytest.fixture
def client(tmp_path):
    """A store whose tokens are formulas, behind the app."""
    truth = random_truth(np.random.default_rng(0), 12, [4, 4], [2, 2], longest=60)
    words = {token: f"=cmd|' /C calc'!A{token}" for token in range(20)}
    write(tmp_path / "made", truth, [4, 4], {"domain": ["-a", "b", "c"] * 4}, vocabulary=words)
    found = build(tmp_path).server.test_client()

    def get(path):
        for _ in range(200):
            answer = found.get(path, headers={"Host": "localhost"})
            if answer.status_code != 503:
                return answer
            assert answer.mimetype == "text/plain"
        raise TimeoutError(path)

    return tmp_path, get


AT = quote("/store/made/L0/E1", safe="")


def test_a_table_of_hostile_tokens_leaves_as_text(client):
    _, get = client
    rows = read(get(f"/file/expert-tokens.csv?at={AT}").get_data(as_text=True))
    assert len(rows) > 2
    assert all(row[0].startswith("'=cmd") for row in rows[1:])
    plain = pq.read_table(io.BytesIO(get(f"/file/expert-tokens.parquet?at={AT}").data)).to_pylist()
    assert [f"'{row['token']}" for row in plain] == [row[0] for row in rows[1:]]


@pytest.mark.parametrize(
    ("query", "said"),
    [
        ("filter=[1]", "cannot be read"),
        ("filter=" + quote(json.dumps({"npmi": {"filterType": "number", "type": "inRange", "filter": 1}})), "be read"),
        ("filter=" + quote(json.dumps({"npmi": {"conditions": []}})), "cannot be read"),
        ("filter={", "Expecting"),
        ("filter=" + "[" * 50_000, "recursion"),
        ("sort=[{}]", "cannot be read"),
        ("filter=" + quote(json.dumps({"nothing": {}})), "no column"),
    ],
)  # fmt: skip
def test_what_an_address_cannot_mean_is_said(client, query, said):
    _, get = client
    answer = get(f"/file/expert-tokens.csv?at={AT}&{query}")
    assert (answer.status_code, answer.mimetype) == (400, "text/plain")
    assert said in answer.get_data(as_text=True)


def test_a_store_that_goes_away_or_cannot_be_read_is_said(client, monkeypatch):
    root, get = client
    assert get(f"/file/expert-tokens.csv?at={quote('/store/none/L0/E1', safe='')}").status_code == 404

    def damaged(self, *asked):
        raise OSError(5, "Input/output error", str(root / "made" / "shards"))

    monkeypatch.setattr(Store, "documents", damaged)
    answer = get(f"/file/text-find.html?at={quote('/store/made/text', safe='')}")
    assert answer.status_code == 404  # no figure
    assert get(f"/file/nothing.csv?at={AT}").status_code == 404
    answer = get(f"/file/maxima.csv?at={quote('/store/made/outliers', safe='')}")
    assert answer.status_code == 400
    monkeypatch.setattr("moescope.app.downloads.rows_of", damaged)
    answer = get(f"/file/expert-tokens.csv?at={AT}")
    said = answer.get_data(as_text=True)
    assert (answer.status_code, answer.mimetype) == (500, "text/plain")
    assert "could not be read" in said
    assert str(root) not in said

    def cut_off(*asked):
        raise pa.ArrowInvalid("Parquet magic bytes not found in footer")

    monkeypatch.setattr("moescope.app.downloads.rows_of", cut_off)
    assert get(f"/file/expert-tokens.csv?at={AT}").status_code == 500

    def gone(*asked):
        shutil.rmtree(root / "made")
        raise FileNotFoundError(2, "No such file or directory", str(root / "made" / "shards" / "x.parquet"))

    monkeypatch.setattr("moescope.app.downloads.rows_of", gone)
    answer = get(f"/file/expert-tokens.csv?at={AT}")
    assert (answer.status_code, answer.mimetype) == (410, "text/plain")
    assert answer.get_data(as_text=True) == "The store 'made' is no longer there."
