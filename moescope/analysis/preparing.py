"""Counting ahead: what the first pages of an app and the common analyses read, kept with the store in one go."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from moescope.analysis.contents import contents_of
from moescope.analysis.counts import document_tables, token_tables, token_totals
from moescope.analysis.selection_margins import margin_sums
from moescope.analysis.slot_sums import slot_sums
from moescope.analysis.transitions import transition_tables
from moescope.analysis.watching import counted
from moescope.errors import MoescopeError

if TYPE_CHECKING:
    from moescope.store import Store


def prepare(store: Store) -> None:
    """Counts a store's selections by document and by token, its transitions, margins and sums of outputs, and indexes
    its documents, texts and tokens; all of it is kept in the store's aggregates, and what is there already is not
    counted again.

    It draws no nulls: those depend on what is asked. What it counts is what they are drawn from.

    Args:
        store: an open store; one that grows is counted as it was when it was opened.

    Raises:
        MoescopeError: no token, or no routing tier.
    """
    sites = list(store.sites)
    if not store.shards:
        raise MoescopeError(f"{store.path} holds no tokens yet: there is nothing to count.")
    jobs: list[Callable[[], object]] = [
        lambda: contents_of(store).index(),
        lambda: token_totals(store),
        lambda: document_tables(store, sites),
        lambda: document_tables(store, sites, weighted=True),
        lambda: token_tables(store, sites),
        *([lambda: transition_tables(store)] if len(sites) > 1 else []),
        *(lambda site=site: margin_sums(store, site) for site in sites),
        *(lambda site=site: slot_sums(store, site, "experts" in store.tiers) for site in sites),
    ]
    for job in counted("tables", jobs):
        job()
