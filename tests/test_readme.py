"""What the README says of commands and analyses is what there is."""

from __future__ import annotations

import re

import pytest
import typer.main

from moescope.cli import app
from tests import readme


@pytest.mark.parametrize("name", readme.PARTS)
def test_what_is_written_is_what_the_registry_and_the_results_files_say(name: str) -> None:
    assert readme.shown(name) == readme.PARTS[name]()


def test_every_command_is_named_and_every_named_one_exists() -> None:
    commands = set(typer.main.get_command(app).commands)  # type: ignore[attr-defined]
    named = set(re.findall(r"(?m)(?:^|`)moescope ([a-z][a-z-]+)", readme.README.read_text(encoding="utf-8")))
    assert commands <= named
    assert named <= commands
