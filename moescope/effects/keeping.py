"""Numbers of a long run kept in a folder, so that a killed run goes on where it was."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from moescope.errors import MoescopeError

TOGETHER = 16  # entries in one part on disk


def opened(folder: Path, question: dict[str, Any]) -> None:
    """Make a folder for the answers to one question, or find that it already is.

    Raises:
        MoescopeError: it holds something else.
    """
    digest = hashlib.blake2b(json.dumps(question, sort_keys=True).encode(), digest_size=16).hexdigest()
    folder.mkdir(parents=True, exist_ok=True)
    mark = folder / "question.json"
    if mark.is_file():
        if json.loads(mark.read_text(encoding="utf-8")).get("digest") != digest:
            raise MoescopeError(f"{folder} holds the answers to another question; choose another folder.")
    elif any(folder.iterdir()):
        raise MoescopeError(f"{folder} is not empty and holds no earlier run; choose another folder.")
    else:
        mark.write_text(json.dumps({"digest": digest, **question}, indent=2), encoding="utf-8")


def write_part(part: Path, columns: dict[str, Any]) -> None:
    """Write one Parquet file that is either whole or not there."""
    partial = part.with_suffix(".writing")
    pq.write_table(pa.table(columns), partial)
    partial.replace(part)


class Kept:
    """Numbers by name: in memory, and in Parquet parts if there is a folder.

    Args:
        folder: where; None keeps them in memory alone.
        question: what they answer; another question's folder is refused.
    """

    def __init__(self, folder: str | Path | None, question: dict[str, Any]) -> None:
        self._folder = None if folder is None else Path(folder)
        self._found: dict[str, np.ndarray] = {}
        self._fresh: list[str] = []
        self._parts = 0
        if self._folder is None:
            return
        opened(self._folder, question)
        for part in sorted(self._folder.glob("part-*.parquet")):
            table = pq.read_table(part)
            for name, numbers in zip(table["name"].to_pylist(), table["numbers"].to_pylist(), strict=True):
                self._found[name] = np.array(numbers)
            self._parts += 1

    def get(self, name: str) -> np.ndarray | None:
        """What is kept under a name."""
        return self._found.get(name)

    def add(self, name: str, numbers: Sequence[float] | np.ndarray) -> np.ndarray:
        """Keep numbers under a name; they are on disk after `flush`, or some further entries."""
        self._found[name] = np.asarray(numbers, dtype=np.float64)
        self._fresh.append(name)
        if len(self._fresh) >= TOGETHER:
            self.flush()
        return self._found[name]

    def flush(self) -> None:
        """Put on disk what is not there yet."""
        if self._folder is None or not self._fresh:
            return
        numbers = [self._found[name].tolist() for name in self._fresh]
        write_part(self._folder / f"part-{self._parts:08d}.parquet", {"name": self._fresh, "numbers": numbers})
        self._parts, self._fresh = self._parts + 1, []
