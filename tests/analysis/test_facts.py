"""The numbers that a page about a store begins with, against the store that was made."""

from __future__ import annotations

import numpy as np

from moescope.analysis.facts import _millions, model_facts
from moescope.store import Store
from tests.analysis.made_stores import random_truth, write


def test_facts_are_the_stores_own(tmp_path):
    truth = random_truth(np.random.default_rng(0), 12, [6, 4], [2, 1])
    write(tmp_path / "made", truth, [6, 4], {}, name="some/folder/made-moe/")
    told = model_facts(Store.open(tmp_path / "made"))
    facts = {what: number for number, what in told["facts"]}
    assert told["name"] == "made-moe"
    assert (facts["MoE layers"], facts["experts in each"], facts["active per token"]) == ("2", "4–6", "1–2")
    assert (facts["tokens read"], facts["documents"]) == (f"{len(truth.token_id):,}", "12")


def test_sizes_are_rounded_into_the_unit_they_come_to():
    said = {999: "999", 1_200: "1.2k", 999_499: "999k", 999_600: "1M", 8_500_000: "8.5M", 999_800_000: "1B"}
    assert {size: _millions(size) for size in said} == said
