"""A series of checkpoints over the same tokens: when each token's expert settles, and how saturated routing is.

Source: routing fluctuation as StableMoE has it (arXiv 2204.08396): the last step at which a token's expert differs from
its final one; router saturation by step as OLMoE has it (arXiv 2409.02060, section 5.1).
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import xarray as xr

from moescope.analysis.aligning import Aligned
from moescope.analysis.comparing import CONTROL, SUMS, UNDEFINED, block_sums
from moescope.analysis.comparing_kernels import differ_last
from moescope.analysis.counts import Phase, labelling
from moescope.analysis.labelled import LayerAxis, provenance
from moescope.analysis.question import LAYERS, PHASE, SEED, Analysis, Parameter
from moescope.analysis.resampling import INTERVAL, ratio_interval
from moescope.errors import MoescopeError

if TYPE_CHECKING:
    from jaxtyping import Float

    from moescope.store import Store


def fluctuation(
    stores: Sequence[Store],
    steps: Sequence[float] | None = None,
    by: str | None = None,
    layers: Sequence[int] | None = None,
    where: dict[str, str | Sequence[str]] | None = None,
    phase: Phase | None = None,
    resamples: int = 1000,
    seed: int = 0,
) -> xr.Dataset:
    """When tokens find their final expert, over a series of checkpoints whose last is the final one.

    How to read it: `settled` is the share of tokens whose first expert is, from this checkpoint on, the final one for
    good; `last_change` the share that differs for the last time at it. `top1` and `overlap` (router saturation) say how
    far this checkpoint agrees with the final one at all, `control_*` how far it would with tokens mixed up within their
    sequence. `top1` high and `settled` low: tokens go back and forth.

    Args:
        stores: captures of the same tokens in training order, the final checkpoint last.
        steps: training step of each, ascending; 0, 1, 2, ... if None.
        by: a document label; None for all documents as the one label "all".
        layers, where, phase: filters, as in `analysis.load`.
        resamples: bootstrap draws of documents behind the intervals; 0 for none.
        seed: of the draws and of the control.

    Returns:
        Dataset with dims (step, layer, label): settled, settled_low, settled_high, last_change (0 at the final step:
        nothing differs there), overlap, overlap_low, overlap_high, top1, top1_low, top1_high, control_overlap,
        control_top1; (layer, label): tokens (whose first expert is known at every step).

    Raises:
        MoescopeError: fewer than two stores, not of the same tokens, tokenizer, layers and widths, or bad steps.
    """
    names = list(range(len(stores))) if steps is None else list(steps)
    if len(names) != len(stores) or any(b <= a for a, b in itertools.pairwise(names)):
        raise MoescopeError(f"`steps` needs one number for each of the {len(stores)} stores, in ascending order.")
    # The final checkpoint is the reference; the earlier ones follow in training order.
    aligned = Aligned([stores[-1], *stores[:-1]] if stores else [], layers)
    chosen = labelling(stores[-1], by, where, phase)
    rows = [np.flatnonzero(chosen.code == code) for code in range(len(chosen.labels))]
    kept = np.searchsorted(np.unique(aligned.runs.document), chosen.documents)
    last, sums = (table[:, :, kept] for table in _changes(aligned, phase, seed))
    rng = np.random.default_rng(seed)
    attrs = provenance(
        stores[-1],
        analysis="fluctuation",
        earlier_store_ids=[store.manifest.store_id for store in stores[:-1]],
        by=by,
        where=where,
        phase=phase,
        resamples=resamples,
        seed=seed,
        control=CONTROL,
        interval=INTERVAL,
        undefined=UNDEFINED + "; settled and last_change count tokens whose first expert is known at every step",
        documents_unlabelled=chosen.unlabelled,
        documents_filtered=chosen.filtered,
        table="step, layer, label",
    )
    axis = LayerAxis.of_sites(aligned.sites)
    coordinates: dict[str, Any] = {name: value for name, value in axis.coordinates().items() if name != "expert"}
    coordinates |= {"step": names, "label": list(chosen.labels)}
    return xr.Dataset(_variables(last, sums, rows, resamples, rng), coords=coordinates, attrs=attrs)


def _changes(aligned: Aligned, phase: Phase | None, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Per document of the reference, kept in its aggregates.

    Returns:
        (last [step, layer, document]: tokens whose last change is at the step before, 0 for never; sums [step, layer,
        document, 8] of `block_sums` against the final checkpoint, which comes last).
    """
    documents = np.unique(aligned.runs.document)
    n_steps = len(aligned.stores)
    shape = (n_steps, len(aligned.sites), documents.size)
    names = [*SUMS, *(f"control_{name}" for name in SUMS)]

    def compute() -> pa.Table:
        last, sums = np.zeros(shape, dtype=np.int64), np.zeros((*shape, 8))
        for block in aligned.blocks():
            group = block.groups(documents, phase)
            for row, site in enumerate(aligned.sites):
                final = block.ids(0, site)
                when = np.zeros(block.n_tokens, dtype=np.int64)
                for step in range(n_steps):
                    ids = final if step == n_steps - 1 else block.ids(step + 1, site)
                    sums[step, row] += block_sums(block, final, ids, group, documents.size, seed)
                    differ_last(final[:, 0], ids[:, 0], step + 1, when)
                counted = (group >= 0) & (when >= 0)
                cell = when[counted] * documents.size + group[counted]
                last[:, row] += np.bincount(cell, minlength=n_steps * documents.size).reshape(n_steps, -1)
        columns = {name: sums[..., place].ravel() for place, name in enumerate(names)}
        return pa.table({"last": last.ravel()} | columns)

    found = aligned.stores[0].cached("fluctuation", compute, aligned.key | {"phase": phase or "all", "seed": seed})
    sums = np.stack([found[name].to_numpy() for name in names], axis=-1)
    return found["last"].to_numpy().reshape(shape), sums.reshape(*shape, 8)


