"""Edits that meet: which of them act on the same rows, and whether they can all hold there."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from moescope.edits.edit import Demote, Mask, Merge, Promote, Prune, Route, Zero
from moescope.errors import MoescopeError

# Kinds that decide alone what becomes of an expert: two of them contradict each other.
DECIDING = (Mask, Zero, Promote, Demote, Prune, Merge)


def meeting(edits: Sequence[Any]) -> Iterator[list[Any]]:
    """The sets of edits that act together on some row, at some position, in some phase; each set once."""
    rows = {row for edit in edits for row in edit.rows.batch or ()} | {None}  # None: any other row
    edges = {edge for edit in edits for edge in edit.rows.positions or ()} | {0}
    phases = ("prefill", "decode") if any(edit.rows.phase for edit in edits) else ("prefill",)
    seen = set()
    for row in rows:
        for position in edges:
            for phase in phases:
                here = tuple(n for n, edit in enumerate(edits) if _acts(edit.rows, row, position, phase))
                if here and here not in seen:
                    seen.add(here)
                    yield [edits[n] for n in here]


def _acts(rows: Any, row: int | None, position: int, phase: str) -> bool:
    return (
        (rows.batch is None or row in rows.batch)
        and (rows.positions is None or rows.positions[0] <= position < rows.positions[1])
        and rows.phase in (None, phase)
    )


def require_consistent(edits: Sequence[Any], *, one_site: bool = False) -> None:
    """Raises MoescopeError where two edits decide differently about one expert, or leave a token no rank, in some rows.

    Args:
        edits: the edits.
        one_site: they are all of one site, whatever they call it: by its layer or by its key.
    """
    for some in meeting(edits):
        decided: dict[Any, str] = {}
        ranks: dict[Any, set[int]] = {}
        for edit in some:
            site = None if one_site else edit.layer
            for expert in edit.expert if isinstance(edit, DECIDING) else ():
                new = (site, expert) not in decided
                other = decided.setdefault((site, expert), edit.kind)
                if edit.kind == other == "merge" and not new:
                    raise MoescopeError(f"Layer {edit.layer}, expert {expert} is in two groups to be merged.")
                if other != edit.kind:
                    raise MoescopeError(f"Layer {edit.layer}, expert {expert}: {other} and {edit.kind} contradict.")
            if isinstance(edit, Route) and edit.top_p is None:
                own = set(range(edit.top_k or 0)) if edit.ranks is None else set(edit.ranks)
                ranks[site] = ranks.get(site, own) & own
                if not ranks[site]:
                    raise MoescopeError(f"Layer {edit.layer}: two routings by rank leave no rank in common.")


def require_enough(edits: Sequence[Any], layer: int, n_experts: int, top_k: int) -> None:
    """Raises MoescopeError where the edits of one site promote more experts than are selected, or leave too few."""
    for some in meeting(edits):
        promoted = {expert for edit in some if isinstance(edit, Promote) for expert in edit.expert}
        masked = {expert for edit in some if isinstance(edit, Mask | Prune) for expert in edit.expert}
        masked |= {expert for edit in some if isinstance(edit, Merge) for expert in edit.gone}
        if len(promoted) > top_k:
            raise MoescopeError(f"Layer {layer}: {len(promoted)} experts are promoted, {top_k} are selected.")
        if n_experts - len(masked) < top_k:
            raise MoescopeError(f"Layer {layer}: {len(masked)} masked experts leave too few to select {top_k}.")
