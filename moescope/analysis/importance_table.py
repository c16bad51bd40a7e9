"""Importance: every criterion that says which experts matter, in one table, and how far the criteria agree (METHODS 6).

Sources: REAP (arXiv 2510.13999), EAN (2504.05586), MSAN (2606.15716), MC-MoE (2410.06270), ESFT (2407.01906). Criteria
that need the model (HEAPr, NAEE, router rows) and causal effects come from `moescope.effects` and join as `extra`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import xarray as xr
from scipy.stats import rankdata

from moescope.analysis.counts import Labelling, Phase, labelling, sites_of
from moescope.analysis.labelled import PADDING, LayerAxis, provenance
from moescope.analysis.question import LAYERS, PHASE, SEED, Analysis, Parameter
from moescope.analysis.rank_agreement import NULL, PAIR, across_halves, agreement
from moescope.analysis.resampling import INTERVAL, drawn_documents
from moescope.analysis.slot_sums import SUMS, SlotSums, slot_sums
from moescope.errors import MoescopeError

if TYPE_CHECKING:
    from jaxtyping import Float

    from moescope.store import Store

Definition = Literal["paper", "code"]

OF_ROUTING = ("frequency", "mean_weight", "mc_moe", "esft_token", "esft_gate")
OF_OUTPUTS = ("reap", "reap_total", "ean", "ean_total", "msan")
CELLS = 4_000_000
"""Cells (draws x layers x sums x experts) held at once, about 32 MB in float64."""


def importance(
    store: Store,
    by: str | None = None,
    definition: Definition = "paper",
    alpha: float = 1.0,
    beta: float = 1.0,
    layers: Sequence[int] | None = None,
    where: dict[str, str | Sequence[str]] | None = None,
    phase: Phase | None = None,
    extra: Mapping[str, Any] | None = None,
    resamples: int = 200,
    splits: int = 20,
    permutations: int = 499,
    seed: int = 0,
) -> xr.Dataset:
    """How important each expert is by every criterion at once, and how far the criteria agree.

    How to read it: each criterion ranks the experts of a layer; compare inside a layer, since norms grow with depth.
    `spearman_within` says how alike two criteria rank them (mean over layers); beyond `null_p99` that is more than
    independent rankings would, but two criteria that share a factor agree by construction. So hold it against the
    diagonal of `split_half`: how well a criterion agrees with itself on other documents. None of this says that an
    expert matters: only removing it does (`moescope.effects.criteria_effects`).

    Args:
        store: an open store with the routing tier; with the experts tier, norms of outputs too.
        by: a document label; adds the dimension `label`. Documents without it are left out.
        definition: ESFT's scores are divided by their sum over the experts of a layer ("paper", where esft_token ranks
            as frequency does) or over the layers for each expert number ("code").
        alpha, beta: powers of frequency and of weight in MC-MoE's criterion.
        layers: model layer indices; all MoE layers if None.
        where: label -> value(s), documents to keep.
        phase: "prefill" or "decode"; both if None.
        extra: more criteria by name: each a DataArray (layer, expert) or a [layer, expert] array, NaN where it says
            nothing. They have no intervals and no halves.
        resamples: bootstrap draws of documents; 0 for no intervals.
        splits: random halves of the documents behind `split_half`; 0 for none.
        permutations: rankings dealt at random behind p.
        seed: of all three.

    Returns:
        Dataset with dims (layer, expert) or (layer, expert, label), w the routing weight and f the output before it:
            frequency (selections per token), mean_weight (mean w where selected), mc_moe = frequency^alpha * (w per
            token)^beta, esft_token and esft_gate (shares of selections and of w; see `definition`); with the experts
            tier reap = mean w |f|, ean = mean |f|, msan = mean |f|^2, each over the tokens that selected the expert,
            and reap_total, ean_total: sums of w |f| and of |f| per token of text, which an expert that is rarely
            selected cannot be high in; NAME_low, NAME_high; count (selections). Means are NaN for an expert that was
            never selected, shares 0.
        And, over all documents kept, rank (layer, expert, criterion; 1 the most important of its layer, NaN where the
            criterion says nothing); and as `rank_agreement.agreement` gives: spearman, kendall, split_half (layer,
            criterion, against), spearman_within, kendall_within, spearman_pooled, split_half_within, null_p99, p, q
            (criterion, against); tokens, documents (or by label).

    Raises:
        MoescopeError: an unknown label, layer or definition, an `extra` that does not fit, or nothing left to count.
    """
    if definition not in ("paper", "code"):
        raise MoescopeError('`definition` is "paper" or "code".')
    sites = sites_of(store, layers)
    chosen = labelling(store, by, where, phase)
    norms = "experts" in store.tiers
    names = [*OF_ROUTING, *(OF_OUTPUTS if norms else ())]
    axis = LayerAxis.of_sites(sites)
    sums = [slot_sums(store, site, norms, phase) for site in sites]
    rule = _Rule(axis, definition, alpha, beta, tuple(names))
    given = {name: _table(name, values, axis, names) for name, values in (extra or {}).items()}
    rng = np.random.default_rng(seed)
    values, low, high, counts = [], [], [], []
    for label in range(len(chosen.labels)):
        here = chosen.code == label
        documents, tokens = chosen.documents[here], chosen.tokens[here]
        once = _sums(sums, axis, documents, np.ones((1, documents.size)))
        counts.append(once["count"][0])
        values.append({name: table[0] for name, table in rule.of(once, np.array([tokens.sum()])).items()})
        bounds = _interval(sums, rule, documents, tokens, resamples, rng)
        low.append(bounds[0])
        high.append(bounds[1])
    cell = ("layer", "expert", "label")
    variables: dict[str, Any] = {}
    for name in names:
        for suffix, parts in (("", values), ("_low", low), ("_high", high)):
            variables[name + suffix] = (cell, np.stack([part[name] for part in parts], axis=-1))
    variables["count"] = (cell, np.stack(counts, axis=-1))
    variables |= {name: (("layer", "expert"), table) for name, table in given.items()}
    everyone = _sums(sums, axis, chosen.documents, np.ones((1, chosen.documents.size)))
    whole = rule.of(everyone, np.array([chosen.tokens.sum()]))
    ranked = [whole[name][0] for name in names] + list(given.values())
    result = xr.Dataset(
        variables
        | {
            "exists": (("layer", "expert"), axis.exists),
            "tokens": ("label", chosen.tokens_per_label),
            "documents": ("label", chosen.documents_per_label),
        },
        coords=axis.coordinates() | {"label": list(chosen.labels)},
        attrs=provenance(
            store, analysis="importance", by=by, definition=definition, alpha=alpha, beta=beta, where=where,
            phase=phase, resamples=resamples, splits=splits, permutations=permutations, seed=seed,
            criteria=[*names, *given], null=NULL, interval=INTERVAL, padding=PADDING,
            outputs="measured" if norms else "none: the store has no experts tier, so REAP, EAN and MSAN are absent",
            undefined="means are NaN for an expert that was never selected, whose frequency and shares are 0",
            documents_unlabelled=chosen.unlabelled, documents_filtered=chosen.filtered,
            table="layer, expert" if by is None else "layer, expert, label", table_order="reap" if norms else "mc_moe",
        ),
    )  # fmt: skip
    result = result.isel(label=0, drop=True) if by is None else result
    halves = _halves(sums, rule, chosen, splits, len(given), rng)
    return result.merge(agreement(ranked, [*names, *given], permutations, seed)).assign(
        rank=(("layer", "expert", "criterion"), np.stack([_rank(table) for table in ranked], axis=-1)),
        split_half=(("layer", *PAIR), halves),
        split_half_within=(PAIR, _mean(halves)),
    )


@dataclass(frozen=True)
class _Rule:
    """How criteria follow from sums."""

    axis: LayerAxis
    definition: Definition
    alpha: float
    beta: float
    names: tuple[str, ...]

    def of(
        self, sums: Mapping[str, Float[np.ndarray, "draw layer expert"]], tokens: Float[np.ndarray, " draw"]
    ) -> dict[str, Float[np.ndarray, "draw layer expert"]]:
        """Every criterion, NaN where there is no such expert or nothing to divide by."""
        n = np.asarray(tokens, dtype=np.float64)[:, None, None]
        over = 2 if self.definition == "paper" else 1
        k = self.axis.top_k[None, :, None]
        with np.errstate(invalid="ignore", divide="ignore"):
            found = {
                "frequency": sums["count"] / n,
                "mean_weight": sums["weight"] / sums["count"],
                "mc_moe": (sums["count"] / n) ** self.alpha * (sums["weight"] / n) ** self.beta,
                "esft_token": _share(sums["count"] / k, over),
                "esft_gate": _share(sums["weight"], over),
                "reap": sums["weighted_norm"] / sums["measured"],
                "reap_total": sums["weighted_norm"] / n,
                "ean": sums["norm"] / sums["measured"],
                "ean_total": sums["norm"] / n,
                "msan": sums["squared_norm"] / sums["measured"],
            }
        # What was selected and not measured has an unknown output, not none.
        unmeasured = (sums["count"] > 0) & (sums["measured"] == 0)
        return {
            name: np.where(self.axis.exists & ~(unmeasured if name in OF_OUTPUTS else False), found[name], np.nan)
            for name in self.names
        }


def _share(values: np.ndarray, over: int) -> np.ndarray:
    total = np.nansum(values, axis=over, keepdims=True)
    return values / np.where(total > 0, total, np.nan)


def _sums(
    sums: Sequence[SlotSums], axis: LayerAxis, documents: np.ndarray, draws: np.ndarray
) -> dict[str, Float[np.ndarray, "draw layer expert"]]:
    widest = int(axis.n_experts.max(initial=0))
    found = {name: np.full((draws.shape[0], len(sums), widest), np.nan) for name in SUMS}
    for layer, part in enumerate(sums):
        for name, values in part.of(documents, draws).items():
            found[name][:, layer, : values.shape[1]] = values
    return found


def _blocks(n: int, resamples: int, axis: LayerAxis, rng: np.random.Generator) -> Iterator[np.ndarray]:
    """Bootstrap draws [draw, document], few enough at once."""
    step = max(1, CELLS // max(1, axis.exists.size * len(SUMS)))
    for draws in drawn_documents(n, resamples, rng):
        for start in range(0, draws.shape[0], step):
            yield draws[start : start + step]


def _interval(
    sums: Sequence[SlotSums], rule: _Rule, documents: np.ndarray, tokens: np.ndarray, resamples: int, rng: Any
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """95 % bounds of every criterion [layer, expert]; NaN with fewer than two documents that selected the expert."""
    empty = np.full(rule.axis.exists.shape, np.nan)
    if resamples < 1 or documents.size < 2:
        return dict.fromkeys(rule.names, empty), dict.fromkeys(rule.names, empty)
    drawn: dict[str, list[np.ndarray]] = {name: [] for name in rule.names}
    for draws in _blocks(documents.size, resamples, rule.axis, rng):
        for name, values in rule.of(_sums(sums, rule.axis, documents, draws), draws @ tokens).items():
            drawn[name].append(values)
    met = empty.copy()
    for layer, part in enumerate(sums):
        rows = np.isin(part.document, documents)
        met[layer, : part.table["count"].shape[1]] = (part.table["count"][rows] > 0).sum(axis=0)
    bounds: tuple[dict[str, np.ndarray], dict[str, np.ndarray]] = {}, {}
    for name, parts in drawn.items():
        values = np.concatenate(parts)
        known = (met >= 2) & ~np.isnan(values).all(axis=0)
        for bound, quantile in zip(bounds, (0.025, 0.975), strict=True):
            bound[name] = empty.copy()
            bound[name][known] = np.nanquantile(values[:, known], quantile, axis=0)
    return bounds


def _halves(
    sums: Sequence[SlotSums], rule: _Rule, chosen: Labelling, splits: int, extra: int, rng: np.random.Generator
) -> Float[np.ndarray, "layer criterion criterion"]:
    """Correlations across random halves of the documents; NaN for criteria that came from outside."""
    n, documents = len(rule.names), chosen.documents
    found = np.full((len(sums), n + extra, n + extra), np.nan)
    if splits < 1 or documents.size < 2:
        return found
    deal = rng.permuted(np.tile(np.arange(documents.size) % 2, (splits, 1)), axis=1).astype(np.float64)
    halves = []
    for draws in (deal, 1 - deal):
        values = rule.of(_sums(sums, rule.axis, documents, draws), draws @ chosen.tokens)
        halves.append(np.stack([values[name] for name in rule.names]))
    found[:, :n, :n] = across_halves(*halves)
    return found


def _rank(values: np.ndarray) -> np.ndarray:
    """Ranks within each layer, 1 the largest, the mean rank where equal."""
    return np.asarray(rankdata(-values, axis=1, nan_policy="omit"))


def _mean(tables: np.ndarray) -> np.ndarray:
    n = (~np.isnan(tables)).sum(axis=0)
    return np.where(n > 0, np.nansum(tables, axis=0) / np.maximum(n, 1), np.nan)


def _table(name: str, values: Any, axis: LayerAxis, taken: Sequence[str]) -> Float[np.ndarray, "layer expert"]:
    """A criterion from outside as [layer, expert], by its own layer coordinate where it has one."""
    if name in (*taken, "count", "exists", "tokens", "documents") or name.endswith(("_low", "_high")):
        raise MoescopeError(f"{name!r} is the name of a column of this table; call the criterion otherwise.")
    shape = axis.exists.shape
    if isinstance(values, xr.DataArray):
        if set(values.dims) != {"layer", "expert"}:
            said = ", ".join(map(str, values.dims))
            raise MoescopeError(f"The criterion {name!r} needs the dimensions layer and expert; it has {said}.")
        array = values.transpose("layer", "expert")
        key, asked = ("site", axis.sites) if "site" in array.coords else ("layer", axis.layers.tolist())
        row_of = {own: row for row, own in enumerate(array[key].values.tolist())}
        table = np.full(shape, np.nan)
        for row, own in enumerate(asked):
            if own in row_of:
                part = array.values[row_of[own]][: shape[1]]
                table[row, : part.size] = part
        if not set(row_of) & set(asked):
            raise MoescopeError(f"The criterion {name!r} is about none of these layers.")
    else:
        table = np.asarray(values, dtype=np.float64)
        if table.shape != shape:
            raise MoescopeError(f"The criterion {name!r} has the shape {table.shape}; this table has {shape}.")
    return np.where(axis.exists, table, np.nan)


IMPORTANCE_QUESTION = Analysis(
    name="importance",
    run=importance,
    figure="importance",
    help="Which experts matter by each published criterion, and do the criteria agree?",
    parameters=(
        Parameter("by", str, None, "a document label to tell apart (default: all documents together)"),
        Parameter("definition", str, "paper", "ESFT's scores over experts, or over layers", ("paper", "code")),
        Parameter("alpha", float, 1.0, "power of frequency in MC-MoE's criterion"),
        Parameter("beta", float, 1.0, "power of weight in MC-MoE's criterion"),
        LAYERS,
        PHASE,
        Parameter("resamples", int, 200, "bootstrap draws behind the intervals"),
        Parameter("splits", int, 20, "random halves of the documents behind split_half"),
        Parameter("permutations", int, 499, "rankings dealt at random behind p"),
        SEED,
    ),
    tier="routing",
)
