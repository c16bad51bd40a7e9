"""Vocabulary specialisation: how much of a token's occurrences its favourite expert takes, and how much is luck.

Source: OLMoE (arXiv 2409.02060, section 5.4): for each token id the share of its most frequent top-1 expert. A token
seen a few times reaches a high share by chance, and so does one that stands in few texts: the null draws experts from
the mix of the documents the token stands in, as many as its occurrences are worth where those of one document are one.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import xarray as xr
from scipy.sparse import csr_array
from scipy.special import betainc

from moescope.analysis.association import CORRECTIONS, q_values
from moescope.analysis.counts import Phase, labelling, sites_of
from moescope.analysis.label_tests import Correction
from moescope.analysis.labelled import LayerAxis, provenance
from moescope.analysis.question import LAYERS, PHASE, SEED, Analysis, Parameter
from moescope.analysis.token_ids import occurrences, shown_tokens
from moescope.analysis.token_tops import TokenTops, token_tops
from moescope.analysis.watching import counted
from moescope.errors import MoescopeError

if TYPE_CHECKING:
    from jaxtyping import Float, Int

    from moescope.store import Store

NULL = (
    "the token's experts drawn from the top-1 experts of the documents it stands in, `effective` times: occurrences^2 "
    "/ sum over documents of occurrences^2, so that occurrences in one document, which are alike, count as few; p is "
    "the sum over experts of the binomial tails (an upper bound)"
)
DRAWS = 20
"""Of the null's mean; it is averaged over the vocabulary."""


def vocabulary_specialisation(
    store: Store,
    by: str | None = None,
    least: int = 20,
    seed: int = 0,
    correction: Correction = "bh",
    layers: Sequence[int] | None = None,
    where: dict[str, str | Sequence[str]] | None = None,
    phase: Phase | None = None,
) -> xr.Dataset:
    """For each token id, the share of its occurrences that go to its most frequent top-1 expert.

    How to read it: a share of 1 means that one expert always comes first for this token. Hold it against `null_p99`: a
    rare token reaches a high share by chance. `mean_share` of a layer against `null_mean_share` says how much of the
    layer's routing is settled by the token alone.

    Args:
        store: an open store with the routing tier.
        by: a document label: the same for the documents of each of its values.
        least: leave out tokens that occur less often (with a label: in the documents of that value).
        seed: of the draws behind the null's mean.
        correction: "bh" or "by".
        layers, where, phase: filters, as in `analysis.load`.

    Returns:
        Dataset with dims (layer, token) or (layer, token, label): share in [1/E, 1], favourite (the expert; the lowest
        of equals), count (occurrences with a top-1 expert), effective, p, q, null_mean, null_p99; and by layer:
        mean_share, null_mean_share (over the tokens), tokens (how many), specialised (q <= 0.05), uniform = 1/E.
        Coordinates token_id and text along token.

    Raises:
        MoescopeError: no such label, or no token that occurs often enough.
    """
    sites = sites_of(store, layers)
    ids, seen = occurrences(store, where, phase)
    if least < 1:
        raise MoescopeError("`least` must be at least 1.")
    kept = ids[seen >= least]
    if not kept.size:
        raise MoescopeError(
            f"No token occurs {least} times; the most frequent occurs {int(seen.max(initial=0))} times."
        )
    documents = labelling(store, None, where, phase)
    if by is None:
        names, code = ["all"], np.zeros(documents.documents.size, dtype=np.int64)
    else:
        chosen = labelling(store, by, where, phase)
        names, code = list(chosen.labels), np.full(documents.documents.size, -1)
        code[np.searchsorted(documents.documents, chosen.documents)] = chosen.code
    attrs = provenance(store, analysis="vocabulary_specialisation", by=by, where=where, phase=phase)
    attrs["tokens_left_out"] = int(ids.size - kept.size)
    layers_in_turn = token_tops(store, sites, kept, documents, code, len(names), phase)
    axis, shape = LayerAxis.of_sites(sites), (len(sites), kept.size, len(names))
    result = _result(axis, counted("layers", layers_in_turn, len(sites)), shape, names, least, seed, correction, attrs)
    vocabulary = dict(store.vocabulary())
    texts = np.array([vocabulary.get(one, "") for one in kept.tolist()], dtype=object)
    result = result.assign_coords(
        token=shown_tokens(kept.tolist(), vocabulary), token_id=("token", kept), text=("token", texts)
    )
    return result.isel(label=0, drop=True) if by is None else result


