"""The integer programs of placement, for HiGHS: ExFlow's crossings and MoETuner's load balance (METHODS 3).

Both are solved after a heuristic: HiGHS through SciPy takes no starting solution, so what the heuristic reached goes in
as a bound on the objective, and "no solution" then proves that the heuristic's is optimal.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from scipy.sparse import coo_array, csr_array

from moescope.analysis.integer_programs import INFEASIBLE, Solved, solve
from moescope.analysis.placing import Counts, Plan, align, crossings, local_search, room, step_bound, widths_of
from moescope.analysis.replication import pack
from moescope.analysis.watching import counted

if TYPE_CHECKING:
    from jaxtyping import Float

LARGEST = 15_000
"""Variables of ExFlow's program beyond which HiGHS is not started. At 28,000 (8 layers of 32 experts on 4 devices)
presolve alone took 40 s, heedless of its time limit, and the bound at the root was half of `step_bound`'s."""
CLOSE = 1e-3
"""Relative distance from its bound at which a layer's load counts as even: tokens vary by more from text to text."""

OPTIMAL, LIMIT, LARGE = "optimal", "time limit", "not started: too large"


@dataclass(frozen=True)
class Solution:
    """A placement with what is proven about it.

    Attributes:
        plan: per layer, the device of each expert.
        objective: what was minimised: crossings (exflow), or the summed load of each layer's busiest device (moetuner).
        bound: no placement has a smaller objective.
        status: "optimal", "time limit", or "not started: too large" (the plan is then the heuristic's).
        seconds: time it took.
        improved: did the program find something better than the heuristic?
    """

    plan: Plan
    objective: float
    bound: float
    status: str
    seconds: float
    improved: bool = False

    @property
    def gap(self) -> float:
        """(objective - bound) / objective; 0 is proven optimal."""
        return (self.objective - self.bound) / self.objective if self.objective > 0 else 0.0


def exflow(counts: Counts, devices: int, uneven: bool = False, seed: int = 0, time_limit: float = 30.0) -> Solution:
    """ExFlow's placement: the fewest crossings with equally many experts on every device (arXiv 2401.08383).

    Binary x[l,e,d] puts expert e of layer l on device d; y[l,a,b,d] >= x[l,a,d] - x[l+1,b,d] for every transition that
    occurs; minimise the sum of N_l[a,b] y[l,a,b,d]. Added here, without loss: devices are named in the order in which
    the first layer's experts need them; an expert can share a device with no more experts of the next layer than it
    holds (which lifts the linear relaxation, otherwise worth 0); and the objective must beat the local search's.

    Args:
        counts: per step, [source expert, target expert] tokens.
        devices: how many.
        uneven: let devices differ by one expert where experts do not divide.
        seed: of the local search.
        time_limit: seconds for both together; the local search takes a third at most.

    Returns:
        The better of the local search's and the program's plan, and the larger of the program's bound and the sum of
        `step_bound`.
    """
    begun = time.perf_counter()
    widths_of(counts)
    tables = [np.asarray(table, dtype=np.float64) for table in counts]
    plan = local_search(tables, devices, uneven, seed, seconds=time_limit / 3)
    reached = float(crossings(tables, plan).sum())
    program = _Program(tables, devices, uneven)
    bound = float(sum(step_bound(table, devices, uneven) for table in tables))
    if bound >= reached:
        return Solution(plan, reached, reached, OPTIMAL, _since(begun))
    if program.size > LARGEST:
        return Solution(plan, reached, bound, LARGE, _since(begun))
    whole = all(np.array_equal(table, np.round(table)) for table in tables)
    better_than = reached - (1 if whole else 1e-6 * reached)
    left = max(time_limit - _since(begun), 0.01)
    answer = program.solve(better_than, left)
    if answer.status == INFEASIBLE:
        # Nothing beats the local search by one token (or, for weights, by a millionth).
        return Solution(plan, reached, max(bound, min(better_than + whole, reached)), OPTIMAL, _since(begun))
    if answer.bound is not None:
        lowest = answer.bound - 1e-6 * reached
        bound = max(bound, min(np.ceil(lowest) if whole else lowest, reached))
    if answer.x is None:
        return Solution(plan, reached, bound, LIMIT, _since(begun))
    found = program.plan(answer.x)
    crossed = float(crossings(tables, found).sum())
    if crossed >= reached:  # within HiGHS's tolerances of being better, and not better
        return Solution(plan, reached, bound, OPTIMAL if bound >= reached else LIMIT, _since(begun))
    if answer.status == 0:
        return Solution(found, crossed, crossed, OPTIMAL, _since(begun), True)
    return Solution(found, crossed, min(bound, crossed), LIMIT, _since(begun), True)


