"""What an expert reads: the tokens it answers to most, and stretches of text where it is busiest.

These are illustrations, not tests: the evidence that an expert specialises is `analysis.npmi` and its null.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from moescope.analysis.association import score
from moescope.analysis.counts import Phase, of_phase, token_tables, token_totals
from moescope.analysis.kernels import kernel

if TYPE_CHECKING:
    import pyarrow as pa

    from moescope.store import Store

_BLANKS = str.maketrans({" ": "␣", "\n": "↵", "\t": "⇥", "\r": "␍"})


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
    """One token of an example.

    Attributes:
        text: its text.
        weight: the expert's routing weight there, None where it was not selected (or the token does not count).
        offset: rows of the store that it is behind the example's first.
    """

    text: str
    weight: float | None
    offset: int


@dataclass(frozen=True)
class Example:
    """A stretch of one document around which an expert was busy.

    Attributes:
        document: its number; id: its own id, if it has one; source: the file it came from.
        position: position in its context of the first token shown; row: its row of the store.
        tokens: the stretch.
        cut_before, cut_after: whether the context goes on before and after it.
    """

    document: int
    id: str | None
    source: str
    position: int
    row: int
    tokens: tuple[ExampleToken, ...]
    cut_before: bool
    cut_after: bool


def top_tokens(
    store: Store,
    site: Any,
    experts: Collection[int],
    n: int = 12,
    least: int = 5,
    phase: Phase | None = None,
) -> dict[int, list[TopToken]]:
    """The tokens that each of some experts of one layer prefers.

    How to read it: `active` of `occurrences` against `expected`, which is what an expert blind to the token would get.

    Args:
        store: an open store with the routing tier.
        site: a site record, key or model layer index.
        experts: expert ids.
        n: tokens per expert, best nPMI first.
        least: leave out tokens that occur less often (a token seen once is always or never met).
        phase: count only tokens of this phase; None for all.

    Returns:
        expert -> tokens whose nPMI is above 0, at most n.
    """
    pairs = token_tables(store, [site], phase)[0]
    ids, occurrences = token_totals(store, phase)
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
                text=text_of_token(text, int(token[row])),
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
    phase: Phase | None = None,
) -> list[Example]:
    """The stretches of text, one per document, in which an expert is selected most often.

    A selection counts 1 plus its routing weight, which is held between 0 and 1.

    How to read it: these are the expert's *busiest* stretches, chosen for it; they show what it may answer to, and
    cannot show that it answers to nothing else.

    Args:
        store: an open store with the routing tier.
        site: a site record, key or model layer index.
        expert: expert id.
        documents: only these documents; all if None.
        n: how many examples, best first.
        window: tokens per stretch.
        phase: count only tokens of this phase; the others of a stretch are shown as if not selected. None for all.

    Returns:
        At most n examples, in descending order of what was counted; fewer if the expert is active in fewer documents.
    """
    return examples_of_experts(store, site, [expert], documents, n, window, phase)[expert]


def examples_of_experts(
    store: Store,
    site: Any,
    experts: Collection[int],
    documents: Collection[int] | None = None,
    n: int = 3,
    window: int = 40,
    phase: Phase | None = None,
) -> dict[int, list[Example]]:
    """`examples` of many experts of one layer, in one pass over the store."""
    record = store.site(getattr(site, "key", site))
    wanted = None if documents is None else np.fromiter(documents, dtype=np.int64)
    best: dict[int, list[tuple[float, int, int, int, int]]] = {int(expert): [] for expert in experts}
    for number, shard in enumerate(store.shards):
        found = _busiest(shard, record, wanted, window, phase)
        for expert, kept in best.items():
            fresh = [(float(c), int(d), number, int(a), int(b)) for c, d, a, b in zip(*found[expert], strict=True)]
            kept = sorted(kept + fresh, key=lambda item: (-item[0], item[1]))
            # A document cut into several contexts may have come up before: its best stretch stands.
            seen: set[int] = set()
            best[expert] = [item for item in kept if not (item[1] in seen or seen.add(item[1]))][:n]
    if not any(best.values()):
        return {expert: [] for expert in best}
    table, vocabulary = store.documents(["document", "id", "text", "source"]), store.vocabulary()
    return {
        expert: [
            _example(store.shards[number], record, expert, table, vocabulary, document, start, stop, phase)
            for _, document, number, start, stop in kept
        ]
        for expert, kept in best.items()
    }


def _slot_weights(shard: Any, record: Any, expert: int) -> tuple[np.ndarray, np.ndarray]:
    """[row] the expert's routing weight at each row (0 if not selected), and whether it was selected."""
    fields = ["expert", "weight", "valid"] if record.slots_can_miss else ["expert", "weight"]
    routing = shard.routing(record.key, fields=fields)
    chosen = routing.expert == expert
    if record.slots_can_miss and routing.valid is not None:
        chosen = chosen & routing.valid
    return np.where(chosen, routing.weight, 0).sum(axis=1), chosen.any(axis=1)