def _variables(
    last: np.ndarray, sums: np.ndarray, rows: list[np.ndarray], resamples: int, rng: np.random.Generator
) -> dict[str, Any]:
    cell = ("step", "layer", "label")
    tokens = last.sum(axis=0)
    settled = np.cumsum(last, axis=0)
    found: dict[str, Any] = _ratio("settled", settled, np.broadcast_to(tokens, last.shape), rows, resamples, rng)
    changes = np.concatenate([last[1:], np.zeros_like(last[:1])])
    found |= _ratio("last_change", changes, np.broadcast_to(tokens, last.shape), rows, 0, rng)
    found |= _ratio("overlap", sums[..., 0], sums[..., 1], rows, resamples, rng)
    found |= _ratio("top1", sums[..., 2], sums[..., 3], rows, resamples, rng)
    found |= _ratio("control_overlap", sums[..., 4], sums[..., 5], rows, 0, rng)
    found |= _ratio("control_top1", sums[..., 6], sums[..., 7], rows, 0, rng)
    for name in ("last_change", "control_overlap", "control_top1"):
        del found[f"{name}_low"], found[f"{name}_high"]
    variables: dict[str, Any] = {name: (cell, values) for name, values in found.items()}
    variables["tokens"] = (("layer", "label"), np.stack([tokens[:, of].sum(axis=1) for of in rows], axis=1))
    return variables


def _ratio(
    name: str,
    numerator: Float[np.ndarray, "step layer document"],
    denominator: Float[np.ndarray, "step layer document"],
    rows: list[np.ndarray],
    resamples: int,
    rng: np.random.Generator,
) -> dict[str, Any]:
    """{name, name_low, name_high}: [step, layer, label]."""
    shape, found = numerator.shape[:2], []
    for of in rows:
        top, bottom = (
            values[:, :, of].reshape(-1, of.size).T.astype(np.float64) for values in (numerator, denominator)
        )
        with np.errstate(invalid="ignore"):
            value = top.sum(axis=0) / bottom.sum(axis=0)
        low, high = ratio_interval(top, bottom, resamples, rng)
        found.append([part.reshape(shape) for part in (value, low, high)])
    stacked = np.stack([np.stack(parts) for parts in found], axis=-1)
    return {name: stacked[0], f"{name}_low": stacked[1], f"{name}_high": stacked[2]}


FLUCTUATION_QUESTION = Analysis(
    name="fluctuation",
    run=fluctuation,
    figure="fluctuation",
    help="Over a series of checkpoints, when do tokens find their final expert?",
    parameters=(
        Parameter("steps", float, None, "training step of each store (default: 0, 1, 2, ...)", many=True),
        Parameter("by", str, None, "label of the documents (default: all together)"),
        LAYERS,
        PHASE,
        Parameter("resamples", int, 1000, "bootstrap draws of documents behind the intervals"),
        SEED,
    ),
    tier="routing",
    inputs=("stores",),
)
