"""What an expert reads: the tokens it answers to most, and stretches of text where it is busiest.

These are illustrations, not tests: the evidence that an expert specialises is `analysis.npmi` and its null.
"""

from __future__ import annotations

import itertools
from collections.abc import Collection
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from moescope.analysis.association import score
from moescope.analysis.counts import token_counts, token_totals

if TYPE_CHECKING:
    import pyarrow as pa

    from moescope.store import Store


@dataclass(frozen=True)
class TopToken:
    """A token id that an expert prefers.

    Attributes:
        token_id, text: the token.
        active: occurrences at which the expert was selected.
        occurrences: all its occurrences.
        expected: how many of them chance would give, occurrences x the expert's share of all tokens.
        npmi: of token id and expert; orders the list.
    """

    token_id: int
    text: str
    active: int
    occurrences: int
    expected: float
    npmi: float


@dataclass(frozen=True)
class ExampleToken:
    """One token of an example: its text, and the expert's routing weight there, None where it was not selected."""

    text: str
    weight: float | None


@dataclass(frozen=True)
class Example:
    """A stretch of one document around which an expert was busy.

    Attributes:
        document: its number; id: its own id, if it has one; source: the file it came from.
        position: position in its context of the first token shown.
        tokens: the stretch.
        cut_before, cut_after: whether the context goes on before and after it.
    """

    document: int
    id: str | None
    source: str
    position: int
    tokens: tuple[ExampleToken, ...]
    cut_before: bool
    cut_after: bool


def top_tokens(
    store: Store, site: Any, experts: Collection[int], n: int = 12, least: int = 5
) -> dict[int, list[TopToken]]:
    """The tokens that each of some experts of one layer prefers.

    How to read it: `active` of `occurrences` against `expected`, which is what an expert blind to the token would get.

    Args:
        store: an open store with the routing tier.
        site: a site record, key or model layer index.
        experts: expert ids.
        n: tokens per expert, best nPMI first.
        least: leave out tokens that occur less often (a token seen once is always or never met).

    Returns:
        expert -> tokens whose nPMI is above 0, at most n.
    """
    pairs = token_counts(store, site)
    ids, occurrences = token_totals(store)
    total = float(occurrences.sum())
    text = store.vocabulary()
    found: dict[int, list[TopToken]] = {}
    for expert in experts:
        of_expert = pairs.expert == expert
        token, active = pairs.group[of_expert], pairs.count[of_expert]
        seen = occurrences[np.searchsorted(ids, token)]
        frequent = seen >= least
        token, active, seen = token[frequent], active[frequent], seen[frequent]
        fired = float(pairs.count[of_expert].sum())
        value = score(active.astype(float), seen.astype(float), fired, total)
        best = [row for row in np.argsort(-value, kind="stable")[:n] if value[row] > 0]
        found[int(expert)] = [
            TopToken(
                token_id=int(token[row]),
                text=_text_of(text, int(token[row])),
                active=int(active[row]),
                occurrences=int(seen[row]),
                expected=float(seen[row]) * fired / total,
                npmi=float(value[row]),
            )
            for row in best
        ]
    return found


def examples(
    store: Store,
    site: Any,
    expert: int,
    documents: Collection[int] | None = None,
    n: int = 3,
    window: int = 40,
) -> list[Example]:
    """The stretches of text, one per document, over which an expert collects the most routing weight.

    How to read it: these are the expert's *busiest* stretches, chosen for it; they show what it may answer to, and
    cannot show that it answers to nothing else.

    Args:
        store: an open store with the routing tier.
        site: a site record, key or model layer index.
        expert: expert id.
        documents: only these documents; all if None.
        n: how many examples, best first.
        window: tokens per stretch.

    Returns:
        At most n examples, in descending order of collected weight; fewer if the expert is active in fewer documents.
    """
    record = store.site(getattr(site, "key", site))
    wanted = None if documents is None else set(documents)
    best: list[tuple[float, int, int, int, int]] = []
    for number, shard in enumerate(store.shards):
        for collected, document, start, stop in _busiest(shard, record, expert, wanted, window):
            best.append((collected, document, number, start, stop))
        best.sort(key=lambda item: (-item[0], item[1]))
        # A document cut into several contexts may have come up before: its best stretch stands.
        seen: set[int] = set()
        best = [item for item in best if not (item[1] in seen or seen.add(item[1]))][:n]
    documents_table = store.documents(["document", "id", "text", "source"]) if best else None
    vocabulary = store.vocabulary() if best else None
    return [
        _example(store.shards[number], record, expert, documents_table, vocabulary, document, start, stop)
        for _, document, number, start, stop in best
    ]


