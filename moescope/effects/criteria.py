"""Which criterion of importance knows what removing experts will do: its lowest and highest masked, beside random ones.

A criterion that is right can drop its lowest experts for less than random ones cost, and must pay more for its highest.
All criteria mask as many experts in the same layers, so that one set of random controls stands for all of them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import xarray as xr
from scipy.stats import false_discovery_control

from moescope.capturing.corpus import Corpus
from moescope.edits import Mask, Recipe, Zero
from moescope.effects.losses import MAX_LENGTH, Losses, document_losses
from moescope.errors import MoescopeError
from moescope.hooks import Model

Kind = Literal["mask", "zero"]
Sets = dict[int, tuple[int, ...]]
"""Experts by row of the importance table: a set of the same size in every layer."""

ENDS = ("lowest", "highest")
DRAWS = 2000  # bootstrap draws of documents
ALL = "all"
CONTROL = (
    "as many experts of the same layers drawn at random, two sets at a time that share none; p_lowest = (1 + controls "
    "that raise the loss no more) / (1 + controls), p_highest the same for controls that raise it no less, p_gap for "
    "the differences within the pairs, taken either way; q: Benjamini-Hochberg over the criteria, by label"
)


def criteria_effects(
    model: Model,
    corpus: Corpus,
    importance: xr.Dataset,
    criteria: Sequence[str] | None = None,
    n: int = 1,
    *,
    by: str | None = None,
    kind: Kind = "mask",
    controls: int = 40,
    max_length: int = MAX_LENGTH,
    seed: int = 0,
    on_progress: Callable[[int], None] | None = None,
) -> xr.Dataset:
    """Masks the n lowest and the n highest experts of every layer by each criterion, and compares what that costs.

    How to read it: `change` is what masking adds to the loss, in nats per token. A useful criterion has a `lowest`
    below what random experts cost (`control_low` to `control_high`), a `highest` above it, and so a large `gap`. `best`
    is how often, over documents drawn anew, a criterion does better than all others there: 0.9 is a clear winner, 0.3
    is not.

    Take the corpus from other documents than the importance, or the comparison favours criteria that fit their sample.

    Args:
        model: a model with a tokenizer.
        corpus: labelled texts to measure the loss on.
        importance: from `analysis.importance`, of this model; of one label if it has several.
        criteria: which; all that have a value in every layer if None.
        n: experts masked in each layer at either end.
        by: a label of the corpus; the label "all" stands for all documents beside its values.
        kind: "mask" (others take the expert's place) or "zero" (nothing does).
        controls: random sets, an even number; p cannot be below 1 / (1 + controls).
        max_length: tokens of context.
        seed: of controls, ties and intervals.
        on_progress: called with the tokens done, of all runs together (`runs` in the attributes).

    Returns:
        Dataset with dims (criterion, end, label), end "lowest" or "highest": change, low, high (95 %, documents drawn
            anew), p, q, best; (criterion, label): gap = highest - lowest, gap_low, gap_high, gap_p, gap_q, gap_best;
            (label): plain (loss, nats per token), tokens, documents, control_mean, control_low, control_high (2.5 and
            97.5 % of the controls); (control, label): control_change; (criterion, end, layer, masked): expert.

    Raises:
        MoescopeError: another model's table, an unknown criterion or label, too few experts in a layer.
        RefusedError: this family's experts cannot be masked.
    """
    if importance.attrs.get("model") not in (None, model.name):
        raise MoescopeError(f"This importance is of {importance.attrs['model']}, not of {model.name}.")
    if controls < 0 or controls % 2:
        raise MoescopeError("`controls` must be an even number: random sets are drawn in pairs.")
    names = _criteria(importance, criteria)
    rng = np.random.default_rng(seed)
    plan = [_ends(importance, name, n, rng) for name in names]
    randoms = [side for _ in range(controls // 2) for side in _random(importance, n, rng)]
    sets = [side for ends in plan for side in ends] + randoms
    distinct = list({tuple(sorted(side.items())): side for side in sets}.values())
    place = [distinct.index(side) for side in sets]
    recipes = [_recipe(importance, side, kind) for side in distinct]
    losses = document_losses(model, corpus, [None, *recipes], max_length=max_length, on_progress=on_progress)
    rows = np.array([0, *(1 + which for which in place)])
    whole = Losses(losses.documents, losses.tokens, losses.nats[rows], losses.divergence[rows])
    result = compare(whole, names, by, seed)
    experts = np.array([[list(side.values()) for side in ends] for ends in plan])
    return result.assign_coords(layer=importance["layer"].values).assign(
        expert=(("criterion", "end", "layer", "masked"), experts)
    ).assign_attrs(
        model=model.name, config_hash=model.config_hash, corpus=corpus.name.rpartition("/")[2],
        importance_store=str(importance.attrs.get("store_id", "none")),
        importance_corpus=str(importance.attrs.get("corpus", "none")), kind=kind, n=n, runs=1 + len(recipes),
    )  # fmt: skip


def compare(losses: Losses, names: Sequence[str], by: str | None = None, seed: int = 0) -> xr.Dataset:
    """The comparison from losses alone.

    Args:
        losses: recipes in this order: none; for each criterion its lowest, then its highest; then the controls, in
            pairs.
        names: of the criteria.
        by, seed: as in `criteria_effects`.
    """
    labels, code = losses.labels(by)
    everything = np.arange(len(losses.documents))
    groups = [(ALL, everything)] + [
        (name, np.flatnonzero(code == place)) for place, name in enumerate(labels if by is not None else ())
    ]
    n, controls = len(names), len(losses.nats) - 1 - 2 * len(names)
    rng = np.random.default_rng(seed)
    parts = [_of_label(losses.tokens[here], losses.nats[:, here], n, rng) for _, here in groups]
    three = ("criterion", "end", "label")
    variables: dict[str, Any] = {}
    for name, dims in {
        "change": three, "low": three, "high": three, "p": three, "best": three, "gap": ("criterion", "label"),
        "gap_low": ("criterion", "label"), "gap_high": ("criterion", "label"), "gap_p": ("criterion", "label"),
        "gap_best": ("criterion", "label"), "control_change": ("control", "label"),
        **dict.fromkeys(("plain", "tokens", "documents", "control_mean", "control_low", "control_high"), ("label",)),
    }.items():  # fmt: skip
        variables[name] = (dims, np.stack([part[name] for part in parts], axis=-1))
    variables["q"] = (three, _adjusted(variables["p"][1]))
    variables["gap_q"] = (("criterion", "label"), _adjusted(variables["gap_p"][1]))
    return xr.Dataset(
        variables,
        coords={"criterion": list(names), "end": list(ENDS), "label": [name for name, _ in groups],
                "control": np.arange(controls)},
        attrs={"analysis": "criteria_effects", "by": by or "none", "controls": controls, "seed": seed,
               "control": CONTROL, "interval": "95 %, documents drawn anew", "table": "criterion, end, label"},
    )  # fmt: skip


def _of_label(tokens: np.ndarray, nats: np.ndarray, n: int, rng: np.random.Generator) -> dict[str, Any]:
    """One label's numbers; `nats` [recipe, document]."""
    mean = nats.sum(axis=1) / tokens.sum()
    change = mean[1:] - mean[0]
    own, control = change[: 2 * n].reshape(n, 2), change[2 * n :]
    gap = own[:, 1] - own[:, 0]
    found: dict[str, Any] = {
        "change": own, "gap": gap, "control_change": control, "plain": mean[0], "tokens": int(tokens.sum()),
        "documents": len(tokens),
    }  # fmt: skip
    bounds = _Drawn(tokens, (nats[1 : 1 + 2 * n] - nats[0]).T, rng)
    found |= bounds.of(n)
    if not control.size:
        nothing = np.full(n, np.nan)
        return found | {
            "p": np.full((n, 2), np.nan), "gap_p": nothing, "control_mean": np.nan, "control_low": np.nan,
            "control_high": np.nan,
        }  # fmt: skip
    below = (control[None, :] <= own[:, :1]).sum(axis=1)
    above = (control[None, :] >= own[:, 1:]).sum(axis=1)
    apart = control[1::2] - control[::2]
    both = np.concatenate([apart, -apart])
    low, high = np.quantile(control, [0.025, 0.975])
    return found | {
        "p": (1 + np.stack([below, above], axis=1)) / (1 + control.size),
        "gap_p": (1 + (both[None, :] >= gap[:, None]).sum(axis=1)) / (1 + both.size),
        "control_mean": control.mean(), "control_low": low, "control_high": high,
    }  # fmt: skip


@dataclass(frozen=True)
class _Drawn:
    """Bootstrap of the changes [document, criterion x end]."""

    tokens: np.ndarray
    apart: np.ndarray
    rng: np.random.Generator

    def of(self, n: int) -> dict[str, np.ndarray]:
        """Intervals, and how often each criterion is the best; NaN with a single document."""
        size = len(self.tokens)
        if size < 2:
            blank, short = np.full((n, 2), np.nan), np.full(n, np.nan)
            names = {"low": blank, "high": blank, "best": blank}
            return names | {"gap_low": short, "gap_high": short, "gap_best": short}
        times = self.rng.multinomial(size, np.full(size, 1 / size), DRAWS)
        drawn = ((times @ self.apart) / (times @ self.tokens)[:, None]).reshape(DRAWS, n, 2)
        gap = drawn[..., 1] - drawn[..., 0]
        low, high = np.quantile(drawn, [0.025, 0.975], axis=0)
        gap_low, gap_high = np.quantile(gap, [0.025, 0.975], axis=0)
        best = np.stack([_best(-drawn[..., 0]), _best(drawn[..., 1])], axis=1)
        return {
            "low": low, "high": high, "best": best, "gap_low": gap_low, "gap_high": gap_high, "gap_best": _best(gap),
        }  # fmt: skip


def _best(values: np.ndarray) -> np.ndarray:
    """Share of the draws [draw, criterion] in which each criterion is largest; equals share a draw."""
    top = values >= values.max(axis=1, keepdims=True) - 1e-12
    return (top / top.sum(axis=1, keepdims=True)).mean(axis=0)


def _adjusted(p: np.ndarray) -> np.ndarray:
    """Benjamini-Hochberg over all axes but the last, the label."""
    if np.isnan(p).all():
        return p
    flat = p.reshape(-1, p.shape[-1])
    return np.stack([false_discovery_control(column) for column in flat.T], axis=-1).reshape(p.shape)


def _criteria(importance: xr.Dataset, wanted: Sequence[str] | None) -> list[str]:
    if "label" in importance.dims:
        raise MoescopeError("This importance is by label; choose one: importance.sel(label=...).")
    if "criterion" not in importance.coords:
        raise MoescopeError("This is not a result of analysis.importance.")
    known = [str(name) for name in importance["criterion"].values]
    unknown = [name for name in wanted or () if name not in known]
    if unknown:
        raise MoescopeError(f"There is no criterion {unknown[0]!r}; there are {', '.join(known)}.")
    silent = [name for name in known if np.isnan(importance[name].values).all(axis=1).any()]
    if wanted is None:
        known = [name for name in known if name not in silent]
    elif set(wanted) & set(silent):
        raise MoescopeError(f"The criterion {next(n for n in wanted if n in silent)!r} says nothing in some layers.")
    return list(wanted or known)


def _ends(importance: xr.Dataset, name: str, n: int, rng: np.random.Generator) -> tuple[Sets, Sets]:
    """The n lowest and n highest experts of each layer; an expert without a value was never selected: the lowest."""
    values = importance[name].transpose("layer", "expert").values
    lowest: Sets = {}
    highest: Sets = {}
    for row, width in enumerate(_widths(importance, n)):
        own = np.where(np.isnan(values[row, :width]), -np.inf, values[row, :width])
        order = np.lexsort((rng.random(width), own))  # equals in random order
        lowest[row] = tuple(sorted(order[:n].tolist()))
        highest[row] = tuple(sorted(order[width - n :].tolist()))
    return lowest, highest


def _random(importance: xr.Dataset, n: int, rng: np.random.Generator) -> tuple[Sets, Sets]:
    dealt = [rng.permutation(width)[: 2 * n].tolist() for width in _widths(importance, n)]
    first, second = ({row: tuple(sorted(deal[part])) for row, deal in enumerate(dealt)}
                     for part in (slice(n), slice(n, None)))  # fmt: skip
    return first, second


def _widths(importance: xr.Dataset, n: int) -> list[int]:
    widths = [int(width) for width in importance["n_experts"].values]
    narrow = next((row for row, width in enumerate(widths) if width < 2 * n), None)
    if n < 1 or narrow is not None:
        layer = int(importance["layer"].values[narrow or 0])
        raise MoescopeError(f"Layer {layer} has {widths[narrow or 0]} experts: not {n} lowest and {n} other highest.")
    return widths


def _recipe(importance: xr.Dataset, side: Sets, kind: Kind) -> Recipe:
    edit = {"mask": Mask, "zero": Zero}[kind]
    sites = importance["site"].values
    return Recipe([edit(layer=str(sites[row]), expert=experts) for row, experts in side.items()])
