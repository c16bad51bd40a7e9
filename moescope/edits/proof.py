"""Whether a written checkpoint computes what its recipe does live: logits of both on real prompts, in float32."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from moescope.edits.recipe import Recipe
from moescope.errors import RefusedError
from moescope.hooks import Model, load

PROMPTS = (
    "The capital of France is Paris, and the capital of Italy is",
    "def add(a, b):\n    return a + b\n",
    "12 + 30 = 42, so 42 - 12 =",
)
TOLERANCE = 1e-4  # of the logits' spread: what float32 leaves of a product taken at another place
ROUNDED = {"float32": 1e-4, "bfloat16": 2e-2, "float16": 3e-3}  # where the scaled weights were rounded to the dtype


@dataclass(frozen=True)
class Proof:
    """Live against written.

    Attributes:
        tokens: over how many.
        largest: largest difference of a logit.
        spread: standard deviation of the live logits, to hold it against.
        divergence: mean KL of next-token distributions, live to written, nats.
        changed: largest difference of a logit between the live edit and the unedited model.
        dtype: the checkpoint's precision.
    """

    tokens: int
    largest: float
    spread: float
    divergence: float
    changed: float
    dtype: str

    def require(self, *, exact: bool) -> None:
        """Raises RefusedError where an edit that should be exact is not."""
        allowed = ROUNDED.get(self.dtype, TOLERANCE) * self.spread
        if exact and not self.largest <= allowed:
            raise RefusedError(
                f"The written checkpoint differs from the live edit by up to {self.largest:.3g} in a logit (allowed "
                f"{allowed:.3g}); it was not kept."
            )


def compare(recipe: Recipe, source: Path, written: Path, prompts: Sequence[str] | None = None) -> Proof:
    """Load the source with the recipe live, then the written checkpoint, and compare their logits."""
    texts = list(prompts or PROMPTS)
    model = load(str(source), dtype="float32")
    batches = [_ids(model, text) for text in texts]
    plain = [_logits(model, ids) for ids in batches]
    with model.edited(recipe):
        live = [_logits(model, ids) for ids in batches]
    dtype = str(getattr(model.hf.config, "dtype", None) or "float32").removeprefix("torch.")
    del model
    other = load(str(written), dtype="float32")
    stored = [_logits(other, ids) for ids in batches]
    a, b, before = (torch.cat(list(parts)) for parts in (live, stored, plain))
    if not (torch.isfinite(a).all() and torch.isfinite(b).all()):
        raise RefusedError("The edited model gives logits that are not finite; it was not kept.")
    p = a.log_softmax(-1)
    return Proof(
        tokens=len(a),
        largest=float((a - b).abs().max()),
        spread=float(a.std()),
        divergence=float((p.exp() * (p - b.log_softmax(-1))).sum(-1).mean()),
        changed=float((a - before).abs().max()),
        dtype=_checkpoint_dtype(written, dtype),
    )


def _checkpoint_dtype(folder: Path, fallback: str) -> str:
    import json

    config: dict[str, Any] = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    return str(config.get("dtype") or config.get("torch_dtype") or fallback)


def _ids(model: Model, text: str) -> torch.Tensor:
    ids = model.tokenizer(text, return_tensors="pt")["input_ids"]
    return ids.to(model.device)


def _logits(model: Model, ids: torch.Tensor) -> torch.Tensor:
    with torch.inference_mode():
        return model.forward(ids, torch.ones_like(ids))[0].float().clone()
