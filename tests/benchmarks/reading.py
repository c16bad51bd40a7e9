"""What looking at a large store costs: pages of text, one token through all layers, searches, occurrences.

    python -m tests.benchmarks.reading [--store FOLDER] [--rows 50_000_000] [--calls 60]

On the store of `tests.benchmarks.synthetic`, written if it is not there. Each call is asked at random places, after one
that counts nothing but what is kept; milliseconds of wall clock and of CPU, median and 95th percentile; and the peak
memory of the process. The first call of each kind in a process is given apart: it reads the kept tables.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from moescope import analysis
from moescope.store import Store
from tests.benchmarks.synthetic import count_for_pages, synthetic


def calls(store: Store, rng: np.random.Generator) -> dict[str, Callable[[], Any]]:
    """Every kind of look, each at a place of its own at each call."""
    layers, documents = store.layers, store.n_documents

    def layer() -> int:
        return int(rng.choice(layers))

    def deep() -> Any:
        start = int(rng.integers(0, 100_000))
        return analysis.passage(store, 0, layer(), start, start + 512)

    words = [text.strip() for text in list(store.vocabulary().values())[:2000]]
    return {
        "open the store": lambda: Store.open(store.path),
        "a document of 512 tokens": lambda: analysis.passage(store, int(rng.integers(1, documents)), layer()),
        "512 tokens inside 100k": deep,
        "one token, all layers": lambda: analysis.token_routing(store, int(rng.integers(0, store.n_tokens))),
        "50 documents": lambda: analysis.find_documents(store, offset=int(rng.integers(0, documents - 50))),
        "50 documents by size and label": lambda: analysis.find_documents(
            store, where={"domain": "python"}, sort="n_tokens", descending=True
        ),
        "a text in all documents": lambda: analysis.find_documents(store, text=" ".join(rng.choice(words, 2))),
        "20 places of a frequent token": lambda: analysis.token_occurrences(store, int(rng.integers(0, 20))),
        "20 places of a rare token": lambda: analysis.token_occurrences(store, int(rng.integers(4000, 8000))),
        "tokens by text": lambda: analysis.tokens_matching(store, str(rng.choice(words))[:2]),
        "load, by label": lambda: analysis.load(store, by="domain"),
        "margins": lambda: analysis.margins(store),
    }


def measure(path: Path, rows: int, count: int) -> dict[str, Any]:
    """Milliseconds of every kind of look."""
    store = synthetic(path, -(-rows // 16), texts=True)
    count_for_pages(store)
    store = Store.open(path)
    found: dict[str, Any] = {}
    for name, look in calls(store, np.random.default_rng(0)).items():
        wall, cpu = [], []
        for _ in range(count + 1):
            begun = time.perf_counter(), time.process_time()
            look()
            wall.append((time.perf_counter() - begun[0]) * 1e3)
            cpu.append((time.process_time() - begun[1]) * 1e3)
        found[name] = {"first": round(wall[0], 2)} | {
            f"{what}_{at}": round(float(np.percentile(values[1:], at)), 2)
            for what, values in (("wall", wall), ("cpu", cpu))
            for at in (50, 95)
        }
        print(f"{name}: {found[name]}", flush=True)
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    peak = int(status.split("VmHWM:")[1].split()[0]) / 2**20
    return {"rows": store.n_tokens * len(store.sites), "milliseconds": found, "peak_gib": round(peak, 2)}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--store", type=Path)
    parser.add_argument("--rows", type=int, default=50_000_000)
    parser.add_argument("--calls", type=int, default=60)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        found = measure(given.store or Path(folder) / "store", given.rows, given.calls)
    print(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()
