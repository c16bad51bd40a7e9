"""What counting costs: 16 million token-layer rows, against DuckDB, a plain NumPy script, and two bounds, in one run.

    python -m tests.benchmarks.analyses [--tokens N] [--store FOLDER]

1M tokens x 16 layers, E = 64, k = 8, eight labels (`tests/benchmarks/synthetic.py`). For each question:

cold        MoEscope on the store alone, nothing kept from before; in a process of its own, whose peak memory is noted
warm        the same again, with the store's aggregates
files       the bound: numba loops over the store's own Parquet columns, on one thread, nothing else done
duckdb      SQL over what people write: one Parquet file, a list column for each layer (zstd)
numpy       the script people write: one .npy [token, layer, rank] and a loop over layers and labels
bincount    the bound in memory: `np.bincount` over arrays that are there already

The contestants take turns; ratios are of medians. What would take minutes is done in part and scaled (`SCALED`): one
permutation of two hundred by DuckDB and `np.bincount`, five by the script; the windows of one layer by DuckDB, which
counts them only at the tokens that select the expert, and by NumPy in memory.
"""

from __future__ import annotations

import argparse
import itertools
import json
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from moescope import analysis
from moescope.analysis.counts import token_tables
from moescope.analysis.kernels import count_pairs, kernel
from moescope.analysis.transitions import transition_tables
from moescope.store import Store
from tests.benchmarks.synthetic import LABELS, VOCABULARY, synthetic

RESULTS = Path(__file__).with_name("analyses.json")
ROUNDS = 3
PERMUTATIONS = 200
WINDOW = 16


def _consistency(store: Store) -> Any:
    return analysis.consistency(store, windows=[WINDOW], draws=0, resamples=0)


OURS: dict[str, Callable[[Store], Any]] = {
    "load by label": lambda store: analysis.load(store, by="domain", weighted=False, draws=1),
    "counts by token id": lambda store: token_tables(store, store.sites),
    "transitions, top-1": lambda store: transition_tables(store, ranks="top1"),
    "transitions, all k x k": lambda store: transition_tables(store, ranks="all"),
    "nPMI, 200 permutations": lambda store: analysis.npmi(store, by="domain", permutations=PERMUTATIONS, resamples=0),
    "consistency, m = 16": _consistency,
}


