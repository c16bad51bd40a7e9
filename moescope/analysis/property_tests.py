"""nPMI of experts with token properties: values, the test inside documents, intervals; on a store or plain counts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import xarray as xr
from scipy.sparse import csr_array

from moescope.analysis.association import CORRECTIONS, association, q_values, score
from moescope.analysis.label_tests import LabelTest
from moescope.analysis.labelled import LayerAxis, provenance
from moescope.analysis.pairs import PairCounts
from moescope.analysis.resampling import association_interval
from moescope.analysis.within_documents import NULL, Z99, within_documents
from moescope.errors import MoescopeError

if TYPE_CHECKING:
    from jaxtyping import Int

    from moescope.analysis.token_properties import PropertyCounts

INTERVAL = "95 % percentile intervals over documents drawn again with replacement; NaN with fewer than two documents"
FAMILY_WISE = "p_max is p times the number of tests (Bonferroni)"


def npmi_from_properties(
    joint: Int[np.ndarray, "document layer expert property"],
    held: Int[np.ndarray, "document property"],
    selections: Int[np.ndarray, "document layer expert"],
    tokens: Int[np.ndarray, " document"],
    labels: Sequence[str] | None = None,
    layers: Sequence[int] | None = None,
    top_k: int | None = None,
    seed: int = 0,
    alternative: str = "greater",
    correction: str = "bh",
    resamples: int = 500,
) -> xr.Dataset:
    """nPMI of experts with token properties from plain per-document counts, tested inside documents.

    How to read it: as `npmi_classes`.

    Args:
        joint: tokens with the property at which the expert was active.
        held: tokens with the property.
        selections: tokens at which the expert was active; NaN where a layer has no such expert.
        tokens: all tokens of each document, >= 1.
        labels: names of the properties.
        layers, top_k: as in `npmi_from_documents`.
        seed, alternative, correction, resamples: as in `npmi`.

    Raises:
        MoescopeError: shapes that do not fit, or counts above their totals.
    """
    table, fired = np.asarray(joint, dtype=np.float64), np.asarray(selections, dtype=np.float64)
    of_kind, size = np.asarray(held, dtype=np.float64), np.asarray(tokens, dtype=np.int64)
    if table.ndim != 4 or fired.shape != table.shape[:3] or of_kind.shape != (len(table), table.shape[3]):
        raise MoescopeError(
            f"Counts of shape {table.shape} (document, layer, expert, property) need `held` (document, property) and "
            f"`selections` (document, layer, expert); got {of_kind.shape} and {fired.shape}."
        )
    if size.shape != table.shape[:1] or not size.size or (size < 1).any():
        raise MoescopeError("Every document needs its number of tokens, at least one.")
    if (np.nan_to_num(table) > np.minimum(of_kind[:, None, None], np.nan_to_num(fired)[..., None])).any():
        raise MoescopeError("An expert cannot be active at more tokens with a property than there are of either.")
    names = [str(name) for name in (labels if labels is not None else range(table.shape[3]))]
    axis = LayerAxis.of_array(np.moveaxis(fired, 0, -1), layers, top_k)
    pairs = [
        PairCounts.of_dense(np.moveaxis(table[:, row, :width], 1, 2).reshape(-1, width))
        for row, width in enumerate(axis.n_experts)
    ]
    each = [fired[:, row, :width] for row, width in enumerate(axis.n_experts)]
    test = LabelTest(0, seed, alternative, correction, resamples)  # pyright: ignore[reportArgumentType]
    attrs = provenance(None, analysis="npmi_classes", by="token property")
    return tested_inside(axis, pairs, csr_array(of_kind), each, size, names, test, attrs)


def npmi_of_counts(
    axis: LayerAxis, counts: PropertyCounts, labels: Sequence[str], test: LabelTest, attrs: dict[str, Any]
) -> xr.Dataset:
    """The same from counts of a store."""
    return tested_inside(
        axis, counts.joint, counts.held, counts.selections, counts.tokens, labels, test, attrs | left_out(counts)
    )


def left_out(counts: PropertyCounts) -> dict[str, int]:
    """Attributes that say which documents were not looked at."""
    return {"documents_filtered": counts.documents.filtered, "documents": int(counts.tokens.size)}


def tested_inside(
    axis: LayerAxis,
    joint: Sequence[PairCounts],
    held: csr_array,
    selections: Sequence[np.ndarray],
    tokens: np.ndarray,
    labels: Sequence[str],
    test: LabelTest,
    attrs: dict[str, Any],
) -> xr.Dataset:
    """The association of properties and experts with the test inside documents; arguments as in `within_documents`."""
    size, total = np.asarray(held.sum(axis=0)).ravel(), float(tokens.sum())
    found = [within_documents(pairs, held, fired, tokens) for pairs, fired in zip(joint, selections, strict=True)]
    active = [fired.sum(axis=0) for fired in selections]
    undefined = [(fired[:, None] == 0) | (size[None, :] == 0) for fired in active]
    p = axis.pad(
        [np.where(no, np.nan, one.p_value(test.alternative)) for one, no in zip(found, undefined, strict=True)]
    )
    tests = int((~np.isnan(p)).sum())
    most = [np.minimum(fired[:, None], size[None, :]) for fired in active]
    statistics: dict[str, Any] = {
        "p": p,
        "q": q_values(p, test.correction),
        "p_max": np.minimum(1.0, p * tests),
        "null_mean": axis.pad(
            [score(one.mean, size, fired[:, None], total) for one, fired in zip(found, active, strict=True)]
        ),
        "null_p99": axis.pad(
            [
                score(np.minimum(one.mean + Z99 * one.deviation, top), size, fired[:, None], total)
                for one, fired, top in zip(found, active, most, strict=True)
            ]
        ),
    }
    if test.resamples:
        statistics |= intervals(axis, joint, held, selections, tokens, test)
    attrs = attrs | {
        "alternative": test.alternative,
        "correction": CORRECTIONS[test.correction],
        "null": NULL,
        "resamples": test.resamples,
        "seed": test.seed,
        "interval": INTERVAL,
        "family": f"all {tests} defined (layer, expert, label) cells of this result",
        "family_wise": FAMILY_WISE,
    }
    documents = np.diff(csr_array(held.T).indptr)
    notes = few_documents(labels, documents)
    return association(
        axis, [one.joint for one in found], size, labels, documents, statistics, attrs, notes, active, total
    )


def intervals(
    axis: LayerAxis,
    joint: Sequence[PairCounts],
    held: csr_array,
    selections: Sequence[np.ndarray],
    tokens: np.ndarray,
    test: LabelTest,
) -> dict[str, np.ndarray]:
    """npmi_low and npmi_high over documents drawn again."""
    dense = held.toarray()
    kinds = dense.shape[1]
    holders = [np.flatnonzero(dense[:, kind]) for kind in range(kinds)]
    low, high = [], []
    for pairs, fired in zip(joint, selections, strict=True):
        document, of_kind = np.divmod(pairs.group, kinds)
        parts = []
        for kind, rows in enumerate(holders):
            mine = of_kind == kind
            table = np.zeros((rows.size, pairs.n_experts))
            table[np.searchsorted(rows, document[mine]), pairs.expert[mine]] = pairs.count[mine]
            parts.append((rows, table))
        bounds = association_interval(parts, fired, dense, tokens, score, test.resamples, test.seed)
        low.append(bounds[0])
        high.append(bounds[1])
    return {"npmi_low": axis.pad(low), "npmi_high": axis.pad(high)}


def few_documents(labels: Sequence[str], documents: np.ndarray) -> list[str]:
    """A note about properties that so few documents hold that no test can say much."""
    rare = [str(name) for name, n in zip(labels, documents, strict=True) if 0 < n < 10]
    if not rare:
        return []
    shown = ", ".join(repr(name) for name in rare[:5]) + (f" and {len(rare) - 5} more" if len(rare) > 5 else "")
    return [f"{shown}: fewer than 10 documents hold it, so that its p-values cannot be small"]
