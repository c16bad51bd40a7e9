"""Domain specialisation: how often a domain's tokens go to each expert, against uniform choice and against chance.

Source: OLMoE (arXiv 2409.02060, section 5.3): selections of the expert by the domain's tokens / tokens of the domain.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import xarray as xr

from moescope.analysis.association import noted
from moescope.analysis.counts import Phase, document_tables, labelling, sites_of
from moescope.analysis.label_tests import Alternative, Correction, LabelTest, against_dealings
from moescope.analysis.labelled import PADDING, LayerAxis, provenance
from moescope.analysis.pairs import PairCounts
from moescope.analysis.question import LAYERS, PHASE, RESAMPLES, SEED, Analysis, Parameter
from moescope.analysis.specialisation import checked_documents, default_label
from moescope.errors import MoescopeError

if TYPE_CHECKING:
    from jaxtyping import Int

    from moescope.store import Store


def domain_specialisation(
    store: Store,
    by: str | None = None,
    ranks: int | None = None,
    permutations: int | None = None,
    seed: int = 0,
    alternative: Alternative = "greater",
    correction: Correction = "bh",
    resamples: int = 500,
    layers: Sequence[int] | None = None,
    where: dict[str, str | Sequence[str]] | None = None,
    phase: Phase | None = None,
) -> xr.Dataset:
    """The share of each domain's tokens that each expert is selected for.

    How to read it: hold `share` against two things. `uniform` = k/E is what a router without any preference gives;
    `overall` is the expert's share of all tokens, and an expert that is busy everywhere is no specialist. `q` tests
    the second: whether the share in this domain is above what labels dealt anew over documents give.

    Args:
        store: an open store with the routing tier.
        by: the document label that names domains; the store's first if None.
        ranks: count only the first so many ranks: 1 for the top-1 expert, as in the paper's comparison with Mixtral;
            None for all k.
        permutations, seed, alternative, correction, resamples, layers, where, phase: as in `analysis.npmi`.

    Returns:
        Dataset with dims (layer, expert, label): share in [0, 1] (sums to the counted ranks over the experts of a layer
        without missing slots), share_low, share_high (95 % interval over documents), excess = share / uniform, count;
        p, q, p_max, null_mean, null_p99 of the share; and overall (layer, expert), uniform (layer), tokens, documents
        (label), null_max_p99 ().

    Raises:
        MoescopeError: no such label, or `ranks` below 1 or above a layer's k.
    """
    by = by or default_label(store)
    sites = sites_of(store, layers)
    axis = LayerAxis.of_sites(sites)
    counted = _ranks(axis, ranks)
    chosen = labelling(store, by, where, phase)
    index = chosen.spread(np.arange(chosen.documents.size))
    tables = [table.regrouped(index) for table in document_tables(store, sites, phase=phase, ranks=ranks)]
    attrs = provenance(
        store,
        analysis="domain_specialisation",
        by=by,
        ranks=ranks,
        where=where,
        phase=phase,
        documents_unlabelled=chosen.unlabelled,
        documents_filtered=chosen.filtered,
    )
    test = LabelTest(permutations, seed, alternative, correction, resamples)
    return _result(axis, counted, tables, chosen.tokens, chosen.code, list(chosen.labels), test, attrs)


def domain_specialisation_from_documents(
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
    """`domain_specialisation` from plain per-document counts; arguments as in `npmi_from_documents`.

    Without `top_k`, `uniform` is the selections per token / E.
    """
    axis, tables, size, code, names = checked_documents(counts, tokens, labels, layers, top_k)
    test = LabelTest(permutations, seed, alternative, correction, resamples)
    attrs = provenance(None, analysis="domain_specialisation", by="label")
    return _result(axis, axis.top_k, tables, size, code, names, test, attrs)


def share(joint: np.ndarray, label: np.ndarray, expert: np.ndarray, total: np.ndarray | float) -> np.ndarray:
    """Share of the label's tokens at which the expert is active: joint / label; NaN for an expert never selected."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(np.broadcast_to(expert == 0, joint.shape), np.nan, joint / label)


def _ranks(axis: LayerAxis, ranks: int | None) -> np.ndarray:
    if ranks is None:
        return axis.top_k
    if not 1 <= ranks <= axis.top_k.min():
        raise MoescopeError(f"`ranks` must be from 1 to {int(axis.top_k.min())}, the fewest experts a layer selects.")
    return np.full(axis.top_k.size, float(ranks))


def _result(
    axis: LayerAxis,
    counted: np.ndarray,
    tables: list[PairCounts],
    tokens: np.ndarray,
    code: np.ndarray,
    labels: list[str],
    test: LabelTest,
    attrs: dict[str, Any],
) -> xr.Dataset:
    found = against_dealings(axis, tables, tokens, code, labels, share, test)
    count = axis.pad(found.counts)
    cell = ("layer", "expert", "label")
    with np.errstate(divide="ignore", invalid="ignore"):
        value = count / found.size
    # Where plain counts do not say k, it is what they have: selections per token.
    per_token = np.nansum(count, axis=(1, 2)) / found.size.sum()
    uniform = np.where(np.isnan(counted), per_token, counted) / axis.n_experts
    statistics = {name: found.statistics.get(name, np.full(count.shape, np.nan)) for name in STATISTICS}
    variables: dict[str, Any] = {
        "share": (cell, value),
        "share_low": (cell, statistics.pop("low")),
        "share_high": (cell, statistics.pop("high")),
        "excess": (cell, value / uniform[:, None, None]),
        "count": (cell, count),
        **{name: (cell, values) for name, values in statistics.items()},
        "null_max_p99": ((), found.statistics.get("null_max_p99", np.nan)),
        "overall": (("layer", "expert"), count.sum(axis=2) / found.size.sum()),
        "uniform": ("layer", uniform),
        "tokens": ("label", found.size),
        "documents": ("label", found.documents),
        "exists": (("layer", "expert"), axis.exists),
    }
    attrs = attrs | found.attrs | noted(found.notes)
    attrs |= {"padding": PADDING, "table": "layer, expert, label", "table_order": "share"}
    return xr.Dataset(variables, coords=axis.coordinates() | {"label": labels}, attrs=attrs)


STATISTICS = ("low", "high", "p", "q", "p_max", "null_mean", "null_p99")

DOMAINS_QUESTION = Analysis(
    name="domain_specialisation",
    run=domain_specialisation,
    figure="domain_specialisation",
    help="What share of each domain's tokens goes to each expert, against uniform choice and against chance?",
    parameters=(
        Parameter("by", str, None, "the document label that names domains (default: the store's first)"),
        Parameter("ranks", int, None, "count only the first so many ranks, 1 for the top-1 expert (default: all)"),
        Parameter("permutations", int, None, "random dealings of labels over documents (default: enough)"),
        Parameter("alternative", str, "greater", "test for preference, or either way", ("greater", "two-sided")),
        Parameter("correction", str, "bh", "q-values: Benjamini-Hochberg or -Yekutieli", ("bh", "by")),
        RESAMPLES,
        LAYERS,
        PHASE,
        SEED,
    ),
    tier="routing",
)
