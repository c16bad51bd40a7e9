"""What all tests share."""

from __future__ import annotations

import torch

# Zoo models are so small that threads only wait for each other; one thread is several times faster on a busy machine.
torch.set_num_threads(1)
