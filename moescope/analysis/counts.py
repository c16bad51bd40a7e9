"""Counts from a store, shard by shard in bounded memory: who was selected how often, by document and by token id.

Everything association-like follows from the document table: label tables are its sums, and permutations of labels over
documents are sums again, never another scan. Tables are sparse (one row per pair that met), merged over shards and
kept in the store's own aggregates through `Store.cached`, where SQL can read them too.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pyarrow as pa

from moescope.analysis.kernels import count_pairs, weigh_pairs
from moescope.analysis.spreading import over_shards
from moescope.errors import MoescopeError, StoreError

if TYPE_CHECKING:
    from jaxtyping import Float, Int

    from moescope.store import Store

Phase = Literal["prefill", "decode"]


@dataclass(frozen=True)
class PairCounts:
    """How often each (group, expert) pair met in one MoE layer; sparse, sorted by group then expert.

    Attributes:
        group: [pair] int64; a document number or a token id.
        expert: [pair] int32.
        count: [pair] int64; tokens of the group at which the expert was selected.
        weight: [pair] float64 sum of routing weights, or None if they were not asked for.
        n_experts: how many experts the layer has, selected or not.
    """

    group: Int[np.ndarray, " pair"]
    expert: Int[np.ndarray, " pair"]
    count: Int[np.ndarray, " pair"]
    weight: Float[np.ndarray, " pair"] | None
    n_experts: int

    @classmethod
    def of_dense(cls, counts: Int[np.ndarray, "group expert"]) -> PairCounts:
        """The sparse form of a dense table with rows for groups 0, 1, 2, ...; NaN columns at its end are no experts."""
        dense = np.asarray(counts, dtype=np.float64)
        present = np.flatnonzero(~np.isnan(dense).all(axis=0))
        width = int(present[-1]) + 1 if present.size else 0
        dense = np.nan_to_num(dense[:, :width])
        if (dense < 0).any() or (dense != np.round(dense)).any():
            raise MoescopeError("Selection counts must be whole numbers, 0 or more.")
        group, expert = np.nonzero(dense)
        return cls(group, expert.astype(np.int32), dense[group, expert].astype(np.int64), None, width)

    def by_label(
        self, label: Int[np.ndarray, " group"], n_labels: int, what: str = "count"
    ) -> Float[np.ndarray, "expert label"]:
        """Sums over groups: [expert, label] float64 of `count` or `weight`; groups labelled below 0 are left out."""
        values = self.count if what == "count" else self.weight
        if values is None:
            raise MoescopeError("These counts were taken without weights: ask for `weighted=True`.")
        of_pair = _look_up(label, self.group)
        kept = of_pair >= 0
        cell = self.expert[kept].astype(np.int64) * n_labels + of_pair[kept]
        total = np.bincount(cell, weights=values[kept].astype(np.float64), minlength=self.n_experts * n_labels)
        return total.reshape(self.n_experts, n_labels)

    def regrouped(self, index_of_group: Int[np.ndarray, " group"]) -> PairCounts:
        """The same counts with each group renamed to `index_of_group[group]`; groups renamed below 0 are left out."""
        group = _look_up(index_of_group, self.group)
        kept = group >= 0
        weight = None if self.weight is None else self.weight[kept]
        return PairCounts(group[kept], self.expert[kept], self.count[kept], weight, self.n_experts)


def _look_up(table: np.ndarray, index: np.ndarray) -> np.ndarray:
    """`table[index]`, -1 beyond its end."""
    if not table.size:
        return np.full(index.shape, -1, dtype=np.int64)
    return np.where(index < table.size, table[np.minimum(index, table.size - 1)], -1)


def document_tokens(store: Store, phase: Phase | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Tokens per document, over the committed shards.

    Returns:
        (document [n] int64, ascending; tokens [n] int64, each >= 1). Documents without a stored token are absent.
    """
    return _group_sizes(store, "document", phase)


