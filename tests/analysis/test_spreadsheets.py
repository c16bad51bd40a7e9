"""CSV that no spreadsheet runs, wherever it is written, and that gives every text and number back."""

from __future__ import annotations

import csv
import gzip
import io

import numpy as np
import pandas as pd
from hypothesis import given
from hypothesis import strategies as st

from moescope.analysis.spreadsheets import as_csv, write_csv
from tests.analysis.made_stores import random_truth, write
from tests.cli.running import moescope

_TEXTS = st.lists(st.one_of(st.none(), st.text(st.characters(exclude_categories=["Cs"]), max_size=8)), min_size=1)


def read(text):
    return list(csv.reader(io.StringIO(text, newline="")))


@given(_TEXTS)
def test_no_cell_begins_as_a_formula_and_every_text_can_be_had_back(texts):
    rows = pd.DataFrame({"text": pd.Series(texts, dtype=object), "n": range(len(texts))})
    cells = [row[0] for row in read(as_csv(rows))[1:]]
    for cell, text in zip(cells, texts, strict=True):
        assert not cell.startswith(("=", "+", "-", "@", "\t", "\r", "\n", "＝", "＋", "－", "＠"))
        assert cell == (text or "") or cell == f"'{text}"
        assert cell == (text or "") or text[0] in "=+-@\t\r\n＝＋－＠"


def test_numbers_and_what_is_missing_are_untouched():
    mixed = pd.Series([-3, None, "-3"], dtype=object)
    rows = pd.DataFrame({"=a": [-1.5, np.nan, 2.0], "n": [-7, 0, 7], "mixed": mixed, "yes": [True, False, True]})
    rows["kind"] = pd.Categorical(["-x", "y", "-x"])
    assert as_csv(rows).splitlines() == [
        "'=a,n,mixed,yes,kind", "-1.5,-7,-3,True,'-x", ",0,,False,y", "2.0,7,'-3,True,'-x"
    ]  # fmt: skip
    assert rows.columns[0] == "=a"


def test_a_file_holds_the_same_and_is_compressed_by_its_name(tmp_path):
    rows = pd.DataFrame({"text": ["=1+1", "\r", "été", "a,b"], "n": [-1, 2, 3, 4]})
    write_csv(rows, tmp_path / "t.csv")
    write_csv(rows, tmp_path / "t.csv.gz")
    assert (tmp_path / "t.csv").read_bytes() == as_csv(rows).encode()
    assert gzip.decompress((tmp_path / "t.csv.gz").read_bytes()) == as_csv(rows).encode()


def test_the_command_line_writes_no_formula_either(tmp_path):
    truth = random_truth(np.random.default_rng(0), 12, [4, 4], [2, 2], longest=60)
    write(tmp_path / "made", truth, [4, 4], {"domain": ["=1+1", "+b", "c"] * 4})
    options = ("--by", "domain", "--permutations", 10, "--csv", tmp_path / "t.csv")
    assert moescope("analyze", "npmi", tmp_path / "made", *options).returncode == 0
    heading, *cells = read((tmp_path / "t.csv").read_text(encoding="utf-8"))
    assert {row[heading.index("label")] for row in cells} == {"'=1+1", "'+b", "c"}
    scores = [float(row[heading.index("npmi")]) for row in cells if row[heading.index("npmi")]]
    assert min(scores) < 0 < max(scores)
