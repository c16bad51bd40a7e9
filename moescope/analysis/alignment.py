"""How alike what experts give out is: linear centred kernel alignment of their outputs on the same tokens (METHODS 6).

Source: CKA, Kornblith et al. (arXiv 1905.00414); without its bias, from the unbiased HSIC of Song et al. (2012) as in
Nguyen et al. (arXiv 2010.15327). Plain CKA of n tokens in D dimensions goes to 1 for anything when n is below D.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import xarray as xr

from moescope.analysis.counts import sites_of
from moescope.analysis.labelled import LayerAxis, provenance
from moescope.analysis.pairwise import PairNull, pair_result
from moescope.analysis.question import LAYERS, SEED, Analysis, Parameter
from moescope.analysis.similarities import axis_of
from moescope.errors import MoescopeError

if TYPE_CHECKING:
    from jaxtyping import Float, Int

    from moescope.store import Store

NULL = (
    "the tokens of one expert permuted against those of the other, within documents that hold several of them and "
    "freely among the rest: CKA of outputs that have nothing to do with each other, token by token"
)
SELECTED = (
    "a store holds the outputs of selected experts alone: a pair is compared on the tokens that selected both, which "
    "are not a random sample, and differ from pair to pair; NaN with fewer than min_tokens of them"
)


def linear_cka(
    first: Float[np.ndarray, "token channel"], second: Float[np.ndarray, "token other_channel"], debiased: bool = True
) -> float:
    """Linear CKA of two sets of vectors for the same tokens, computed from their channels: O(n D D').

    Args:
        first, second: [n, D] and [n, D'], row t of both for token t.
        debiased: with the unbiased estimate of HSIC (n >= 4): about 0 for unrelated vectors, at times below it; else
            the plain measure, in [0, 1].

    Returns:
        CKA; NaN where one of the two does not vary, or has too few rows.

    Raises:
        MoescopeError: different numbers of rows.
    """
    x, y = np.asarray(first, dtype=np.float64), np.asarray(second, dtype=np.float64)
    if x.ndim != 2 or y.ndim != 2 or len(x) != len(y):
        raise MoescopeError(f"CKA needs two arrays [token, channel] with the same tokens; got {x.shape} and {y.shape}.")
    if len(x) < (4 if debiased else 2):
        return float("nan")
    cross, own, other = (_hsic(a, b, debiased) for a, b in ((x, y), (x, x), (y, y)))
    scale = float(np.square(x - x.mean(0)).sum() * np.square(y - y.mean(0)).sum())
    if own <= 0 or other <= 0 or scale <= 1e-24 * float(np.square(x).sum() * np.square(y).sum()):
        return float("nan")
    return float(cross / np.sqrt(own * other))


def output_similarity_from_arrays(
    outputs: Float[np.ndarray, "layer expert token channel"],
    layers: Sequence[int] | None = None,
    document: Int[np.ndarray, " token"] | None = None,
    debiased: bool = True,
    min_tokens: int = 4,
    most_tokens: int = 512,
    draws: int = 19,
    seed: int = 0,
) -> xr.Dataset:
    """CKA of every two experts from outputs on given tokens, for instance of all experts run on the same hidden states.

    How to read it: see `output_similarity`.

    Args:
        outputs: [layer, expert, token, channel]; NaN rows where an expert gave nothing for a token.
        layers: model layer index of each row; 0, 1, 2, ... if None.
        document: [token] document of each token, for the null.
        debiased, min_tokens, most_tokens, draws, seed: as in `output_similarity`.

    Raises:
        MoescopeError: not four axes, or names that do not fit.
    """
    values = np.asarray(outputs)
    if values.ndim != 4:
        raise MoescopeError(f"Outputs need the axes layer, expert, token and channel; got {values.ndim} axes.")
    numbers = list(range(values.shape[0])) if layers is None else [int(layer) for layer in layers]
    if len(numbers) != values.shape[0]:
        raise MoescopeError(f"`layers` names {len(numbers)} layers, but the array has {values.shape[0]}.")
    named = np.zeros(values.shape[2], dtype=np.int64) if document is None else np.asarray(document)
    held = []
    for layer in values:
        token = [np.flatnonzero(~np.isnan(rows).any(axis=1)) for rows in layer]
        vectors = [rows[keep] for rows, keep in zip(layer, token, strict=True)]
        held.append(_layer(token, vectors, named, debiased, min_tokens, most_tokens, draws, seed))
    attrs = _attributes(provenance(None, analysis="output_similarity"), debiased, min_tokens, most_tokens, draws, seed)
    return _result(axis_of(numbers, [values.shape[1]] * len(numbers)), held, attrs)


def output_similarity(
    store: Store,
    layers: Sequence[int] | None = None,
    debiased: bool = True,
    min_tokens: int = 30,
    most_tokens: int = 512,
    draws: int = 19,
    seed: int = 0,
) -> xr.Dataset:
    """CKA of what every two experts of a layer gave out for the tokens that selected both.

    How to read it: 1 means one's outputs are the other's up to a rotation and a factor, 0 that they do not vary
    together over tokens. Read the debiased value: with few tokens the plain one is high for anything, as `null_mean`
    would show. Only the tokens that selected both are seen; see `attrs["selected"]`.

    Args:
        store: an open store with the activations tier, kind "outputs".
        layers: model layer indices; those with kept outputs if None.
        debiased: see `linear_cka`.
        min_tokens: common tokens below which a pair is left out.
        most_tokens: common tokens of a pair that are used at most, drawn at random; memory grows with its square.
        draws: of the null; 0 for none.
        seed: of the draws and of the choice of tokens.

    Returns:
        As `pairwise.pair_result`: similarity = CKA; and with dims (layer, expert, other): common (tokens that selected
        both). One layer's kept vectors are in memory at a time.

    Raises:
        MoescopeError: no activations tier, no outputs kept, or no such layer.
    """
    record = store.manifest.activations
    if record is None or "outputs" not in record.kinds:
        raise MoescopeError(
            'This store keeps no expert outputs: capture it with activations=ms.Activations(["outputs"], ...).'
        )
    sites = sites_of(store, layers)
    kept = [site for site in sites if site.key in record.sites]
    if not kept or (layers is not None and len(kept) < len(sites)):
        raise MoescopeError(f"Expert outputs were kept for {', '.join(record.sites)} alone; name those layers.")
    document = np.asarray(store.tokens(["document"])["document"].to_numpy())
    held = []
    for site in kept:
        found = store.activations("outputs", site.key)
        each = [np.flatnonzero(found.expert == e) for e in range(site.n_experts)]
        each = [rows[np.argsort(found.row[rows], kind="stable")] for rows in each]
        vectors = [found.values[rows] for rows in each]
        token = [found.row[rows] for rows in each]
        held.append(_layer(token, vectors, document, debiased, min_tokens, most_tokens, draws, seed))
    attrs = provenance(store, analysis="output_similarity")
    return _result(LayerAxis.of_sites(kept), held, _attributes(attrs, debiased, min_tokens, most_tokens, draws, seed))


def _attributes(attrs: dict, debiased: bool, min_tokens: int, most_tokens: int, draws: int, seed: int) -> dict:
    return attrs | {
        "debiased": str(debiased), "min_tokens": min_tokens, "most_tokens": most_tokens, "draws": draws, "seed": seed,
        "null": NULL, "selected": SELECTED, "metric": "linear CKA of outputs" + (", debiased" if debiased else ""),
    }  # fmt: skip


def _result(axis: LayerAxis, held: list[tuple], attrs: dict) -> xr.Dataset:
    return pair_result(axis, [h[0] for h in held], [h[1] for h in held], {"common": [h[2] for h in held]}, attrs)


def _layer(
    token: Sequence[np.ndarray],
    vectors: Sequence[np.ndarray],
    document: np.ndarray,
    debiased: bool,
    min_tokens: int,
    most_tokens: int,
    draws: int,
    seed: int,
) -> tuple[np.ndarray, PairNull, np.ndarray]:
    """(CKA, null, common tokens) of one layer; `token[e]` ascending names the rows of `vectors[e]`."""
    n_experts = len(token)
    value, common = np.full((n_experts, n_experts), np.nan), np.zeros((n_experts, n_experts))
    null = np.full((draws, n_experts, n_experts), np.nan)
    for i in range(n_experts):
        for j in range(i + 1, n_experts):
            both, mine, theirs = np.intersect1d(token[i], token[j], assume_unique=True, return_indices=True)
            common[i, j] = common[j, i] = both.size
            if both.size < max(min_tokens, 4):
                continue
            rng = np.random.default_rng([seed, i, j])
            if both.size > most_tokens:
                some = np.sort(rng.choice(both.size, most_tokens, replace=False))
                both, mine, theirs = both[some], mine[some], theirs[some]
            grams = [_centred_gram(vectors[e][rows], debiased) for e, rows in ((i, mine), (j, theirs))]
            own = [float(np.square(gram).sum()) for gram in grams]
            if min(own) <= 0:
                continue
            scale = np.sqrt(own[0] * own[1])
            value[i, j] = value[j, i] = float((grams[0] * grams[1]).sum()) / scale
            for draw in range(draws):
                order = _within(document[both], rng)
                moved = grams[1][np.ix_(order, order)]  # centring and permuting commute
                null[draw, i, j] = null[draw, j, i] = float((grams[0] * moved).sum()) / scale
    return value, PairNull.of_draws(list(null)), common


def _within(document: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """An order of tokens permuted within their documents; tokens alone in their document change places freely."""
    _, code, size = np.unique(document, return_inverse=True, return_counts=True)
    group = np.where(size[code] > 1, code, -1)
    order = np.empty(document.size, dtype=np.int64)
    order[np.lexsort((np.arange(document.size), group))] = np.lexsort((rng.random(document.size), group))
    return order


def _centred_gram(rows: np.ndarray, debiased: bool) -> np.ndarray:
    """Gram matrix [n, n], centred doubly, or U-centred: zero on the diagonal and in every row's sum."""
    x = rows.astype(np.float64)
    x = x - x.mean(axis=0)
    gram = x @ x.T
    if float(np.trace(gram)) <= 1e-24 * float(np.square(rows.astype(np.float64)).sum()):
        return np.zeros_like(gram)
    if not debiased:
        return gram
    n = len(gram)
    np.fill_diagonal(gram, 0.0)
    each, total = gram.sum(axis=1) / (n - 2), gram.sum() / ((n - 1) * (n - 2))
    gram = gram - each[:, None] - each[None, :] + total
    np.fill_diagonal(gram, 0.0)
    return gram


def _hsic(x: np.ndarray, y: np.ndarray, debiased: bool) -> float:
    """HSIC of linear kernels up to a common factor, without a Gram matrix of tokens."""
    x, y = x - x.mean(axis=0), y - y.mean(axis=0)
    product = float(np.square(x.T @ y).sum())
    if not debiased:
        return product
    n = len(x)
    own, other = np.square(x).sum(axis=1), np.square(y).sum(axis=1)
    # With the diagonal of both Gram matrices left out: their sums are those of the whole less the diagonal, and the
    # whole sums to 0 over every row, because x and y are centred.
    return (
        product
        - float(own @ other)
        + float(own.sum() * other.sum()) / ((n - 1) * (n - 2))
        - 2 * float(own @ other) / (n - 2)
    )


OUTPUT_SIMILARITY_QUESTION = Analysis(
    name="output_similarity",
    run=output_similarity,
    figure="output_similarity",
    help="Which experts of a layer give out the same, up to a rotation, on the tokens that selected both?",
    parameters=(
        LAYERS,
        Parameter("debiased", bool, True, "without the bias that few tokens give CKA"),
        Parameter("min_tokens", int, 30, "common tokens below which a pair is left out"),
        Parameter("most_tokens", int, 512, "common tokens of a pair that are used at most"),
        Parameter("draws", int, 19, "permutations of tokens behind the null; 0 for none"),
        SEED,
    ),
    tier="activations",
)
