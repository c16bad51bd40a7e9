"""Two stores of the same tokens: how far their routers agree, how the load moved, what it did to the loss (METHODS 8).

Source: router saturation as OLMoE defines it (arXiv 2409.02060, section 5.1); selection shift on a forget set as SEUF
draws it (figure 3): the mean over layers of the share of experts that stay selected.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import xarray as xr
from scipy.sparse import csr_array

from moescope.analysis.aligning import Aligned
from moescope.analysis.comparing_kernels import agree, rotate_runs
from moescope.analysis.counts import Labelling, Phase, document_counts, labelling
from moescope.analysis.discovery import adjusted
from moescope.analysis.labelled import PADDING, LayerAxis, provenance
from moescope.analysis.permutation import TIE
from moescope.analysis.question import LAYERS, PHASE, SEED, Analysis, Parameter
from moescope.analysis.resampling import CELLS, INTERVAL, mean_present, ratio_interval
from moescope.analysis.watching import counted
from moescope.errors import MoescopeError

if TYPE_CHECKING:
    from jaxtyping import Float, Int

    from moescope.store import Store

SUMS = ("overlap", "overlap_tokens", "top1", "top1_tokens")
CONTROL = (
    "control_*: the other store's tokens rotated by one random offset within each sequence: what two routers share "
    "that know the sequence and not the token; NaN where every sequence has one token"
)
NULL = (
    "jsd, share_change and nll_change: the two stores exchanged at random within whole documents; "
    "p = (1 + draws at least as extreme) / (1 + draws)"
)
UNDEFINED = (
    "a token counts for overlap if both stores selected some expert for it, for top-1 if both have their first one; "
    "overlap is over the larger of the two sets, which is k unless slots are missing; NaN where no token counts"
)


def compare(
    store: Store,
    other: Store,
    by: str | None = None,
    layers: Sequence[int] | None = None,
    where: dict[str, str | Sequence[str]] | None = None,
    phase: Phase | None = None,
    permutations: int = 1000,
    resamples: int = 1000,
    seed: int = 0,
) -> xr.Dataset:
    """How the routing of the same tokens differs between two stores: before and after, or a checkpoint and the final.

    How to read it: `overlap` is the share of a token's experts that both stores selected (1: nothing moved), `top1` the
    share of tokens whose first expert is the same; both are OLMoE's router saturation when one store is of the final
    checkpoint. Hold them against `control_overlap` and `control_top1`, what is left when tokens are mixed up within
    their sequence. `jsd` is how far the load moved (bits, 0 to 1): believe it where `jsd_q` is small. Loads can stay
    while every token moves, so read both. `nll_change` above 0: the other store's model predicts this label worse.

    Args:
        store, other: two stores of the same tokens, in any sharding; changes are other minus store.
        by: a document label of `store`; None for all documents as the one label "all".
        layers, where, phase: filters, as in `analysis.load`.
        permutations: random exchanges of the stores by document, for p-values; 0 for none.
        resamples: bootstrap draws of documents behind the intervals; 0 for none.
        seed: of both, and of the control.

    Returns:
        Dataset with dims (layer, label): overlap, overlap_low, overlap_high, control_overlap, top1, top1_low,
        top1_high, control_top1, jsd (bits), jsd_null_p99, jsd_p, jsd_q (Benjamini-Hochberg), overlap_tokens,
        top1_tokens; (layer, expert, label): share, other_share, share_change (of the layer's selections), share_p,
        share_q, exists; (label): mean_overlap (over layers: SEUF's selection shift, as drawn in its figure 3),
        mean_overlap_low, mean_overlap_high, documents and, where both stores hold losses, nll, other_nll, nll_change,
        nll_change_low, nll_change_high (nats per token), nll_p, nll_q (Benjamini-Hochberg over the labels), nll_tokens.

    Raises:
        MoescopeError: the stores are not of the same tokens, tokenizer, layers and widths, or nothing is left.
    """
    if permutations < 0 or resamples < 0:
        raise MoescopeError("`permutations` and `resamples` must be 0 (none) or more.")
    aligned = Aligned([store, other], layers)
    chosen = labelling(store, by, where, phase)
    rows = [np.flatnonzero(chosen.code == code) for code in range(len(chosen.labels))]
    sums = _agreement(aligned, phase, seed)[:, np.searchsorted(np.unique(aligned.runs.document), chosen.documents)]
    axis = LayerAxis.of_sites(aligned.sites)
    rng = np.random.default_rng(seed)
    variables = _agreements(sums, rows, resamples, rng) | _loads(aligned, axis, chosen, rows, phase, permutations, seed)
    attrs = provenance(
        store,
        analysis="compare",
        other_store_id=other.manifest.store_id,
        other_model=other.manifest.model.name,
        by=by,
        where=where,
        phase=phase,
        permutations=permutations,
        resamples=resamples,
        seed=seed,
        control=CONTROL,
        null=NULL if permutations else "none: no permutations were asked for",
        interval=INTERVAL,
        undefined=UNDEFINED,
        padding=PADDING,
        documents_unlabelled=chosen.unlabelled,
        documents_filtered=chosen.filtered,
        table="layer, label",
        table_order="jsd",
    )
    if other.manifest.settings.get("edits"):
        attrs["other_edits"] = "; ".join(other.manifest.settings["edits"])
    if store.manifest.loss and other.manifest.loss:
        variables |= _losses(aligned, chosen, rows, phase, permutations, resamples, seed)
        attrs["loss"] = "nats per token, over tokens with a loss in both stores"
    else:
        attrs["loss"] = "none: not both stores hold losses; capture both with loss=True"
    variables["documents"] = ("label", chosen.documents_per_label)
    variables["exists"] = (("layer", "expert"), axis.exists)
    return xr.Dataset(variables, coords=axis.coordinates() | {"label": list(chosen.labels)}, attrs=attrs)


def overlap_of(
    ids: Int[np.ndarray, "token rank"], other: Int[np.ndarray, "token rank"]
) -> tuple[Float[np.ndarray, " token"], Float[np.ndarray, " token"]]:
    """Token by token, how far two selections agree.

    Args:
        ids, other: [token, rank] expert ids in rank order, distinct within a token; negative for a missing slot.

    Returns:
        (shared experts over the larger set's size, 1.0 or 0.0 for the same first expert), NaN where one is missing.
    """
    left, right = np.asarray(ids, dtype=np.int64), np.asarray(other, dtype=np.int64)
    if left.ndim != 2 or right.ndim != 2 or len(left) != len(right):
        raise MoescopeError(f"Selections are [token, rank] arrays of the same tokens; got {left.shape}, {right.shape}.")
    every = np.arange(len(left))
    sums = np.zeros((len(left), 4))
    agree(left, right, every, every, sums)
    with np.errstate(invalid="ignore"):
        return sums[:, 0] / sums[:, 1], sums[:, 2] / sums[:, 3]


def divergence(
    counts: Float[np.ndarray, "*rest expert"], other: Float[np.ndarray, "*rest expert"]
) -> Float[np.ndarray, "*rest"]:
    """Jensen-Shannon divergence of two loads over the last axis, in bits: 0 the same, 1 disjoint; NaN if one is empty.

    Args:
        counts, other: selections (or weights) of each expert, 0 or more.
    """
    with np.errstate(invalid="ignore", divide="ignore"):
        p = counts / counts.sum(axis=-1, keepdims=True)
        q = other / other.sum(axis=-1, keepdims=True)
        middle = (p + q) / 2
        terms = np.where(p > 0, p * np.log2(p / middle), 0) + np.where(q > 0, q * np.log2(q / middle), 0)
    found = np.clip(terms.sum(axis=-1) / 2, 0.0, 1.0)
    return np.where((counts.sum(axis=-1) > 0) & (other.sum(axis=-1) > 0), found, np.nan)


def block_sums(block: Any, left: np.ndarray, right: np.ndarray, group: np.ndarray, n: int, seed: int) -> np.ndarray:
    """[document, 8]: `SUMS` of the same tokens, then of the control."""
    same, rotated = np.arange(block.n_tokens), np.empty(block.n_tokens, dtype=np.int64)
    rotate_runs(block.edge, block.document, block.sequence, seed & 0x7FFFFFFF, rotated)
    found = np.zeros((2, n, 4))
    agree(left, right, same, group, found[0])
    agree(left, right, rotated, group, found[1])
    return np.concatenate(list(found), axis=1)


def _agreement(aligned: Aligned, phase: Phase | None, seed: int) -> Float[np.ndarray, "layer document sum"]:
    """Sums of `block_sums` for every document of the reference, ascending; kept in its aggregates."""
    documents = np.unique(aligned.runs.document)
    shape = (len(aligned.sites), documents.size, 8)

    def compute() -> pa.Table:
        sums = np.zeros(shape)
        for block in aligned.blocks():
            group = block.groups(documents, phase)
            for row, site in enumerate(aligned.sites):
                sums[row] += block_sums(block, block.ids(0, site), block.ids(1, site), group, documents.size, seed)
        names = [*SUMS, *(f"control_{name}" for name in SUMS)]
        return pa.table({name: sums[:, :, place].ravel() for place, name in enumerate(names)})

    found = aligned.stores[0].cached("agreement", compute, aligned.key | {"phase": phase or "all", "seed": seed})
    return np.stack([column.to_numpy() for column in found.columns], axis=-1).reshape(shape)


def _agreements(sums: np.ndarray, rows: list[np.ndarray], resamples: int, rng: np.random.Generator) -> dict[str, Any]:
    """Overlap and top-1 agreement with intervals and control, by layer and label."""
    cell = ("layer", "label")
    total = np.stack([sums[:, of].sum(axis=1) for of in rows], axis=1)
    found: dict[str, Any] = {}
    for place, name in enumerate(("overlap", "top1")):
        with np.errstate(invalid="ignore"):
            value, control = (total[..., at] / total[..., at + 1] for at in (2 * place, 2 * place + 4))
        bounds = [ratio_interval(sums[:, of, 2 * place].T, sums[:, of, 2 * place + 1].T, resamples, rng) for of in rows]
        found |= {
            name: (cell, value),
            f"{name}_low": (cell, np.stack([low for low, _ in bounds], axis=1)),
            f"{name}_high": (cell, np.stack([high for _, high in bounds], axis=1)),
            f"control_{name}": (cell, control),
            f"{name}_tokens": (cell, total[..., 2 * place + 1]),
        }
        if name == "overlap":
            means = [ratio_interval(sums[:, of, 0].T, sums[:, of, 1].T, resamples, rng, mean=True) for of in rows]
            found["mean_overlap"] = ("label", mean_present(value.T))
            found["mean_overlap_low"] = ("label", np.array([low[0] for low, _ in means]))
            found["mean_overlap_high"] = ("label", np.array([high[0] for _, high in means]))
    return found


def _loads(
    aligned: Aligned,
    axis: LayerAxis,
    chosen: Labelling,
    rows: list[np.ndarray],
    phase: Phase | None,
    permutations: int,
    seed: int,
) -> dict[str, Any]:
    """Shares of both stores, their divergence, and the null of exchanged documents."""
    layers: list[list[dict[str, np.ndarray]]] = []
    index = chosen.spread(np.arange(chosen.documents.size))
    for site in aligned.sites:
        tables = []
        for store in aligned.stores:
            pairs = document_counts(store, site, phase=phase).regrouped(index)
            shape = (chosen.documents.size, site.n_experts)
            tables.append(csr_array((pairs.count.astype(np.float64), (pairs.group, pairs.expert)), shape=shape))
        layers.append(
            [_moved(tables[0][of], tables[1][of], of.size, permutations, [seed, code]) for code, of in enumerate(rows)]
        )
    jsd_names, share_names = ("jsd", "jsd_null_p99", "jsd_p"), ("share", "other_share", "share_change", "share_p")
    found: dict[str, Any] = {
        name: (("layer", "label"), np.array([[label[name] for label in layer] for layer in layers]))
        for name in jsd_names
    }
    for name in share_names:
        padded = axis.pad([np.stack([label[name] for label in layer], axis=1) for layer in layers])
        found[name] = (("layer", "expert", "label"), padded)
    for name in ("jsd", "share"):
        dims, p = found[f"{name}_p"]
        found[f"{name}_q"] = (dims, adjusted(p))
    return found


def _moved(before: csr_array, after: csr_array, documents: int, permutations: int, seed: list[int]) -> dict[str, Any]:
    """One layer and label: loads [document, expert] of both stores; the same documents are exchanged in every layer."""
    a, b = (np.asarray(table.sum(axis=0)).ravel() for table in (before, after))
    observed = divergence(a, b)
    with np.errstate(invalid="ignore"):
        change = b / b.sum() - a / a.sum()
        found: dict[str, Any] = {"jsd": observed, "share": a / a.sum(), "other_share": b / b.sum()}
    found |= {"share_change": change, "share_p": np.full(a.size, np.nan), "jsd_p": np.nan, "jsd_null_p99": np.nan}
    if not permutations or np.isnan(observed):
        return found
    rng, difference = np.random.default_rng(seed), after - before
    drawn, beyond = [], np.zeros(a.size)
    for draws in counted("permutations", _portions(permutations, documents)):
        swapped = rng.random((draws, documents)) < 0.5
        moved = (difference.T @ swapped.T.astype(np.float64)).T
        left, right = a + moved, b - moved
        drawn.append(divergence(left, right))
        with np.errstate(invalid="ignore"):
            changes = right / right.sum(axis=1, keepdims=True) - left / left.sum(axis=1, keepdims=True)
        # A draw that leaves one side without selections (NaN) counts as extreme: it speaks for nothing.
        beyond += (~(np.abs(changes) < np.abs(change) - TIE)).sum(axis=0)
    null = np.concatenate(drawn)
    found["jsd_p"] = (1 + (~(null < observed - TIE)).sum()) / (1 + permutations)
    null = null[~np.isnan(null)]
    found["jsd_null_p99"] = np.quantile(null, 0.99, method="higher") if null.size else np.nan
    found["share_p"] = (1 + beyond) / (1 + permutations)
    return found


def _losses(
    aligned: Aligned,
    chosen: Labelling,
    rows: list[np.ndarray],
    phase: Phase | None,
    permutations: int,
    resamples: int,
    seed: int,
) -> dict[str, Any]:
    """Loss of both stores by label, over the tokens that have one in both."""
    sums = np.zeros((chosen.documents.size, 3))
    for block in aligned.blocks():
        group, left, right = block.groups(chosen.documents, phase), block.loss(0), block.loss(1)
        kept = (group >= 0) & np.isfinite(left) & np.isfinite(right)
        for place, values in enumerate((left[kept], right[kept], None)):
            sums[:, place] += np.bincount(group[kept], values, minlength=len(sums))
    names = ("nll", "other_nll", "nll_change", "nll_change_low", "nll_change_high", "nll_p", "nll_tokens")
    table = np.full((len(names), len(rows)), np.nan)
    rng = np.random.default_rng([seed, 1])
    for label, of in enumerate(rows):
        part = sums[of]
        before, after, n = part.sum(axis=0)
        table[6, label] = n
        if not n:
            continue
        moved = part[:, 1] - part[:, 0]
        low, high = ratio_interval(moved[:, None], part[:, 2:], resamples, rng)
        p = np.nan
        if permutations:
            null = np.concatenate([_signed(moved, size, rng) for size in _portions(permutations, len(of))])
            p = (1 + (np.abs(null) >= abs(moved.sum()) * (1 - TIE) - TIE).sum()) / (1 + permutations)
        table[:6, label] = before / n, after / n, moved.sum() / n, low[0], high[0], p
    return {name: ("label", values) for name, values in zip(names, table, strict=True)} | {
        "nll_q": ("label", adjusted(table[5]))
    }


def _signed(values: np.ndarray, draws: int, rng: np.random.Generator) -> np.ndarray:
    return np.where(rng.random((draws, values.size)) < 0.5, -1.0, 1.0) @ values


def _portions(draws: int, documents: int) -> list[int]:
    step = max(1, CELLS // max(documents, 1))
    return [min(step, draws - first) for first in range(0, draws, step)]


COMPARE_QUESTION = Analysis(
    name="compare",
    run=compare,
    figure="compare",
    help="How does the routing of the same tokens differ between two stores?",
    parameters=(
        Parameter("by", str, None, "label of the documents (default: all together)"),
        LAYERS,
        PHASE,
        Parameter("permutations", int, 1000, "random exchanges of the stores by document"),
        Parameter("resamples", int, 1000, "bootstrap draws of documents behind the intervals"),
        SEED,
    ),
    tier="routing",
    inputs=("store", "other"),
)
