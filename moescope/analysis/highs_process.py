"""HiGHS in a process of its own: a program on standard input, its solution on standard output, both as NumPy archives.

Run as a script by `moescope.analysis.integer_programs`, so it imports nothing of moescope. It is given the process that
waits for it, and ends soon after that one is gone, however that came about.
"""

import io
import json
import os
import sys
import threading
import time

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import csr_array

LOOK = 0.5  # seconds between two looks at whether anybody waits for the answer


def end_with(parent: int) -> None:
    """Ends this process once `parent` no longer is its parent: HiGHS lets go of Python's lock while it runs."""
    while os.getppid() == parent:
        time.sleep(LOOK)
    os._exit(1)


def main() -> None:
    """Reads, solves, writes."""
    threading.Thread(target=end_with, args=(int(sys.argv[1]),), daemon=True).start()
    with np.load(io.BytesIO(sys.stdin.buffer.read()), allow_pickle=False) as given:
        matrix = csr_array((given["data"], given["indices"], given["indptr"]), shape=tuple(given["shape"]))
        between, within = (given["low"], given["high"]), (given["lower"], given["upper"])
        answer = milp(
            given["cost"],
            constraints=LinearConstraint(matrix, *between),  # pyright: ignore[reportArgumentType]
            integrality=given["integrality"],
            bounds=Bounds(*within),  # pyright: ignore[reportArgumentType]
            options=json.loads(str(given["options"])),
        )
    bound = np.nan if answer.mip_dual_bound is None else answer.mip_dual_bound
    x = np.empty(0) if answer.x is None else answer.x
    out = io.BytesIO()
    np.savez(out, status=answer.status, bound=bound, x=x, found=answer.x is not None)
    sys.stdout.buffer.write(out.getvalue())


if __name__ == "__main__":
    main()
