"""Ways of generating text with another routing than the model's own, and what comes of them.

>>> answer, = self_contrast(model, "What is 8 + 3 * 9?", beta=0.5, alpha=0.1)
>>> answer.text; answer.steps[0].strong          # both distributions, token by token
>>> Rerouter(model, references)(prompt).written.text     # routing moved toward similar prompts answered correctly
>>> result = tune(model, problems, alphas=[0.1], betas=[0.0, 0.5])
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from moescope.decoding.apart import answers_apart
    from moescope.decoding.contrast import SelfContrast, Step, Written, self_contrast
    from moescope.decoding.problems import Problem, generate, interval, read_problems, solved, tune
    from moescope.decoding.rerouting import Rerouted, Rerouter, judge
    from moescope.decoding.watching import pieces, watched

_HOME = {
    "Problem": "problems",
    "Rerouted": "rerouting",
    "Rerouter": "rerouting",
    "SelfContrast": "contrast",
    "Step": "contrast",
    "Written": "contrast",
    "answers_apart": "apart",
    "generate": "problems",
    "interval": "problems",
    "judge": "rerouting",
    "pieces": "watching",
    "read_problems": "problems",
    "self_contrast": "contrast",
    "solved": "problems",
    "tune": "problems",
    "watched": "watching",
}

__all__ = [
    "Problem", "Rerouted", "Rerouter", "SelfContrast", "Step", "Written", "answers_apart", "generate", "interval",
    "judge", "pieces", "read_problems", "self_contrast", "solved", "tune", "watched",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return __all__
