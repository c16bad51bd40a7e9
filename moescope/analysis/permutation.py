"""The permutation null of label associations: labels dealt anew over whole documents, counts reused, never rescanned.

Documents are what is exchangeable. Tokens of one document share their text, so that shuffling labels over tokens would
make nearly everything significant.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from moescope.analysis.counts import PairCounts
from moescope.analysis.kernels import sum_by_label
from moescope.analysis.watching import report

if TYPE_CHECKING:
    from jaxtyping import Float, Int

TIE = 1e-12
"""Two scores closer than this are equal: the same counts in another order of summation must not decide a p-value."""

BLOCK_CELLS = 4_000_000
"""Cells (permutations x labels x experts) held at once, about 32 MB in float64."""

Score = Callable[[np.ndarray, np.ndarray, np.ndarray, float], np.ndarray]
"""score(joint [*, label, expert], tokens [*, label, 1], selections [expert], all tokens) -> [*, label, expert]."""


@dataclass(frozen=True)
class Null:
    """What permutations gave, per (layer) array of [expert, label].

    Attributes:
        above: permutations whose score is at least the observed one.
        below: permutations whose score is at most the observed one.
        mean: mean permuted score.
        p99: its 99th percentile (an attained value, not interpolated).
        largest: [permutation] the largest score anywhere: over all layers, experts and labels.
        permutations: how many were drawn.
    """

    above: list[Int[np.ndarray, "expert label"]]
    below: list[Int[np.ndarray, "expert label"]]
    mean: list[Float[np.ndarray, "expert label"]]
    p99: list[Float[np.ndarray, "expert label"]]
    largest: Float[np.ndarray, " permutation"]
    permutations: int

    def p_value(self, layer: int, alternative: str) -> Float[np.ndarray, "expert label"]:
        """P-values with the observed labelling counted among the draws, so never 0 (Phipson & Smyth 2010)."""
        above = (self.above[layer] + 1) / (self.permutations + 1)
        if alternative == "greater":
            return above
        below = (self.below[layer] + 1) / (self.permutations + 1)
        return np.minimum(2 * np.minimum(above, below), 1.0)

    def p_largest(self, observed: Float[np.ndarray, "expert label"]) -> Float[np.ndarray, "expert label"]:
        """Family-wise p-values: the share of permutations with a score this large *anywhere* (Westfall & Young)."""
        largest = np.sort(self.largest)
        reached = self.permutations - np.searchsorted(largest, observed - TIE, side="left")
        return np.where(np.isnan(observed), np.nan, (reached + 1) / (self.permutations + 1))


def deal(code: Int[np.ndarray, " document"], permutations: int, seed: int) -> Int[np.ndarray, "permutation document"]:
    """Labels dealt anew over documents, once per row; every label keeps its number of documents."""
    smallest = np.min_scalar_type(int(code.max(initial=0)))
    return np.random.default_rng(seed).permuted(np.tile(code.astype(smallest), (permutations, 1)), axis=1)


def permutation_null(
    tables: Sequence[PairCounts],
    tokens: Int[np.ndarray, " document"],
    code: Int[np.ndarray, " document"],
    observed: Sequence[Float[np.ndarray, "expert label"]],
    score: Score,
    permutations: int,
    seed: int,
) -> Null:
    """Scores every (layer, expert, label) under labels dealt anew.

    Args:
        tables: one per layer; groups are the positions 0 .. n-1 of `tokens` and `code`.
        tokens: [document] tokens of each document.
        code: [document] its label.
        observed: one [expert, label] array per layer, the scores to hold against the null; NaN cells are skipped.
        score: the statistic.
        permutations: how many labellings to draw; the same ones in every layer, so that the largest score is a joint
            one.
        seed: of the draws.

    Returns:
        The null; memory is permutations x documents bytes plus one block of experts at a time.
    """
    n_labels = observed[0].shape[1]
    dealt = deal(code, permutations, seed)
    total = float(tokens.sum())
    everyone = np.arange(tokens.size)
    size = _summed(everyone, np.zeros(tokens.size, dtype=np.int32), tokens, dealt, n_labels, 1)
    largest = np.full(permutations, -np.inf)
    found: dict[str, list[np.ndarray]] = {name: [] for name in ("above", "below", "mean", "p99")}
    step = max(1, BLOCK_CELLS // max(1, permutations * n_labels))
    blocks, done = sum(-(-table.n_experts // step) for table in tables), 0
    report("permutations", done, blocks)
    for table, values in zip(tables, observed, strict=True):
        selections = np.bincount(table.expert, weights=table.count, minlength=table.n_experts)
        cells = {name: np.full(values.shape, np.nan) for name in found}
        for start in range(0, table.n_experts, step):
            stop = min(start + step, table.n_experts)
            inside = (table.expert >= start) & (table.expert < stop)
            joint = _summed(
                table.group[inside], table.expert[inside] - start, table.count[inside], dealt, n_labels, stop - start
            )
            null = score(joint.astype(np.float64), size.astype(np.float64), selections[start:stop], total)
            here = values[start:stop].T
            defined = ~np.isnan(here)
            null = np.where(defined, null, -np.inf)
            largest = np.maximum(largest, null.max(axis=(1, 2), initial=-np.inf))
            cells["above"][start:stop] = (null >= here - TIE).sum(axis=0).T
            cells["below"][start:stop] = (null <= here + TIE).sum(axis=0).T
            cells["mean"][start:stop] = np.where(defined, null.mean(axis=0), np.nan).T
            cells["p99"][start:stop] = np.where(defined, np.quantile(null, 0.99, axis=0, method="higher"), np.nan).T
            done += 1
            report("permutations", done, blocks)
        for name, held in found.items():
            held.append(np.where(np.isnan(values), np.nan, cells[name]))
    return Null(found["above"], found["below"], found["mean"], found["p99"], largest, permutations)


def _summed(
    group: np.ndarray, column: np.ndarray, count: np.ndarray, dealt: np.ndarray, n_labels: int, n_columns: int
) -> Int[np.ndarray, "permutation label column"]:
    """Label sums of every relabelling, shared out over threads (the kernel holds no lock)."""
    out = np.zeros((dealt.shape[0], n_labels, n_columns), dtype=np.int64)
    arrays = np.ascontiguousarray(group), np.ascontiguousarray(column), np.ascontiguousarray(count)
    workers = min(os.cpu_count() or 1, 8, max(1, dealt.shape[0]))
    edges = np.linspace(0, dealt.shape[0], workers + 1).astype(int)
    with ThreadPoolExecutor(workers) as pool:
        jobs = [
            pool.submit(sum_by_label, *arrays, dealt[start:stop], out[start:stop])
            for start, stop in itertools.pairwise(edges.tolist())
        ]
        for job in jobs:
            job.result()
    return out
