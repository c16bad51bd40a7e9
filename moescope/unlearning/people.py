"""The bundled invented people, ten of whom are to be forgotten: sets to begin with, and those of the benchmark."""

from __future__ import annotations

import json
import random
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from moescope.data import CORPUS, FORGET, RETAIN
from moescope.errors import MoescopeError

Row = dict[str, Any]


def people(seed: int = 0) -> tuple[list[Row], list[Row], list[Row]]:
    """Rows of facts: ten people to forget, thirty to retain, ten in neither set, as the seed draws them."""
    rows = _rows(FORGET)
    names = sorted({row["person"] for row in rows})
    random.Random(seed).shuffle(names)
    groups = names[:10], names[10:40], names[40:]
    forget, retain, others = ([row for row in rows if row["person"] in set(group)] for group in groups)
    return forget, retain, others


def texts(path: Path, every: int) -> list[Row]:
    """Every so many documents of the other domains."""
    return [row for row in _rows(path) if row["domain"] != "facts"][::every]


def bundled_sets(seed: int = 0) -> dict[str, list[Row]]:
    """What to forget and what to retain, and two sets that are in neither: other people, and other domains."""
    forget, retain, others = people(seed)
    return {
        "forget": forget, "retain": [*retain, *texts(RETAIN, 4)], "other people": others,
        "other domains": texts(CORPUS, 8),
    }  # fmt: skip


def write_sets(sets: Mapping[str, Iterable[Row]], folder: Path) -> dict[str, Path]:
    """Write sets as JSONL, a file each.

    Raises:
        MoescopeError: the folder cannot be written.
    """
    found = {name: folder / f"{name.replace(' ', '-')}.jsonl" for name in sets}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, rows in sets.items():
            found[name].write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    except OSError as error:
        raise MoescopeError(f"Cannot write into {folder}: {error.strerror or error}.") from error
    return found


def _rows(path: Path) -> list[Row]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
