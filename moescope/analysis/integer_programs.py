"""Integer programs that can be stopped: HiGHS heeds nobody while it runs, so a watched one runs in a process to end.

Through SciPy it takes no interrupt, and its time limit is not looked at during presolve. An analysis that somebody
watches (`moescope.analysis.watching`) solves whatever may take longer than `SHORT` in a process of its own, which is
ended as soon as the watcher raises, and ends by itself when this process is killed.
"""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import csr_array, vstack

from moescope.analysis.watching import is_watched, report
from moescope.errors import MoescopeError

if TYPE_CHECKING:
    from jaxtyping import Float

LIMIT, INFEASIBLE = 1, 2  # scipy.optimize.milp's status
SHORT = 1.0
"""Seconds of time limit up to which a program runs where it is: a process takes about as long to begin."""
LOOK = 0.1  # seconds between two looks at whether the watcher wants it to go on
_SCRIPT = Path(__file__).with_name("highs_process.py")


@dataclass(frozen=True)
class Solved:
    """What HiGHS answers.

    Attributes:
        status: `scipy.optimize.milp`'s: 0 optimal, 1 limit, 2 infeasible.
        x: [variable] the best solution; None if it found none.
        bound: no solution has a smaller cost; None if unknown.
    """

    status: int
    x: Float[np.ndarray, " variable"] | None
    bound: float | None


def solve(
    cost: Float[np.ndarray, " variable"],
    rows: Sequence[tuple[Any, Any, Any]],
    integrality: np.ndarray,
    lower: np.ndarray,
    upper: np.ndarray,
    time_limit: float,
    gap: float,
) -> Solved:
    """Minimises `cost` x under low <= matrix x <= high.

    Args:
        cost: of each variable.
        rows: (sparse matrix [row, variable], low, high) blocks; low and high by row, or one number for all.
        integrality: [variable] 1 where only integers count.
        lower, upper: [variable] bounds.
        time_limit: seconds.
        gap: relative distance from the bound at which a solution is good enough.

    Raises:
        MoescopeError: the process of its own died.
        CancelledError: whatever the watcher raises.
    """
    matrix: Any = csr_array(vstack([block for block, _, _ in rows], format="csr"))
    low, high = (
        np.concatenate([np.broadcast_to(np.asarray(row[side], np.float64), row[0].shape[0]) for row in rows])
        for side in (1, 2)
    )
    options = {"time_limit": time_limit, "mip_rel_gap": gap}
    if time_limit > SHORT and is_watched() and sys.executable:
        return _aside(cost, matrix, low, high, integrality, lower, upper, options)
    between: Any = (low, high)
    within: Any = (lower, upper)
    answer = milp(
        cost,
        constraints=LinearConstraint(matrix, *between),
        integrality=integrality,
        bounds=Bounds(*within),
        options=options,
    )
    return _solved(answer.status, answer.x, answer.mip_dual_bound)


def _aside(
    cost: Any, matrix: Any, low: Any, high: Any, integrality: Any, lower: Any, upper: Any, options: dict[str, float]
) -> Solved:
    """The same in a process that ends when the watcher says so."""
    limit, begun = options["time_limit"], time.monotonic()
    with tempfile.TemporaryFile() as program:  # a pipe would have to be fed while the process begins to read
        np.savez(
            program, cost=cost, data=matrix.data, indices=matrix.indices, indptr=matrix.indptr, shape=matrix.shape,
            low=low, high=high, integrality=integrality, lower=lower, upper=upper, options=json.dumps(options),
        )  # fmt: skip
        program.seek(0)
        # -P: what lies in the working directory is not imported.
        command = [sys.executable, "-P", str(_SCRIPT), str(os.getpid())]
        process = subprocess.Popen(command, stdin=program, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    try:
        while True:
            report("seconds of the solver", min(int(time.monotonic() - begun), int(limit)), int(np.ceil(limit)))
            try:
                out, err = process.communicate(timeout=LOOK)
                break
            except subprocess.TimeoutExpired:
                continue
    finally:
        if process.poll() is None:
            process.kill()
            process.communicate()
    if process.returncode:
        said = err.decode(errors="replace").strip().splitlines()
        raise MoescopeError(f"The solver ended early ({said[-1] if said else f'exit code {process.returncode}'}).")
    with np.load(io.BytesIO(out), allow_pickle=False) as answer:
        return _solved(int(answer["status"]), answer["x"] if answer["found"] else None, float(answer["bound"]))


def _solved(status: int, x: Any, bound: Any) -> Solved:
    return Solved(int(status), x, None if bound is None or not np.isfinite(bound) else float(bound))
