"""The parts of the README that are written, not typed: between marks, from the registry and from results files.

`python -m tests.readme` writes the table of analyses; `make bench` and `make families` write theirs.
"""

from __future__ import annotations

from pathlib import Path

README = Path(__file__).parents[1] / "README.md"
ANALYSES = "analyses: written by `make readme`"


def marks(name: str) -> tuple[str, str]:
    """The two comments between which a part stands."""
    return f"<!-- {name} -->", f"<!-- end of {name.partition(':')[0]} -->"


def shown(name: str) -> str:
    """A part as the README has it."""
    begin, end = marks(name)
    return README.read_text(encoding="utf-8").split(begin)[1].split(end)[0].strip()


def put(name: str, text: str) -> None:
    """Writes a part between its marks."""
    begin, end = marks(name)
    before, rest = README.read_text(encoding="utf-8").split(begin)
    README.write_text(f"{before}{begin}\n{text}\n{end}{rest.split(end)[1]}", encoding="utf-8")


def analyses() -> str:
    """The table of analyses, from the registry."""
    from moescope.analysis import ANALYSES as questions

    rows = [f"| `{question.name}` | {question.help} |" for question in questions.values()]
    return "\n".join(["| `moescope analyze …` | the question it answers |", "|---|---|", *rows])


if __name__ == "__main__":
    put(ANALYSES, analyses())