class Rows:
    """The same rows as other tools get them: arrays in memory, a .npy file, a Parquet file of lists."""

    def __init__(self, store: Store, folder: Path) -> None:
        self.store = store
        tokens = store.tokens(["document", "token_id", "position"])
        self.document = tokens["document"].to_numpy()
        self.token = tokens["token_id"].to_numpy()
        self.label = self.document % len(LABELS)
        self.npy, self.lists = folder / "ids.npy", folder / "lists.parquet"
        ids = np.stack([store.routing(site.layer).expert for site in store.sites], axis=1)
        np.save(self.npy, ids)
        columns: dict[str, Any] = {
            "domain": pa.array(np.array(LABELS)[self.label]),
            "document": self.document,
            "token_id": self.token,
            "position": tokens["position"].to_numpy(),
        }
        for layer in range(ids.shape[1]):
            flat = pa.array(np.ascontiguousarray(ids[:, layer]).ravel())
            columns[f"L{layer}"] = pa.FixedSizeListArray.from_arrays(flat, ids.shape[2])
        pq.write_table(pa.table(columns), self.lists, compression="zstd")
        self.ids = ids
        self.layers, self.experts = ids.shape[1], store.sites[0].n_experts

    # --- DuckDB -------------------------------------------------------------------------------------------------
    def sql(self, query: str) -> Any:
        return duckdb.sql(query.replace("rows", f"read_parquet('{self.lists}')")).fetchall()

    def duckdb_counts(self, column: str) -> Any:
        parts = (
            f"select {layer} layer, {column}, e, count(*) "
            f"from (select {column}, unnest(L{layer}) e from rows) group by all"
            for layer in range(self.layers)
        )
        return self.sql(" union all ".join(parts))

    def duckdb_transitions(self, every: bool) -> Any:
        def pair(layer: int) -> str:
            if every:
                inner = f"select a, unnest(t) b from (select unnest(L{layer}) a, L{layer + 1} t from rows)"
            else:
                inner = f"select L{layer}[1] a, L{layer + 1}[1] b from rows"
            return f"select {layer} layer, a, b, count(*) from ({inner}) group by all"

        return self.sql(" union all ".join(pair(layer) for layer in range(self.layers - 1)))

    def dealt(self, rng: np.random.Generator) -> np.ndarray:
        """Labels [document] dealt anew."""
        return rng.permutation(np.arange(int(self.document.max()) + 1) % len(LABELS))

    def duckdb_npmi(self) -> Any:
        labels = self.dealt(np.random.default_rng(0))
        connection = duckdb.connect()
        connection.register("dealt", pa.table({"document": np.arange(labels.size), "label": labels}))
        parts = (
            f"select {layer} layer, label, e, count(*) from (select label, unnest(L{layer}) e "
            f"from read_parquet('{self.lists}') join dealt using (document)) group by all"
            for layer in range(self.layers)
        )
        return connection.execute(" union all ".join(parts)).fetchall()

    def duckdb_windows(self) -> Any:
        return self.sql(
            "select e, c, count(*) from (select e, count(*) over (partition by document, e order by position "
            f"range between {WINDOW - 1} preceding and current row) c "
            "from (select document, position, unnest(L0) e from rows)) group by all"
        )

    # --- the script ---------------------------------------------------------------------------------------------
    def script_counts(self, group: np.ndarray, groups: int) -> np.ndarray:
        ids = np.load(self.npy)
        out = np.zeros((self.layers, groups, self.experts), np.int64)
        for layer in range(self.layers):
            if groups <= len(LABELS):
                for label in range(groups):
                    out[layer, label] = np.bincount(ids[group == label, layer].ravel(), minlength=self.experts)
            else:
                np.add.at(out[layer], (np.repeat(group, ids.shape[2]), ids[:, layer].ravel()), 1)
        return out

    def script_transitions(self, every: bool) -> np.ndarray:
        ids = np.load(self.npy)
        out = np.zeros((self.layers - 1, self.experts, self.experts), np.int64)
        for layer in range(self.layers - 1):
            ranks = range(ids.shape[2]) if every else range(1)
            for a in ranks:
                for b in ranks:
                    cell = ids[:, layer, a].astype(np.int64) * self.experts + ids[:, layer + 1, b]
                    out[layer] += np.bincount(cell, minlength=self.experts**2).reshape(self.experts, -1)
        return out

    def script_npmi(self, permutations: int) -> None:
        ids = np.load(self.npy)
        rng = np.random.default_rng(0)
        for _ in range(permutations):
            label = self.dealt(rng)[self.document]
            for layer in range(self.layers):
                for value in range(len(LABELS)):
                    np.bincount(ids[label == value, layer].ravel(), minlength=self.experts)

    def script_consistency(self) -> None:
        self.windows(np.load(self.npy), self.layers)

    def windows(self, ids: np.ndarray, layers: int) -> None:
        starts = np.flatnonzero(np.diff(self.document, prepend=-1))
        for layer in range(layers):
            histogram = np.zeros((self.experts, WINDOW + 1), np.int64)
            for first, last in zip(starts, [*starts[1:], len(ids)], strict=True):
                active = np.zeros((last - first, self.experts), np.int32)
                np.put_along_axis(active, ids[first:last, layer].astype(np.int64), 1, axis=1)
                sums = np.cumsum(np.vstack([np.zeros(self.experts, np.int32), active]), axis=0)
                windows = sums[WINDOW:] - sums[:-WINDOW]
                cell = np.arange(self.experts) * (WINDOW + 1) + windows
                histogram += np.bincount(cell.ravel(), minlength=histogram.size).reshape(histogram.shape)

    # --- bounds -------------------------------------------------------------------------------------------------
    def bincount(self, group: np.ndarray, groups: int) -> None:
        for layer in range(self.layers):
            cell = np.repeat(group * self.experts, self.ids.shape[2]) + self.ids[:, layer].ravel()
            np.bincount(cell, minlength=groups * self.experts)

    def bincount_transitions(self, every: bool) -> None:
        depth = self.ids.shape[2] if every else 1
        for layer in range(self.layers - 1):
            a = self.ids[:, layer, :depth].astype(np.int64) * self.experts
            cell = (a[:, :, None] + self.ids[:, layer + 1, None, :depth]).ravel()
            np.bincount(cell, minlength=self.experts**2)

    def files_counts(self, column: str, groups: int) -> None:
        for shard in self.store.shards:
            group = shard.tokens([column])[column].to_numpy()
            group = group % len(LABELS) if column == "document" else group.astype(np.int64)
            for site in self.store.sites:
                count = np.zeros((groups, self.experts), np.int64)
                count_pairs(group, shard.routing(site.key, ["expert"]).expert, None, count)

    def files_transitions(self, depth: int) -> None:
        for shard in self.store.shards:
            ids = [shard.routing(site.key, ["expert"]).expert for site in self.store.sites]
            for a, b in itertools.pairwise(ids):
                pair_up(a, b, depth, np.zeros((self.experts, self.experts), np.int64))


@kernel
def pair_up(source, target, depth, count):
    """The bound for transitions: nothing but the loop."""
    for row in range(source.shape[0]):
        for a in range(depth):
            for b in range(depth):
                count[source[row, a], target[row, b]] += 1


