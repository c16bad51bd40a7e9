"""Which experts a router scores alike: similarity of its logit columns over the tokens of a store (METHODS 6, MC-SMoE).

Source: MC-SMoE (arXiv 2310.01334) groups experts by `(cos + 1) / 2` of their router logits over the tokens.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import xarray as xr

from moescope.analysis.counts import sites_of
from moescope.analysis.labelled import LayerAxis, provenance
from moescope.analysis.pairwise import PairNull, pair_result
from moescope.analysis.question import LAYERS, SEED, Analysis, Parameter
from moescope.analysis.watching import counted
from moescope.errors import MoescopeError

if TYPE_CHECKING:
    from moescope.store import Store

PARTS = 32
"""Documents are dealt over so many parts, whose sums are what the interval resamples."""
ROWS = 32_768
"""Rows of logits that are held at once, but never less than one sequence."""
BOOTSTRAP = 400
NULL = (
    "each expert's column rotated by its own random offset within every sequence: keeps each column's values and how "
    "they run on from token to token, loses only which token they belong to; sequences of one token cannot be rotated"
)
INTERVAL = (
    "95 % bootstrap over at most 32 parts, each of whole documents; NaN with fewer than 8 parts: too few to resample"
)


def logit_similarity(
    store: Store, layers: Sequence[int] | None = None, draws: int | None = None, seed: int = 0
) -> xr.Dataset:
    """How alike the router scores each two experts over the tokens of a store.

    How to read it: `similarity` is MC-SMoE's (cos + 1) / 2: 1 the same scores up to a factor, 0.5 unrelated, 0
    opposite. An offset that all logits of a layer share raises it everywhere, and `null_mean` shows by how much, since
    the null keeps offsets. `correlation` is free of them: scores that rise and fall together over tokens, after each
    token's mean over experts is taken away (which no softmax sees).

    Args:
        store: an open store with the logits tier.
        layers: model layer indices; all MoE layers if None.
        draws: of the null, 0 for none; by default 19, fewer (at least 4) where that would take long.
        seed: of the draws and of the bootstrap.

    Returns:
        As `pairwise.pair_result`, and with dims (layer, expert, other): correlation; low, high (of similarity); with
        dims (layer): tokens (rows with finite logits).

    Raises:
        MoescopeError: no logits tier, no such layer, or no token.
    """
    sites = sites_of(store, layers)
    work = store.n_tokens * sum(site.n_experts**2 for site in sites)
    if draws is None:
        draws = int(np.clip(4e11 / max(work, 1), 4, 19))
    similarity, nulls, extra = [], [], {"correlation": [], "low": [], "high": []}
    tokens = []
    for site in sites:
        raw, centred, rotated = _sums(store, site, draws, seed)
        tokens.append(int(raw[:, 0, 0].sum()))
        similarity.append(_half_cosine(raw.sum(axis=0)))
        extra["correlation"].append(_correlation(centred.sum(axis=0)))
        low, high = _interval(raw, seed)
        extra["low"].append(low)
        extra["high"].append(high)
        nulls.append(PairNull.of_draws([_half_cosine(draw) for draw in rotated]))
    if not any(tokens):
        raise MoescopeError("No token with finite logits: nothing to compare.")
    attrs = provenance(
        store, analysis="logit_similarity", draws=draws, seed=seed, metric="(cos + 1) / 2 of router logits over tokens"
    )
    attrs |= {"null": NULL, "interval": INTERVAL}
    result = pair_result(LayerAxis.of_sites(sites), similarity, nulls, extra, attrs)
    return result.assign(tokens=("layer", np.array(tokens)))


def _sums(store: Store, site: Any, draws: int, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Moments by part of documents [part, 1 + E, 1 + E], the same of logits less their mean, and those of each draw."""
    size = site.n_experts + 1

    def compute() -> pa.Table:
        raw, centred = np.zeros((PARTS, size, size)), np.zeros((PARTS, size, size))
        rotated = np.zeros((draws, size, size))
        for document, sequence, logits in _chunks(store, site):
            part = _mixed(document.astype(np.uint64), 0, 0) % np.uint64(PARTS)
            for index in np.unique(part):
                rows = logits[part == index]
                raw[index] += _moments(rows)
                centred[index] += _moments(rows - rows.mean(axis=1, keepdims=True))
            for draw in range(draws):
                rotated[draw] += _moments(_rotated(logits, sequence, draw, seed))
        kinds = ["raw"] * PARTS + ["centred"] * PARTS + ["rotated"] * draws
        flat = np.concatenate([raw, centred, rotated]).reshape(len(kinds), -1)
        return pa.table({"kind": kinds, "moments": pa.array(list(flat), pa.list_(pa.float64()))})

    kept = store.cached("logit-moments", compute, {"site": site.key, "draws": draws, "seed": seed})
    kind = np.array(kept["kind"].to_pylist(), dtype=object)
    flat = kept["moments"].combine_chunks().flatten().to_numpy().reshape(len(kind), size, size)
    return flat[kind == "raw"], flat[kind == "centred"], flat[kind == "rotated"]


