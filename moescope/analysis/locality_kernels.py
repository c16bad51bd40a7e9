"""Loops over the tokens of each sequence: activations in a sliding window, and caches of every size at once.

Both do work that grows with the selections (tokens x k), not with windows x m or with cache sizes: a window's counts
change only where a token enters or leaves, and one pass down a stack of experts gives the hits of every cache size
(Mattson et al., IBM Systems Journal 1970). Ids are signed, [row, rank], negative where a slot is missing.
"""

from __future__ import annotations

import numpy as np

from moescope.analysis.kernels import kernel

LRU, LFU, BELADY, SCH = 0, 1, 2, 3
"""Policies of `replay`."""


@kernel
def drop_repeats(ids, experts):
    """Sets to -1 every slot that names an expert its token has named before: a token uses an expert once.

    Args:
        ids: [row, rank] int; changed in place.
        experts: how many experts the layer has, above every id.
    """
    last = np.full(experts, -1, np.int64)
    for row in range(ids.shape[0]):
        for rank in range(ids.shape[1]):
            e = ids[row, rank]
            if e < 0:
                continue
            if last[e] == row:
                ids[row, rank] = -1
            else:
                last[e] = row


@kernel
def count_windows(ids, edge, cell, window, by_cell, label, by_expert):
    """Counts windows by how often an expert is active in them, over all stride-1 windows inside each run.

    An expert's count is written down when it changes, with the number of windows it stood for.

    Args:
        ids: [row, rank] int, without repeats.
        edge: [run + 1] int64; first row of each run, and the end. Runs shorter than the window have none.
        cell, label: [run] int64; rows of the tables that a run adds to; negative to leave it out.
        window: tokens of a window, m.
        by_cell: [cell, m + 1] int64; (window, expert) pairs with 0 .. m activations, added to in place.
        by_expert: [label, expert, m + 1] int64; the same for each expert.
    """
    experts = by_expert.shape[1]
    active = np.zeros(experts, np.int64)
    since = np.zeros(experts, np.int64)
    for run in range(cell.size):
        first, last = edge[run], edge[run + 1]
        windows = last - first - window + 1
        if windows < 1 or cell[run] < 0:
            continue
        summed, table = by_cell[cell[run]], by_expert[label[run]]
        active[:] = 0
        since[:] = 0
        for row in range(first, first + window):
            for rank in range(ids.shape[1]):
                e = ids[row, rank]
                if e >= 0:
                    active[e] += 1
        for step in range(1, windows):
            for rank in range(ids.shape[1]):
                e = ids[first + step - 1, rank]
                if e >= 0:
                    stood = step - since[e]
                    summed[active[e]] += stood
                    table[e, active[e]] += stood
                    since[e] = step
                    active[e] -= 1
            for rank in range(ids.shape[1]):
                e = ids[first + step + window - 1, rank]
                if e >= 0:
                    stood = step - since[e]
                    summed[active[e]] += stood
                    table[e, active[e]] += stood
                    since[e] = step
                    active[e] += 1
        for e in range(experts):
            stood = windows - since[e]
            summed[active[e]] += stood
            table[e, active[e]] += stood


@kernel
def replay(ids, edge, cell, policy, window, depth, first):
    """Replays each run on caches of every size, each beginning empty, that load all experts of a token together.

    A cache of C experts keeps the token's experts and, of the others it held, those the policy values most. Such caches
    are nested, so that one stack holds them all: the cache of size C is the first C experts of the stack, for every C
    that a token's experts fit into. The stack is brought up to date expert by expert; whoever is pushed down and is
    worth less than the next in line goes on down in its place.

    Args:
        ids: [row, rank] int, without repeats.
        edge: [run + 1] int64; first row of each run, and the end.
        cell: [run] int64; row of the tables that a run adds to; negative to leave it out.
        policy: LRU: the expert used last is worth most; within a token the last rank. LFU: the one used by most tokens
            of the run so far, then the one used last. BELADY: the one needed again soonest. SCH: the one that most of
            the next `window` tokens need, the current one included, then the one used last.
        window: m of SCH.
        depth: [cell, expert + 1] int64; selections of an expert that stood at this place of the stack, counting from
            1, before its token: they hit every cache of at least that size. Added to in place.
        first: [cell, expert] int64; selections of an expert not seen before in the run, by how many had been.
    """
    experts, ranks = first.shape[1], ids.shape[1]
    longest = 0
    for run in range(cell.size):
        longest = max(longest, edge[run + 1] - edge[run])
    again = np.zeros((longest if policy == BELADY else 0, ranks), np.int64)
    never = np.int64(1) << 40
    top = np.int64(1) << 62  # above every worth: the token's own experts stay
    stack = np.zeros(experts + 1, np.int64)
    worth = np.zeros(experts, np.int64)
    ahead = np.zeros(experts, np.int64)
    used = np.zeros(experts, np.int64)
    seen = np.zeros(experts, np.bool_)
    for run in range(cell.size):
        if cell[run] < 0:
            continue
        start, stop = edge[run], edge[run + 1]
        hits, fresh = depth[cell[run]], first[cell[run]]
        seen[:] = False
        ahead[:] = 0
        used[:] = 0
        worth[:] = 0
        held = 0
        clock = np.int64(0)
        if policy == BELADY:
            used[:] = never
            for row in range(stop - 1, start - 1, -1):
                for rank in range(ranks):
                    e = ids[row, rank]
                    if e >= 0:
                        again[row - start, rank] = used[e]
                        used[e] = row
        elif policy == SCH:
            for row in range(start, min(start + window - 1, stop)):
                for rank in range(ranks):
                    e = ids[row, rank]
                    if e >= 0:
                        ahead[e] += 1
        for row in range(start, stop):
            if policy == SCH:
                # From here on `ahead` is of the window that begins at this row.
                entering = row + window - 1
                if entering < stop:
                    for rank in range(ranks):
                        e = ids[entering, rank]
                        if e >= 0:
                            ahead[e] += 1
                            worth[e] += np.int64(1) << 32
            known = 0
            for rank in range(ranks):
                e = ids[row, rank]
                if e >= 0:
                    worth[e] = top
                    known += seen[e]
            place = 0
            while known > 0:
                if worth[stack[place]] == top:
                    hits[place + 1] += 1
                    known -= 1
                place += 1
            for rank in range(ranks):
                x = ids[row, rank]
                if x < 0:
                    continue
                if not seen[x]:
                    seen[x] = True
                    fresh[held] += 1
                    stack[held] = x
                    held += 1
                down = stack[0]
                if down == x:
                    continue
                stack[0] = x
                value = worth[down]
                place = 1
                while stack[place] != x:
                    other = stack[place]
                    rival = worth[other]
                    keeps = rival > value
                    stack[place] = other if keeps else down
                    down = down if keeps else other
                    value = value if keeps else rival
                    place += 1
                stack[place] = down
            for rank in range(ranks):
                e = ids[row, rank]
                if e < 0:
                    continue
                clock += 1
                if policy == LRU:
                    worth[e] = clock
                elif policy == LFU:
                    used[e] += 1
                    worth[e] = (used[e] << 32) | clock
                elif policy == BELADY:
                    worth[e] = -again[row - start, rank]
                else:
                    ahead[e] -= 1
                    worth[e] = (ahead[e] << 32) | clock
