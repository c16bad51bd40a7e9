"""Specialisation: normalised pointwise mutual information of experts and document labels, with its null (METHODS 2).

Source: nPMI as RICE uses it for experts (arXiv 2505.14681); domain specialisation as OLMoE (arXiv 2409.02060, section
5.3); risk difference as SteerMoE (arXiv 2509.09660). All three are read off the same counts.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import xarray as xr

from moescope.analysis.association import NO_P, association, score
from moescope.analysis.counts import Phase, document_tables, labelling, sites_of
from moescope.analysis.label_tests import Alternative, Correction, LabelTest, against_dealings
from moescope.analysis.labelled import LayerAxis, provenance
from moescope.analysis.pairs import PairCounts
from moescope.analysis.question import LAYERS, PHASE, RESAMPLES, SEED, Analysis, Parameter
from moescope.errors import MoescopeError

if TYPE_CHECKING:
    from jaxtyping import Float, Int

    from moescope.store import Store

NO_DOCUMENTS = f"{NO_P}: a table already summed over documents has lost what could be permuted"


def npmi(
    store: Store,
    by: str | None = None,
    permutations: int | None = None,
    seed: int = 0,
    alternative: Alternative = "greater",
    correction: Correction = "bh",
    resamples: int = 500,
    layers: Sequence[int] | None = None,
    where: dict[str, str | Sequence[str]] | None = None,
    phase: Phase | None = None,
) -> xr.Dataset:
    """Which experts specialise in which label, and whether that is more than the luck of which documents were read.

    How to read it: 0 means the expert fires on this label's tokens as often as on any others; 1 that the two always
    meet, -1 that they never do. Trust a cell when `q` is small: among the cells with q <= 0.05 about 1 in 20 is a
    false alarm. Compare its value with `null_p99`, what a random dealing of labels over documents reaches in that cell
    once in a hundred times, and, when you went looking for the largest cell, with `null_max_p99`.

    Args:
        store: an open store with the routing tier.
        by: the document label; the store's first if None.
        permutations: random dealings of labels over documents; 0 for values alone. By default as many as it takes for a
            single true discovery to reach q <= 0.05, at least 1000, at most 20000, fewer where a large store would make
            that slow; `attrs["permutations"]` says how many.
        seed: of the dealings.
        alternative: "greater" tests for preference; "two-sided" for preference or avoidance (twice the smaller tail).
        correction: "bh" Benjamini-Hochberg, "by" Benjamini-Yekutieli (any dependence, stricter).
        resamples: documents drawn again within each label, for the intervals; 0 for none.
        layers, where, phase: filters, as in `analysis.load`.

    Returns:
        Dataset with dims (layer, expert, label): npmi in [-1, 1]; pmi (nats, -inf if the two never meet); p_active =
        share of the label's tokens at which the expert is active (OLMoE's domain specialisation, to be held against
        `uniform` = k/E per layer); lift = p_active / the expert's share of all tokens; risk_difference = p_active -
        the same over all other labels (sums to 0 over the experts of a layer); count; p, q (over the declared family),
        p_max (family-wise), null_mean, null_p99; npmi_low, npmi_high (95 % interval over documents); `tokens`,
        `documents` (label); `null_max_p99` (). Reasons for NaN stand in `attrs["undefined"]`.

    Raises:
        MoescopeError: the store has no labels, no such label, or nothing left to count.
    """
    by = by or default_label(store)
    sites = sites_of(store, layers)
    chosen = labelling(store, by, where, phase)
    index = chosen.spread(np.arange(chosen.documents.size))
    tables = [pairs.regrouped(index) for pairs in document_tables(store, sites, phase=phase)]
    attrs = provenance(
        store,
        analysis="npmi",
        by=by,
        where=where,
        phase=phase,
        documents_unlabelled=chosen.unlabelled,
        documents_filtered=chosen.filtered,
    )
    return _with_null(
        LayerAxis.of_sites(sites),
        tables,
        chosen.tokens,
        chosen.code,
        list(chosen.labels),
        LabelTest(permutations, seed, alternative, correction, resamples),
        attrs,
    )


def npmi_from_documents(
    counts: Int[np.ndarray, "document layer expert"],
    tokens: Int[np.ndarray, " document"],
    labels: Sequence[str],
    layers: Sequence[int] | None = None,
    top_k: int | None = None,
    permutations: int | None = None,
    seed: int = 0,
    alternative: Alternative = "greater",
    correction: Correction = "bh",
    resamples: int = 500,
) -> xr.Dataset:
    """`npmi` from plain per-document counts.

    Args:
        counts: [document, layer, expert] selections; NaN where a layer has no such expert.
        tokens: [document] tokens of each document, >= 1.
        labels: [document] one label per document.
        layers: model layer indices; 0, 1, 2, ... if None.
        top_k: selections per token, for `uniform`.
        permutations, seed, alternative, correction, resamples: as in `npmi`.

    Raises:
        MoescopeError: shapes that do not fit, or a document without tokens.
    """
    axis, tables, size, code, names = checked_documents(counts, tokens, labels, layers, top_k)
    test = LabelTest(permutations, seed, alternative, correction, resamples)
    return _with_null(axis, tables, size, code, names, test, provenance(None, analysis="npmi", by="label"))


def checked_documents(
    counts: Int[np.ndarray, "document layer expert"],
    tokens: Int[np.ndarray, " document"],
    labels: Sequence[str],
    layers: Sequence[int] | None,
    top_k: int | None,
) -> tuple[LayerAxis, list[PairCounts], np.ndarray, np.ndarray, list[str]]:
    """Plain per-document counts as the tests take them: (axis, tables, tokens, label of each document, label names).

    Raises:
        MoescopeError: shapes that do not fit, or a document without tokens.
    """
    table = np.asarray(counts, dtype=np.float64)
    size = np.asarray(tokens, dtype=np.int64)
    if table.ndim != 3 or size.shape != table.shape[:1] or len(labels) != size.size:
        raise MoescopeError(
            f"Counts of shape {table.shape} need one token total and one label per document; "
            f"got {size.size} totals and {len(labels)} labels."
        )
    if not size.size or (size < 1).any():
        raise MoescopeError("Every document needs at least one token; leave empty documents out.")
    names, code = np.unique(np.asarray(labels, dtype=str), return_inverse=True)
    axis = LayerAxis.of_array(np.moveaxis(table, 0, -1), layers, top_k)
    tables = [PairCounts.of_dense(table[:, row, : axis.n_experts[row]]) for row in range(table.shape[1])]
    return axis, tables, size, code, [str(name) for name in names]


def npmi_from_counts(
    counts: Float[np.ndarray, "layer expert label"],
    tokens: Float[np.ndarray, " label"],
    labels: Sequence[str] | None = None,
    layers: Sequence[int] | None = None,
    top_k: int | None = None,
) -> xr.Dataset:
    """The values alone from a table already summed over documents, such as a published one; it can have no null.

    Args:
        counts: [layer, expert, label] tokens of the label at which the expert was selected; NaN for experts a layer
            lacks.
        tokens: [label] all tokens of the label.
        labels: names of the labels.
        layers, top_k: as in `npmi_from_documents`.

    Returns:
        As `npmi`, with NaN p-values and the reason in `attrs["undefined"]`.
    """
    table = np.asarray(counts, dtype=np.float64)
    size = np.asarray(tokens, dtype=np.float64)
    if table.ndim != 3 or size.shape != table.shape[2:]:
        raise MoescopeError(f"Counts of shape {table.shape} need one token total per label; got {size.shape}.")
    if (np.nan_to_num(table) > size).any() or (table < 0).any():
        raise MoescopeError("An expert cannot be selected at more tokens than a label has, nor fewer than 0.")
    names = [str(name) for name in (labels if labels is not None else range(size.size))]
    axis = LayerAxis.of_array(table, layers, top_k)
    per_layer = [table[row, :width] for row, width in enumerate(axis.n_experts)]
    attrs = provenance(None, analysis="npmi", by="label", permutations=0)
    return association(axis, per_layer, size, names, np.full(size.size, np.nan), {}, attrs, [NO_DOCUMENTS])


def default_label(store: Store) -> str:
    """The label an analysis uses when none is named: the store's first."""
    known = list(store.labels)
    if not known:
        raise MoescopeError("This store has no labels to specialise in: capture the corpus with label columns.")
    return known[0]


