"""Capturing: a corpus goes through a model under hooks into a store. The only place that knows both sides.

(The package is not called `capture` because `moescope.capture` is the function people call.)
"""

from moescope.capturing.activations import Activations
from moescope.capturing.caches import CachedRun, capture_cache
from moescope.capturing.corpus import Census, Corpus, Document
from moescope.capturing.forecast import Forecast
from moescope.capturing.run import DEFAULT_TIERS, TIERS, capture

__all__ = [
    "DEFAULT_TIERS", "TIERS", "Activations", "CachedRun", "Census", "Corpus", "Document", "Forecast", "capture",
    "capture_cache",
]  # fmt: skip
