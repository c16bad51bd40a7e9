"""MoEscope: look inside Mixture-of-Experts language models.

```python
import moescope as ms

model = ms.load("tiny-qwen-moe")
store = ms.capture(model, ms.Corpus("texts.jsonl", labels=["domain"]), out="runs/demo")
result = ms.analysis.npmi(store, by="domain")
ms.figures.npmi(result)
```

Names are loaded when they are first used, so that importing the package costs nothing.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from moescope import analysis, decoding, edits, effects, figures, report, unlearning
    from moescope.capturing import Activations, CachedRun, Corpus, capture, capture_cache
    from moescope.edits import Demote, Mask, Merge, Promote, Prune, Recipe, Replace, Route, Rows, Scale, Zero
    from moescope.errors import CorpusError, MoescopeError, RefusedError, StoreError
    from moescope.hooks import Model, load, wrap
    from moescope.store import Store, open

_HOMES = {
    "Activations": "moescope.capturing",
    "CachedRun": "moescope.capturing",
    "Corpus": "moescope.capturing",
    "CorpusError": "moescope.errors",
    "Demote": "moescope.edits",
    "Mask": "moescope.edits",
    "Model": "moescope.hooks",
    "MoescopeError": "moescope.errors",
    "Promote": "moescope.edits",
    "Merge": "moescope.edits",
    "Prune": "moescope.edits",
    "Recipe": "moescope.edits",
    "RefusedError": "moescope.errors",
    "Replace": "moescope.edits",
    "Route": "moescope.edits",
    "Rows": "moescope.edits",
    "Scale": "moescope.edits",
    "Store": "moescope.store",
    "StoreError": "moescope.errors",
    "Zero": "moescope.edits",
    "capture": "moescope.capturing",
    "capture_cache": "moescope.capturing",
    "load": "moescope.hooks",
    "open": "moescope.store",
    "wrap": "moescope.hooks",
}
_MODULES = ("analysis", "decoding", "edits", "effects", "figures", "report", "unlearning")

__all__ = [
    "Activations", "CachedRun", "Corpus", "CorpusError", "Demote", "Mask", "Merge", "Model", "MoescopeError", "Promote",
    "Prune", "Recipe", "RefusedError", "Replace", "Route", "Rows", "Scale", "Store", "StoreError", "Zero", "analysis",
    "capture", "capture_cache", "decoding", "edits", "effects", "figures", "load", "open", "report",
    "unlearning", "wrap",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return import_module(f"moescope.{name}")
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'moescope' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
