"""The position-matched null of markers: would other texts' tokens at the same places meet this expert as often?

A marker stands in a document at certain places, a place being a position in the document's first, second, ... context.
Under the null, whichever document had the marker there, the experts at these places would be the same: so each document
with the marker hands its places to a document drawn from those that have tokens at all of them, itself among them. The
places of one document move together, because its tokens are alike.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from moescope.analysis.counts import Labelling, Phase
from moescope.analysis.kernels import kernel
from moescope.analysis.permutation import TIE
from moescope.analysis.spreading import over_shards
from moescope.analysis.token_properties import Signatures, groups_of_rows
from moescope.errors import MoescopeError

if TYPE_CHECKING:
    from jaxtyping import Float, Int

    from moescope.store import Store

Matching = Literal["position", "document"]
CELLS = 1_000_000
"""Tokens of donors that are held at once (x layers x k ids)."""
NULL = (
    "matched by position: each document with the marker hands its places (position in its first, second, ... context) "
    "to a document drawn from those with tokens at all of them, itself and others with the marker among them, so that "
    "p is a little too large where many have it; places of one document move together. What is not matched: the text "
    "around the marker, and documents longer than all others, which stand for themselves"
)


@dataclass(frozen=True)
class Places:
    """Who may stand in for whom.

    Attributes:
        label: [marked] which property each marked document is about (a document may have several).
        size: [marked] places of it.
        offset: [marked] where its donors' tokens begin in `key`, donor by donor, itself first.
        donors: [marked] how many, itself included.
        key: [cell] the (document, context, position) of every donor's token, as one number.
        spare: [marked] whether some donor does not have the property at all these places.
        positions: how many positions a context has at most, and contexts a document, to make the numbers of `key`.
        first_sequence: [document] the number of each document's first sequence.
    """

    label: Int[np.ndarray, " marked"]
    size: Int[np.ndarray, " marked"]
    offset: Int[np.ndarray, " marked"]
    donors: Int[np.ndarray, " marked"]
    key: Int[np.ndarray, " cell"]
    spare: np.ndarray
    positions: tuple[int, int]
    first_sequence: Int[np.ndarray, " document"]
    n_labels: int

    @property
    def cells(self) -> int:
        """Tokens that one draw looks at."""
        return int(self.size.sum())


def places_of(
    store: Store, signatures: Signatures, documents: Labelling, donors: int, seed: int, phase: Phase | None
) -> Places:
    """Finds the places of each property and the documents that could have had it there.

    Raises:
        MoescopeError: the markers stand at too many places to be matched.
    """
    if donors < 1:
        raise MoescopeError("`donors` must be at least 1.")
    index = documents.spread(np.arange(documents.documents.size))
    spans, marked = [], []
    for span, rows in over_shards(store, _shard_places, signatures, index, phase):
        spans.append(span)
        marked.append(rows)
    span, rows = np.concatenate(spans), np.concatenate(marked)
    n = documents.documents.size
    first_sequence = np.full(n, np.iinfo(np.int64).max)
    np.minimum.at(first_sequence, span[:, 0], span[:, 1])
    context = span[:, 1] - first_sequence[span[:, 0]]
    wide, deep = int(span[:, 3].max(initial=0)) + 1, int(context.max(initial=0)) + 1
    low, high = np.full((n, deep), np.iinfo(np.int64).max), np.full((n, deep), -1)
    held = np.zeros((n, deep), dtype=np.int64)
    np.minimum.at(low, (span[:, 0], context), span[:, 2])
    np.maximum.at(high, (span[:, 0], context), span[:, 3])
    np.add.at(held, (span[:, 0], context), span[:, 4])
    whole = held == high - low + 1  # a context with holes in it is nobody's donor
    rng = np.random.default_rng(seed)
    label, size, key, count, spare, offset = [], [], [], [], [], [0]
    member = signatures.member
    place = (rows[:, 1] - first_sequence[rows[:, 0]]) * wide + rows[:, 2]
    total = int((member[rows[:, 3]]).sum())
    if total * 20 > CELLS:
        raise MoescopeError(
            f'These markers stand at {total} places, too many to be matched one by one: use matched="document".'
        )
    room = min(donors, CELLS // max(total, 1))
    for kind in range(member.shape[1]):
        mine = member[rows[:, 3], kind]
        document, at = rows[mine, 0], place[mine]
        taken = np.sort(document * (wide * deep) + at)
        order = np.lexsort((at, document))
        document, at = document[order], at[order]
        cuts = np.flatnonzero(np.diff(document, prepend=-1))
        for start, stop in zip(cuts, [*cuts[1:], document.size], strict=True):
            here, there = int(document[start]), at[start:stop]
            able = np.ones(n, dtype=bool)
            for one in np.unique(there // wide):
                inside = there[there // wide == one] % wide
                able &= whole[:, one] & (low[:, one] <= inside.min()) & (high[:, one] >= inside.max())
            able[here] = False
            others = np.flatnonzero(able)
            if others.size > room:
                others = np.sort(rng.choice(others, room, replace=False))
            keys = np.concatenate([[here], others])[:, None] * (wide * deep) + there
            found = taken[np.minimum(np.searchsorted(taken, keys), taken.size - 1)] == keys
            label.append(kind)
            size.append(there.size)
            count.append(others.size + 1)
            spare.append(bool((~found.all(axis=1)).any()))
            key.append(keys.ravel())
            offset.append(offset[-1] + keys.size)
    return Places(
        np.array(label), np.array(size), np.array(offset[:-1]), np.array(count), np.concatenate(key), np.array(spare),
        (wide, deep), first_sequence, member.shape[1],
    )  # fmt: skip


def _shard_places(
    shard: Any, signatures: Signatures, index: np.ndarray, phase: Phase | None
) -> tuple[np.ndarray, np.ndarray]:
    """[sequence, 5] (document, sequence, first position, last, rows) and [marked row, 4] (…, position, signature)."""
    table = shard.tokens(["sequence", "position"])
    document = groups_of_rows(shard, index, phase)
    sequence, position = (table[name].to_numpy().astype(np.int64) for name in ("sequence", "position"))
    signature = signatures.of_rows(shard)
    kept = document >= 0
    document, sequence, position, signature = document[kept], sequence[kept], position[kept], signature[kept]
    pair, inverse, rows = np.unique(
        np.stack([document, sequence], axis=1), axis=0, return_inverse=True, return_counts=True
    )
    inverse = inverse.ravel()
    low, high = np.full(len(pair), np.iinfo(np.int64).max), np.full(len(pair), -1)
    np.minimum.at(low, inverse, position)
    np.maximum.at(high, inverse, position)
    hit = signatures.member[signature].any(axis=1)
    marked = np.stack([document, sequence, position, signature], axis=1)[hit]
    return np.concatenate([pair, np.stack([low, high, rows], axis=1)], axis=1), marked


@dataclass(frozen=True)
class PlaceNull:
    """Draws of how often each expert is met at the marker's places.

    Attributes:
        counts: per layer, [draw, label, expert].
        matched: [label] documents for which a text without the marker has tokens at the same places.
        draws: how many.
    """

    counts: list[Int[np.ndarray, "draw label expert"]]
    matched: Int[np.ndarray, " label"]
    draws: int

    def of_labels(
        self, size: np.ndarray, active: Sequence[np.ndarray], total: float, score: Callable[..., np.ndarray]
    ) -> ScoredNull:
        """The draws as scores."""
        scores = [
            score(drawn.astype(np.float64), size[:, None], fired, total)
            for drawn, fired in zip(self.counts, active, strict=True)
        ]
        return ScoredNull([np.moveaxis(one, 1, 2) for one in scores], self.matched > 0)


@dataclass(frozen=True)
class ScoredNull:
    """The same as scores: per layer, [draw, expert, label].

    Attributes:
        scores: per layer.
        tested: [label] which labels count for the largest.
    """

    scores: list[Float[np.ndarray, "draw expert label"]]
    tested: np.ndarray

    @property
    def mean(self) -> list[np.ndarray]:
        """Mean score of each cell."""
        return [one.mean(axis=0) for one in self.scores]

    @property
    def p99(self) -> list[np.ndarray]:
        """Its 99th percentile, an attained value."""
        return [_quantile(one) for one in self.scores]

    @property
    def largest(self) -> Float[np.ndarray, " draw"]:
        """The largest score anywhere, per draw."""
        found = np.full(len(self.scores[0]), -np.inf)
        for one in self.scores:
            here = np.where(np.isnan(one), -np.inf, one)[..., self.tested]
            found = np.maximum(found, here.max(axis=(1, 2), initial=-np.inf))
        return found

    def p_values(self, observed: Sequence[np.ndarray], alternative: str) -> list[np.ndarray]:
        """P-values with the observed among the draws; NaN where the score is."""
        found = []
        for drawn, value in zip(self.scores, observed, strict=True):
            above = ((drawn >= value - TIE).sum(axis=0) + 1) / (len(drawn) + 1)
            below = ((drawn <= value + TIE).sum(axis=0) + 1) / (len(drawn) + 1)
            p = above if alternative == "greater" else np.minimum(1.0, 2 * np.minimum(above, below))
            found.append(np.where(np.isnan(value), np.nan, p))
        return found

    def family_wise(self, observed: Sequence[np.ndarray]) -> list[np.ndarray]:
        """The share of draws with a score this large anywhere (Westfall & Young)."""
        largest = np.sort(self.largest)
        return [
            (largest.size - np.searchsorted(largest, value - TIE, side="left") + 1) / (largest.size + 1)
            for value in observed
        ]


def _quantile(scores: np.ndarray) -> np.ndarray:
    """Of each cell; one that is undefined is so in every draw."""
    return np.where(np.isnan(scores[0]), np.nan, np.quantile(np.nan_to_num(scores), 0.99, axis=0, method="higher"))


def place_null(
    store: Store,
    sites: Sequence[Any],
    places: Places,
    documents: Labelling,
    draws: int,
    seed: int,
    phase: Phase | None,
) -> PlaceNull:
    """Draws a document for each marked one, again and again; the same ones in every layer."""
    matched = np.bincount(places.label, weights=places.spare, minlength=places.n_labels).astype(np.int64)
    wanted, cell = np.unique(places.key, return_inverse=True)
    held = [np.full((wanted.size, site.top_k), -1, dtype=np.int32) for site in sites]
    index = documents.spread(np.arange(documents.documents.size))
    found = over_shards(
        store, _shard_experts, tuple(sites), wanted, places.positions, places.first_sequence, index, phase
    )
    for at, experts in found:
        for table, rows in zip(held, experts, strict=True):
            table[at] = rows
    rng = np.random.default_rng([seed, 1])
    chosen = rng.integers(0, places.donors, size=(draws, places.donors.size)).astype(np.int32)
    counts = []
    for table, site in zip(held, sites, strict=True):
        total = np.zeros((draws, places.n_labels, site.n_experts), dtype=np.int32)
        count_chosen(chosen, places.label, places.size, places.offset, cell.ravel(), table, total)
        counts.append(total)
    return PlaceNull(counts, matched, draws)


def _shard_experts(
    shard: Any,
    sites: Sequence[Any],
    wanted: np.ndarray,
    positions: tuple[int, int],
    first_sequence: np.ndarray,
    index: np.ndarray,
    phase: Phase | None,
) -> tuple[np.ndarray, list[np.ndarray]]:
    """(which of the wanted tokens are in this shard, per layer their experts, -1 for a missing slot)."""
    table = shard.tokens(["sequence", "position"])
    document = groups_of_rows(shard, index, phase)
    sequence, position = (table[name].to_numpy().astype(np.int64) for name in ("sequence", "position"))
    wide, deep = positions
    key = document * (wide * deep) + (sequence - first_sequence[document]) * wide + position
    at = np.minimum(np.searchsorted(wanted, key), wanted.size - 1)
    rows = np.flatnonzero((document >= 0) & (wanted[at] == key))
    experts = []
    for site in sites:
        routing = shard.routing(site.key, fields=["expert", "valid"] if site.slots_can_miss else ["expert"])
        chosen = routing.expert[rows].astype(np.int32)
        if site.slots_can_miss and routing.valid is not None:
            chosen = np.where(routing.valid[rows], chosen, -1)
        experts.append(chosen)
    return at[rows], experts


@kernel
def count_chosen(chosen, label, size, offset, cell, expert, total):
    """Adds up the experts at the places that each marked document hands to the chosen one.

    Args:
        chosen: [draw, marked] which donor.
        label, size, offset: [marked] as in `Places`.
        cell: [cell] row of `expert`.
        expert: [row, rank] ids, negative where a slot is missing.
        total: [draw, label, expert], added to in place.
    """
    for draw in range(chosen.shape[0]):
        for marked in range(chosen.shape[1]):
            start = offset[marked] + chosen[draw, marked] * size[marked]
            for place in range(size[marked]):
                row = cell[start + place]
                for rank in range(expert.shape[1]):
                    e = expert[row, rank]
                    if e >= 0:
                        total[draw, label[marked], e] += 1
