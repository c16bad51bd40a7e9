"""Markers such as <think>: where they stand, and which experts go with them; RICE's cognitive experts.

Source: RICE (arXiv 2505.14681): nPMI of experts with the tokens of thinking; the two experts of the whole model with
the highest are its cognitive experts (`cognitive_experts`, `Recipe.from_cognitive_experts`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import xarray as xr

from moescope.analysis.association import CORRECTIONS, NO_P, association, q_values, score
from moescope.analysis.counts import Phase, sites_of, token_totals
from moescope.analysis.label_tests import Alternative, Correction, LabelTest, enough_permutations, floor_of
from moescope.analysis.labelled import LayerAxis, provenance
from moescope.analysis.matched_places import NULL, Matching, PlaceNull, place_null, places_of
from moescope.analysis.property_tests import INTERVAL, few_documents, intervals, left_out, npmi_of_counts
from moescope.analysis.question import LAYERS, PHASE, RESAMPLES, SEED, Analysis, Parameter
from moescope.analysis.token_properties import PropertyCounts, property_counts
from moescope.errors import MoescopeError

if TYPE_CHECKING:
    from jaxtyping import Bool, Int

    from moescope.store import Store

Marker = str | int | Sequence[int]
At = Literal["all", "first", "last"]
THINKING = ("<think>", "</think>")
"""RICE's markers, as DeepSeek-R1 and Qwen3 write them."""
MOST = 8
"""Markers at once: rows are told apart by which of them they belong to."""


@dataclass(frozen=True)
class MarkerRows:
    """Which rows belong to which marker.

    Attributes:
        ids: per marker, token ids each of which is the marker.
        runs: per marker, a run of token ids that is the marker, or empty.
        spelled: per marker, the text that consecutive tokens spell, or "".
        texts: text of every token id, where a marker is spelled.
        at: which tokens of a marker of several count: all, the first or the last.
        union: whether the last property stands for any of them.
    """

    ids: tuple[tuple[int, ...], ...]
    runs: tuple[tuple[int, ...], ...]
    spelled: tuple[str, ...]
    texts: Mapping[int, str]
    at: At
    union: bool

    @property
    def member(self) -> Bool[np.ndarray, "signature property"]:
        """[signature, marker]: signature s has the markers whose bits are set in s."""
        bits = (np.arange(2 ** len(self.ids))[:, None] >> np.arange(len(self.ids))) & 1
        has = bits.astype(bool)
        return np.concatenate([has, has.any(axis=1, keepdims=True)], axis=1) if self.union else has

    def of_rows(self, shard: Any) -> Int[np.ndarray, " row"]:
        """The signature of each row."""
        table = shard.tokens(["token_id", "sequence"])
        token, sequence = (table[name].to_numpy().astype(np.int64) for name in ("token_id", "sequence"))
        signature = np.zeros(token.size, dtype=np.int64)
        for place, (ids, run, spelled) in enumerate(zip(self.ids, self.runs, self.spelled, strict=True)):
            if spelled:
                rows = self._spelled(token, sequence, spelled)
            elif run:
                rows = self._of_stretches(_runs(token, sequence, run), len(run))
            else:
                rows = np.flatnonzero(np.isin(token, ids))
            signature[rows] |= 1 << place
        return signature

    def _of_stretches(self, first: np.ndarray, length: int) -> np.ndarray:
        if self.at == "all":
            return (first[:, None] + np.arange(length)).ravel()
        return first if self.at == "first" else first + length - 1

    def _spelled(self, token: np.ndarray, sequence: np.ndarray, spelled: str) -> np.ndarray:
        """Rows of the tokens that spell it between them; a marker does not go on from one sequence to the next."""
        begins = np.flatnonzero(np.diff(sequence, prepend=-1) != 0)
        pieces = [self.texts.get(one, "\ufffd") for one in token.tolist()]
        for row in begins:
            pieces[row] = "\x00" + pieces[row]
        ends = np.cumsum([len(piece) for piece in pieces])
        text, rows, found = "".join(pieces), [], -1
        while (found := text.find(spelled, found + 1)) >= 0:
            first = int(np.searchsorted(ends, found, side="right"))
            last = int(np.searchsorted(ends, found + len(spelled) - 1, side="right"))
            rows += {"all": range(first, last + 1), "first": [first], "last": [last]}[self.at]
        return np.array(sorted(set(rows)), dtype=np.int64)


