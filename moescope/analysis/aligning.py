"""Pairing stores of the same tokens, token by token, in bounded memory, however each is cut into shards.

Tokens pair by document, order of the sequence within its document, and position; a fingerprint of each sequence's
token ids and positions proves that they are the same tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from moescope.analysis.comparing_kernels import fingerprint_runs
from moescope.analysis.counts import Phase, sites_of
from moescope.analysis.routed_rows import runs_of, slot_ids
from moescope.errors import MoescopeError

if TYPE_CHECKING:
    from jaxtyping import Float, Int

    from moescope.store import Store


@dataclass(frozen=True)
class Runs:
    """The sequences of a store, sorted by document and sequence; arrays [run] int64.

    Attributes:
        shard: index into `store.shards`.
        start: first row within the shard.
        length: tokens.
        document, sequence: which sequence it is.
        fingerprint: hash of its token ids and positions (uint64).
    """

    shard: np.ndarray
    start: np.ndarray
    length: np.ndarray
    document: np.ndarray
    sequence: np.ndarray
    fingerprint: np.ndarray

    @classmethod
    def of(cls, store: Store) -> Runs:
        """Reads them, shard by shard; kept in the store's aggregates."""
        names = list(cls.__dataclass_fields__)

        def compute() -> pa.Table:
            parts = [_runs_of_shard(index, shard) for index, shard in enumerate(store.shards)]
            if not parts:
                return pa.table({name: np.empty(0, np.int64) for name in names})
            columns = {name: np.concatenate([part[name] for part in parts]) for name in names}
            order = np.lexsort((columns["sequence"], columns["document"]))
            return pa.table({name: values[order] for name, values in columns.items()})

        found = store.cached("sequence-runs", compute)
        return cls(**{name: found[name].to_numpy() for name in names})


def _runs_of_shard(index: int, shard: Any) -> dict[str, np.ndarray]:
    edge, document, sequence = runs_of(shard, None)
    tokens = shard.tokens(["token_id", "position"])
    fingerprint = np.zeros(document.size, dtype=np.uint64)
    fingerprint_runs(
        edge, *(tokens[name].to_numpy().astype(np.int64) for name in ("token_id", "position")), fingerprint
    )
    return {
        "shard": np.full(document.size, index, dtype=np.int64),
        "start": edge[:-1].astype(np.int64),
        "length": np.diff(edge),
        "document": document,
        "sequence": sequence,
        "fingerprint": fingerprint,
    }


class Aligned:
    """Stores of the same tokens. The first is the reference: its shards are streamed and its row order is used.

    Attributes:
        stores: two or more.
        sites: the MoE layers looked at, the same in all.
        runs: sequences of the reference.
    """

    def __init__(self, stores: Sequence[Store], layers: Sequence[int] | None = None) -> None:
        """Checks that the stores can be compared; see the module.

        Raises:
            MoescopeError: tokens, tokenizer, layers, widths or experts per token differ, or a store has no routing.
        """
        if len(stores) < 2:
            raise MoescopeError("Comparing takes two stores or more.")
        self.stores = list(stores)
        self.sites = sites_of(stores[0], layers)
        for store in stores:
            if "routing" not in store.tiers:
                raise MoescopeError(f"{store.path} has no routing tier: there are no selections to compare.")
        for store in stores[1:]:
            _same_model_shape(stores[0], store)
        self.runs = Runs.of(stores[0])
        if not self.runs.document.size:
            raise MoescopeError(f"{stores[0].path} holds no token: nothing to compare.")
        self._others = [self.runs, *(Runs.of(store) for store in stores[1:])]
        for store, runs in zip(stores[1:], self._others[1:], strict=True):
            _same_tokens(stores[0], self.runs, store, runs)

    @property
    def key(self) -> dict[str, Any]:
        """What a cached result of the reference depends on besides it."""
        return {
            "others": [f"{store.manifest.store_id}:{store.n_tokens}" for store in self.stores[1:]],
            "sites": [site.key for site in self.sites],
        }

    def blocks(self) -> Iterator[Block]:
        """The reference's shards in order, each with where its rows stand in the other stores."""
        for index, shard in enumerate(self.stores[0].shards):
            chosen = np.flatnonzero(self.runs.shard == index)
            chosen = chosen[np.argsort(self.runs.start[chosen], kind="stable")]
            yield Block(self, shard, chosen, self._others)


