"""What the README says of commands and analyses is what there is."""

from __future__ import annotations

import re

import typer.main

from moescope.cli import app
from tests import readme


def test_analyses_are_those_of_the_registry() -> None:
    assert readme.shown(readme.ANALYSES) == readme.analyses()


def test_every_command_is_named_and_every_named_one_exists() -> None:
    commands = set(typer.main.get_command(app).commands)  # type: ignore[attr-defined]
    named = set(re.findall(r"moescope ([a-z][a-z-]+)", readme.README.read_text(encoding="utf-8")))
    assert commands <= named
    assert named <= commands
