"""Entropy and mutual information of counts, in nats, and what of it finite counts give by chance."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from jaxtyping import Float


def mutual_information(table: Float[np.ndarray, "source target"]) -> float:
    """Mutual information, in nats, of a table of counts; NaN for an empty one."""
    total = table.sum()
    if total <= 0:
        return float("nan")
    cells = n_log_n(table[table > 0])
    found = cells - n_log_n(table.sum(axis=0)) - n_log_n(table.sum(axis=1)) + n_log_n(np.array([total]))
    return max(0.0, float(found / total))


def measures(table: np.ndarray, source_slots: float, target_slots: float) -> dict[str, float]:
    """Scores of one table of counts.

    The bias of mutual information under independence is half the expected chi-square of the cells over the tokens N.
    With k of E experts at each token, an expert of load p has the variance k p (1 - k p), so that a layer gives
    the factor sum_i (1 - k p_i) / k = (E - k) / k, and the table (E - k) (E' - k') / (2 k k' N), as
    usual for k = 1.
    """
    total = float(table.sum())
    source, target = table.sum(axis=1), table.sum(axis=0)
    used_source, used_target = int((source > 0).sum()), int((target > 0).sum())
    free = max(used_source - source_slots, 0.0) * max(used_target - target_slots, 0.0)
    return {
        "total": total,
        "mi": mutual_information(table),
        "mi_bias": free / (2 * total) if total else float("nan"),
        "entropy_source": entropy(source),
        "entropy_target": entropy(target),
        "used_source": used_source,
        "used_target": used_target,
    }


def entropy(counts: np.ndarray) -> float:
    """Entropy, in nats, of what is counted; NaN if nothing is."""
    total = counts.sum()
    return float(np.log(total) - n_log_n(counts) / total) if total > 0 else float("nan")


def n_log_n(counts: np.ndarray) -> float:
    """Sum of n log n over the counts above 0."""
    kept = counts[counts > 0].astype(np.float64)
    return float((kept * np.log(kept)).sum())


def conditional_entropy(table: np.ndarray) -> float:
    """Entropy, in nats, of the target expert when the source expert is known."""
    return max(0.0, entropy(table) - entropy(table.sum(axis=1)))