def _with_null(
    axis: LayerAxis,
    tables: list[PairCounts],
    tokens: np.ndarray,
    code: np.ndarray,
    labels: list[str],
    test: LabelTest,
    attrs: dict,
) -> xr.Dataset:
    found = against_dealings(axis, tables, tokens, code, labels, score, test)
    statistics = dict(found.statistics)
    for bound in ("low", "high"):
        if bound in statistics:
            statistics[f"npmi_{bound}"] = statistics.pop(bound)
    return association(
        axis, found.counts, found.size, labels, found.documents, statistics, attrs | found.attrs, found.notes
    )


NPMI_QUESTION = Analysis(
    name="npmi",
    run=npmi,
    figure="npmi",
    help="Which experts specialise in which label, beyond the luck of which documents were read?",
    parameters=(
        Parameter("by", str, None, "the document label (default: the store's first)"),
        Parameter(
            "permutations",
            int,
            None,
            "random dealings of labels over documents (default: enough for the tests)",
        ),
        Parameter("alternative", str, "greater", "test for preference, or either way", ("greater", "two-sided")),
        Parameter("correction", str, "bh", "q-values: Benjamini-Hochberg or -Yekutieli", ("bh", "by")),
        RESAMPLES,
        LAYERS,
        PHASE,
        SEED,
    ),
    tier="routing",
)