def contestants(rows: Rows) -> dict[str, dict[str, Callable[[], Any]]]:
    """For each question, everybody but us."""
    k = rows.ids.shape[2]
    return {
        "load by label": {
            "files": lambda: rows.files_counts("document", len(LABELS)),
            "duckdb": lambda: rows.duckdb_counts("domain"),
            "numpy": lambda: rows.script_counts(rows.label, len(LABELS)),
            "bincount": lambda: rows.bincount(rows.label, len(LABELS)),
        },
        "counts by token id": {
            "files": lambda: rows.files_counts("token_id", VOCABULARY),
            "duckdb": lambda: rows.duckdb_counts("token_id"),
            "numpy": lambda: rows.script_counts(rows.token, VOCABULARY),
            "bincount": lambda: rows.bincount(rows.token, VOCABULARY),
        },
        "transitions, top-1": {
            "files": lambda: rows.files_transitions(1),
            "duckdb": lambda: rows.duckdb_transitions(False),
            "numpy": lambda: rows.script_transitions(False),
            "bincount": lambda: rows.bincount_transitions(False),
        },
        "transitions, all k x k": {
            "files": lambda: rows.files_transitions(k),
            "duckdb": lambda: rows.duckdb_transitions(True),
            "numpy": lambda: rows.script_transitions(True),
            "bincount": lambda: rows.bincount_transitions(True),
        },
        "nPMI, 200 permutations": {
            "duckdb": rows.duckdb_npmi,
            "numpy": lambda: rows.script_npmi(5),
            "bincount": lambda: rows.bincount(rows.dealt(np.random.default_rng(0))[rows.document], len(LABELS)),
        },
        "consistency, m = 16": {
            "duckdb": rows.duckdb_windows,
            "numpy": rows.script_consistency,
            "bincount": lambda: rows.windows(rows.ids, 1),
        },
    }


SCALED = {
    ("nPMI, 200 permutations", "duckdb"): PERMUTATIONS,
    ("nPMI, 200 permutations", "numpy"): PERMUTATIONS / 5,
    ("nPMI, 200 permutations", "bincount"): PERMUTATIONS,
    ("consistency, m = 16", "duckdb"): 16,
    ("consistency, m = 16", "bincount"): 16,
}
"""How much of its question a contestant leaves out."""


def ask(name: str, path: Path) -> dict[str, float]:
    """One question, cold and then warm, in this process; numba's compiled loops are loaded beforehand on few rows."""
    with tempfile.TemporaryDirectory() as folder:
        OURS[name](synthetic(Path(folder) / "small", tokens=8192))
    shutil.rmtree(path / "aggregates", ignore_errors=True)
    seconds = []
    for _ in ("cold", "warm"):
        store = Store.open(path)
        start = time.perf_counter()
        OURS[name](store)
        seconds.append(time.perf_counter() - start)
    status = Path("/proc/self/status").read_text(encoding="utf-8")  # getrusage would count the parent's memory too
    peak = int(status.split("VmHWM:")[1].split()[0]) / 2**20
    return {"cold": seconds[0], "warm": seconds[1], "peak_gib": peak}


def in_a_process(name: str, path: Path) -> dict[str, float]:
    """`ask` in a fresh process, so that its peak memory is its own."""
    command = [sys.executable, "-m", "tests.benchmarks.analyses", "--store", str(path), "--one", name]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1])


def measure(path: Path, tokens: int) -> dict[str, Any]:
    """Seconds of every contestant at every question."""
    store = synthetic(path, tokens)
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        rows = Rows(store, Path(folder))
        for name, others in contestants(rows).items():
            seconds: dict[str, list[float]] = {}
            for turn in range(ROUNDS + 1):
                ours = in_a_process(name, path)
                for who, value in ours.items():
                    seconds.setdefault(who, []).append(value)
                for who, run in others.items():
                    start = time.perf_counter()
                    run()
                    taken = time.perf_counter() - start
                    seconds.setdefault(who, []).append(taken * SCALED.get((name, who), 1))
                if turn == 0:  # the first turn warms files and compiled loops up, and does not count
                    seconds = {}
            found[name] = {who: statistics.median(values) for who, values in seconds.items()}
            print(f"{name}: " + ", ".join(f"{who} {value:.3g}" for who, value in found[name].items()), flush=True)
    return {
        "tokens": tokens,
        "rows": tokens * len(store.sites),
        "machine": f"2 CPU threads, Python {platform.python_version()}, DuckDB {duckdb.__version__}",
        "seconds": found,
    }


def table(results: dict[str, Any]) -> str:
    """The README's table of one results file."""
    names = ("cold", "warm", "files", "duckdb", "numpy", "bincount")
    lines = [
        "| seconds | cold | warm | bound: loops over files | DuckDB | NumPy script | bound: `np.bincount` | peak |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, seconds in results["seconds"].items():
        cells = [f"{seconds[who]:.2f}" if who in seconds else "" for who in names]
        lines.append(f"| {name} | {' | '.join(cells)} | {seconds['peak_gib']:.1f} GiB |")
    lines.append(f"\n{results['rows'] / 1e6:.1f} million token-layer rows, 64 experts, top-8; {results['machine']}.")
    return "\n".join(lines)


def main() -> None:
    """Measure, print and write the results file."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--tokens", type=int, default=2**20)
    parser.add_argument("--store", type=Path)
    parser.add_argument("--one", choices=list(OURS))
    parser.add_argument("--out", type=Path, default=RESULTS)
    given = parser.parse_args()
    if given.one:
        print(json.dumps(ask(given.one, given.store)))
        return
    with tempfile.TemporaryDirectory() as folder:
        results = measure(given.store or Path(folder) / "store", given.tokens)
    given.out.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    print(table(results))


if __name__ == "__main__":
    main()
