"""The self-check: is what the taps would read really what the model computes? Run at load, on one small batch.

It answers with figures, not with trust: the logits with and without taps to the bit, the ids against their range, and
sum(weight x expert output) against what the experts really returned. A model that fails is refused with the reason.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from moescope.errors import RefusedError
from moescope.hooks.execution import is_compiled
from moescope.hooks.facts import Facts, Gather, OnFacts, Undo
from moescope.hooks.readers import READERS
from moescope.hooks.readings import SiteReading
from moescope.hooks.semantics import Semantics, infer
from moescope.hooks.sites import Site
from moescope.hooks.taps import Tap, Want

Forward = Callable[[], torch.Tensor]
REBUILD_TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-8}
HALF_TOLERANCE = 3e-2  # bf16 keeps 8 bits of mantissa; a wrong expert gives an error near 1


@dataclass(frozen=True)
class Dtypes:
    """Precision in which a site's own numbers stand: float32, bfloat16 or float16 each."""

    weight: str
    logits: str


@dataclass(frozen=True)
class SiteCheck:
    """What the self-check found at one site.

    Attributes:
        rebuild_error: ||sum(weight x output) - experts' output|| / ||experts' output||; None where expert outputs
            cannot be observed, with the reason in ``note``.
        logits_are_linear: the router's first output is its own linear map, to the bit.
    """

    site: Site
    semantics: Semantics
    dtypes: Dtypes
    rebuild_error: float | None
    logits_are_linear: bool
    note: str = ""


@dataclass(frozen=True)
class SelfCheck:
    """The verdict on a model: every site's check, and whether logits stay bit-identical under capture."""

    sites: list[SiteCheck]
    logits_identical: bool
    idle: list[str]
    """Experts modules that did not run on text (a vision pool, say); they are not captured."""

    def as_dict(self) -> dict[str, Any]:
        """Plain figures for a manifest."""
        errors = [check.rebuild_error for check in self.sites if check.rebuild_error is not None]
        return {
            "logits_identical": self.logits_identical,
            "largest_rebuild_error": max(errors, default=None),
            "sites": len(self.sites),
            "idle": self.idle,
        }


def self_check(model: nn.Module, sites: list[Site], forward: Forward, positions: int) -> SelfCheck:
    """Probe, interpret and verify every site of a model.

    Args:
        model: the transformers model.
        sites: from `discover`.
        forward: runs the model on one fixed batch and gives its logits.
        positions: batch size times length of that batch.

    Raises:
        RefusedError: a site cannot be read faithfully; the message says which and why.
    """
    before = _plain(model, forward)
    if not torch.equal(before, forward()):
        raise RefusedError(
            "Two plain runs of this model differ (it draws random numbers?); what ran cannot be compared."
        )
    seen = _probe(model, sites, forward)
    running = [site for site in sites if site.key in seen]
    if not running:
        raise RefusedError("No MoE layer ran on a batch of text; there is nothing to capture.")
    semantics = {site.key: _interpret(model, site, seen[site.key]) for site in running}
    logits, readings, note = _tapped(model, running, semantics, forward, positions)
    if not torch.equal(before, logits):
        raise RefusedError(f"The logits differ under capture (by up to {(before - logits).abs().max():.3g}).")
    checks = [_verify(site, semantics[site.key], seen[site.key], readings[site.key], note) for site in running]
    return SelfCheck(checks, True, [site.experts for site in sites if site not in running])


def _plain(model: nn.Module, forward: Forward) -> torch.Tensor:
    """What the model gives by itself. A class that does not run on text is the model's own fault, and is said so."""
    try:
        return forward()
    except Exception as error:
        if is_compiled(model):
            raise  # whose complaint is the compiler's
        import transformers

        reason = f"{type(error).__name__}: {(str(error).strip().splitlines() or ['no message'])[0]}"
        raise RefusedError(
            f"{type(model).__name__} does not run on a batch of text, with or without MoEscope "
            f"(transformers {transformers.__version__}; {reason})."
        ) from error


def _probe(model: nn.Module, sites: list[Site], forward: Forward) -> dict[str, Facts]:
    """Plain facts of each site that ran on some token, before any interpretation."""
    seen: dict[str, Facts] = {}
    undo: list[Undo] = []

    def keep(site: Site) -> OnFacts:
        def first(facts: Facts) -> None:
            if facts.ids.numel() and site.key not in seen:
                seen[site.key] = _copied(facts)

        return first

    try:
        for site in sites:
            gather = Gather(output=True, linear=True, returned=True)
            undo += READERS[site.reader](model, site, gather, keep(site), site.top_k).install()
        forward()
    finally:
        for remove in reversed(undo):
            remove()
    return seen


