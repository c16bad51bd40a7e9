"""Which experts a set of texts is written with: the routing score that each (layer, expert) gets of it (METHODS 10).

Source: single-expert unlearning, UOE / SEUF (arXiv 2411.18797): s = mean over sequences of mean over tokens of g, where
g is the router's score of the expert if it was selected, else 0.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import xarray as xr

from moescope.analysis.association import q_values
from moescope.analysis.counts import Phase, document_counts, labelling, row_groups, sites_of
from moescope.analysis.kernels import weigh_pairs
from moescope.analysis.labelled import PADDING, LayerAxis, provenance
from moescope.analysis.permutation import TIE
from moescope.analysis.question import LAYERS, PHASE, SEED, Analysis, Parameter
from moescope.analysis.specialisation import default_label
from moescope.analysis.watching import counted
from moescope.errors import MoescopeError
from moescope.store.selection import SCORES

if TYPE_CHECKING:
    from jaxtyping import Float, Int

    from moescope.store import Store

Score = Literal["score", "weight"]
RESAMPLES = 1000
PERMUTATIONS = 1000
BLOCK = 64  # permutations counted at once
INTERVAL = "95 %, documents of the label drawn anew"
NULL = "the label dealt anew over all documents, each whole"


def attribution(
    store: Store,
    by: str | None = None,
    label: str | None = None,
    score: Score | None = None,
    resamples: int = RESAMPLES,
    permutations: int = PERMUTATIONS,
    seed: int = 0,
    layers: Sequence[int] | None = None,
    phase: Phase | None = None,
) -> xr.Dataset:
    """Which (layer, expert) carries a label's texts, how sure that is, and how much it carries of the others'.

    How to read it: `share` is what an expert gets of its layer's score on the label's documents; `rank` 1 is the
    target of single-expert unlearning. It is a stable choice where `first` is near 1: the share of resamples in which
    the expert came first. `contrast` says whether it is theirs: near 0, the other documents use it just as much, and
    changing it changes them too; `q` is how seldom documents taken at random differ as much from the others. Documents
    about one thing are not independent, so that a small `q` may be of the thing rather than of the label.

    Args:
        store: an open store with the routing tier.
        by: the document label; the store's first if None.
        label: whose documents; by default "forget", or the first label where there is none such.
        score: "score", the router's own score of a selected expert (needs the logits tier and a proven score
            function), or "weight", the weight the block multiplied with. By default "score" where it can be had.
        resamples: bootstrap draws of documents.
        permutations: dealings of the label over documents; 0 for no test.
        seed: of the draws.
        layers, phase: filters, as in `analysis.load`.

    Returns:
        Dataset with dims (layer, expert): attribution (s), low, high (95 %), rest (s of all other documents), contrast
        = attribution - rest, share (of the layer's sum), rank (1: largest of the model), first, top (share of
        resamples in which it is the largest of the model, of its layer), null_low, null_high (the middle 95 % of
        attribution under the permutations), p (two-sided, of the contrast), q (Benjamini-Hochberg); (layer): shared,
        the overlap of both sets' shares, sum of the smaller of the two, 1 where they are alike; and (): documents,
        rest_documents, tokens, rest_tokens, target_p, the share of permutations in which the expert that comes first
        then has as large a contrast.

    Raises:
        MoescopeError: no such label, no document with tokens, or scores that were not captured.
    """
    by = by or default_label(store)
    chosen = labelling(store, by, None, phase)
    label = _label(list(chosen.labels), label, by)
    sites = sites_of(store, layers)
    kind = _kind(store, sites, score)
    index = chosen.spread(np.arange(chosen.documents.size))
    means = []
    for site in sites:
        if kind == "score":
            table = _score_sums(store, site, phase, index, chosen.documents.size)
        else:
            found = document_counts(store, site, weighted=True, phase=phase).regrouped(index)
            table = np.zeros((chosen.documents.size, site.n_experts))
            table[found.group, found.expert] = found.weight
        means.append(table / chosen.tokens[:, None])
    attrs = provenance(store, analysis="attribution", by=by, label=label, score=kind, phase=phase)
    here = chosen.code == chosen.labels.index(label)
    result = _scored(LayerAxis.of_sites(sites), means, here, resamples, permutations, seed, attrs)
    result["tokens"], result["rest_tokens"] = int(chosen.tokens[here].sum()), int(chosen.tokens[~here].sum())
    return result


def attribution_from_documents(
    means: Float[np.ndarray, "document layer expert"],
    member: Int[np.ndarray, " document"],
    layers: Sequence[int] | None = None,
    resamples: int = RESAMPLES,
    permutations: int = PERMUTATIONS,
    seed: int = 0,
) -> xr.Dataset:
    """`attribution` from each document's mean over tokens of g.

    Args:
        means: [document, layer, expert]; NaN where a layer has no such expert.
        member: [document] bool: does it belong to the set?
        layers: model layer indices; 0, 1, 2, … if None.
        resamples, permutations, seed: as in `attribution`.
    """
    table = np.asarray(means, dtype=np.float64)
    here = np.asarray(member, dtype=bool)
    if table.ndim != 3 or here.shape != table.shape[:1]:
        raise MoescopeError(f"Means of shape {table.shape} need one membership for each document, got {here.size}.")
    axis = LayerAxis.of_array(np.moveaxis(table, 0, -1), layers)
    parts = [table[:, row, : axis.n_experts[row]] for row in range(table.shape[1])]
    attrs = provenance(None, analysis="attribution", score="given")
    return _scored(axis, parts, here, resamples, permutations, seed, attrs)


def _label(labels: list[str], label: str | None, by: str) -> str:
    if label is None:
        return "forget" if "forget" in labels else labels[0]
    if label not in labels:
        raise MoescopeError(f"The label {by!r} has no value {label!r}; it has {', '.join(labels)}.")
    return label


def _kind(store: Store, sites: Sequence[Any], score: Score | None) -> Score:
    lacking = [site.key for site in sites if site.score_function not in SCORES]
    if score is None:
        return "score" if "logits" in store.tiers and not lacking else "weight"
    if score == "score" and ("logits" not in store.tiers or lacking):
        why = "it has no logits tier" if "logits" not in store.tiers else f"{lacking[0]} has no proven score function"
        raise MoescopeError(f"The router's scores cannot be had from this store: {why}; use score='weight'.")
    return score


def _score_sums(
    store: Store, site: Any, phase: Phase | None, index: Int[np.ndarray, " document"], n: int
) -> Float[np.ndarray, "document expert"]:
    """[n, expert]: the router's scores summed over a document's tokens, where the expert was selected."""
    total = np.zeros((n, site.n_experts))
    for shard in store.shards:
        group = row_groups(shard, "document", phase)
        code = np.where((group >= 0) & (group < index.size), index[np.clip(group, 0, index.size - 1)], -1)
        routing = shard.routing(site.key, fields=["expert", "valid"] if site.slots_can_miss else ["expert"])
        scores = SCORES[site.score_function](shard.logits(site.key, slice(0, shard.n_tokens)).astype(np.float64))
        ids = np.minimum(routing.expert.astype(np.int64), site.n_experts - 1)  # a missing slot holds any id
        chosen = np.take_along_axis(scores, ids, axis=1)
        weigh_pairs(code, routing.expert, routing.valid if site.slots_can_miss else None, chosen, total)
    return total


def _scored(
    axis: LayerAxis, means: list[np.ndarray], here: np.ndarray, resamples: int, permutations: int, seed: int,
    attrs: dict[str, Any],
) -> xr.Dataset:  # fmt: skip
    if not here.any():
        raise MoescopeError("The set has no document with tokens in it: nothing to attribute.")
    n, others = int(here.sum()), int((~here).sum())
    rng = np.random.default_rng(seed)
    times = rng.multinomial(n, np.full(n, 1 / n), resamples) / n if n > 1 else np.zeros((0, n))
    of_set = [table[here].mean(0) for table in means]
    rest = [table[~here].mean(0) if others else np.full(table.shape[1], np.nan) for table in means]
    drawn = [times @ table[here] for table in means]
    flat = np.concatenate(drawn, axis=1)
    edges = np.cumsum([0, *(table.shape[1] for table in means)])
    winner = flat.argmax(1) if len(flat) else np.zeros(0, dtype=int)
    first = np.bincount(winner, minlength=edges[-1]) / max(1, len(flat))
    order = np.argsort(-np.concatenate(of_set), kind="stable")
    rank = np.empty(edges[-1])
    rank[order] = np.arange(1, edges[-1] + 1)
    null = _permuted(np.concatenate(means, axis=1), here, permutations, seed)
    columns: dict[str, list[np.ndarray]] = {name: [] for name in (
        "attribution", "low", "high", "rest", "contrast", "share", "rank", "first", "top",
        "null_low", "null_high", "p", "q")}  # fmt: skip
    shared = np.full(len(means), np.nan)
    for row, (value, other, draws) in enumerate(zip(of_set, rest, drawn, strict=True)):
        span = slice(edges[row], edges[row + 1])
        unsure = np.full(value.size, np.nan)
        low, high = np.quantile(draws, [0.025, 0.975], axis=0) if len(draws) else (unsure, unsure)
        top = np.bincount(draws.argmax(1), minlength=value.size) / len(draws) if len(draws) else unsure
        share = value / value.sum() if value.sum() else unsure
        if others and other.sum():
            shared[row] = np.minimum(share, other / other.sum()).sum()
        of_first = first[span] if len(flat) else unsure
        chance = (null[name][span] for name in ("low", "high", "p", "q"))
        values = (value, low, high, other, value - other, share, rank[span], of_first, top, *chance)
        for name, column in zip(columns, values, strict=True):
            columns[name].append(column)
    cell = ("layer", "expert")
    return xr.Dataset(
        {name: (cell, axis.pad(values)) for name, values in columns.items()}
        | {
            "shared": ("layer", shared),
            "documents": ((), n),
            "rest_documents": ((), others),
            "target_p": ((), float(null["target"])),
            "exists": (cell, axis.exists),
        },
        coords=axis.coordinates(),
        attrs=attrs
        | {
            "definition": "mean over documents of mean over tokens of g; g = score if selected else 0",
            "resamples": resamples, "permutations": permutations if others else 0, "seed": seed,
            "interval": INTERVAL, "null": NULL, "padding": PADDING,
            "table": "layer, expert", "table_order": "attribution",
        },
    )  # fmt: skip


def _permuted(
    table: Float[np.ndarray, "document cell"], here: np.ndarray, permutations: int, seed: int
) -> dict[str, np.ndarray]:
    """By cell: what attribution is when as many documents are taken at random, and p and q of the contrast.

    The sum over all documents stays, so that attribution and contrast rise together, and one is tested by the other.
    """
    n, others = int(here.sum()), int((~here).sum())
    unsure = np.full(table.shape[1], np.nan)
    if not permutations or not others:
        return {"low": unsure, "high": unsure, "p": unsure, "q": unsure, "target": np.array(np.nan)}
    rng, observed, whole = np.random.default_rng([seed, 1]), table[here].mean(0), table.sum(0)

    def contrast(of_set: np.ndarray) -> np.ndarray:
        return of_set - (whole - n * of_set) / others

    drawn, largest = [], []
    for start in counted("permutations", range(0, permutations, BLOCK)):
        size = min(BLOCK, permutations - start)
        members = rng.permuted(np.tile(here, (size, 1)), axis=1)
        drawn.append(members.astype(np.float64) @ table / n)
        first = drawn[-1].argmax(1)
        largest.append(np.take_along_axis(contrast(drawn[-1]), first[:, None], axis=1)[:, 0])
    values = np.concatenate(drawn)
    above, below = ((values >= observed - TIE).sum(0) + 1, (values <= observed + TIE).sum(0) + 1)
    p = np.minimum(1.0, 2 * np.minimum(above, below) / (permutations + 1))
    low, high = np.quantile(values, [0.025, 0.975], axis=0)
    reached = int((np.concatenate(largest) >= contrast(observed)[observed.argmax()] - TIE).sum())
    target = np.array((reached + 1) / (permutations + 1))
    return {"low": low, "high": high, "p": p, "q": q_values(p), "target": target}


ATTRIBUTION_QUESTION = Analysis(
    name="attribution",
    run=attribution,
    figure="attribution",
    help="Which expert carries the texts of one label most, and how much it carries of the others'?",
    parameters=(
        Parameter("by", str, None, "document label (default: the first)"),
        Parameter("label", str, None, "the label value whose texts are meant (default: forget)"),
        Parameter(
            "score", str, None, "router score or routing weight (default: score if captured)", ("score", "weight")
        ),
        Parameter("resamples", int, RESAMPLES, "bootstrap draws of documents"),
        Parameter("permutations", int, PERMUTATIONS, "dealings of the label over documents; 0 for no test"),
        LAYERS,
        PHASE,
        SEED,
    ),
    tier="routing",
)
