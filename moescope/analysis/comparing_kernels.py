"""Loops over the same tokens in several stores: what a sequence holds, whether selections agree, when they differ."""

from __future__ import annotations

import numpy as np

from moescope.analysis.kernels import kernel
from moescope.analysis.transition_kernels import stirred


@kernel
def fingerprint_runs(edge, token_id, position, fingerprint):
    """Fills `fingerprint` [run] uint64 with a hash of each run's token ids and positions, in order."""
    for run in range(fingerprint.size):
        state = np.uint64(0)
        for row in range(edge[run], edge[run + 1]):
            state = stirred(stirred(state, token_id[row]), position[row])
        fingerprint[run] = state


@kernel
def rotate_runs(edge, document, sequence, seed, other_row):
    """Fills `other_row` [row] with another row of the same run, by one random offset for each run; -1 in runs of one.

    The offset is a hash of seed, document and sequence: the same however the store is cut into shards.
    """
    for run in range(document.size):
        start, size = edge[run], edge[run + 1] - edge[run]
        if size < 2:
            for row in range(start, start + size):
                other_row[row] = -1
            continue
        state = stirred(stirred(stirred(seed, document[run]), sequence[run]), 0)
        shift = 1 + int(state % np.uint64(size - 1))
        for at in range(size):
            other_row[start + at] = start + (at + shift) % size


@kernel
def agree(left, right, other_row, group, sums):
    """Adds up how far the selections `left[row]` and `right[other_row[row]]` agree.

    Args:
        left, right: [row, rank] int; ids in rank order, -1 for a missing slot.
        other_row: [row] int; the row of `right` to hold against each row, -1 to leave it out.
        group: [row] int; where to add, -1 to leave the row out.
        sums: [group, 4] float64, added to in place: the shared experts over the larger set's size, rows counted for
            it (both sets not empty), rows whose first experts are the same, rows counted for that (both present).
    """
    for row in range(left.shape[0]):
        g, other = group[row], other_row[row]
        if g < 0 or other < 0:
            continue
        n_left, n_right, shared = 0, 0, 0
        for b in range(right.shape[1]):
            if right[other, b] >= 0:
                n_right += 1
        for a in range(left.shape[1]):
            expert = left[row, a]
            if expert < 0:
                continue
            n_left += 1
            for b in range(right.shape[1]):
                if right[other, b] == expert:
                    shared += 1
                    break
        if n_left and n_right:
            sums[g, 0] += shared / max(n_left, n_right)
            sums[g, 1] += 1
        if left[row, 0] >= 0 and right[other, 0] >= 0:
            sums[g, 3] += 1
            if left[row, 0] == right[other, 0]:
                sums[g, 2] += 1


@kernel
def differ_last(final, earlier, step, last):
    """Sets `last[row]` to `step` where the first experts differ, and to -1 for good where one is missing.

    Args:
        final, earlier: [row] int; first expert, -1 where missing.
        step: number of the earlier checkpoint, 1 or more, called in ascending order.
        last: [row] int; 0 to begin with.
    """
    for row in range(last.size):
        if last[row] < 0:
            continue
        if final[row] < 0 or earlier[row] < 0:
            last[row] = -1
        elif final[row] != earlier[row]:
            last[row] = step