def _runs(token: np.ndarray, sequence: np.ndarray, run: Sequence[int]) -> np.ndarray:
    """First rows of stretches of one sequence whose ids are the run."""
    last = token.size - len(run) + 1
    if last < 1:
        return np.empty(0, dtype=np.int64)
    same = sequence[:last] == sequence[len(run) - 1 :]
    for offset, one in enumerate(run):
        same &= token[offset : offset + last] == one
    return np.flatnonzero(same)


def marker_rows(
    vocabulary: Mapping[int, str], markers: Sequence[Marker], at: At = "all"
) -> tuple[MarkerRows, list[str], list[str]]:
    """How to find markers in a store: (what finds them, their names, how each is found, in words).

    Args:
        vocabulary: text of every token id.
        markers: each a text, a token id, or a run of token ids. A text that is a token's own (or several tokens') means
            that token; any other is looked for where consecutive tokens spell it.
        at: which tokens of a marker of several count.

    Raises:
        MoescopeError: no marker, too many, one twice, or an id that no token has.
    """
    if isinstance(markers, (str, int)):
        markers = [markers]
    if not 1 <= len(markers) <= MOST:
        raise MoescopeError(f"Name from 1 to {MOST} markers; got {len(markers)}.")
    if at not in ("all", "first", "last"):
        raise MoescopeError('`at` is "all", "first" or "last": which tokens of a marker of several count.')
    ids, runs, spelled, names, words = [], [], [], [], []
    for marker in markers:
        found: tuple[int, ...] = ()
        run: tuple[int, ...] = ()
        text = ""
        if isinstance(marker, str):
            found = tuple(one for one, written in vocabulary.items() if written == marker)
            text = "" if found else marker
            names.append(marker)
            words.append(
                f"{marker}: token {', '.join(map(str, found))}" if found else f"{marker}: tokens that spell it"
            )
            if not marker:
                raise MoescopeError("A marker is a text, a token id or a run of token ids; got an empty text.")
        else:
            run = (int(marker),) if isinstance(marker, int) else tuple(int(one) for one in marker)
            missing = [one for one in run if one not in vocabulary]
            if missing or not run:
                raise MoescopeError(
                    f"No token of this store has the id {missing[0] if missing else 'of an empty run'}."
                )
            names.append("".join(vocabulary[one] for one in run) or f"‹{', '.join(map(str, run))}›")
            words.append(f"{names[-1]}: the run of tokens {', '.join(map(str, run))}")
            if len(run) == 1:
                found, run = run, ()
        ids.append(found)
        runs.append(run)
        spelled.append(text)
    if len(set(names)) < len(names):
        raise MoescopeError("Two of these markers are the same.")
    union = len(markers) > 1
    texts = dict(vocabulary) if any(spelled) else {}
    rows = MarkerRows(tuple(ids), tuple(runs), tuple(spelled), texts, at, union)
    return rows, names + ([ANY] if union else []), words


def occurring(store: Store, markers: Sequence[str] = THINKING) -> list[str]:
    """Those of some texts that are a token of their own and occur in the store, whatever its slice; reads totals."""
    ids, seen = token_totals(store)
    known = dict(store.vocabulary())
    there = {known.get(one) for one in ids[seen > 0].tolist()}
    return [text for text in markers if text in there]


ANY = "any marker"
"""The label of all markers taken together, where there are several."""