def token_totals(store: Store, phase: Phase | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Occurrences of each token id: (token id [n] int64, ascending; occurrences [n] int64)."""
    return _group_sizes(store, "token_id", phase)


def document_counts(store: Store, site: Any, weighted: bool = False, phase: Phase | None = None) -> PairCounts:
    """Selections of each expert of one layer by document.

    Args:
        store: an open store.
        site: a site record, its key or its model layer index.
        weighted: also sum the routing weights (decodes one more column).
        phase: only tokens of this phase; None for all.

    Returns:
        PairCounts whose groups are document numbers. Missing slots are not counted.
    """
    return document_tables(store, [site], weighted, phase)[0]


def document_tables(
    store: Store, sites: Sequence[Any], weighted: bool = False, phase: Phase | None = None
) -> list[PairCounts]:
    """`document_counts` of several layers in one pass over the store."""
    return _tables(store, "document", sites, weighted, phase)


def token_counts(store: Store, site: Any, phase: Phase | None = None) -> PairCounts:
    """Selections of each expert of one layer by token id: PairCounts whose groups are token ids."""
    return token_tables(store, [site], phase)[0]


def token_tables(store: Store, sites: Sequence[Any], phase: Phase | None = None) -> list[PairCounts]:
    """`token_counts` of several layers in one pass over the store."""
    return _tables(store, "token_id", sites, False, phase)


def _group_sizes(store: Store, column: str, phase: Phase | None) -> tuple[np.ndarray, np.ndarray]:
    def compute() -> pa.Table:
        group, size = _merge_sizes(list(over_shards(store, _shard_sizes, column, phase)))
        return pa.table({column: group, "tokens": size})

    found = store.cached(f"{column}-tokens", compute, {"phase": phase or "all"})
    return found[column].to_numpy(), found["tokens"].to_numpy()


def _tables(store: Store, column: str, sites: Sequence[Any], weighted: bool, phase: Phase | None) -> list[PairCounts]:
    records = [store.site(getattr(site, "key", site)) for site in sites]

    @cache
    def scanned() -> list[PairCounts]:
        """All of these layers at once, as soon as one of them is not kept yet."""
        parts = list(over_shards(store, _shard_tables, column, tuple(records), weighted, phase))
        return [merge_pairs((part[place] for part in parts), record.n_experts) for place, record in enumerate(records)]

    def kept(place: int, record: Any) -> PairCounts:
        def compute() -> pa.Table:
            merged = scanned()[place]
            columns = {column: merged.group, "expert": merged.expert, "count": merged.count}
            return pa.table(columns if merged.weight is None else columns | {"weight": merged.weight})

        params = {"site": record.key, "weighted": weighted, "phase": phase or "all"}
        found = store.cached(f"{column}-expert-{record.key}", compute, params)
        return PairCounts(
            group=found[column].to_numpy(),
            expert=found["expert"].to_numpy(),
            count=found["count"].to_numpy(),
            weight=found["weight"].to_numpy() if weighted else None,
            n_experts=record.n_experts,
        )

    return [kept(place, record) for place, record in enumerate(records)]


def _shard_sizes(shard: Any, column: str, phase: Phase | None) -> tuple[np.ndarray, np.ndarray]:
    group = _groups(shard, column, phase)
    return np.unique(group[group >= 0], return_counts=True)


def _shard_tables(
    shard: Any, column: str, records: Sequence[Any], weighted: bool, phase: Phase | None
) -> list[PairCounts]:
    names, index = np.unique(_groups(shard, column, phase), return_inverse=True)
    if names.size and names[0] < 0:
        names, index = names[1:], index - 1
    return [_shard_pairs(shard, record, names, index, weighted) for record in records]


def _groups(shard: Any, column: str, phase: Phase | None) -> Int[np.ndarray, " row"]:
    """The group of each row of a shard, -1 where the row is of another phase."""
    tokens = shard.tokens([column] if phase is None else [column, "phase"])
    group = tokens[column].to_numpy().astype(np.int64)
    if phase is None:
        return group
    same = np.asarray(tokens["phase"].cast(pa.string()).to_numpy(zero_copy_only=False)) == phase
    return np.where(same, group, -1)


def _shard_pairs(shard: Any, record: Any, names: np.ndarray, index: np.ndarray, weighted: bool) -> PairCounts:
    """Pairs of one shard, counted densely over the groups that occur in it: at most rows x experts cells.

    Args:
        names: [group] the groups of the shard, ascending.
        index: [row] into `names`; -1 to leave the row out.
    """
    fields = ["expert", "weight"] if weighted else ["expert"]
    if record.slots_can_miss:
        fields.append("valid")
    routing = shard.routing(record.key, fields=fields)
    valid = routing.valid if record.slots_can_miss else None
    count = np.zeros((names.size, record.n_experts), dtype=np.int64)
    beyond = count_pairs(index, routing.expert, valid, count)
    if beyond:
        raise StoreError(
            f"{beyond} slots of layer {record.layer} name an expert beyond the {record.n_experts} it has: "
            "the store is damaged; run `moescope check` on it."
        )
    row, expert = np.nonzero(count)
    weight = None
    if weighted:
        total = np.zeros(count.shape, dtype=np.float64)
        weigh_pairs(index, routing.expert, valid, routing.weight, total)
        weight = total[row, expert]
    return PairCounts(names[row], expert.astype(np.int32), count[row, expert], weight, record.n_experts)


def merge_pairs(parts: Iterable[PairCounts], n_experts: int) -> PairCounts:
    """Adds up pair counts of disjoint rows (shards, processes): the result does not depend on how the rows were cut."""
    held = list(parts)
    weighted = bool(held) and held[0].weight is not None
    if not held:
        empty = np.empty(0, dtype=np.int64)
        return PairCounts(empty, empty.astype(np.int32), empty, None, n_experts)
    group = np.concatenate([part.group for part in held])
    expert = np.concatenate([part.expert for part in held]).astype(np.int64)
    order = np.lexsort((expert, group))
    group, expert = group[order], expert[order]
    first = np.ones(group.size, dtype=bool)
    first[1:] = (group[1:] != group[:-1]) | (expert[1:] != expert[:-1])
    start = np.flatnonzero(first)
    count = np.add.reduceat(np.concatenate([part.count for part in held])[order], start) if start.size else group
    weight = None
    if weighted:
        values = np.concatenate([_weights(part) for part in held])[order]
        weight = np.add.reduceat(values, start) if start.size else values
    return PairCounts(group[start], expert[start].astype(np.int32), count.astype(np.int64), weight, n_experts)


def _weights(part: PairCounts) -> np.ndarray:
    if part.weight is None:
        raise MoescopeError("Some parts were counted with weights and others without: count all of them one way.")
    return part.weight


def _merge_sizes(parts: list[tuple[np.ndarray, np.ndarray]]) -> tuple[np.ndarray, np.ndarray]:
    if not parts:
        return np.empty(0, dtype=np.int64), np.empty(0, dtype=np.int64)
    group, index = np.unique(np.concatenate([names for names, _ in parts]), return_inverse=True)
    size = np.zeros(group.size, dtype=np.int64)
    np.add.at(size, index, np.concatenate([sizes for _, sizes in parts]))
    return group, size


@dataclass(frozen=True)
class Labelling:
    """Documents of a store and their labels, after filters.

    Attributes:
        documents: [n] document numbers, ascending; only those with a stored token and a label.
        tokens: [n] stored tokens of each.
        code: [n] index into `labels`.
        labels: the label values, sorted.
        unlabelled: documents left out because their label is null.
        filtered: documents left out by `where`.
    """

    documents: Int[np.ndarray, " document"]
    tokens: Int[np.ndarray, " document"]
    code: Int[np.ndarray, " document"]
    labels: tuple[str, ...]
    unlabelled: int
    filtered: int

    @property
    def tokens_per_label(self) -> Int[np.ndarray, " label"]:
        """Tokens of each label."""
        return np.bincount(self.code, weights=self.tokens, minlength=len(self.labels)).astype(np.int64)

    @property
    def documents_per_label(self) -> Int[np.ndarray, " label"]:
        """Documents of each label."""
        return np.bincount(self.code, minlength=len(self.labels))

    def spread(self, values: np.ndarray, fill: int = -1) -> np.ndarray:
        """[largest document number + 1]: `values` at each document of this labelling, `fill` elsewhere."""
        out = np.full(int(self.documents.max(initial=-1)) + 1, fill, dtype=np.int64)
        out[self.documents] = values
        return out


def labelling(
    store: Store,
    by: str | None,
    where: dict[str, str | Sequence[str]] | None = None,
    phase: Phase | None = None,
) -> Labelling:
    """Reads which documents a question is about and what they are labelled.

    Args:
        store: an open store.
        by: a label of the store; None puts every document under the one label "all".
        where: label -> value or values to keep, e.g. `{"language": ["en", "de"]}`.
        phase: count only tokens of this phase.

    Raises:
        MoescopeError: the store has no such label, or no document is left.
    """
    document, tokens = document_tokens(store, phase)
    table = store.documents(["document", *store.labels])
    position = _positions(table["document"].to_numpy(), document)
    kept = np.ones(document.size, dtype=bool)
    for name, wanted in (where or {}).items():
        values = {wanted} if isinstance(wanted, str) else set(wanted)
        column = _label_column(store, table, name, position)
        kept &= np.array([value in values for value in column], dtype=bool)
    filtered = int((~kept).sum())
    if by is None:
        names, code, labelled = ("all",), np.zeros(document.size, dtype=np.int64), kept
    else:
        column = _label_column(store, table, by, position)
        present = np.array([value is not None for value in column], dtype=bool)
        labelled = kept & present
        names = tuple(
            sorted({value for value, keep in zip(column, labelled, strict=True) if keep and value is not None})
        )
        lookup = {name: index for index, name in enumerate(names)}
        code = np.array([-1 if value is None else lookup.get(value, -1) for value in column], dtype=np.int64)
    if not labelled.any():
        reason = f"carries the label {by!r}" if by is not None and not filtered else "is left after the filters"
        raise MoescopeError(f"No document of this store {reason}: nothing to count.")
    return Labelling(
        documents=document[labelled],
        tokens=tokens[labelled],
        code=code[labelled],
        labels=names,
        unlabelled=int(kept.sum() - labelled.sum()),
        filtered=filtered,
    )


def _positions(listed: np.ndarray, document: np.ndarray) -> np.ndarray:
    """The row of each document in the documents table; -1 if an interrupted capture has its end, not its start."""
    if not listed.size:
        return np.full(document.shape, -1, dtype=np.int64)
    order = np.argsort(listed, kind="stable")
    row = order[np.minimum(np.searchsorted(listed, document, sorter=order), listed.size - 1)]
    return np.where(listed[row] == document, row, -1)


def _label_column(store: Store, table: pa.Table, name: str, position: np.ndarray) -> list[str | None]:
    known = list(store.labels)
    if name not in known:
        offered = f"its labels are {', '.join(known)}" if known else "it was captured without labels"
        raise MoescopeError(f"The store has no label {name!r}: {offered}. Labels are named at capture.")
    values = table[name].cast(pa.string()).to_pylist()
    return [None if row < 0 else values[row] for row in position.tolist()]


def sites_of(store: Store, layers: Sequence[int] | None) -> list[Any]:
    """The site records of the asked layers, in the store's order; all of them for None.

    Raises:
        MoescopeError: the store has no router tier, no MoE layer, or not the layers asked for.
    """
    sites = list(store.sites)
    if layers is None:
        chosen = sites
    else:
        missing = sorted(set(layers) - {site.layer for site in sites})
        if missing:
            known = ", ".join(str(site.layer) for site in sites)
            raise MoescopeError(f"The store has no MoE layer {', '.join(map(str, missing))}; it has {known}.")
        chosen = [site for site in sites if site.layer in set(layers)]
    if not chosen:
        raise MoescopeError("No MoE layer to look at: the store has none, or none was asked for.")
    return chosen