class Block:
    """One shard of the reference, and the same tokens of every other store in its row order.

    Attributes:
        n_tokens: rows.
        edge: [run + 1] first row of each sequence, and the end.
        document, sequence: [run] what each sequence is, as the reference numbers it.
    """

    def __init__(self, aligned: Aligned, shard: Any, chosen: np.ndarray, runs: Sequence[Runs]) -> None:
        self._aligned = aligned
        self._shard = shard
        self.n_tokens: int = shard.n_tokens
        own = runs[0]
        self.edge = np.append(own.start[chosen], shard.n_tokens).astype(np.int64)
        self.document = own.document[chosen]
        self.sequence = own.sequence[chosen]
        # Which rows of which shard of the other store stand where here.
        self._pieces = [_pieces(own, other, chosen) for other in runs]

    def groups(self, documents: Int[np.ndarray, " document"], phase: Phase | None) -> Int[np.ndarray, " row"]:
        """[row] index of each row's document in `documents` (ascending); -1 for other documents or another phase."""
        place = np.minimum(np.searchsorted(documents, self.document), max(documents.size - 1, 0))
        place = np.where(documents[place] == self.document, place, -1) if documents.size else place * 0 - 1
        group = np.repeat(place, np.diff(self.edge)).astype(np.int64)
        if phase is not None:
            column = self._shard.tokens(["phase"])["phase"].cast(pa.string())
            group[np.asarray(column.to_numpy(zero_copy_only=False)) != phase] = -1
        return group

    def ids(self, which: int, site: Any) -> Int[np.ndarray, "row rank"]:
        """Selected experts of store `which` in rank order, -1 for a missing slot."""
        if which == 0:
            return slot_ids(self._shard, site, "all", None)
        out: np.ndarray | None = None
        for shard, rows, there in self._pieces[which]:
            part = slot_ids(self._aligned.stores[which].shards[shard], site, "all", None)
            if out is None:
                out = np.full((self.n_tokens, part.shape[1]), -1, dtype=part.dtype)
            out[rows] = part[there]
        return np.empty((0, site.top_k), np.int16) if out is None else out

    def loss(self, which: int) -> Float[np.ndarray, " row"]:
        """Loss of each token (nats) in store `which`; NaN where it has none."""
        out = np.full(self.n_tokens, np.nan)
        for shard, rows, there in self._pieces[which]:
            column = self._aligned.stores[which].shards[shard].tokens(["loss"])["loss"]
            out[rows] = column.to_numpy().astype(np.float64)[there]
        return out


def _pieces(own: Runs, other: Runs, chosen: np.ndarray) -> list[tuple[int, np.ndarray, np.ndarray]]:
    """Per shard of the other store that holds some of these runs: (shard, rows here, rows there)."""
    found = []
    for shard in np.unique(other.shard[chosen]):
        runs = chosen[other.shard[chosen] == shard]
        length = own.length[runs]
        within = np.arange(length.sum()) - np.repeat(np.cumsum(length) - length, length)
        here = np.repeat(own.start[runs], length) + within
        found.append((int(shard), here, np.repeat(other.start[runs], length) + within))
    return found


def _same_model_shape(store: Store, other: Store) -> None:
    if store.manifest.tokenizer.hash != other.manifest.tokenizer.hash:
        raise MoescopeError(
            f"{store.path} and {other.path} were captured with different tokenizers "
            f"({store.manifest.tokenizer.name}, {other.manifest.tokenizer.name}): their tokens do not pair."
        )
    left, right = (
        {site.key: (site.n_experts, site.top_k) for site in each.sites} for each in (store, other)
    )  # fmt: skip
    odd = sorted(set(left) ^ set(right))
    if odd:
        holder = store if odd[0] in left else other
        raise MoescopeError(f"Only {holder.path} has the MoE layer {odd[0]}: compare stores of the same layers.")
    for key, (experts, top_k) in left.items():
        if right[key] != (experts, top_k):
            raise MoescopeError(
                f"Layer {key} selects {top_k} of {experts} experts in {store.path} and {right[key][1]} of "
                f"{right[key][0]} in {other.path}: their selections do not compare."
            )


def _same_tokens(store: Store, runs: Runs, other: Store, theirs: Runs) -> None:
    pair = f"{store.path} and {other.path} do not hold the same tokens"
    if runs.document.size != theirs.document.size or (runs.document != theirs.document).any():
        only = np.setxor1d(runs.document, theirs.document)
        if only.size:
            holder = store if np.isin(only[0], runs.document) else other
            raise MoescopeError(f"{pair}: only {holder.path} has document {only[0]}.")
        raise MoescopeError(f"{pair}: documents are cut into sequences differently; capture with the same max_length.")
    wrong = np.flatnonzero((runs.length != theirs.length) | (runs.fingerprint != theirs.fingerprint))
    if wrong.size:
        run = wrong[0]
        tokens, places = zip(*(_of_run(each, of, run) for each, of in ((store, runs), (other, theirs))), strict=True)
        n = min(map(len, tokens))
        different = np.flatnonzero((tokens[0][:n] != tokens[1][:n]) | (places[0][:n] != places[1][:n]))
        at = int(different[0]) if different.size else n
        raise MoescopeError(f"{pair}: document {runs.document[run]} differs from its sequence's token {at} on.")


def _of_run(store: Store, runs: Runs, run: int) -> tuple[np.ndarray, np.ndarray]:
    rows = slice(int(runs.start[run]), int(runs.start[run] + runs.length[run]))
    tokens = store.shards[int(runs.shard[run])].tokens(["token_id", "position"])
    return tokens["token_id"].to_numpy()[rows], tokens["position"].to_numpy()[rows]