def npmi_markers(
    store: Store,
    markers: Sequence[Marker] = THINKING,
    matched: Matching = "position",
    at: At = "all",
    permutations: int | None = None,
    donors: int = 100,
    seed: int = 0,
    alternative: Alternative = "greater",
    correction: Correction = "bh",
    resamples: int = 500,
    layers: Sequence[int] | None = None,
    where: dict[str, str | Sequence[str]] | None = None,
    phase: Phase | None = None,
) -> xr.Dataset:
    """Which experts go with a marker, such as <think>, and whether more than its place in the text explains.

    How to read it: `npmi` near 1 means that marker and expert nearly always meet. A marker that stands once per text at
    a fixed place cannot be told from that place by nPMI alone; `q` holds it against other texts' tokens at the same
    places. `matched_documents` of `documents` have such texts to be held against: where it is 0, marker and place
    cannot be told apart in this store and there is no p-value. RICE's cognitive experts are the two largest `npmi` of
    the whole model (`cognitive_experts`).

    Args:
        store: an open store with the routing tier.
        markers: texts, token ids, or runs of token ids; see `marker_rows`.
        matched: "position" holds a marker against the tokens at the same positions in other documents; "document"
            against the other tokens of its own, as `npmi_classes`.
        at: "all", "first" or "last": which tokens of a marker of several count.
        permutations: random deals of documents to the marker's places; enough for one discovery if None.
        donors: other documents, at most, that a document with the marker is held against, drawn at random.
        seed: of the draws.
        alternative, correction, resamples, layers, where, phase: as in `npmi_classes`.

    Returns:
        As `npmi_classes`, with the markers as `label`, and "any marker" if there are several; with position matching
        also null_max_p99 () and, along label, matched_documents: those for which a text without the marker has tokens
        at the same places.

    Raises:
        MoescopeError: a marker that does not occur, or one that stands at too many places to be matched.
    """
    if matched not in ("position", "document"):
        raise MoescopeError('`matched` is "position" or "document".')
    sites = sites_of(store, layers)
    rows, names, words = marker_rows(dict(store.vocabulary()), markers, at)
    counts = property_counts(store, sites, rows, where, phase)
    size = np.asarray(counts.held.sum(axis=0)).ravel()
    absent = [name for name, n in zip(names, size, strict=True) if n == 0]
    if absent:
        raise MoescopeError(f"The marker {absent[0]!r} does not occur in these documents.")
    attrs = provenance(
        store, analysis="npmi_markers", by="marker", markers=names, found_by="; ".join(words), at=at, matched=matched,
        where=where, phase=phase,
    )  # fmt: skip
    axis, test = LayerAxis.of_sites(sites), LabelTest(permutations, seed, alternative, correction, resamples)
    if matched == "document":
        return npmi_of_counts(axis, counts, names, test, attrs)
    tests = sum(int(counts.selections[row].any(axis=0).sum()) * len(names) for row in range(len(sites)))
    places = places_of(store, rows, counts.documents, donors, seed, phase)
    if permutations is None:
        sides = 1 if alternative == "greater" else 2
        draws = enough_permutations(tests * sides, places.cells * sum(site.top_k for site in sites))
    else:
        draws = permutations
    null = place_null(store, sites, places, counts.documents, draws, seed, phase)
    return _matched(
        axis, counts, names, null, test, attrs | {"permutations": draws, "donors": donors} | left_out(counts)
    )


