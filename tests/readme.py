"""The parts of the README that are written, not typed: between marks, from the registry and from results files.

`make readme` writes those that are read off; `make families` writes the table of families, which takes minutes.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

README = Path(__file__).parents[1] / "README.md"
RESULTS = Path(__file__).parent / "benchmarks"


def marks(name: str) -> tuple[str, str]:
    """The two comments between which a part stands."""
    made = "make families" if name == "families" else "make readme"
    return f"<!-- {name}: written by `{made}` -->", f"<!-- end of {name} -->"


def shown(name: str) -> str:
    """A part as the README has it."""
    begin, end = marks(name)
    return README.read_text(encoding="utf-8").split(begin)[1].split(end)[0].strip()


def put(name: str, text: str) -> None:
    """Writes a part between its marks."""
    begin, end = marks(name)
    before, rest = README.read_text(encoding="utf-8").split(begin)
    README.write_text(f"{before}{begin}\n{text}\n{end}{rest.split(end)[1]}", encoding="utf-8")


def results(name: str) -> Any:
    """A committed results file of a benchmark."""
    return json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))


def analyses() -> str:
    """The table of analyses, from the registry."""
    from moescope.analysis import ANALYSES

    # A marker's angle brackets are no HTML.
    rows = [f"| `{q.name}` | {q.help.replace('<', '&lt;').replace('>', '&gt;')} |" for q in ANALYSES.values()]
    return "\n".join(["| `moescope analyze …` | the question it answers |", "|---|---|", *rows])


def capturing() -> str:
    """What capture costs."""
    from tests.benchmarks.capture import table

    return table(results("capture"))


def counting() -> str:
    """What analyses cost."""
    from tests.benchmarks.analyses import table

    return table(results("analyses"))


def editing() -> str:
    """What edits cost, live and written."""
    speed, applied = results("decoding"), results("applying")
    rows = [
        (f"{words}, {batch}", f"{found['time_over'][key]:.2f}x", target if batch == "batch 1" or "two" in key else "")
        for key, words, target in (
            ("self-contrast over plain", "self-contrast, time over plain greedy decoding", "1.5x"),
            ("self-contrast over two forwards", "the same, over two separate forward passes", "1x"),
            ("idle recipe over plain", "a recipe whose rows are not in the batch, over none", ""),
            ("active recipe over plain", "a recipe active in every layer, over none", ""),
        )
        for batch, found in speed["speed"].items()
    ]
    for name, words in (("every shard", "every shard changed"), ("one shard", "one shard changed, the others linked")):
        found = applied[name]
        rows.append((f"`moescope apply`, {words}, time over `cp -r`", f"{found['time over cp -r']:.2f}x", "1.3x"))
        if name == "every shard":
            beyond = found["peak memory, MB"] - found["largest touched tensor, MB"]
            rows.append(("its peak memory beyond the largest tensor it touches", f"{max(beyond, 0):.0f} MB", "300 MB"))
    lines = ["| measured in one run | result | target |", "|---|---|---|"]
    lines += [f"| {' | '.join(row)} |" for row in rows]
    lines.append(f"\n{speed['model']}, {speed['tokens']} tokens, {speed['machine']}; {applied['checkpoint']}.")
    return "\n".join(lines)


def exploring() -> str:
    """What the app costs on many rows, beside loading them in pandas."""
    found = results("app")
    script = found["pandas"]
    slowest = [max(found[tour]["page still, median s"].items(), key=lambda item: item[1]) for tour in _TOURS]
    cold, again, calls = (
        found["nothing counted yet: finding, map, s"],
        found["again: finding, map, s"],
        found["callbacks"],
    )
    rows = [
        (
            "first finding in words, after `moescope prepare`, server just started (median of five)",
            found["first finding, s"],
            "2 s",
            None,
        ),
        ("first map, the same", found["first map, s"], "2 s", script["first view, s"]),
        ("first finding, opened again", again[0], "2 s", None),
        ("first map, opened again", again[1], "2 s", script["one label, s"]),
        ("first map in a store where nothing has been counted", cold[1], "", script["first view, s"]),
        (f"the slowest page ({slowest[0][0]}) until all its panels stand, seen first", slowest[0][1], "", None),
        (f"the slowest page ({slowest[1][0]}) with something else chosen", slowest[1][1], "", None),
    ]
    lines = ["| the app in a browser | result | target | the same in pandas |", "|---|---|---|---|"]
    for words, seconds, target, other in rows:
        lines.append(f"| {words} | {seconds:.1f} s | {target} | {'' if other is None else f'{other:.1f} s'} |")
    lines += [
        f"| callbacks, 95th percentile | {calls['p95, ms']:.0f} ms | 150 ms | |",
        f"| without those that only ask whether an answer is there | {calls['p95 of these, ms']:.0f} ms | 150 ms | |",
        f"| memory at its peak | {found['memory, GB']:.2f} GB | 1.5 GB | {script['memory, GB']:.1f} GB |",
        f"\n{found['rows'] / 1e6:.0f} million token-layer rows ({found['tokens']:,} tokens), E = 64, k = 8; "
        f"{calls['callbacks']:,} callbacks on two tours of all pages; {found['machine']}. The pandas script loads "
        "every id, counts by layer and expert and plots; its second figure is the count for one label.",
    ]
    return "\n".join(lines)


_TOURS = ("first tour", "second tour")


def unlearning() -> str:
    """What one expert can be made to forget, and what memory that takes."""
    from tests.benchmarks.unlearning import table
    from tests.benchmarks.unlearning_memory import table as memory

    return f"{table(results('unlearning'))}\n\n{memory(results('unlearning_memory'))}"


PARTS: dict[str, Callable[[], str]] = {
    "analyses": analyses,
    "capturing": capturing,
    "counting": counting,
    "editing": editing,
    "exploring": exploring,
    "unlearning": unlearning,
}


def main() -> None:
    """Write every part that is read off."""
    for name, part in PARTS.items():
        put(name, part())


if __name__ == "__main__":
    main()