def vocabulary_from_counts(
    joint: Int[np.ndarray, "document token layer expert"],
    selections: Int[np.ndarray, "document layer expert"],
    least: int = 1,
    layers: Sequence[int] | None = None,
    seed: int = 0,
    correction: Correction = "bh",
) -> xr.Dataset:
    """The same from plain top-1 counts by document.

    Args:
        joint: occurrences of the token at which the expert came first.
        selections: tokens of the document at which it did, all of them; NaN for an expert a layer lacks.
        least, layers, seed, correction: as in `vocabulary_specialisation`.
    """
    table, first = np.asarray(joint, dtype=np.float64), np.asarray(selections, dtype=np.float64)
    if table.ndim != 4 or first.shape != (table.shape[0], *table.shape[2:]):
        raise MoescopeError(f"Counts of shape {table.shape} (document, token, layer, expert) need `selections` to fit.")
    axis = LayerAxis.of_array(np.moveaxis(first, 0, -1), layers, 1)
    if np.nanmin(table, initial=0) < 0 or (np.nan_to_num(table) % 1).any():
        raise MoescopeError("Selection counts must be whole numbers, 0 or more.")
    in_turn = []
    for row, width in enumerate(axis.n_experts):
        own = table[:, :, row, :width]
        in_turn.append([TokenTops(own.sum(axis=0), csr_array(own.sum(axis=2)), first[:, row, :width])])
    attrs = provenance(None, analysis="vocabulary_specialisation", by=None)
    shape = (len(in_turn), table.shape[1], 1)
    result = _result(axis, in_turn, shape, ["all"], least, seed, correction, attrs)
    return result.assign_coords(token=np.arange(table.shape[1])).isel(label=0, drop=True)


def chance_of_share(
    share: Float[np.ndarray, " token"], effective: Float[np.ndarray, " token"], mix: Float[np.ndarray, "token expert"]
) -> Float[np.ndarray, " token"]:
    """Upper bound of the chance that some expert's share of `effective` draws from `mix` reaches `share`.

    Draws and successes are rounded down, which makes it larger, never smaller.
    """
    draws = np.floor(effective + 1e-9)
    hits = np.floor(share * draws + 1e-9)
    return _tail(hits, draws, mix)


def _tail(hits: np.ndarray, draws: np.ndarray, mix: np.ndarray) -> np.ndarray:
    """Sum over experts of P(Binomial(draws, mix) >= hits), at most 1."""
    inside = np.clip(hits, 1, None)[:, None]
    tail = betainc(inside, np.maximum(draws[:, None] - inside + 1, 1e-9), mix)
    tail = np.where(hits[:, None] > draws[:, None], 0.0, np.where(mix >= 1, 1.0, tail)).sum(axis=1)
    return np.where(hits < 1, 1.0, np.minimum(tail, 1.0))


def share_by_chance(
    effective: Float[np.ndarray, " token"], mix: Float[np.ndarray, "token expert"], level: float = 0.01
) -> Float[np.ndarray, " token"]:
    """The smallest share whose chance is at most `level`; 1 where no share is that rare."""
    draws = np.floor(effective + 1e-9)
    low, high = np.zeros(draws.size), draws + 1
    while (open_still := np.flatnonzero(high - low > 1)).size:
        middle = np.floor((low + high) / 2)[open_still]
        rare = _tail(middle, draws[open_still], mix[open_still]) <= level
        high[open_still[rare]], low[open_still[~rare]] = middle[rare], middle[~rare]
    return np.minimum(high / np.maximum(draws, 1), 1.0)