def _matched(
    axis: LayerAxis, counts: PropertyCounts, names: list[str], null: PlaceNull, test: LabelTest, attrs: dict[str, Any]
) -> xr.Dataset:
    size, total = np.asarray(counts.held.sum(axis=0)).ravel(), float(counts.tokens.sum())
    active = [fired.sum(axis=0) for fired in counts.selections]
    joint, found = [], null.of_labels(size, active, total, score)
    for pairs in counts.joint:
        table = np.zeros((pairs.n_experts, len(names)))
        np.add.at(table, (pairs.expert, pairs.group % len(names)), pairs.count)
        joint.append(table)
    observed = [score(table, size, fired[:, None], total) for table, fired in zip(joint, active, strict=True)]
    statistics = {}
    notes = few_documents(names, np.diff(counts.held.T.tocsr().indptr))
    unmatched = [name for name, n in zip(names, null.matched, strict=True) if n == 0]
    if unmatched:
        notes.append(
            f"{NO_P} for {', '.join(map(repr, unmatched))}: every document long enough has it at the same places, so "
            "that marker and place cannot be told apart"
        )
    if null.draws:
        p = axis.pad(found.p_values(observed, test.alternative))
        p[..., null.matched == 0] = np.nan
        q = q_values(p, test.correction)
        statistics = {
            "p": p,
            "q": q,
            "p_max": np.where(np.isnan(p), np.nan, axis.pad(found.family_wise(observed))),
            "null_mean": axis.pad(found.mean),
            "null_p99": axis.pad(found.p99),
            "null_max_p99": np.quantile(found.largest, 0.99, method="higher"),
        }
        tests = int((~np.isnan(p)).sum())
        attrs = attrs | floor_of(p, q, null.draws, tests, test)
        notes += [f"{attrs['floor']}, or read p_max"] if "floor" in attrs else []
        attrs = attrs | {"family": f"all {tests} defined (layer, expert, label) cells of this result"}
    else:
        notes.append(f"{NO_P}: no permutations were asked for")
    if test.resamples:
        statistics |= intervals(axis, counts.joint, counts.held, counts.selections, counts.tokens, test)
    attrs = attrs | {
        "seed": test.seed, "alternative": test.alternative, "correction": CORRECTIONS[test.correction], "null": NULL,
        "resamples": test.resamples, "interval": INTERVAL,
    }  # fmt: skip
    documents = np.diff(counts.held.T.tocsr().indptr)
    result = association(axis, joint, size, names, documents, statistics, attrs, notes, active, total)
    return result.assign(matched_documents=("label", null.matched))


def cognitive_experts(result: xr.Dataset, top: int = 2) -> list[tuple[int | str, int, float]]:
    """RICE's cognitive experts: the `top` of the whole model by nPMI with the thinking markers.

    Args:
        result: from `npmi_markers`; of several markers, "any marker" counts.
        top: the paper takes 2.

    Returns:
        (layer, expert, nPMI), the highest first; the layer as edits name it: its number, or its site's key, such as
        "L003-mlp", where layers have two routers.

    Raises:
        MoescopeError: the result is not about markers.
    """
    if result.attrs.get("analysis") != "npmi_markers":
        raise MoescopeError("Cognitive experts are read off a result of analysis.npmi_markers.")
    value = result["npmi"].isel(label=-1).transpose("layer", "expert")
    flat, width = value.values.ravel(), value.sizes["expert"]
    known = np.flatnonzero(~np.isnan(flat))
    best = known[np.argsort(-flat[known], kind="stable")[:top]]
    number, site = value["layer"].values, value["site"].values
    names = [int(n) for n in number] if np.unique(number).size == number.size else [str(key) for key in site]
    return [(names[i // width], int(i % width), float(flat[i])) for i in best]


MARKERS_QUESTION = Analysis(
    name="npmi_markers",
    run=npmi_markers,
    figure="npmi_markers",
    help="Which experts go with markers such as <think>, beyond the place where these stand?",
    parameters=(
        Parameter("markers", str, THINKING, "texts of the markers", many=True),
        Parameter("matched", str, "position", "held against other texts' tokens at the same places, or the same texts'",
                  ("position", "document")),
        Parameter("at", str, "all", "which tokens of a marker of several count", ("all", "first", "last")),
        Parameter("permutations", int, None, "random deals of documents to the marker's places (default: enough)"),
        Parameter("donors", int, 100, "other documents that one with the marker is held against, at most"),
        Parameter("alternative", str, "greater", "test for preference, or either way", ("greater", "two-sided")),
        Parameter("correction", str, "bh", "q-values: Benjamini-Hochberg or -Yekutieli", ("bh", "by")),
        RESAMPLES,
        LAYERS,
        PHASE,
        SEED,
    ),
    tier="routing",
)  # fmt: skip