def _busiest(
    shard: Any, record: Any, wanted: np.ndarray | None, window: int, phase: Phase | None
) -> list[tuple[np.ndarray, ...]]:
    """For each expert, the best stretch of each context of one shard: what it counts, document, first row, end."""
    tokens = shard.tokens(["document", "sequence"] if phase is None else ["document", "sequence", "phase"])
    document, sequence = tokens["document"].to_numpy(), tokens["sequence"].to_numpy()
    routing = shard.routing(record.key, fields=["expert", "weight"])
    # Weights may be negative or huge in some families; what counts here is being selected, then by how much.
    worth = 1.0 + np.clip(np.nan_to_num(routing.weight.astype(np.float64)), 0, 1)
    if record.slots_can_miss and routing.valid is not None:
        worth = np.where(routing.valid, worth, 0.0)
    if phase is not None:
        worth = np.where(of_phase(tokens, phase)[:, None], worth, 0.0)
    edges = np.concatenate([[0], np.flatnonzero(sequence[1:] != sequence[:-1]) + 1, [sequence.size]])
    runs = edges.size - 1
    collected = np.zeros((runs, record.n_experts))
    last = np.zeros((runs, record.n_experts), dtype=np.int64)
    busiest_windows(edges, routing.expert, worth, window, collected, last)
    if wanted is not None:
        collected[~np.isin(document[edges[:-1]], wanted)] = 0
    found = []
    for expert in range(record.n_experts):
        run = np.flatnonzero(collected[:, expert] > 0)
        begin = np.maximum(edges[run], last[run, expert] - window + 1)
        end = np.minimum(begin + window, edges[run + 1])
        found.append((collected[run, expert], document[edges[run]], begin, end))
    return found


@kernel
def busiest_windows(edge, expert, worth, window, best, last):
    """The largest sum of an expert's worth over `window` rows of a run, for every expert at once.

    A sum grows only where the expert is selected, so only there can it be the largest: O(rows x ranks).

    Args:
        edge: [run + 1] first row of each run, and the end.
        expert: [row, rank] unsigned ids.
        worth: [row, rank] float64, above 0 where the slot is filled and 0 where it is missing.
        window: rows of a stretch; a shorter run is one stretch.
        best: [run, expert] float64, zeros; filled.
        last: [run, expert] int64; filled with the last row of the first best stretch.
    """
    experts = best.shape[1]
    running = np.zeros(experts)
    held = np.zeros(experts, dtype=np.int64)
    for run in range(edge.size - 1):
        running[:] = 0
        held[:] = 0
        for row in range(edge[run], edge[run + 1]):
            leaving = row - window
            if leaving >= edge[run]:
                for rank in range(expert.shape[1]):
                    e = int(expert[leaving, rank])
                    if worth[leaving, rank] > 0 and e < experts:
                        running[e] -= worth[leaving, rank]
                        held[e] -= 1
                        if held[e] == 0:
                            running[e] = 0.0  # no dust from earlier sums
            for rank in range(expert.shape[1]):
                e = int(expert[row, rank])
                if worth[row, rank] > 0 and e < experts:
                    running[e] += worth[row, rank]
                    held[e] += 1
                    if running[e] > best[run, e] + 1e-9:
                        best[run, e] = running[e]
                        last[run, e] = row


def _example(
    shard: Any,
    record: Any,
    expert: int,
    documents: pa.Table,
    vocabulary: Any,
    document: int,
    start: int,
    stop: int,
    phase: Phase | None,
) -> Example:
    tokens = shard.tokens(["sequence", "position", "token_id", "start", "end", "phase"])
    sequence = tokens["sequence"].to_numpy()
    weight, chosen = _slot_weights(shard, record, expert)
    if phase is not None:
        chosen = chosen & of_phase(tokens, phase)
    rows = tokens.slice(start, stop - start).to_pylist()
    row = np.flatnonzero(documents["document"].to_numpy() == document)
    about = documents.slice(int(row[0]), 1).to_pylist()[0] if row.size else {"text": None, "id": None, "source": ""}
    pieces = token_pieces(rows, about["text"], vocabulary)
    shown: list[ExampleToken] = []
    for offset, piece in enumerate(pieces):
        value = float(weight[start + offset]) if chosen[start + offset] else None
        if not piece and shown:
            # The second half of a character that two tokens share: show its weight on the character.
            held = shown[-1]
            both = value if held.weight is None else max(held.weight, value or 0.0)
            shown[-1] = ExampleToken(held.text, both, held.offset)
        else:
            shown.append(ExampleToken(piece, value, offset))
    return Example(
        document=document,
        id=about["id"],
        source=about["source"] or "",
        position=int(rows[0]["position"]),
        row=shard.offset + start,
        tokens=tuple(shown),
        cut_before=bool(start > 0 and sequence[start - 1] == sequence[start]),
        cut_after=bool(stop < sequence.size and sequence[stop] == sequence[stop - 1]),
    )


def token_pieces(
    rows: list[dict[str, Any]], text: str | None, vocabulary: Any, reached: int | None = None
) -> list[str]:
    """The text of each token, so that their join reads as the document does: gaps go to the token that follows.

    Args:
        rows: token_id, start and end of tokens that follow each other in one document.
        text: the document's; None if it is not there.
        vocabulary: token id -> text, for tokens without a span.
        reached: where in the text the token before them ends; None if that is not known.
    """
    pieces = []
    for row in rows:
        start, end = row["start"], row["end"]
        if text is None or start is None or end is None:
            pieces.append(text_of_token(vocabulary, row["token_id"]))
            continue
        begin = start if reached is None else min(reached, end) if start >= reached else reached
        pieces.append(text[begin : max(begin, end)])
        reached = max(end, reached or 0)
    return pieces


def text_of_token(vocabulary: Any, token_id: int) -> str:
    try:
        text = vocabulary[token_id]
    except (KeyError, IndexError):
        text = None
    return f"<{token_id}>" if text is None else str(text)


def visible(text: str) -> str:
    """A token's text with its blanks seen."""
    return text.translate(_BLANKS)
