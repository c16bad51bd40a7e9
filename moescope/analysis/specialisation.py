"""Specialisation: normalised pointwise mutual information of experts and document labels, with its null (METHODS 2).

Source: nPMI as RICE uses it for experts (arXiv 2505.14681); domain specialisation as OLMoE (arXiv 2409.02060, section
5.3); risk difference as SteerMoE (arXiv 2509.09660). All three are read off the same counts.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

import numpy as np
import xarray as xr
from scipy.stats import false_discovery_control

from moescope.analysis.counts import PairCounts, Phase, document_tables, labelling, sites_of
from moescope.analysis.labelled import PADDING, LayerAxis, provenance
from moescope.analysis.permutation import permutation_null
from moescope.analysis.question import LAYERS, PHASE, SEED, Analysis, Parameter
from moescope.errors import MoescopeError

if TYPE_CHECKING:
    from jaxtyping import Float, Int

    from moescope.store import Store

Alternative = Literal["greater", "two-sided"]
Correction = Literal["bh", "by"]

UNDEFINED = "NaN where an expert is never selected or a label has no token: 0/0, no association is defined"
ONE_LABEL = "p-values are NaN: with one label, dealing labels anew over documents changes nothing"
NO_DOCUMENTS = "p-values are NaN: a table already summed over documents has lost what could be permuted"
NULL = (
    "labels permuted over whole documents; p = (1 + draws at least as extreme) / (1 + draws), ties counted as extreme"
)


def npmi(
    store: Store,
    by: str | None = None,
    permutations: int | None = None,
    seed: int = 0,
    alternative: Alternative = "greater",
    correction: Correction = "bh",
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
        layers, where, phase: filters, as in `analysis.load`.

    Returns:
        Dataset with dims (layer, expert, label): npmi in [-1, 1]; pmi (nats, -inf if the two never meet); p_active =
        share of the label's tokens at which the expert is active (OLMoE's domain specialisation, to be held against
        `uniform` = k/E per layer); lift = p_active / the expert's share of all tokens; risk_difference = p_active -
        the same over all other labels (sums to 0 over the experts of a layer); count; p, q (over the declared family),
        p_max (family-wise), null_mean, null_p99; `tokens`, `documents` (label); `null_max_p99` (). Reasons for NaN
        stand in `attrs["undefined"]`.

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
        (permutations, seed, alternative, correction),
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
) -> xr.Dataset:
    """`npmi` from plain per-document counts.

    Args:
        counts: [document, layer, expert] selections; NaN where a layer has no such expert.
        tokens: [document] tokens of each document, >= 1.
        labels: [document] one label per document.
        layers: model layer indices; 0, 1, 2, ... if None.
        top_k: selections per token, for `uniform`.
        permutations, seed, alternative, correction: as in `npmi`.

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
    return _with_null(
        axis,
        tables,
        size,
        code,
        [str(name) for name in names],
        (permutations, seed, alternative, correction),
        provenance(None, analysis="npmi", by="label"),
    )


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
    return _dataset(axis, per_layer, size, np.full(size.size, np.nan), names, {}, attrs, [NO_DOCUMENTS])


def default_label(store: Store) -> str:
    """The label an analysis uses when none is named: the store's first."""
    known = list(store.labels)
    if not known:
        raise MoescopeError("This store has no labels to specialise in: capture the corpus with label columns.")
    return known[0]


def score(
    joint: np.ndarray, label: np.ndarray | float, expert: np.ndarray | float, total: np.ndarray | float
) -> np.ndarray:
    """nPMI from counts, broadcasting: log(p(x,y) / (p(x) p(y))) / -log p(x,y), without base.

    Args:
        joint: tokens of the label at which the expert is active.
        label: tokens of the label.
        expert: tokens at which the expert is active.
        total: all tokens.

    Returns:
        In [-1, 1]: -1 where the two never meet, 1 where every token is both; NaN where `label` or `expert` is 0.
    """
    with np.errstate(divide="ignore", invalid="ignore"):
        value = np.log(joint * total / (label * expert)) / -np.log(joint / total)
    value = np.where(joint == 0, -1.0, np.where(joint == total, 1.0, value))
    return np.where((label == 0) | (expert == 0), np.nan, np.clip(value, -1.0, 1.0))


def enough_permutations(tests: int, pairs: int) -> int:
    """Dealings that let one discovery among `tests` reach q <= 0.05, within what takes seconds.

    The smallest p is 1 / (1 + dealings), and alone among m tests it has q = m p.

    Args:
        tests: cells that are tested together.
        pairs: (document, layer, expert) pairs to sum in each dealing.
    """
    wanted = int(np.clip(tests / 0.05, 1000, 20_000))
    # About a second per 1e9 sums and per 1e7 scores.
    affordable = int(min(4e9 / max(pairs, 1), 5e7 / max(tests, 1)))
    return max(1000, min(wanted, affordable))