def _slot_weights(shard: Any, record: Any, expert: int) -> tuple[np.ndarray, np.ndarray]:
    """[row] the expert's routing weight at each row (0 if not selected), and whether it was selected."""
    fields = ["expert", "weight", "valid"] if record.slots_can_miss else ["expert", "weight"]
    routing = shard.routing(record.key, fields=fields)
    chosen = routing.expert == expert
    if record.slots_can_miss and routing.valid is not None:
        chosen = chosen & routing.valid
    return np.where(chosen, routing.weight, 0).sum(axis=1), chosen.any(axis=1)


def _busiest(
    shard: Any, record: Any, expert: int, wanted: set[int] | None, window: int
) -> list[tuple[float, int, int, int]]:
    """(collected weight, document, first row, last row + 1) of the best stretch of each context of one shard."""
    tokens = shard.tokens(["document", "sequence"])
    document, sequence = tokens["document"].to_numpy(), tokens["sequence"].to_numpy()
    weight, chosen = _slot_weights(shard, record, expert)
    # Weights may be negative or huge in some families; what counts here is being selected, then by how much.
    busy = np.where(chosen, 1.0 + np.clip(np.nan_to_num(weight), 0, 1), 0.0)
    edges = np.concatenate([[0], np.flatnonzero(sequence[1:] != sequence[:-1]) + 1, [sequence.size]])
    running = np.concatenate([[0.0], np.cumsum(busy)])
    found = []
    for start, stop in itertools.pairwise(edges.tolist()):
        if stop == start or (wanted is not None and int(document[start]) not in wanted):
            continue
        begins = np.arange(start, max(start + 1, stop - window + 1))
        collected = running[np.minimum(begins + window, stop)] - running[begins]
        at = int(collected.argmax())
        if collected[at] > 0:
            first = int(begins[at])
            found.append((float(collected[at]), int(document[start]), first, int(min(first + window, stop))))
    return found


def _example(
    shard: Any, record: Any, expert: int, documents: pa.Table, vocabulary: Any, document: int, start: int, stop: int
) -> Example:
    tokens = shard.tokens(["sequence", "position", "token_id", "start", "end"])
    sequence = tokens["sequence"].to_numpy()
    weight, chosen = _slot_weights(shard, record, expert)
    rows = tokens.slice(start, stop - start).to_pylist()
    row = np.flatnonzero(documents["document"].to_numpy() == document)
    about = documents.slice(int(row[0]), 1).to_pylist()[0] if row.size else {"text": None, "id": None, "source": ""}
    pieces = _pieces(rows, about["text"], vocabulary)
    shown: list[ExampleToken] = []
    for offset, piece in enumerate(pieces):
        value = float(weight[start + offset]) if chosen[start + offset] else None
        if not piece and shown:
            # The second half of a character that two tokens share: show its weight on the character.
            held = shown[-1]
            shown[-1] = ExampleToken(held.text, value if held.weight is None else max(held.weight, value or 0.0))
        else:
            shown.append(ExampleToken(piece, value))
    return Example(
        document=document,
        id=about["id"],
        source=about["source"] or "",
        position=int(rows[0]["position"]),
        tokens=tuple(shown),
        cut_before=bool(start > 0 and sequence[start - 1] == sequence[start]),
        cut_after=bool(stop < sequence.size and sequence[stop] == sequence[stop - 1]),
    )


def _pieces(rows: list[dict[str, Any]], text: str | None, vocabulary: Any) -> list[str]:
    """The text of each token, so that their join reads as the document does: gaps go to the token that follows."""
    pieces, reached = [], None
    for row in rows:
        start, end = row["start"], row["end"]
        if text is None or start is None or end is None:
            pieces.append(_text_of(vocabulary, row["token_id"]))
            continue
        begin = start if reached is None else min(reached, end) if start >= reached else reached
        pieces.append(text[begin : max(begin, end)])
        reached = max(end, reached or 0)
    return pieces


def _text_of(vocabulary: Any, token_id: int) -> str:
    try:
        text = vocabulary[token_id]
    except (KeyError, IndexError):
        text = None
    return f"<{token_id}>" if text is None else str(text)
