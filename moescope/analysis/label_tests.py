"""The test every question about document labels shares: labels dealt anew over documents, and documents drawn again.

The counts by document are all it reads: a dealing or a resample is another sum of them, never another scan of tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from moescope.analysis.association import CORRECTIONS, NO_P, q_values
from moescope.analysis.discovery import too_few
from moescope.analysis.labelled import LayerAxis
from moescope.analysis.pairs import PairCounts
from moescope.analysis.permutation import Score, permutation_null
from moescope.analysis.resampling import association_interval
from moescope.errors import MoescopeError

if TYPE_CHECKING:
    from jaxtyping import Float, Int

Alternative = Literal["greater", "two-sided"]
Correction = Literal["bh", "by"]

ONE_LABEL = f"{NO_P}: with one label, dealing labels anew over documents changes nothing"
NOT_ASKED = f"{NO_P}: no permutations were asked for"
NULL = (
    "labels permuted over whole documents; p = (1 + draws at least as extreme) / (1 + draws), ties counted as extreme"
)
INTERVAL = (
    "95 % percentile intervals over documents drawn again with replacement within each label; NaN for a label with "
    "fewer than two documents"
)


@dataclass(frozen=True)
class LabelTest:
    """How to test.

    Attributes:
        permutations: dealings of labels over documents; None for enough of them, 0 for no test.
        seed: of the dealings and the resamples.
        alternative: "greater" or "two-sided" (twice the smaller tail).
        correction: "bh" or "by".
        resamples: documents drawn again, for intervals; 0 for none.
    """

    permutations: int | None = None
    seed: int = 0
    alternative: Alternative = "greater"
    correction: Correction = "bh"
    resamples: int = 0

    def __post_init__(self) -> None:
        if self.alternative not in ("greater", "two-sided") or self.correction not in CORRECTIONS:
            raise MoescopeError('`alternative` is "greater" or "two-sided", `correction` is "bh" or "by".')
        if (self.permutations is not None and self.permutations < 0) or self.resamples < 0:
            raise MoescopeError("`permutations` and `resamples` must be 0 (values alone) or more.")


@dataclass(frozen=True)
class Tested:
    """What came of it.

    Attributes:
        counts: per layer, sums of the table by label.
        observed: per layer, the statistic.
        size: tokens of each label.
        documents: documents of each label.
        statistics: p, q, p_max, null_mean, null_p99, low, high of shape (layer, expert, label), null_max_p99 (); those
            that could be had.
        attrs: how it was tested.
        notes: what a reader must know of the test; those that begin with `NO_P` say why there are no p-values.
    """

    counts: list[Float[np.ndarray, "expert label"]]
    observed: list[Float[np.ndarray, "expert label"]]
    size: Float[np.ndarray, " label"]
    documents: Int[np.ndarray, " label"]
    statistics: dict[str, Any]
    attrs: dict[str, Any]
    notes: list[str]


def against_dealings(
    axis: LayerAxis,
    tables: Sequence[PairCounts],
    tokens: Int[np.ndarray, " document"],
    code: Int[np.ndarray, " document"],
    labels: Sequence[str],
    score: Score,
    test: LabelTest,
    mirrored: bool = False,
) -> Tested:
    """Scores every (layer, expert, label), and holds it against labels dealt anew over documents.

    Args:
        axis: of the layers.
        tables: one per layer; groups are the positions 0 .. n-1 of `tokens` and `code`.
        tokens: [document] tokens of each document.
        code: [document] its label.
        labels: their names.
        score: the statistic, as in `permutation_null`.
        test: how.
        mirrored: two labels whose scores are each other's negative: one test, of which the first label has p and q.
    """
    n_labels = len(labels)
    documents = np.bincount(code, minlength=n_labels)
    size = np.bincount(code, weights=tokens, minlength=n_labels)
    counts = [table.by_label(code, n_labels) for table in tables]
    observed = [score(joint.T, size[:, None], joint.sum(axis=1), size.sum()).T for joint in counts]
    tests = sum(int((~np.isnan(values)).sum()) for values in observed) // (2 if mirrored else 1)
    permutations = test.permutations
    if permutations is None:
        sides = 1 if test.alternative == "greater" else 2
        permutations = enough_permutations(tests * sides, sum(table.count.size for table in tables))
    attrs: dict[str, Any] = {
        "permutations": permutations,
        "seed": test.seed,
        "alternative": test.alternative,
        "correction": CORRECTIONS[test.correction],
        "null": NULL,
        "resamples": test.resamples,
        "interval": INTERVAL,
        "family": f"all {tests} defined (layer, expert, label) cells of this result",
    }
    notes = [
        f"label {name!r} has {n} document{'s' if n > 1 else ''} of {documents.sum()}: its p-values cannot be small"
        for name, n in zip(labels, documents, strict=True)
        if n < 3 and n_labels > 1
    ]
    statistics: dict[str, Any] = {}
    if test.resamples:
        pairs = [_interval(table, tokens, code, n_labels, score, test) for table in tables]
        statistics["low"] = axis.pad([low for low, _ in pairs])
        statistics["high"] = axis.pad([high for _, high in pairs])
    if n_labels < 2 or not permutations:
        return Tested(
            counts, observed, size, documents, statistics, attrs, [ONE_LABEL if n_labels < 2 else NOT_ASKED, *notes]
        )
    null = permutation_null(tables, tokens, code, observed, score, permutations, test.seed)
    p = axis.pad([null.p_value(row, test.alternative) for row in range(len(tables))])
    if mirrored:
        p[..., 1:] = np.nan
    q = q_values(p, test.correction)
    attrs |= floor_of(p, q, permutations, tests, test)
    notes += [f"{attrs['floor']}, or read p_max"] if "floor" in attrs else []
    statistics |= {
        "p": p,
        "q": q,
        "p_max": axis.pad([null.p_largest(values) for values in observed]),
        "null_mean": axis.pad(null.mean),
        "null_p99": axis.pad(null.p99),
        "null_max_p99": np.quantile(null.largest, 0.99, method="higher"),
    }
    return Tested(counts, observed, size, documents, statistics, attrs, notes)


def floor_of(p: np.ndarray, q: np.ndarray, permutations: int, tests: int, test: LabelTest) -> dict[str, str]:
    """The attribute `floor`, where the permutations were too few for anything to stand."""
    sides = 1 if test.alternative == "greater" else 2
    floor = too_few(p, q, permutations, tests, "tests", sides, test.correction)
    return {"floor": floor} if floor else {}


def enough_permutations(tests: int, pairs: int) -> int:
    """Dealings that let one discovery among `tests` reach q <= 0.05, within what takes seconds.

    The smallest p is 1 / (1 + dealings), and alone among m tests it has q = m p.

    Args:
        tests: cells that are tested together, each counted twice for a two-sided test.
        pairs: (document, layer, expert) pairs to sum in each dealing.
    """
    wanted = int(np.clip(tests / 0.05, 1000, 20_000))
    # About a second per 1e9 sums and per 1e7 scores.
    affordable = int(min(4e9 / max(pairs, 1), 5e7 / max(tests, 1)))
    return max(1000, min(wanted, affordable))


def _interval(
    table: PairCounts, tokens: np.ndarray, code: np.ndarray, n_labels: int, score: Score, test: LabelTest
) -> tuple[np.ndarray, np.ndarray]:
    dense = table.dense(code.size)
    held = np.zeros((code.size, n_labels))
    held[np.arange(code.size), code] = tokens
    parts = [(rows, dense[rows]) for rows in (np.flatnonzero(code == label) for label in range(n_labels))]
    return association_interval(parts, dense, held, tokens, score, test.resamples, test.seed, strata=code)
