"""Counts from a store, shard by shard in bounded memory: who was selected how often, by document and by token id.

Everything association-like follows from the document table: label tables are its sums, and permutations of labels over
documents are sums again, never another scan. Tables are sparse (one row per pair that met), merged over shards and
kept in the store's own aggregates through `Store.cached`, where SQL can read them too.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pyarrow as pa

from moescope.analysis.kernels import count_pairs, weigh_pairs
from moescope.analysis.pairs import CELLS, PairCounts, PairSum
from moescope.analysis.spreading import over_runs, over_shards, side_by_side
from moescope.errors import MoescopeError, StoreError

if TYPE_CHECKING:
    from jaxtyping import Int

    from moescope.store import Store

Phase = Literal["prefill", "decode"]


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
    store: Store,
    sites: Sequence[Any],
    weighted: bool = False,
    phase: Phase | None = None,
    ranks: int | None = None,
) -> list[PairCounts]:
    """`document_counts` of several layers in one pass over the store, of the first `ranks` ranks alone if given."""
    return _tables(store, "document", sites, weighted, phase, ranks)


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


def _tables(
    store: Store, column: str, sites: Sequence[Any], weighted: bool, phase: Phase | None, ranks: int | None = None
) -> list[PairCounts]:
    records = [store.site(getattr(site, "key", site)) for site in sites]

    def asked(record: Any) -> tuple[str, dict[str, Any]]:
        params = {"site": record.key, "weighted": weighted, "phase": phase or "all"}
        return f"{column}-expert-{record.key}", params if ranks is None else params | {"ranks": ranks}

    def kept(record: Any) -> PairCounts | None:
        found = store.kept(*asked(record))
        if found is None:
            return None
        return PairCounts(
            group=found[column].to_numpy(),
            expert=found["expert"].to_numpy(),
            count=found["count"].to_numpy(),
            weight=found["weight"].to_numpy() if weighted else None,
            n_experts=record.n_experts,
        )

    def keep(record: Any, counts: PairCounts) -> None:
        columns = {column: counts.group, "expert": counts.expert, "count": counts.count}
        table = pa.table(columns if counts.weight is None else columns | {"weight": counts.weight})
        store.keep(*asked(record), table)

    found = side_by_side(kept, ((record,) for record in records))
    missing = [place for place, counts in enumerate(found) if counts is None]
    if missing:
        counted = _scan(store, column, [records[place] for place in missing], weighted, phase, ranks)
        side_by_side(keep, ((records[place], counts) for place, counts in zip(missing, counted, strict=True)))
        for place, counts in zip(missing, counted, strict=True):
            found[place] = counts
    return found


def _shard_sizes(shard: Any, column: str, phase: Phase | None) -> tuple[np.ndarray, np.ndarray]:
    group = row_groups(shard, column, phase)
    group = group[group >= 0]
    if int(group.max(initial=0)) > 4 * group.size:
        return np.unique(group, return_counts=True)
    size = np.bincount(group)
    names = np.flatnonzero(size)
    return names, size[names]


def _scan(
    store: Store, column: str, records: Sequence[Any], weighted: bool, phase: Phase | None, ranks: int | None
) -> list[PairCounts]:
    """Counts several layers, as many in one pass over the shards as `CELLS` allows."""
    names, _ = _group_sizes(store, column, phase)
    groups = int(names.max(initial=-1)) + 1
    widest = max(record.n_experts for record in records)
    at_once = max(1, CELLS // max(groups * widest, 1))
    found = []
    for first in range(0, len(records), at_once):
        layers = tuple(records[first : first + at_once])
        sums = [PairSum(groups, record.n_experts, weighted, store.n_tokens) for record in layers]
        asked = (column, groups, layers, weighted, phase, ranks)
        # Sums of weights depend in their last bits on what is added up first: shard by shard, whoever counts.
        parts = over_shards(store, _shard_tables, *asked) if weighted else over_runs(store, _run_tables, *asked)
        for part in itertools.chain.from_iterable(parts):
            for total, (count, weight) in zip(sums, part.tables, strict=True):
                total.add(part.names, count, weight)
        found += side_by_side(PairSum.counts, ((total,) for total in sums))
    return found


@dataclass(frozen=True)
class _Part:
    """Dense tables of some shards: for each layer, counts [group, expert] and summed weights or None.

    Attributes:
        names: the groups of the tables' rows; None where they are all groups of the store.
        tables: of each layer.
    """

    names: Int[np.ndarray, " group"] | None
    tables: list[tuple[np.ndarray, np.ndarray | None]]


def _run_tables(
    shards: Sequence[Any],
    column: str,
    groups: int,
    records: Sequence[Any],
    weighted: bool,
    phase: Phase | None,
    ranks: int | None,
) -> list[_Part]:
    """Counts of several shards: in one table of each layer if most groups are likely in it, as token ids are."""
    if 2 * groups > sum(shard.n_tokens for shard in shards):
        asked = (column, groups, records, weighted, phase, ranks)
        return [part for shard in shards for part in _shard_tables(shard, *asked)]
    tables = [np.zeros((groups, record.n_experts), dtype=np.int32) for record in records]
    for shard in shards:
        group = row_groups(shard, column, phase)
        for record, table in zip(records, tables, strict=True):
            shard_table(shard, record, groups, group, ranks=ranks, into=table)
    return [_Part(None, [(table, None) for table in tables])]


def _shard_tables(
    shard: Any, column: str, groups: int, records: Sequence[Any], weighted: bool, phase: Phase | None, ranks: int | None
) -> list[_Part]:
    group = row_groups(shard, column, phase)
    if 2 * groups <= group.size:
        return [_Part(None, [shard_table(shard, record, groups, group, weighted, ranks) for record in records])]
    names, index = np.unique(group, return_inverse=True)
    if names.size and names[0] < 0:
        names, index = names[1:], index - 1
    return [_Part(names, [shard_table(shard, record, names.size, index, weighted, ranks) for record in records])]


def row_groups(shard: Any, column: str, phase: Phase | None) -> Int[np.ndarray, " row"]:
    """The group of each row of a shard, -1 where the row is of another phase."""
    tokens = shard.tokens([column] if phase is None else [column, "phase"])
    group = tokens[column].to_numpy().astype(np.int64)
    return group if phase is None else np.where(of_phase(tokens, phase), group, -1)


def of_phase(tokens: pa.Table, phase: Phase) -> np.ndarray:
    """[row] bool: is the token of this phase? From a table that has the column."""
    return np.asarray(tokens["phase"].cast(pa.string()).to_numpy(zero_copy_only=False)) == phase


def shard_table(
    shard: Any,
    record: Any,
    groups: int,
    index: Int[np.ndarray, " row"],
    weighted: bool = False,
    ranks: int | None = None,
    into: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray | None]:
    """Counts [group, expert] of one layer of a shard, and summed weights; `index` is -1 where a row is left out.

    Args:
        shard: a committed shard.
        record: the site record of the layer.
        groups: how many groups `index` names.
        index: [row] the group of each row.
        weighted: also sum the routing weights.
        ranks: count the first so many ranks alone; None for all.
        into: counts of other shards to add these to, in place; None to begin anew.
    """
    fields = ["expert", "weight"] if weighted else ["expert"]
    if record.slots_can_miss:
        fields.append("valid")
    routing = shard.routing(record.key, fields=fields)
    valid = routing.valid if record.slots_can_miss else None
    chosen = routing.expert if ranks is None else routing.expert[:, :ranks]
    valid = valid if valid is None or ranks is None else valid[:, :ranks]
    count = np.zeros((groups, record.n_experts), dtype=np.int32) if into is None else into
    beyond = count_pairs(index, chosen, valid, count)
    if beyond:
        raise StoreError(
            f"{beyond} slots of layer {record.layer} name an expert beyond the {record.n_experts} it has: "
            "the store is damaged; run `moescope check` on it."
        )
    if not weighted:
        return count, None
    total = np.zeros(count.shape, dtype=np.float64)
    weigh_pairs(index, chosen, valid, routing.weight if ranks is None else routing.weight[:, :ranks], total)
    return count, total


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
        where: label -> value or values to keep, e.g. `{"language": ["en", "de"]}`; "document" -> numbers.
        phase: count only tokens of this phase.

    Raises:
        MoescopeError: the store has no such label, or no document is left.
    """
    document, tokens = document_tokens(store, phase)
    table = store.documents(["document", *store.labels])
    position = _positions(table["document"].to_numpy(), document)
    kept = np.ones(document.size, dtype=bool)
    for name, wanted in (where or {}).items():
        if name == "document":
            numbers = [wanted] if isinstance(wanted, int | str) else list(wanted)
            kept &= np.isin(document, np.array(numbers, dtype=np.int64))
            continue
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