def _result(
    axis: LayerAxis,
    layers_in_turn: Iterable[list[TokenTops]],
    shape: tuple[int, int, int],
    names: list[str],
    least: int,
    seed: int,
    correction: Correction,
    attrs: dict[str, Any],
) -> xr.Dataset:
    cells = {name: np.full(shape, np.nan) for name in CELL}
    rng = np.random.default_rng(seed)
    for row, by_label in enumerate(layers_in_turn):
        for label, tops in enumerate(by_label):
            table, held = tops.table, tops.held
            with np.errstate(invalid="ignore", divide="ignore"):
                rate = np.nan_to_num(tops.first / tops.first.sum(axis=1, keepdims=True))
            count = table.sum(axis=1)
            often = np.flatnonzero(count >= least)
            mix = (held.T @ rate)[often] / count[often, None]
            squares = (held.multiply(held)).sum(axis=0)
            effective = count[often] ** 2 / np.asarray(squares).ravel()[often]
            share = table[often].max(axis=1) / count[often]
            draws = np.maximum(np.floor(effective + 1e-9), 1).astype(np.int64)
            mix = mix / mix.sum(axis=1, keepdims=True)
            highest = sum(rng.multinomial(draws, mix).max(axis=1) for _ in range(DRAWS))
            at = (row, often, label)
            cells["share"][at], cells["favourite"][at] = share, table[often].argmax(axis=1)
            cells["count"][at], cells["effective"][at] = count[often], effective
            cells["p"][at] = chance_of_share(share, effective, mix)
            cells["null_p99"][at] = share_by_chance(effective, mix)
            cells["null_mean"][at] = highest / (DRAWS * draws)
    cells["q"] = q_values(cells["p"], correction)
    known = ~np.isnan(cells["share"])
    number = known.sum(axis=1)
    with np.errstate(invalid="ignore", divide="ignore"):
        mean, null = (np.nansum(cells[name], axis=1) / number for name in ("share", "null_mean"))
    cell = ("layer", "token", "label")
    variables: dict[str, Any] = {name: (cell, values) for name, values in cells.items()}
    variables |= {
        "mean_share": (("layer", "label"), mean),
        "null_mean_share": (("layer", "label"), null),
        "tokens": (("layer", "label"), number),
        "specialised": (("layer", "label"), (cells["q"] <= 0.05).sum(axis=1)),
        "uniform": ("layer", 1 / axis.n_experts),
    }
    if not known.any():
        raise MoescopeError(f"No token occurs {least} times in the documents of any label.")
    attrs = attrs | {
        "least": least, "seed": seed, "null": NULL, "correction": CORRECTIONS[correction], "draws": DRAWS,
        "family": f"all {int(known.sum())} cells of this result",
        "undefined": f"NaN for a token that occurs less than {least} times among the documents of a label",
        "table": "layer, token" if attrs["by"] == "none" else "layer, token, label", "table_order": "share",
    }  # fmt: skip
    coords = {name: value for name, value in axis.coordinates().items() if name != "expert"}
    return xr.Dataset(variables, coords=coords | {"label": names}, attrs=attrs)


CELL = ("share", "favourite", "count", "effective", "p", "null_mean", "null_p99")

VOCABULARY_QUESTION = Analysis(
    name="vocabulary_specialisation",
    run=vocabulary_specialisation,
    figure="vocabulary_specialisation",
    help="How much of each token's occurrences does one expert take, beyond what rare tokens reach by chance?",
    parameters=(
        Parameter("by", str, None, "a document label: the same for each of its values"),
        Parameter("least", int, 20, "leave out tokens that occur less often"),
        Parameter("correction", str, "bh", "q-values: Benjamini-Hochberg or -Yekutieli", ("bh", "by")),
        LAYERS,
        PHASE,
        SEED,
    ),
    tier="routing",
)
