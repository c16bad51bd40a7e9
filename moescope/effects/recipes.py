"""What a recipe does to the loss, by label, with intervals over documents and random experts as the control."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import xarray as xr

from moescope.capturing.corpus import Corpus
from moescope.edits import Recipe
from moescope.effects.losses import Losses, document_losses
from moescope.errors import MoescopeError
from moescope.hooks import Model

if TYPE_CHECKING:
    from jaxtyping import Float

DRAWS = 2000  # bootstrap draws of documents
CONTROL = (
    "each control does the same edits to random experts of the same layers that the recipe leaves alone; p = (1 + "
    "controls at least as far from the median of recipe and controls, on either side) / (1 + controls)"
)


def effect(
    model: Model,
    corpus: Corpus,
    recipe: Recipe,
    *,
    by: str | None = None,
    controls: int = 20,
    seed: int = 0,
    max_length: int = 512,
    on_progress: Callable[[int], None] | None = None,
) -> xr.Dataset:
    """What a recipe does to the loss of a corpus, held against the same edits on random experts.

    How to read it: `change` is what the edit adds to the loss, in nats per token; below 0 it helps. The recipe's
    experts matter for a label when `change` lies outside what the controls do (`control_low`, `control_high`) and `p`
    is small. `divergence` says how far the predictions move at all, right or wrong.

    Args:
        model: a model with a tokenizer.
        corpus: labelled texts.
        recipe: its edits must name experts.
        by: the label; without one, all documents together.
        controls: random recipes; 0 for none. p cannot be below 1 / (1 + controls).
        seed: of controls and intervals.
        max_length: tokens of context.
        on_progress: called with the tokens done, of (2 + controls) x the corpus.

    Returns:
        Dataset with dims (label): plain, edited (mean loss, nats per token), change, low, high (95 %, documents drawn
        anew), divergence (nats per token), control_divergence (mean of the controls), tokens, documents,
        control_mean, control_low, control_high (2.5 and 97.5 % of the controls), p, p_any (corrected over the labels:
        `p_over_labels`); and (control, label): control_change.

    Raises:
        MoescopeError: unknown label, or a recipe that does not fit.
    """
    rng = np.random.default_rng(seed)
    others = [matched(recipe, model, rng) for _ in range(controls)]
    losses = document_losses(model, corpus, [None, recipe, *others], max_length=max_length, on_progress=on_progress)
    return beside_controls(model, corpus, recipe, losses, by, rng, seed)


def beside_controls(
    model: Model,
    corpus: Corpus,
    recipe: Recipe,
    losses: Losses,
    by: str | None,
    rng: np.random.Generator,
    seed: int,
) -> xr.Dataset:
    """`effect` from the losses of no recipe, the recipe, and its controls, in this order; `rng` draws the intervals."""
    controls = len(losses.nats) - 2
    names, code = losses.labels(by)
    rows: dict[str, list[Any]] = {name: [] for name in (
        "plain", "edited", "change", "low", "high", "divergence", "control_divergence", "tokens", "documents",
        "control_mean", "control_low", "control_high", "p",
    )}  # fmt: skip
    control_change = np.zeros((controls, len(names)))
    for label in range(len(names)):
        here = np.flatnonzero(code == label)
        tokens, nats = losses.tokens[here], losses.nats[:, here]
        mean = nats.sum(1) / tokens.sum()
        change = mean[1:] - mean[0]
        control_change[:, label] = change[1:]
        low, high = _interval(nats[1] - nats[0], tokens, rng)
        between = np.quantile(change[1:], [0.025, 0.975]) if controls else (np.nan, np.nan)
        values = (
            mean[0], mean[1], change[0], low, high, losses.divergence[1, here].sum() / tokens.sum(),
            losses.divergence[2:, here].sum() / tokens.sum() / controls if controls else np.nan, tokens.sum(),
            len(here), change[1:].mean() if controls else np.nan, *between,
            p_beside(change[0], change[1:]) if controls else np.nan,
        )  # fmt: skip
        for name, value in zip(rows, values, strict=True):
            rows[name].append(value)
    rows["p_any"] = p_over_labels(np.array(rows["change"]), control_change).tolist()
    return xr.Dataset(
        {name: ("label", values) for name, values in rows.items()}
        | {"control_change": (("control", "label"), control_change)},
        coords={"label": names, "control": np.arange(controls)},
        attrs=_attrs(model, corpus, losses, "effect", by)
        | {"controls": controls, "seed": seed, "control": CONTROL, "edits": describe(recipe), "table": "label"},
    )


def p_beside(change: float, controls: np.ndarray) -> float:
    """How often one of n + 1 alike changes lies this far out, whichever it is and on whichever side.

    The side is not chosen by looking at the change: that would halve the p of every recipe that does nothing special.
    The middle is that of all of them, so that the recipe's own stands out no more than any other would.
    """
    middle = np.median(np.append(controls, change))
    far = np.abs(controls - middle) >= abs(change - middle) * (1 - 1e-9)
    return float((1 + far.sum()) / (1 + len(controls)))


def p_over_labels(change: Float[np.ndarray, " label"], controls: Float[np.ndarray, "control label"]) -> np.ndarray:
    """[label] `p_beside` corrected for having looked at several labels: how often one of n + 1 alike changes lies this
    far out on any label.

    Source: Westfall & Young (1993), single-step max-T. Distance is from the median of recipe and controls, in their
    mean distance from it, so that labels of any size compare; the recipe counts in both like every control.
    Bonferroni's and Benjamini & Hochberg's would ask for as many controls as there are labels times 20.

    Args:
        change: of the recipe.
        controls: of the random recipes; NaN comes back without any.
    """
    if not len(controls):
        return np.full(len(change), np.nan)
    apart = np.vstack([change, controls])
    apart = np.abs(apart - np.median(apart, axis=0))
    mean = apart.mean(axis=0)
    far = np.divide(apart, mean, out=np.zeros_like(apart), where=mean > 0)
    reached = far[1:].max(axis=1)[:, None] >= far[0] * (1 - 1e-9)
    return (1 + reached.sum(axis=0)) / (1 + len(controls))


def sweep(
    model: Model,
    corpus: Corpus,
    recipe: Recipe,
    factors: Sequence[float],
    *,
    by: str | None = None,
    controls: int = 0,
    seed: int = 0,
    on_progress: Callable[[int], None] | None = None,
) -> xr.Dataset:
    """`effect` at several strengths of a recipe's scale edits: dims (factor, label), and the same columns.

    Raises:
        MoescopeError: the recipe scales nothing.
    """
    done = 0

    def shifted(tokens: int) -> None:
        if on_progress is not None:
            on_progress(done + tokens)

    parts = []
    for factor in factors:
        stronger = at_strength(recipe, factor)
        part = effect(model, corpus, stronger, by=by, controls=controls, seed=seed, on_progress=shifted)
        done += int(part["tokens"].sum()) * (2 + controls)
        parts.append(part)
    whole: Any = xr.concat(parts, xr.DataArray(list(factors), dims="factor", name="factor"), combine_attrs="override")
    whole.attrs |= {"analysis": "sweep", "edits": describe(recipe), "table": "factor, label"}
    return whole


def at_strength(recipe: Recipe, factor: float | None) -> Recipe:
    """The same recipe with another factor in its scale edits; as it is for None.

    Raises:
        MoescopeError: the recipe scales nothing, or the factor is below 0.
    """
    if factor is None:
        return recipe
    if not 0 <= factor < np.inf:
        raise MoescopeError(f"Experts are scaled by 0 or more, not by {factor}.")
    if not any(edit.kind == "scale" for edit in recipe.edits):
        raise MoescopeError("A sweep over the strength needs a recipe with scale edits.")
    edits = [e.model_copy(update={"factor": factor}) if e.kind == "scale" else e for e in recipe.edits]
    return recipe.model_copy(update={"edits": edits})


def matched(recipe: Recipe, model: Model, rng: np.random.Generator) -> Recipe:
    """The same edits on as many random experts of the same layers, none of them the recipe's own.

    Raises:
        MoescopeError: an edit without experts, or a layer with too few others.
    """
    widths = {name: site.n_experts for site in model.sites for name in (site.layer, site.key)}
    own: dict[int | str, set[int]] = {}
    if any(edit.kind == "replace" for edit in recipe.edits):
        raise MoescopeError(
            "Replaced tensors are one expert's own and fit no other; there is no random control for that."
        )
    for edit in recipe.edits:
        own.setdefault(edit.layer, set()).update(getattr(edit, "expert", ()))
    drawn: dict[int | str, dict[int, int]] = {}
    for layer, experts in own.items():
        if not experts:
            raise MoescopeError(f"Layer {layer} is edited without naming experts; there is no random control for that.")
        rest = sorted(set(range(widths.get(layer, 0))) - experts)
        if len(rest) < len(experts):
            raise MoescopeError(f"Layer {layer}: {len(rest)} experts are left, too few to stand for {len(experts)}.")
        chosen = rng.choice(rest, len(experts), replace=False)
        drawn[layer] = dict(zip(sorted(experts), map(int, chosen), strict=True))
    edits = [
        edit.model_copy(update={"expert": tuple(drawn[edit.layer][expert] for expert in getattr(edit, "expert", ()))})
        for edit in recipe.edits
    ]
    return Recipe(edits, config_hash=recipe.config_hash, note="random control")


def describe(recipe: Recipe) -> str:
    """A recipe in one line."""
    return "; ".join(
        f"layer {edit.layer} {edit.kind} {', '.join(map(str, getattr(edit, 'expert', ())))}".strip()
        + (f" x {edit.factor:g} ({edit.stage})" if edit.kind == "scale" else "")
        for edit in recipe.edits
    )


def _interval(apart: np.ndarray, tokens: np.ndarray, rng: np.random.Generator) -> tuple[float, float]:
    """95 % of the mean difference per token, documents drawn anew; NaN for a single one."""
    if len(apart) < 2:
        return np.nan, np.nan
    times = rng.multinomial(len(apart), np.full(len(apart), 1 / len(apart)), DRAWS)
    low, high = np.quantile((times @ apart) / (times @ tokens), [0.025, 0.975])
    return float(low), float(high)


def _attrs(model: Model, corpus: Corpus, losses: Losses, analysis: str, by: str | None) -> dict[str, Any]:
    return {
        "analysis": analysis,
        "model": model.name,
        "config_hash": model.config_hash,
        "corpus": corpus.name.rpartition("/")[2],
        "by": by or "none",
        "documents": len(losses.documents),
        "tokens": int(losses.tokens.sum()),
    }