def _copied(facts: Facts) -> Facts:
    """The same facts in memory of their own: the model may still write into its tensors."""
    tensors = {name: value.clone() for name, value in vars(facts).items() if isinstance(value, torch.Tensor)}
    return replace(facts, **tensors)


def _interpret(model: nn.Module, site: Site, seen: Facts) -> Semantics:
    if seen.output is None:
        raise RefusedError(f"{site.router} did not run although its experts did; its logits cannot be read.")
    block, router = model.get_submodule(site.block), model.get_submodule(site.router)
    columns = seen.output.shape[-1]
    if columns >= site.n_experts:
        found = infer(
            site, block, output=seen.output, linear=seen.linear,
            ids=seen.ids, weights=seen.weights, missing=seen.missing,
        )  # fmt: skip
        drops = seen.missing is not None or hasattr(router, "expert_capacity")
        found = replace(found, drops=drops, weight_on=READERS[site.reader].weight_on)
        if columns == site.n_experts or found.selection is not None:
            return found
    raise RefusedError(
        f"{site.router} scores {columns} classes for {site.n_experts} experts, in a way that no rule explains; "
        "it is not captured, rather than captured wrongly."
    )


def _tapped(
    model: nn.Module, sites: list[Site], semantics: dict[str, Semantics], forward: Forward, positions: int
) -> tuple[torch.Tensor, dict[str, SiteReading], str]:
    """Run once more under the taps that a capture would use, with expert outputs if they can be observed."""
    try:
        with Tap(
            model,
            sites,
            semantics,
            Want(logits=True, experts=True, outliers=True, vectors=frozenset(site.key for site in sites)),
        ) as tap:
            tap.begin(positions)
            logits = forward()
            return logits, tap.take().sites, ""
    except RefusedError as refusal:
        with Tap(model, sites, semantics, Want(logits=True)) as tap:
            tap.begin(positions)
            logits = forward()
            return logits, tap.take().sites, str(refusal)


def _verify(site: Site, semantics: Semantics, seen: Facts, reading: SiteReading, note: str) -> SiteCheck:
    ids, weights = reading.expert, reading.weight
    present = torch.ones_like(ids, dtype=torch.bool) if reading.valid is None else reading.valid
    if bool(((ids < 0) | (ids >= site.n_experts))[present].any()):
        raise RefusedError(f"{site.experts} receives expert ids outside 0..{site.n_experts - 1} (expert parallel?).")
    apart = site.n_experts + torch.arange(ids.shape[-1], device=ids.device).expand_as(ids)
    if (torch.where(present, ids, apart).sort(-1).values.diff(dim=-1) == 0).any():
        raise RefusedError(f"{site.experts} receives the same expert twice for one token.")
    if not torch.isfinite(weights).all():
        raise RefusedError(f"{site.experts} receives routing weights that are not finite.")
    linear = seen.linear is not None and seen.output is not None and torch.equal(seen.output, seen.linear)
    dtypes = Dtypes(_name(weights), _name(weights if reading.logits is None else reading.logits))
    if reading.vectors is None:
        return SiteCheck(site, semantics, dtypes, None, linear, note)
    assert seen.returned is not None
    if torch.isnan(reading.vectors[present]).any():
        raise RefusedError(f"{site.experts}: some selected experts gave no output, or NaN.")
    coefficients = torch.ones_like(weights) if semantics.weight_on == "input" else weights
    outputs = reading.vectors.double().masked_fill(~present.unsqueeze(-1), 0)
    rebuilt = seen.factor * (outputs * coefficients.double().unsqueeze(-1)).sum(1)
    returned = seen.returned.reshape(rebuilt.shape).double()
    error = float((rebuilt - returned).norm() / returned.norm().clamp_min(1e-30))
    if error > REBUILD_TOLERANCE.get(seen.returned.dtype, HALF_TOLERANCE):
        raise RefusedError(
            f"{site.experts}: sum(weight x expert output) misses the experts' real output by {error:.2g} (relative); "
            "what would be stored is not what the model computes."
        )
    return SiteCheck(site, semantics, dtypes, error, linear, note)


def _name(tensor: torch.Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")
