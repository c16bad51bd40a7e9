"""Risk difference: how much more often an expert is active in one set of texts than in another (SteerMoE, 2509.09660).

`rd = P(active | first set) - P(active | second set)`, over the tokens of each set. In a layer where every token selects
k experts both probabilities sum to k, so that the differences sum to 0.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import xarray as xr

from moescope.analysis.association import noted
from moescope.analysis.counts import Phase, document_tables, labelling, sites_of
from moescope.analysis.label_tests import Alternative, Correction, LabelTest, against_dealings
from moescope.analysis.labelled import PADDING, LayerAxis, provenance
from moescope.analysis.pairs import PairCounts, merge_pairs
from moescope.analysis.question import LAYERS, PHASE, RESAMPLES, SEED, Analysis, Parameter
from moescope.analysis.specialisation import checked_documents, default_label
from moescope.errors import MoescopeError

if TYPE_CHECKING:
    from jaxtyping import Bool, Int

    from moescope.store import Store

PAIRED = (
    "the two stores hold documents of the same ids: a dealing takes them for different documents, which makes the test "
    "strict where pairs are alike; what changed token by token is the question of analysis.compare"
)


def risk_difference(
    store: Store,
    first: str | None = None,
    second: str | None = None,
    by: str | None = None,
    permutations: int | None = None,
    seed: int = 0,
    alternative: Alternative = "two-sided",
    correction: Correction = "bh",
    resamples: int = 500,
    layers: Sequence[int] | None = None,
    where: dict[str, str | Sequence[str]] | None = None,
    phase: Phase | None = None,
) -> xr.Dataset:
    """How much more often each expert is active on the texts of one label value than of another.

    How to read it: 0.1 means that of 100 tokens of the first set 10 more select the expert than of 100 of the second.
    SteerMoE promotes the experts of the largest difference and demotes those of the smallest
    (`Recipe.from_risk_difference`). Trust a difference whose `q` is small, and whose interval leaves out 0.

    Args:
        store: an open store with the routing tier.
        first: the value whose texts are the first set; may be left out where the label has two values.
        second: the value of the second set; all other labelled documents if None.
        by: the document label; the store's first if None.
        permutations, seed, correction, resamples, layers, where, phase: as in `analysis.npmi`.
        alternative: "two-sided", or "greater" for experts of the first set alone.

    Returns:
        Dataset with dims (layer, expert): risk_difference in [-1, 1], low, high (95 % interval, documents drawn again
        within each set), p_first, p_second = P(active | set), count_first, count_second; p, q, p_max, null_p01,
        null_p99 of the difference under sets dealt anew over documents; sum (layer), 0 where no slot is missing;
        `first`, `second` and their tokens and documents stand in the attributes.

    Raises:
        MoescopeError: no such label or value, or the two sets are one.
    """
    by = by or default_label(store)
    sites = sites_of(store, layers)
    chosen = labelling(store, by, where, phase)
    first, rest = _sets(list(chosen.labels), first, second, by)
    kept = np.array([first == name or name in rest for name in chosen.labels])[chosen.code]
    code = np.where(np.array(chosen.labels)[chosen.code] == first, 0, 1)[kept]
    index = np.full(int(chosen.documents.max(initial=-1)) + 1, -1, dtype=np.int64)
    index[chosen.documents[kept]] = np.arange(code.size)
    tables = [table.regrouped(index) for table in document_tables(store, sites, phase=phase)]
    attrs = provenance(
        store,
        analysis="risk_difference",
        by=by,
        first=first,
        second=second or "all others",
        where=where,
        phase=phase,
        documents_unlabelled=chosen.unlabelled,
        documents_filtered=chosen.filtered,
    )
    test = LabelTest(permutations, seed, alternative, correction, resamples)
    return _result(LayerAxis.of_sites(sites), tables, chosen.tokens[kept], code, test, attrs)


def risk_difference_between(
    store: Store,
    other: Store,
    names: tuple[str, str] = ("first", "second"),
    permutations: int | None = None,
    seed: int = 0,
    alternative: Alternative = "two-sided",
    correction: Correction = "bh",
    resamples: int = 500,
    layers: Sequence[int] | None = None,
    where: dict[str, str | Sequence[str]] | None = None,
    phase: Phase | None = None,
) -> xr.Dataset:
    """The same between two stores: all of one is the first set, all of the other the second.

    How to read it: as `risk_difference`. The stores may hold different texts for one model, or come from two models of
    the same shape; what the sets differ in is what you compare.

    Args:
        store, other: open stores with the routing tier and MoE layers of the same numbers and widths.
        names: what to call the two.
        permutations, seed, alternative, correction, resamples, layers, where, phase: as in `risk_difference`. Document
            numbers in `where` are those of `store`; in `other` the documents of the same ids count.

    Raises:
        MoescopeError: their layers differ, nothing is left to count, or `other` lacks a document of `where`.
    """
    if len(names) != 2 or names[0] == names[1]:
        raise MoescopeError("`names` are two different names, one for each store.")
    both = [sites_of(one, layers) for one in (store, other)]
    shapes = [[(site.key, site.n_experts) for site in sites] for sites in both]
    if shapes[0] != shapes[1]:
        raise MoescopeError(
            "The two stores have MoE layers of different numbers or widths: their experts do not match."
        )
    parts, tokens = [], []
    filters = (where, _where_in(other, store, where))
    for one, sites, kept in zip((store, other), both, filters, strict=True):
        chosen = labelling(one, None, kept, phase)
        index = chosen.spread(np.arange(chosen.documents.size))
        parts.append([table.regrouped(index) for table in document_tables(one, sites, phase=phase)])
        tokens.append(chosen.tokens)
    shift = tokens[0].size
    tables = [
        merge_pairs([a, PairCounts(b.group + shift, b.expert, b.count, None, b.n_experts)], a.n_experts)
        for a, b in zip(*parts, strict=True)
    ]
    attrs = provenance(store, analysis="risk_difference_between", where=where, phase=phase)
    attrs |= {"other_store_id": other.manifest.store_id, "other_model": other.manifest.model.name}
    attrs |= {"first": names[0], "second": names[1]}
    code = np.repeat([0, 1], [shift, tokens[1].size])
    test = LabelTest(permutations, seed, alternative, correction, resamples)
    notes = [PAIRED] if _same_documents(store, other) else []
    return _result(LayerAxis.of_sites(both[0]), tables, np.concatenate(tokens), code, test, attrs, notes)


def risk_difference_of(
    store: Store,
    first: Mapping[str, Any],
    second: Mapping[str, Any] | None = None,
    names: tuple[str, str] = ("first", "second"),
    permutations: int | None = None,
    seed: int = 0,
    alternative: Alternative = "two-sided",
    correction: Correction = "bh",
    resamples: int = 500,
    layers: Sequence[int] | None = None,
    phase: Phase | None = None,
) -> xr.Dataset:
    """The same between any two sets of documents of one store.

    Args:
        store: an open store with the routing tier.
        first: which documents are the first set, as `where` of any analysis.
        second: the second set; all documents that are not in the first if None.
        names: what to call the two.
        permutations, seed, alternative, correction, resamples, layers, phase: as in `risk_difference`.

    Raises:
        MoescopeError: a set is empty, or a document is in both.
    """
    if len(names) != 2 or names[0] == names[1]:
        raise MoescopeError("`names` are two different names, one for each set.")
    sites, every = sites_of(store, layers), labelling(store, None, None, phase)
    one = labelling(store, None, dict(first), phase).documents
    other = np.setdiff1d(every.documents, one) if second is None else None
    if other is None:
        other = labelling(store, None, dict(second or {}), phase).documents
    both = np.intersect1d(one, other).size
    if both:
        raise MoescopeError(
            f"{names[0]} and {names[1]} share {both:,} documents: a risk difference is between sets without one in "
            "common."
        )
    if not other.size:
        raise MoescopeError(f"{names[0]} is every document: there is no other to hold it against.")
    code = np.where(np.isin(every.documents, one), 0, np.where(np.isin(every.documents, other), 1, -1))
    kept = code >= 0
    index = np.full(int(every.documents.max(initial=-1)) + 1, -1, dtype=np.int64)
    index[every.documents[kept]] = np.arange(int(kept.sum()))
    tables = [table.regrouped(index) for table in document_tables(store, sites, phase=phase)]
    attrs = provenance(store, analysis="risk_difference", by="set", first=names[0], second=names[1], phase=phase)
    attrs |= {"where_first": str(dict(first)), "where_second": "all others" if second is None else str(dict(second))}
    test = LabelTest(permutations, seed, alternative, correction, resamples)
    return _result(LayerAxis.of_sites(sites), tables, every.tokens[kept], code[kept], test, attrs)


def risk_difference_from_documents(
    counts: Int[np.ndarray, "document layer expert"],
    tokens: Int[np.ndarray, " document"],
    in_first: Bool[np.ndarray, " document"],
    layers: Sequence[int] | None = None,
    top_k: int | None = None,
    permutations: int | None = None,
    seed: int = 0,
    alternative: Alternative = "two-sided",
    correction: Correction = "bh",
    resamples: int = 500,
) -> xr.Dataset:
    """`risk_difference` from plain per-document counts; `in_first` says which documents are the first set."""
    inside = np.asarray(in_first, dtype=bool)
    if inside.all() or not inside.any():
        raise MoescopeError("A risk difference needs documents in both sets.")
    names = ["first" if one else "second" for one in inside]
    axis, tables, size, code, _ = checked_documents(counts, tokens, names, layers, top_k)
    attrs = provenance(None, analysis="risk_difference", by="set", first="first", second="second")
    return _result(axis, tables, size, code, LabelTest(permutations, seed, alternative, correction, resamples), attrs)


def difference(joint: np.ndarray, label: np.ndarray, expert: np.ndarray, total: np.ndarray | float) -> np.ndarray:
    """P(active | label) - P(active | every other label); NaN for an expert never selected."""
    with np.errstate(divide="ignore", invalid="ignore"):
        value = joint / label - (expert - joint) / (total - label)
    return np.where(np.broadcast_to(expert == 0, value.shape), np.nan, value)


def _sets(known: list[str], first: str | None, second: str | None, by: str) -> tuple[str, list[str]]:
    for name in (first, second):
        if name is not None and name not in known:
            raise MoescopeError(f"No document has {name!r} as its {by}; there are {', '.join(known)}.")
    if first is None:
        if second is not None or len(known) != 2:
            raise MoescopeError(f"Name the first set: the values of {by!r} are {', '.join(known)}.")
        first = known[0]
    rest = [name for name in known if name != first] if second is None else [second]
    if first in rest or not rest:
        raise MoescopeError(f"A risk difference needs two sets; {first!r} is all there is to choose from.")
    return first, rest


def _where_in(other: Store, store: Store, where: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """The filter as it reads in another store, where the same documents may have other numbers."""
    if where is None or "document" not in where:
        return None if where is None else dict(where)
    here, there = (one.documents(["document", "id"]).to_pandas() for one in (store, other))
    ids = here["id"][np.isin(here["document"], np.array(where["document"], dtype=np.int64))]
    numbers = there["document"][there["id"].isin(ids.dropna())]
    if ids.isna().any() or numbers.size != ids.size:
        raise MoescopeError(
            "The other store does not hold just these documents, going by their ids: choose texts by a label instead."
        )
    return dict(where) | {"document": numbers.tolist()}


def _same_documents(store: Store, other: Store) -> bool:
    ids = [{name for name in one.documents(["id"])["id"].to_pylist() if name is not None} for one in (store, other)]
    return bool(ids[0] & ids[1])


def _result(
    axis: LayerAxis,
    tables: list[PairCounts],
    tokens: np.ndarray,
    code: np.ndarray,
    test: LabelTest,
    attrs: dict[str, Any],
    notes: Sequence[str] = (),
) -> xr.Dataset:
    names = [attrs["first"], attrs["second"]]
    found = against_dealings(axis, tables, tokens, code, names, difference, test, mirrored=True)
    count = axis.pad(found.counts)
    cell = ("layer", "expert")
    probability = count / found.size
    value = np.where(count.sum(axis=2) > 0, probability[..., 0] - probability[..., 1], np.nan)
    statistics = {name: found.statistics.get(name, np.full(count.shape, np.nan)) for name in STATISTICS}
    variables: dict[str, Any] = {
        "risk_difference": (cell, value),
        "low": (cell, statistics["low"][..., 0]),
        "high": (cell, statistics["high"][..., 0]),
        "p_first": (cell, probability[..., 0]),
        "p_second": (cell, probability[..., 1]),
        "count_first": (cell, count[..., 0]),
        "count_second": (cell, count[..., 1]),
        "p": (cell, statistics["p"][..., 0]),
        "q": (cell, statistics["q"][..., 0]),
        "p_max": (
            cell,
            statistics["p_max"][..., 0] if test.alternative == "greater" else statistics["p_max"].min(axis=2),
        ),
        # What the second set has more of is the other tail of the same difference.
        "null_p01": (cell, -statistics["null_p99"][..., 1]),
        "null_p99": (cell, statistics["null_p99"][..., 0]),
        "sum": ("layer", np.nansum(value, axis=1)),
        "exists": (cell, axis.exists),
    }
    tests = int((~np.isnan(value)).sum())
    attrs = attrs | found.attrs | noted([*found.notes, *notes]) | {"family": f"all {tests} experts selected at all"}
    for name, place in (("first", 0), ("second", 1)):
        attrs[f"tokens_{name}"] = int(found.size[place])
        attrs[f"documents_{name}"] = int(found.documents[place])
    attrs |= {"padding": PADDING, "table": "layer, expert", "table_order": "risk_difference"}
    return xr.Dataset(variables, coords=axis.coordinates(), attrs=attrs)


STATISTICS = ("low", "high", "p", "q", "p_max", "null_mean", "null_p99")

_TEST = (
    Parameter("permutations", int, None, "random dealings of the sets over documents (default: enough)"),
    Parameter("alternative", str, "two-sided", "test either way, or for the first set", ("greater", "two-sided")),
    Parameter("correction", str, "bh", "q-values: Benjamini-Hochberg or -Yekutieli", ("bh", "by")),
    RESAMPLES,
    LAYERS,
    PHASE,
    SEED,
)

RISK_QUESTION = Analysis(
    name="risk_difference",
    run=risk_difference,
    figure="risk_difference",
    help="Which experts are active more often on one set of texts than on another?",
    parameters=(
        Parameter("first", str, None, "the label value of the first set (may be left out if there are two values)"),
        Parameter("second", str, None, "the label value of the second set (default: all other documents)"),
        Parameter("by", str, None, "the document label (default: the store's first)"),
        *_TEST,
    ),
    tier="routing",
)

RISK_BETWEEN_QUESTION = Analysis(
    name="risk_difference_between",
    run=risk_difference_between,
    figure="risk_difference_between",
    help="Which experts are active more often in one store than in another?",
    parameters=_TEST,
    tier="routing",
    inputs=("store", "other"),
)
