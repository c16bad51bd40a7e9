"""`moescope analyze` as a person types it, on made stores and in this process: inputs, filters, rows, refusals."""

import json
import os
import pty
import shutil
import subprocess
import sys

import numpy as np
import pytest

from moescope.cli import analyze
from moescope.errors import MoescopeError
from tests.analysis.made_stores import random_truth
from tests.analysis.paired_stores import changed, write_tiers


@pytest.fixture(scope="module")
def stores(tmp_path_factory):
    """Two stores of the same tokens; in the second, documents of the label b are routed otherwise."""
    rng, folder = np.random.default_rng(0), tmp_path_factory.mktemp("stores")
    made = random_truth(rng, 16, [4, 4], [2, 2])
    labels = {"domain": ["ab"[d % 2] for d in range(16)]}
    other = made.document % 2 == 1
    picks = [np.where(other[:, None], (ids + 1) % 4, ids) for ids in made.expert]
    write_tiers(folder / "one", made, [4, 4], labels)
    write_tiers(folder / "two", changed(made, expert=picks), [4, 4], labels)
    return folder / "one", folder / "two"


def run(name, *arguments):
    with pytest.raises(SystemExit) as ended:
        analyze.run(name, [str(argument) for argument in arguments], str)
    return ended.value.code


def rows(capsys, name, *arguments):
    assert run(name, *arguments, "--json") == 0
    return json.loads(capsys.readouterr().out)["rows"]


def test_two_stores_and_a_label_to_keep(stores, capsys):
    same = rows(capsys, "compare", *stores, "--where", "domain=a", "--permutations", 9, "--resamples", 0)
    assert [row["overlap"] for row in same] == [1, 1]
    both = rows(capsys, "compare", *stores, "--where", "domain=a", "--where", "domain=b", "--resamples", 0)
    assert all(row["overlap"] < 1 for row in both)
    named = rows(capsys, "compare", *stores, "--by", "domain", "--permutations", 0)
    assert {row["label"] for row in named} == {"a", "b"}


def test_a_series_and_its_figure(stores, tmp_path):
    page = tmp_path / "f.html"
    assert run("fluctuation", *stores, stores[0], "--steps", 1, "--steps", 5, "--steps", 9, "--html", page) == 0
    assert "<script" in page.read_text()


def test_what_if_as_people_type_it(stores, capsys):
    assert {row["threshold"] for row in rows(capsys, "what-if", stores[0], "--thresholds", 0.5)} == {0.5}
    assert {row["layer"] for row in rows(capsys, "what_if", stores[0], "--layers", 1)} == {1}


def test_rows_of_another_table(stores, tmp_path):
    plan = tmp_path / "plan.csv"
    asked = ("--devices", 2, "--method", "eplb", "--draws", 5, "--rows", "layer, expert, plan", "--csv", plan)
    assert run("placement", stores[0], *asked) == 0
    lines = plan.read_text().splitlines()
    assert lines[0] == "layer,expert,plan,home,replicas"
    assert len(lines) == 1 + 2 * 4 * 4  # eplb and three controls


def test_bits_of_every_expert(stores, capsys):
    found = rows(capsys, "bits", stores[0], "--budget", 2, "--widths", 1, "--widths", 3)
    assert len(found) == 8
    assert {row["bits"] for row in found} <= {1, 3}
    assert sum(row["bits"] for row in found) <= 16


def test_mistakes_are_one_sentence(stores):
    for says, name, *arguments in (
        ("label=value", "load", stores[0], "--where", "domain"),
        ("no label 'colour'", "load", stores[0], "--where", "colour=red"),
        ("two stores or more", "fluctuation", stores[0]),
        ("do not divide over 3 devices", "placement", stores[0], "--devices", 3),
        ("tables by", "bits", stores[0], "--rows", "label"),
    ):
        with pytest.raises(MoescopeError, match=says):
            analyze.run(name, [str(argument) for argument in arguments], str)
    assert run("compare", stores[0]) == 2


def test_progress_is_drawn_on_a_terminal_and_only_there(stores):
    shutil.rmtree(stores[0] / "aggregates", ignore_errors=True)  # nothing is counted that is kept
    shown, terminal = pty.openpty()
    code = "from moescope.cli import analyze; import sys; analyze.run('load', [sys.argv[1], '--json'], str)"
    kept = subprocess.run([sys.executable, "-c", code, stores[0]], stdout=subprocess.PIPE, stderr=terminal, check=True)
    os.close(terminal)
    drawn = os.read(shown, 65536).decode()
    os.close(shown)
    assert "shards" in drawn
    assert json.loads(kept.stdout)["rows"]
    piped = subprocess.run([sys.executable, "-c", code, stores[0]], capture_output=True, check=True)
    assert (piped.stderr, piped.stdout) == (b"", kept.stdout)