def _chunks(store: Store, site: Any) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """(document, sequence, logits float64) of whole sequences, some rows at a time."""
    for shard in counted("shards", store.shards):
        table = shard.tokens(["document", "sequence"])
        document, sequence = (table[name].to_numpy() for name in ("document", "sequence"))
        starts = np.flatnonzero(np.diff(sequence, prepend=sequence[:1] - 1))
        edges = [0]
        for end in [*starts[1:].tolist(), sequence.size]:
            if end - edges[-1] >= ROWS:
                edges.append(end)
        if edges[-1] < sequence.size:
            edges.append(sequence.size)
        for first, last in itertools.pairwise(edges):
            logits = shard.logits(site.key, slice(first, last)).astype(np.float64)
            good = np.isfinite(logits).all(axis=1)
            yield document[first:last][good], sequence[first:last][good], logits[good]


def _rotated(logits: np.ndarray, sequence: np.ndarray, draw: int, seed: int) -> np.ndarray:
    """Each column rotated within each sequence by an offset that depends on the sequence, the column and the draw."""
    rows, n_experts = logits.shape
    first = np.flatnonzero(np.diff(sequence, prepend=sequence[:1] - 1))
    length = np.diff(np.append(first, rows))
    name = sequence[first].astype(np.uint64)[:, None] * np.uint64(65_537) + np.arange(n_experts, dtype=np.uint64)
    # 0 counts too: what matters is how two columns stand to each other, and without it two tokens could never part.
    offset = (_mixed(name, draw + 1, seed) % length.astype(np.uint64)[:, None]).astype(np.int64)
    of_row = np.repeat(np.arange(first.size), length)
    place = np.arange(rows) - first[of_row]
    source = first[of_row][:, None] + (place[:, None] + offset[of_row]) % length[of_row][:, None]
    return np.take_along_axis(logits, source, axis=0)


def _mixed(values: np.ndarray, draw: int, seed: int) -> np.ndarray:
    """Well-mixed 64-bit numbers (splitmix64), so that a draw does not depend on how the store is cut into shards."""
    step = (0x9E3779B97F4A7C15 * (draw * 1_000_003 + seed + 1)) % 2**64
    with np.errstate(over="ignore"):
        z = values + np.uint64(step)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return z ^ (z >> np.uint64(31))


def _moments(rows: np.ndarray) -> np.ndarray:
    """[1 + E, 1 + E]: count, sums and scalar products of the columns."""
    one = np.concatenate([np.ones((len(rows), 1)), rows], axis=1)
    return one.T @ one


def _half_cosine(moments: np.ndarray) -> np.ndarray:
    products = moments[1:, 1:]
    with np.errstate(invalid="ignore", divide="ignore"):
        size = np.sqrt(np.diag(products))
        size = np.where(size > 0, size, np.nan)
        return (np.clip(products / size[:, None] / size[None, :], -1, 1) + 1) / 2


def _correlation(moments: np.ndarray) -> np.ndarray:
    count, total = moments[0, 0], moments[0, 1:]
    with np.errstate(invalid="ignore", divide="ignore"):
        spread = moments[1:, 1:] - np.outer(total, total) / count
        size = np.sqrt(np.where(np.diag(spread) > 1e-12 * np.diag(moments)[1:], np.diag(spread), np.nan))
        return np.clip(spread / size[:, None] / size[None, :], -1, 1)


def _interval(parts: np.ndarray, seed: int) -> tuple[np.ndarray, np.ndarray]:
    shape = parts.shape[1] - 1, parts.shape[2] - 1
    used = int((parts[:, 0, 0] > 0).sum())
    if used < 8:
        return np.full(shape, np.nan), np.full(shape, np.nan)
    parts = parts[parts[:, 0, 0] > 0]
    rng = np.random.default_rng(seed)
    times = rng.multinomial(used, np.full(used, 1 / used), size=BOOTSTRAP).astype(np.float64)
    low, high = np.empty(shape), np.empty(shape)
    # Row by row of experts: all resampled matrices at once would be 400 x E x E numbers.
    square = np.sqrt(np.einsum("bp,pe->be", times, np.einsum("pee->pe", parts[:, 1:, 1:])))
    for e in range(shape[0]):
        products = times @ parts[:, 1 + e, 1:]
        with np.errstate(invalid="ignore", divide="ignore"):
            value = (products / square[:, [e]] / square + 1) / 2
        low[e], high[e] = np.percentile(value, [2.5, 97.5], axis=0)
    return low, high


LOGIT_SIMILARITY_QUESTION = Analysis(
    name="logit_similarity",
    run=logit_similarity,
    figure="logit_similarity",
    help="Which experts does the router score alike over the tokens?",
    parameters=(
        LAYERS,
        Parameter("draws", int, None, "rotations behind the null; 0 for none (default: up to 19)"),
        SEED,
    ),
    tier="logits",
)
