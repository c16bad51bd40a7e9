"""What all tests share."""

from __future__ import annotations

import os

# One thread: zoo models are so small that threads only wait for each other, and several workers share the cores.
# The environment is for what starts threads by itself - OpenMP pools that a library sizes anew, processes that tests
# start - and counts only if it is set before torch and NumPy are there.
for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "NUMBA_NUM_THREADS"):
    os.environ.setdefault(name, "1")

import torch  # noqa: E402
from hypothesis import HealthCheck, settings  # noqa: E402

torch.set_num_threads(1)

# Wall-clock deadlines say something about the machine, not about the code, and so does an example that is made slowly;
# the same examples run everywhere.
settings.register_profile(
    "moescope", deadline=None, derandomize=True, max_examples=50, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("moescope")