def moetuner(
    counts: Counts,
    loads: Sequence[Float[np.ndarray, " expert"]],
    devices: int,
    uneven: bool = False,
    time_limit: float = 30.0,
) -> Solution:
    """MoETuner's placement: experts of a layer to clusters of even load, clusters to devices (arXiv 2502.06643).

    First stage, layer by layer: the least load of the busiest cluster, clusters holding equally many experts. Second
    stage: the naming of clusters by devices with the fewest crossings; devices being equally far from one another, that
    is exact (`align`) and needs no program.

    Args:
        counts: per step, [source expert, target expert] tokens, for the second stage.
        loads: per layer, [expert] tokens.
        devices, uneven: as in `exflow`.
        time_limit: seconds for the first stages of all layers.

    Returns:
        The plan; objective and bound are those of the first stage, summed over layers.
    """
    begun = time.perf_counter()
    widths_of(counts)
    tables = [np.asarray(table, dtype=np.float64) for table in counts]
    solved = []
    for index, load in counted("layers", list(enumerate(loads))):
        left = max(time_limit - _since(begun), 0.0) / (len(loads) - index)
        solved.append(balanced_clusters(np.asarray(load, dtype=np.float64), devices, uneven, left))
    plan = align(tables, [layer.plan[0] for layer in solved], devices)
    return Solution(
        plan,
        sum(layer.objective for layer in solved),
        sum(layer.bound for layer in solved),
        next((layer.status for layer in solved if layer.status != OPTIMAL), OPTIMAL),
        _since(begun),
        any(layer.improved for layer in solved),
    )


def balanced_clusters(
    load: Float[np.ndarray, " expert"], devices: int, uneven: bool = False, time_limit: float = 5.0
) -> Solution:
    """One layer's experts in clusters of equal size whose busiest one carries the least load.

    Heaviest first, then exchanges, then the program; within `CLOSE` of the bound the layer counts as solved.
    """
    begun = time.perf_counter()
    fewest, most = room(load.size, devices, uneven)
    plan = np.empty(load.size, dtype=np.int64)
    for place, experts in enumerate(pack(load, devices)):
        plan[experts] = place
    plan = _exchanged(load, plan, devices)
    reached = float(np.bincount(plan, load, devices).max())
    lightest = np.sort(load)[: max(fewest - 1, 0)].sum()
    bound = float(max(load.sum() / devices, load.max() + lightest if fewest else load.max()))
    if reached <= bound * (1 + CLOSE):
        return Solution([plan], reached, bound, OPTIMAL, _since(begun))
    n = load.size * devices
    expert, place = np.divmod(np.arange(n), devices)
    ones = np.ones(n)
    once = coo_array((ones, (expert, np.arange(n))), (load.size, n + 1))
    held = coo_array((ones, (place, np.arange(n))), (devices, n + 1))
    over = coo_array(
        (
            np.append(load[expert], -np.ones(devices)),
            (np.append(place, np.arange(devices)), np.append(np.arange(n), [n] * devices)),
        ),
        (devices, n + 1),
    )
    upper = np.append(ones, reached * (1 - CLOSE / 10))
    upper[:n][(np.argsort(np.argsort(-load, kind="stable"))[expert] < place)] = 0  # clusters named by heaviest expert
    answer = solve(
        np.append(np.zeros(n), 1.0),
        [(csr_array(once), 1, 1), (csr_array(held), fewest, most), (csr_array(over), -np.inf, 0)],
        integrality=np.append(ones, 0),
        lower=np.append(np.zeros(n), bound),
        upper=upper,
        time_limit=max(time_limit - _since(begun), 0.01),
        gap=CLOSE,
    )
    if answer.status == INFEASIBLE:
        return Solution([plan], reached, max(bound, reached * (1 - CLOSE / 10)), OPTIMAL, _since(begun))
    if answer.bound is not None:
        bound = max(bound, min(answer.bound * (1 - 1e-6), reached))
    if answer.x is None:
        return Solution([plan], reached, bound, LIMIT, _since(begun))
    found = answer.x[:n].reshape(load.size, devices).argmax(axis=1)
    carried = float(np.bincount(found, load, devices).max())
    status = OPTIMAL if answer.status == 0 else LIMIT
    return Solution([found], carried, min(bound, carried), status, _since(begun), True)


def _exchanged(load: np.ndarray, plan: np.ndarray, devices: int) -> np.ndarray:
    """Exchanges an expert of the busiest cluster with one of another while that lowers the larger of the two."""
    plan = plan.copy()
    while True:
        carried = np.bincount(plan, load, devices)
        busiest = int(carried.argmax())
        mine, others = np.flatnonzero(plan == busiest), np.flatnonzero(plan != busiest)
        if not mine.size or not others.size:
            return plan
        moved = load[mine][:, None] - load[others][None, :]
        after = np.maximum(carried[busiest] - moved, carried[plan[others]][None, :] + moved)
        a, b = np.unravel_index(int(after.argmin()), after.shape)
        if after[a, b] >= carried[busiest] * (1 - 1e-12):
            return plan
        plan[mine[a]], plan[others[b]] = plan[others[b]], busiest


