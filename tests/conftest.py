"""What all tests share."""

from __future__ import annotations

import torch
from hypothesis import settings

# Zoo models are so small that threads only wait for each other; one thread is several times faster on a busy machine.
torch.set_num_threads(1)

# Wall-clock deadlines say something about the machine, not about the code; the same examples run everywhere.
settings.register_profile("moescope", deadline=None, derandomize=True, max_examples=50)
settings.load_profile("moescope")
