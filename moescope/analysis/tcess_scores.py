"""TCESS, the task-conditioned expected selection score: the mean over a task's tokens of what the router's top gives.

Source: PreMoe (arXiv 2505.17639). The paper scores an expert by its softmax among the token's top k_a logits, where
that is at least r, and 0 elsewhere; the released code takes the raw logit of the top-1 expert, 0 for all others.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import xarray as xr
from scipy.special import softmax

from moescope.analysis.association import noted
from moescope.analysis.counts import Phase, labelling, sites_of
from moescope.analysis.label_tests import Alternative, Correction, LabelTest, against_dealings
from moescope.analysis.labelled import PADDING, LayerAxis, provenance
from moescope.analysis.pairs import PairCounts
from moescope.analysis.question import LAYERS, PHASE, RESAMPLES, SEED, Analysis, Parameter
from moescope.analysis.specialisation import default_label
from moescope.analysis.spreading import over_shards
from moescope.analysis.token_properties import groups_of_rows
from moescope.errors import MoescopeError

if TYPE_CHECKING:
    from jaxtyping import Float

    from moescope.store import Store

Definition = Literal["paper", "code"]
Value = Literal["probability", "logit"]
Norm = Literal["local", "global"]
UNIT = 2.0**-24
"""Sums over documents are held as whole multiples of this, so that a dealing adds them up without rounding."""
LOGITS = (
    "from the router's raw logits, as in the paper: a correction bias, groups of experts or a score function other "
    "than softmax, where the router has them, play no part"
)


@dataclass(frozen=True)
class Rule:
    """How a token scores its experts.

    Attributes:
        k: experts of the largest logits that score at all; None for the layer's own k.
        r: they score where their softmax is at least this; None for no threshold.
        value: their score: the "probability" or the raw "logit".
        norm: the softmax is over these k ("local") or over all experts ("global").
    """

    k: int | None
    r: float | None
    value: Value
    norm: Norm


RULES: dict[str, Rule] = {"paper": Rule(None, 0.0, "probability", "local"), "code": Rule(1, None, "logit", "local")}


def tcess(
    store: Store,
    by: str | None = None,
    definition: Definition = "paper",
    k: int | None = None,
    r: float | None = None,
    value: Value | None = None,
    norm: Norm | None = None,
    permutations: int | None = None,
    seed: int = 0,
    alternative: Alternative = "greater",
    correction: Correction = "bh",
    resamples: int = 500,
    layers: Sequence[int] | None = None,
    where: dict[str, str | Sequence[str]] | None = None,
    phase: Phase | None = None,
) -> xr.Dataset:
    """What each expert can expect from a token of each task, by the router's top scores.

    How to read it: by the paper's definition the scores of a layer sum to at most 1, and an expert of 0.2 takes a fifth
    of what the task's tokens give out. PreMoe keeps the highest of each task. `q` says whether an expert's score in a
    task is above what tasks dealt anew over documents give: a high score with a large `q` is an expert busy in all.

    Args:
        store: an open store with the logits tier.
        by: the document label that names tasks; the store's first if None.
        definition: "paper" or "code": what the next four are where they are not given; see `RULES`.
        k, r, value, norm: see `Rule`.
        permutations, seed, alternative, correction, resamples, layers, where, phase: as in `analysis.npmi`.

    Returns:
        Dataset with dims (layer, expert, label): tcess, tcess_low, tcess_high (95 % interval over documents), p, q,
        p_max, null_mean, null_p99; overall (layer, expert), tokens, documents (label), null_max_p99 ().

    Raises:
        MoescopeError: no logits, no such label, or parameters that do not fit.
    """
    by = by or default_label(store)
    rule = rule_of(definition, k, r, value, norm)
    sites = sites_of(store, layers)
    chosen = labelling(store, by, where, phase)
    index = chosen.spread(np.arange(chosen.documents.size))
    for site in sites:
        if rule.k is not None and rule.k > site.n_experts:
            raise MoescopeError(f"`k` is {rule.k}, and layer {site.layer} has {site.n_experts} experts.")
    sums = [np.zeros((chosen.documents.size, site.n_experts)) for site in sites]
    for found in over_shards(store, _shard_sums, tuple(sites), rule, index, phase):
        for total, part in zip(sums, found, strict=True):
            total += part
    attrs = provenance(
        store, analysis="tcess", by=by, definition=definition, k=rule.k or "the layer's own", r=rule.r,
        value=rule.value, norm=rule.norm, where=where, phase=phase, documents_unlabelled=chosen.unlabelled,
        documents_filtered=chosen.filtered,
    )  # fmt: skip
    test = LabelTest(permutations, seed, alternative, correction, resamples)
    return _result(LayerAxis.of_sites(sites), sums, chosen.tokens, chosen.code, list(chosen.labels), test, attrs)


def tcess_from_documents(
    sums: Float[np.ndarray, "document layer expert"],
    tokens: np.ndarray,
    labels: Sequence[str],
    layers: Sequence[int] | None = None,
    permutations: int | None = None,
    seed: int = 0,
    alternative: Alternative = "greater",
    correction: Correction = "bh",
    resamples: int = 500,
) -> xr.Dataset:
    """The same from sums of `token_scores` over the tokens of each document.

    Args:
        sums: [document, layer, expert]; NaN where a layer has no such expert.
        tokens: [document] tokens of each, >= 1.
        labels: [document] the task.
        layers, permutations, seed, alternative, correction, resamples: as in `tcess`.
    """
    table, size = np.asarray(sums, dtype=np.float64), np.asarray(tokens, dtype=np.int64)
    if table.ndim != 3 or size.shape != table.shape[:1] or len(labels) != size.size or (size < 1).any():
        raise MoescopeError(f"Sums of shape {table.shape} need one label and at least one token for each document.")
    names, code = np.unique(np.asarray(labels, dtype=str), return_inverse=True)
    axis = LayerAxis.of_array(np.moveaxis(table, 0, -1), layers)
    each = [table[:, row, :width] for row, width in enumerate(axis.n_experts)]
    test = LabelTest(permutations, seed, alternative, correction, resamples)
    attrs = provenance(None, analysis="tcess", by="label")
    return _result(axis, each, size, code, [str(name) for name in names], test, attrs)


def rule_of(
    definition: Definition = "paper",
    k: int | None = None,
    r: float | None = None,
    value: Value | None = None,
    norm: Norm | None = None,
) -> Rule:
    """The rule of a definition with parts of it replaced; see `Rule`.

    Raises:
        MoescopeError: no such definition, or a part that is none.
    """
    if definition not in RULES:
        raise MoescopeError('`definition` is "paper" or "code".')
    base = RULES[definition]
    rule = Rule(base.k if k is None else k, base.r if r is None else r, value or base.value, norm or base.norm)
    if rule.value not in ("probability", "logit") or rule.norm not in ("local", "global"):
        raise MoescopeError('`value` is "probability" or "logit", `norm` is "local" or "global".')
    if (rule.k is not None and rule.k < 1) or (rule.r is not None and not 0 <= rule.r <= 1):
        raise MoescopeError("`k` is at least 1, and `r` a probability.")
    return rule


def token_scores(logits: Float[np.ndarray, "token expert"], k: int, rule: Rule) -> Float[np.ndarray, "token expert"]:
    """What each token gives each expert: 0 for all but its k largest logits; of equals the first."""
    top = np.argsort(-logits, axis=1, kind="stable")[:, :k]
    chosen = np.take_along_axis(logits, top, axis=1).astype(np.float64)
    if rule.norm == "local":
        probability = softmax(chosen, axis=1)
    else:
        probability = np.take_along_axis(softmax(logits.astype(np.float64), axis=1), top, axis=1)
    score = probability if rule.value == "probability" else chosen
    if rule.r is not None:
        score = np.where(probability >= rule.r, score, 0.0)
    out = np.zeros(logits.shape)
    np.put_along_axis(out, top, score, axis=1)
    return out


def _shard_sums(
    shard: Any, sites: Sequence[Any], rule: Rule, index: np.ndarray, phase: Phase | None
) -> list[np.ndarray]:
    """[document, expert] sums of one shard, per layer; some rows at a time."""
    document = groups_of_rows(shard, index, phase)
    n = int(index.max(initial=-1)) + 1
    found = []
    for site in sites:
        total = np.zeros((n, site.n_experts))
        for start in range(0, document.size, ROWS):
            rows = slice(start, min(start + ROWS, document.size))
            kept = document[rows] >= 0
            scores = token_scores(shard.logits(site.key, rows)[kept], rule.k or site.top_k, rule)
            if not np.isfinite(scores).all():
                raise MoescopeError(
                    f"Layer {site.layer} has top logits that are not finite (experts masked while it was captured?): "
                    'they score nothing as logits; ask for value="probability", or a smaller k.'
                )
            np.add.at(total, document[rows][kept], scores)
        found.append(total)
    return found


ROWS = 16_384
"""Tokens whose logits are looked at together: two row groups of the store."""


def _result(
    axis: LayerAxis,
    sums: Sequence[np.ndarray],
    tokens: np.ndarray,
    code: np.ndarray,
    labels: list[str],
    test: LabelTest,
    attrs: dict[str, Any],
) -> xr.Dataset:
    tables = []
    for total in sums:
        whole = np.rint(total / UNIT).astype(np.int64)
        document, expert = np.nonzero(whole)
        tables.append(PairCounts(document, expert.astype(np.int32), whole[document, expert], None, total.shape[1]))
    found = against_dealings(axis, tables, tokens, code, labels, _expected, test)
    value = axis.pad(found.counts) * UNIT / found.size
    cell = ("layer", "expert", "label")
    statistics = {name: found.statistics.get(name, np.full(value.shape, np.nan)) for name in STATISTICS}
    variables: dict[str, Any] = {
        "tcess": (cell, value),
        "tcess_low": (cell, statistics.pop("low")),
        "tcess_high": (cell, statistics.pop("high")),
        **{name: (cell, values) for name, values in statistics.items()},
        "null_max_p99": ((), found.statistics.get("null_max_p99", np.nan)),
        "overall": (("layer", "expert"), (value * found.size).sum(axis=2) / found.size.sum()),
        "tokens": ("label", found.size),
        "documents": ("label", found.documents),
        "exists": (("layer", "expert"), axis.exists),
    }
    attrs = attrs | found.attrs | noted(found.notes) | {"logits": LOGITS, "resolution": UNIT, "padding": PADDING}
    attrs |= {"table": "layer, expert, label", "table_order": "tcess"}
    return xr.Dataset(variables, coords=axis.coordinates() | {"label": labels}, attrs=attrs)


def _expected(joint: np.ndarray, label: np.ndarray, expert: np.ndarray, total: np.ndarray | float) -> np.ndarray:
    """Mean over the label's tokens; NaN for an expert that no token gives anything."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(np.broadcast_to(expert == 0, joint.shape), np.nan, joint * UNIT / label)


STATISTICS = ("low", "high", "p", "q", "p_max", "null_mean", "null_p99")

TCESS_QUESTION = Analysis(
    name="tcess",
    run=tcess,
    figure="tcess",
    help="What can each expert expect from a token of each task, by the router's top scores (PreMoe)?",
    parameters=(
        Parameter("by", str, None, "the document label that names tasks (default: the store's first)"),
        Parameter("definition", str, "paper", "the paper's definition or the released code's", ("paper", "code")),
        Parameter("k", int, None, "experts of the largest logits that score (default: the definition's)"),
        Parameter("r", float, None, "threshold of their softmax (default: the definition's)"),
        Parameter("value", str, None, "what they score (default: the definition's)", ("probability", "logit")),
        Parameter("norm", str, None, "softmax over these or over all (default: the definition's)", ("local", "global")),
        Parameter("permutations", int, None, "random dealings of labels over documents (default: enough)"),
        Parameter("alternative", str, "greater", "test for preference, or either way", ("greater", "two-sided")),
        Parameter("correction", str, "bh", "q-values: Benjamini-Hochberg or -Yekutieli", ("bh", "by")),
        RESAMPLES,
        LAYERS,
        PHASE,
        SEED,
    ),
    tier="logits",
)