class _Program:
    """ExFlow's program as sparse matrices: columns are x of layer 0, 1, ..., then y of step 0, 1, ..."""

    def __init__(self, counts: Counts, devices: int, uneven: bool) -> None:
        self.devices, self.widths = devices, widths_of(counts)
        self.rooms = [room(width, devices, uneven) for width in self.widths]
        self.cells = [np.nonzero(table) for table in counts]
        self.cost = [table[cell] for table, cell in zip(counts, self.cells, strict=True)]
        self.x_start = np.cumsum([0, *(width * devices for width in self.widths)])
        self.y_start = self.x_start[-1] + np.cumsum([0, *(cost.size * devices for cost in self.cost)])
        self.size = int(self.y_start[-1])

    def solve(self, better_than: float, time_limit: float) -> Solved:
        """Runs HiGHS for a plan with at most `better_than` crossings."""
        cost = np.zeros(self.size)
        cost[self.x_start[-1] :] = np.concatenate([np.repeat(value, self.devices) for value in self.cost])
        upper = np.ones(self.size)
        first = np.arange(self.widths[0] * self.devices)
        upper[first[first % self.devices > first // self.devices]] = 0
        integrality = np.zeros(self.size)
        integrality[: self.x_start[-1]] = 1
        rows = [*self._assignment(), *self._crossing(), *self._companions(), *self._order()]
        rows.append((csr_array(cost[None, :]), [-np.inf], [better_than]))
        return solve(cost, rows, integrality, np.zeros(self.size), upper, time_limit, gap=0.0)

    def plan(self, x: Float[np.ndarray, " variable"]) -> Plan:
        """The devices of a solution."""
        return [
            x[start : start + width * self.devices].reshape(width, self.devices).argmax(axis=1)
            for start, width in zip(self.x_start[:-1], self.widths, strict=True)
        ]

    def _matrix(self, row: np.ndarray, column: np.ndarray, value: np.ndarray, rows: int) -> csr_array:
        return csr_array(coo_array((value, (row, column)), (rows, self.size)))

    def _assignment(self):
        """Every expert on one device; every device within its room, layer by layer."""
        for start, width, (fewest, most) in zip(self.x_start[:-1], self.widths, self.rooms, strict=True):
            index = np.arange(width * self.devices)
            ones = np.ones(index.size)
            yield self._matrix(index // self.devices, start + index, ones, width), np.ones(width), np.ones(width)
            held = self._matrix(index % self.devices, start + index, ones, self.devices)
            yield held, np.full(self.devices, fewest), np.full(self.devices, most)

    def _crossing(self):
        """x[l,a,d] - x[l+1,b,d] - y[l,a,b,d] <= 0."""
        for step, (source, target) in enumerate(self.cells):
            n = source.size * self.devices
            cell, device = np.divmod(np.arange(n), self.devices)
            row = np.tile(np.arange(n), 3)
            column = np.concatenate(
                [
                    self.x_start[step] + source[cell] * self.devices + device,
                    self.x_start[step + 1] + target[cell] * self.devices + device,
                    self.y_start[step] + np.arange(n),
                ]
            )
            value = np.repeat([1.0, -1.0, -1.0], n)
            yield self._matrix(row, column, value, n), np.full(n, -np.inf), np.zeros(n)

    def _companions(self):
        """Of the partners an expert has, all but those that fit on one device are crossed to."""
        for step, sides in enumerate(self.cells):
            for side, other in ((0, 1), (1, 0)):
                expert = sides[side]
                width, most = self.widths[step + side], self.rooms[step + other][1]
                cell = np.repeat(np.arange(expert.size), self.devices)
                column = self.y_start[step] + np.arange(cell.size)
                least = np.bincount(expert, minlength=width) - most
                matrix = self._matrix(expert[cell], column, np.ones(cell.size), width)
                wanted = np.flatnonzero(least > 0)
                yield matrix[wanted], least[wanted], np.full(wanted.size, np.inf)

    def _order(self):
        """An expert of the first layer is on device d only if an earlier one is on device d - 1."""
        rows, columns, values, row = [], [], [], 0
        for expert in range(1, self.widths[0]):
            for device in range(1, min(expert, self.devices - 1) + 1):
                columns += [expert * self.devices + device, *(e * self.devices + device - 1 for e in range(expert))]
                values += [1.0] + [-1.0] * expert
                rows += [row] * (expert + 1)
                row += 1
        yield (
            self._matrix(np.array(rows, int), np.array(columns, int), np.array(values), row),
            np.full(row, -np.inf),
            np.zeros(row),
        )


def _since(begun: float) -> float:
    return time.perf_counter() - begun
