"""The loop that walks a placement token by token: what each document adds to the crossings of each method."""

from __future__ import annotations

from moescope.analysis.kernels import kernel


@kernel
def add_crossings(source, target, document, cost, expected, weight, total):
    """Adds `weight * (cost[method, i, j] - expected[method])` to `total[document, method]` for each pair of slots.

    Args:
        source, target: [row, rank] int; ids of two layers at the same tokens, negative where there is none.
        document: [row] int; the row of `total` that the token belongs to.
        cost: [method, source expert, target expert] float64; probability that the token changes device.
        expected: [method] float64; what is subtracted: 0 for the crossings themselves.
        weight: float64; of the step.
        total: [document, method] float64, added to in place.
    """
    for row in range(source.shape[0]):
        d = document[row]
        for a in range(source.shape[1]):
            i = source[row, a]
            if i < 0:
                continue
            for b in range(target.shape[1]):
                j = target[row, b]
                if j >= 0:
                    for method in range(cost.shape[0]):
                        total[d, method] += weight * (cost[method, i, j] - expected[method])
