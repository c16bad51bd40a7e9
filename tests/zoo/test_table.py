"""The README's table of families says what a fresh check says, and lists every family once."""

from __future__ import annotations

import pytest

from tests import readme

from . import REFUSED, ZOO
from .table import PART, markdown, names, row


def lines() -> list[str]:
    return [
        line for line in readme.shown(PART).splitlines() if line.startswith("| ") and not line.startswith("| family")
    ]


def test_every_family_stands_in_it_once() -> None:
    listed = [line.split("|")[1].strip() for line in lines()]
    assert listed == names()
    assert set(listed) == {name for name in ZOO if "+" not in name}


@pytest.mark.parametrize("name", ["deepseek_v3", "zaya", "jetmoe", "nllb_moe", "old_qwen2_moe", "llama4", "phimoe"])
def test_its_rows_are_those_of_a_fresh_check(name: str) -> None:
    fresh = markdown([row(name)]).splitlines()[-1]
    assert fresh in lines()


def test_what_it_refuses_is_what_is_known_to_be_refused() -> None:
    refused = {line.split("|")[1].strip(): line for line in lines() if "refused" in line}
    assert refused.keys() == REFUSED.keys()
    assert all(reason in refused[name] for name, reason in REFUSED.items())
