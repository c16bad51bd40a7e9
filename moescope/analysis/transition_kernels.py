"""Counting loops over pairs of layers: transitions as they are, and under the null of `affinity`.

All loops take ids as signed integers [row, rank] with -1 for a missing slot, so that each is compiled once, and count
in integers, so that the sum does not depend on how the rows were cut. Random draws come from a hash of the sequence and
the draw, not from a running generator: they are the same whichever shard or thread meets the sequence.
"""

from __future__ import annotations

import numpy as np

from moescope.analysis.kernels import kernel


@kernel
def count_transitions(source, target, source_worth, target_worth, count):
    """Adds `source_worth[rank] * target_worth[rank]` to `count[i, j]` for each pair of filled slots of each row.

    Args:
        source: [row, rank] int; ids of one layer, negative where there is none.
        target: [row, rank] int; ids of the other layer at the same tokens.
        source_worth, target_worth: [rank] int64; all ones count pairs.
        count: [source expert, target expert] int64, added to in place.
    """
    for row in range(source.shape[0]):
        for a in range(source.shape[1]):
            i = source[row, a]
            if i < 0:
                continue
            for b in range(target.shape[1]):
                j = target[row, b]
                if j >= 0:
                    count[i, j] += source_worth[a] * target_worth[b]


@kernel
def mixed(seed, first, second, third):
    """A 64-bit hash of four numbers (splitmix64's finaliser after each)."""
    state = np.uint64(seed)
    for part in (first, second, third):
        state = (state ^ np.uint64(part)) + np.uint64(0x9E3779B97F4A7C15)
        state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        state = state ^ (state >> np.uint64(31))
    return state
