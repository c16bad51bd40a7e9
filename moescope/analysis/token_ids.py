"""Which experts specialise in which token: nPMI of experts and token ids, tested inside documents."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
import xarray as xr

from moescope.analysis.contexts import visible
from moescope.analysis.counts import Phase, labelling, sites_of
from moescope.analysis.label_tests import Alternative, Correction, LabelTest
from moescope.analysis.labelled import LayerAxis, provenance
from moescope.analysis.property_tests import npmi_of_counts
from moescope.analysis.question import LAYERS, PHASE, SEED, Analysis, Parameter
from moescope.analysis.spreading import over_shards
from moescope.analysis.token_properties import SignaturesOfIds, groups_of_rows, property_counts
from moescope.errors import MoescopeError

if TYPE_CHECKING:
    from moescope.store import Store


def npmi_tokens(
    store: Store,
    tokens: Sequence[int | str] | None = None,
    most: int = 100,
    least: int = 20,
    seed: int = 0,
    alternative: Alternative = "greater",
    correction: Correction = "bh",
    resamples: int = 0,
    layers: Sequence[int] | None = None,
    where: dict[str, str | Sequence[str]] | None = None,
    phase: Phase | None = None,
) -> xr.Dataset:
    """Which experts specialise in which token.

    How to read it: as `npmi_classes`: a cell with a small `q` fires on this token more than on the other tokens of the
    same documents. A token needs some tens of documents before its p-values can be small.

    Args:
        store: an open store with the routing tier.
        tokens: token ids, or texts (every id of that text is looked at); the most frequent ones if None.
        most: how many of the most frequent.
        least: leave out tokens that occur less often (unless they are named).
        seed, alternative, correction, layers, where, phase: as in `npmi_classes`.
        resamples: documents drawn again, for the intervals; 0, the default, for none.

    Returns:
        As `npmi_classes`, with tokens as `label` (spaces and line breaks made visible, the id beside texts that several
        ids share), and along it the coordinates token_id and text.

    Raises:
        MoescopeError: a token that does not occur, or none that occurs often enough.
    """
    sites = sites_of(store, layers)
    vocabulary = dict(store.vocabulary())
    ids, seen = occurrences(store, where, phase)
    chosen = _named(tokens, vocabulary, ids) if tokens is not None else _frequent(ids, seen, most, least)
    attrs = provenance(store, analysis="npmi_tokens", by="token", most=most, least=least, where=where, phase=phase) | {
        "tokens_left_out": int(ids.size - len(chosen))
    }
    counts = property_counts(store, sites, SignaturesOfIds.of_sets([[one] for one in chosen]), where, phase)
    test = LabelTest(0, seed, alternative, correction, resamples)
    result = npmi_of_counts(LayerAxis.of_sites(sites), counts, shown_tokens(chosen, vocabulary), test, attrs)
    texts = np.array([vocabulary.get(one, "") for one in chosen], dtype=object)
    return result.assign_coords(token_id=("label", np.array(chosen)), text=("label", texts))


def occurrences(
    store: Store, where: dict[str, str | Sequence[str]] | None, phase: Phase | None
) -> tuple[np.ndarray, np.ndarray]:
    """(token ids, ascending; how often each occurs) in the documents that the filters leave."""
    chosen = labelling(store, None, where, phase)
    index = chosen.spread(np.zeros(chosen.documents.size, dtype=np.int64))
    total: Counter[int] = Counter()
    for ids, seen in over_shards(store, _shard_occurrences, index, phase):
        total.update(dict(zip(ids.tolist(), seen.tolist(), strict=True)))
    ids = np.array(sorted(total), dtype=np.int64)
    return ids, np.array([total[one] for one in ids.tolist()], dtype=np.int64)


def shown_tokens(ids: Sequence[int], vocabulary: Mapping[int, str]) -> list[str]:
    """Names of tokens, each its own: the text with spaces made visible, and the id where texts are shared or empty."""
    names = [visible(vocabulary.get(one) or "") for one in ids]
    often = Counter(names)
    return [f"{name}‹{one}›" if not name or often[name] > 1 else name for name, one in zip(names, ids, strict=True)]


def _shard_occurrences(shard, index: np.ndarray, phase: Phase | None) -> tuple[np.ndarray, np.ndarray]:
    kept = groups_of_rows(shard, index, phase) >= 0
    return np.unique(shard.tokens(["token_id"])["token_id"].to_numpy()[kept], return_counts=True)


def _frequent(ids: np.ndarray, seen: np.ndarray, most: int, least: int) -> list[int]:
    if most < 1 or least < 1:
        raise MoescopeError("`most` and `least` are at least 1.")
    order = np.argsort(-seen, kind="stable")[:most]
    chosen = sorted(int(ids[place]) for place in order if seen[place] >= least)
    if not chosen:
        raise MoescopeError(
            f"No token occurs {least} times; the most frequent occurs {int(seen.max(initial=0))} times."
        )
    return chosen


def _named(tokens: Sequence[int | str], vocabulary: Mapping[int, str], ids: np.ndarray) -> list[int]:
    """Ids of tokens given by id or text, in order; a text may also be an id written out, as on a command line."""
    if isinstance(tokens, str):
        tokens = [tokens]
    there = set(ids.tolist())
    chosen: list[int] = []
    for token in tokens:
        found = [one for one, text in vocabulary.items() if text == token and one in there]
        if not found and (isinstance(token, int) or token.isdecimal()) and int(token) in there:
            found = [int(token)]
        if not found:
            raise MoescopeError(f"The token {token!r} does not occur in these documents.")
        chosen += [one for one in found if one not in chosen]
    return chosen


TOKENS_QUESTION = Analysis(
    name="npmi_tokens",
    run=npmi_tokens,
    figure="npmi_tokens",
    help="Which experts specialise in which token, beyond the texts it stands in?",
    parameters=(
        Parameter("tokens", str, None, "token texts or ids (default: the most frequent)", many=True),
        Parameter("most", int, 100, "how many of the most frequent tokens"),
        Parameter("least", int, 20, "leave out tokens that occur less often"),
        Parameter("alternative", str, "greater", "test for preference, or either way", ("greater", "two-sided")),
        Parameter("correction", str, "bh", "q-values: Benjamini-Hochberg or -Yekutieli", ("bh", "by")),
        LAYERS,
        PHASE,
        SEED,
    ),
    tier="routing",
)
