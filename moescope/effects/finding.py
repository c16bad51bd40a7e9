"""Which experts two sets of prompts tell apart: both are captured into a store that is thrown away."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path

import xarray as xr

from moescope.analysis import npmi
from moescope.capturing import Corpus, capture
from moescope.errors import MoescopeError
from moescope.hooks import Model

WANTED, OTHER = "wanted", "other"


def between(model: Model, wanted: Sequence[str], other: Sequence[str], *, seed: int = 0) -> xr.Dataset:
    """`analysis.npmi` of two sets of texts, by the label "set": "wanted" or "other".

    Raises:
        MoescopeError: a set without texts.
    """
    if not wanted or not other:
        raise MoescopeError("Two sets of prompts are needed, with at least one prompt each.")
    rows = [{"text": text, "set": name} for name, texts in ((WANTED, wanted), (OTHER, other)) for text in texts]
    with tempfile.TemporaryDirectory() as folder:
        store = capture(model, Corpus(rows, ["set"]), Path(folder) / "store", ["routing"])
        return npmi(store, by="set", seed=seed)
