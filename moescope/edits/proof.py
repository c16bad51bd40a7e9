"""Whether a written checkpoint computes what its recipe does live: logits of both on real prompts, in float32."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from moescope.edits.files import tensors_of
from moescope.edits.recipe import Recipe
from moescope.errors import RefusedError
from moescope.hooks import Model, load

PROMPTS = (
    "The capital of France is Paris, and the capital of Italy is",
    "def add(a, b):\n    return a + b\n",
    "12 + 30 = 42, so 42 - 12 =",
)
TOLERANCE = 1e-4  # of the logits' spread: what float32 leaves of a product taken at another place
COARSEST = (("BF16", "bfloat16"), ("F16", "float16"), ("F32", "float32"))
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
        unedited: mean KL of next-token distributions, live to the unedited model, nats.
        dtype: the coarsest precision that the checkpoint stores numbers in.
    """

    tokens: int
    largest: float
    spread: float
    divergence: float
    changed: float
    unedited: float
    dtype: str

    def require(self, *, exact: bool, hint: str = "") -> None:
        """Raises RefusedError where an edit that should be exact is not (`hint` says why that may be), or where an
        approximation is no nearer to the live edit than the unedited model is."""
        allowed = ROUNDED.get(self.dtype, TOLERANCE) * self.spread
        if exact and not self.largest <= allowed:
            raise RefusedError(
                f"The written checkpoint differs from the live edit by up to {self.largest:.3g} in a logit (allowed "
                f"{allowed:.3g}); it was not kept.{f' {hint}.' if hint else ''}"
            )
        if not exact and not self.divergence < self.unedited:
            raise RefusedError(
                f"The approximation is no nearer to the live edit than the unedited model: {self.divergence:.3g} nats "
                f"against {self.unedited:.3g}; it was not kept."
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

    def divergence(other: torch.Tensor) -> float:
        return float((p.exp() * (p - other.log_softmax(-1))).sum(-1).mean())

    return Proof(
        tokens=len(a),
        largest=float((a - b).abs().max()),
        spread=float(a.std()),
        divergence=divergence(b),
        changed=float((a - before).abs().max()),
        unedited=divergence(before),
        dtype=_stored_dtype(written, dtype),
    )


def _stored_dtype(folder: Path, fallback: str) -> str:
    """The coarsest precision that a checkpoint stores numbers in; its configuration may say another."""
    stored = {tensor.dtype for tensor in tensors_of(folder).values()}
    return next((name for code, name in COARSEST if code in stored), fallback)


def _ids(model: Model, text: str) -> torch.Tensor:
    ids = model.tokenizer(text, return_tensors="pt")["input_ids"]
    return ids.to(model.device)


def _logits(model: Model, ids: torch.Tensor) -> torch.Tensor:
    with torch.inference_mode():
        return model.forward(ids, torch.ones_like(ids))[0].float().clone()
