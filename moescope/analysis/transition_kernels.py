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
def stirred(state, part):
    """A 64-bit hash of two numbers (splitmix64's finaliser)."""
    state = (np.uint64(state) ^ np.uint64(part)) + np.uint64(0x9E3779B97F4A7C15)
    state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return state ^ (state >> np.uint64(31))


@kernel
def reorder(order, start, stop, shuffle, state):
    """Fills `order[start:stop]` with a random rotation of start .. stop - 1, or with a random permutation of it."""
    size = stop - start
    if not shuffle:
        shift = int(state % np.uint64(size))
        for at in range(size):
            there = at + shift
            order[start + at] = start + (there if there < size else there - size)
        return
    for at in range(size):
        order[start + at] = start + at
    for at in range(size - 1, 0, -1):
        state = stirred(state, at)
        other = int(state % np.uint64(at + 1))
        held = order[start + at]
        order[start + at] = order[start + other]
        order[start + other] = held


@kernel
def reorder_runs(edge, document, sequence, seed, draw, shuffle, order):
    """Fills `order` [row] with the rows, each run of them reordered within itself.

    Args:
        edge: [run + 1] int64; first row of each run, and the end.
        document, sequence: [run] int64; what the run is, which with `seed` and `draw` decides its random order.
        shuffle: permute the rows of a run; False rotates them by a random offset, 0 included.
    """
    for run in range(document.size):
        state = stirred(stirred(stirred(seed, document[run]), sequence[run]), draw)
        reorder(order, edge[run], edge[run + 1], shuffle, state)


@kernel
def count_reordered(source, target, source_worth, target_worth, edge, document, sequence, seed, first, shuffle, count):
    """`count_transitions` once per draw, with the target's rows reordered within each run: see `reorder_runs`.

    Args:
        first: number of the draw that `count[0]` is for.
        count: [draw, source expert, target expert] int64, added to in place.
    """
    order = np.empty(source.shape[0], dtype=np.int32)
    single = source.shape[1] == 1 and target.shape[1] == 1
    for draw in range(count.shape[0]):
        reorder_runs(edge, document, sequence, seed, first + draw, shuffle, order)
        table = count[draw]
        if single:
            # The worth of a single rank is 1 for every `ranks`.
            for row in range(source.shape[0]):
                i, j = source[row, 0], target[order[row], 0]
                if i >= 0 and j >= 0:
                    table[i, j] += 1
            continue
        for row in range(source.shape[0]):
            other = order[row]
            for a in range(source.shape[1]):
                i = source[row, a]
                if i < 0:
                    continue
                for b in range(target.shape[1]):
                    j = target[other, b]
                    if j >= 0:
                        table[i, j] += source_worth[a] * target_worth[b]


@kernel
def hash_rows(path, out):
    """A 64-bit hash of each row of `path` [row, layer] int."""
    for row in range(path.shape[0]):
        state = np.uint64(0)
        for layer in range(path.shape[1]):
            state = stirred(state, path[row, layer])
        out[row] = state


@kernel
def count_coactive(ids, group, adjacent, both, single, size):
    """Counts experts selected together at one token, each pair once, in the upper triangle.

    Args:
        ids: [row, rank] int; negative where a slot is missing.
        group: [row] int; the row's group.
        adjacent: only pairs whose ranks follow one another.
        both: [group, expert, expert] int64, added to at (smaller id, larger id).
        single: [group, expert] int64; tokens at which the expert is active.
        size: [group, k + 1] int64; tokens by number of filled slots.
    """
    for row in range(ids.shape[0]):
        g, filled = group[row], 0
        for a in range(ids.shape[1]):
            i = ids[row, a]
            if i < 0:
                continue
            filled += 1
            single[g, i] += 1
            last = min(a + 2, ids.shape[1]) if adjacent else ids.shape[1]
            for b in range(a + 1, last):
                j = ids[row, b]
                if j >= 0 and j != i:
                    both[g, min(i, j), max(i, j)] += 1
        size[g, filled] += 1


@kernel
def symmetric_tails(odds, depth):
    """Elementary symmetric polynomials of the last experts: out[i, m] is e_m of odds[i:], for m = 0 .. depth."""
    n = odds.size
    tails = np.zeros((n + 1, depth + 1))
    tails[n, 0] = 1.0
    for i in range(n - 1, -1, -1):
        tails[i, 0] = 1.0
        for m in range(1, depth + 1):
            tails[i, m] = tails[i + 1, m] + odds[i] * tails[i + 1, m - 1]
    return tails


@kernel
def joint_inclusion(odds, share, joint):
    """Inclusion probabilities of single experts (diagonal) and of pairs, in sets drawn by conditional Poisson sampling.

    A set of m experts has a probability proportional to the product of its odds. All terms are positive sums of
    products, so that nothing cancels.

    Args:
        odds: [expert] float64, >= 0.
        share: [m] float64; the probability of a set of m experts, m = 0 .. k.
        joint: [expert, expert] float64; overwritten.
    """
    n, depth = odds.size, share.size - 1
    tails = symmetric_tails(odds, depth)
    whole = tails[0]
    head = np.zeros(depth + 1)
    head[0] = 1.0
    middle = np.empty(depth + 1)
    for i in range(n):
        middle[:] = head
        total = 0.0
        for m in range(1, depth + 1):
            if share[m] > 0 and whole[m] > 0:
                part = 0.0
                for a in range(m):
                    part += head[a] * tails[i + 1, m - 1 - a]
                total += share[m] * odds[i] * part / whole[m]
        joint[i, i] = total
        for j in range(i + 1, n):
            total = 0.0
            for m in range(2, depth + 1):
                if share[m] > 0 and whole[m] > 0:
                    part = 0.0
                    for a in range(m - 1):
                        part += middle[a] * tails[j + 1, m - 2 - a]
                    total += share[m] * odds[i] * odds[j] * part / whole[m]
            joint[i, j] = total
            joint[j, i] = total
            for m in range(depth, 0, -1):
                middle[m] += odds[j] * middle[m - 1]
        for m in range(depth, 0, -1):
            head[m] += odds[i] * head[m - 1]


@kernel
def single_inclusion(odds, share, out):
    """The diagonal of `joint_inclusion` alone."""
    n, depth = odds.size, share.size - 1
    tails = symmetric_tails(odds, depth)
    whole = tails[0]
    head = np.zeros(depth + 1)
    head[0] = 1.0
    for i in range(n):
        total = 0.0
        for m in range(1, depth + 1):
            if share[m] > 0 and whole[m] > 0:
                part = 0.0
                for a in range(m):
                    part += head[a] * tails[i + 1, m - 1 - a]
                total += share[m] * odds[i] * part / whole[m]
        out[i] = total
        for m in range(depth, 0, -1):
            head[m] += odds[i] * head[m - 1]