def _with_null(
    axis: LayerAxis,
    tables: list[PairCounts],
    tokens: np.ndarray,
    code: np.ndarray,
    labels: list[str],
    test: tuple[int | None, int, Alternative, Correction],
    attrs: dict,
) -> xr.Dataset:
    permutations, seed, alternative, correction = test
    if alternative not in ("greater", "two-sided") or correction not in ("bh", "by"):
        raise MoescopeError('`alternative` is "greater" or "two-sided", `correction` is "bh" or "by".')
    if permutations is not None and permutations < 0:
        raise MoescopeError("`permutations` must be 0 (values without a null) or more.")
    documents = np.bincount(code, minlength=len(labels))
    size = np.bincount(code, weights=tokens, minlength=len(labels))
    counts = [table.by_label(code, len(labels)) for table in tables]
    observed = [score(joint, size, joint.sum(axis=1, keepdims=True), size.sum()) for joint in counts]
    if permutations is None:
        tests = sum(int((~np.isnan(values)).sum()) for values in observed)
        permutations = enough_permutations(tests, sum(table.count.size for table in tables))
    attrs = attrs | {
        "permutations": permutations,
        "seed": seed,
        "alternative": alternative,
        "correction": {"bh": "Benjamini-Hochberg", "by": "Benjamini-Yekutieli"}[correction],
        "null": NULL,
    }
    notes = [
        f"label {name!r} has {n} document{'s' if n > 1 else ''} of {documents.sum()}: its p-values cannot be small"
        for name, n in zip(labels, documents, strict=True)
        if n < 3 and len(labels) > 1
    ]
    if len(labels) < 2 or not permutations:
        why = [ONE_LABEL] if len(labels) < 2 else ["p-values are NaN: no permutations were asked for"]
        return _dataset(axis, counts, size, documents, labels, {}, attrs, why + notes)
    null = permutation_null(tables, tokens, code, observed, score, permutations, seed)
    p = axis.pad([null.p_value(row, alternative) for row in range(len(tables))])
    tested = ~np.isnan(p)
    q = np.full(p.shape, np.nan)
    q[tested] = false_discovery_control(p[tested], method=correction) if tested.any() else []
    floor = (1 if alternative == "greater" else 2) / (permutations + 1)
    if tested.sum() * floor > 0.05:
        needed = int(np.ceil(tested.sum() * floor / 0.05))
        notes.append(
            f"with {permutations} permutations no p is below {floor:.2g}, so that q <= 0.05 takes at least {needed} "
            f"discoveries among the {int(tested.sum())} tests; for fewer read p_max, or raise permutations"
        )
    statistics = {
        "p": p,
        "q": q,
        "p_max": axis.pad([null.p_largest(values) for values in observed]),
        "null_mean": axis.pad(null.mean),
        "null_p99": axis.pad(null.p99),
        "null_max_p99": np.quantile(null.largest, 0.99, method="higher"),
    }
    attrs["family"] = f"all {int(tested.sum())} defined (layer, expert, label) cells of this result"
    return _dataset(axis, counts, size, documents, labels, statistics, attrs, notes)


def _dataset(
    axis: LayerAxis,
    counts: list[Float[np.ndarray, "expert label"]],
    size: Float[np.ndarray, " label"],
    documents: np.ndarray,
    labels: list[str],
    statistics: dict,
    attrs: dict,
    notes: list[str],
) -> xr.Dataset:
    joint = axis.pad(counts)
    expert = joint.sum(axis=2, keepdims=True)
    total = size.sum()
    value = score(joint, size, expert, total)
    with np.errstate(divide="ignore", invalid="ignore"):
        pmi = np.log(joint * total / (size * expert))
        active = joint / size
        elsewhere = (expert - joint) / (total - size)
        lift = active / (expert / total)
    cell = ("layer", "expert", "label")
    blank = np.full(joint.shape, np.nan)
    variables: dict = {
        "npmi": (cell, np.where(axis.exists[..., None], value, np.nan)),
        "count": (cell, joint),
        "pmi": (cell, np.where((expert == 0) | (size == 0), np.nan, pmi)),
        "p_active": (cell, active),
        "lift": (cell, lift),
        "risk_difference": (cell, active - elsewhere),
    }
    for name in ("p", "q", "p_max", "null_mean", "null_p99"):
        variables[name] = (cell, statistics.get(name, blank))
    variables["null_max_p99"] = ((), statistics.get("null_max_p99", np.nan))
    variables["tokens"] = ("label", size)
    variables["documents"] = ("label", documents)
    variables["uniform"] = ("layer", axis.top_k / axis.n_experts)
    variables["exists"] = (("layer", "expert"), axis.exists)
    attrs = attrs | {
        "undefined": "; ".join([UNDEFINED, *[note for note in notes if note.startswith("p-values are NaN")]]),
        "notes": "; ".join(note for note in notes if not note.startswith("p-values are NaN")) or "none",
        "padding": PADDING,
        "table": "layer, expert, label",
        "table_order": "npmi",
    }
    return xr.Dataset(variables, coords=axis.coordinates() | {"label": labels}, attrs=attrs)


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
        LAYERS,
        PHASE,
        SEED,
    ),
    tier="routing",
)
