"""The numbers that a page about a store begins with, against the store that was made."""

from __future__ import annotations

import numpy as np

from moescope.analysis.facts import model_facts
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
