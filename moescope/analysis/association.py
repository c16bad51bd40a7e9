"""What "goes with" means: nPMI and its kin from four counts, and the labelled result every association is given as.

Source: nPMI as RICE uses it for experts (arXiv 2505.14681, section 3), Bouma (2009).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import xarray as xr

from moescope.analysis.discovery import adjusted
from moescope.analysis.labelled import PADDING, LayerAxis
from moescope.errors import MoescopeError

if TYPE_CHECKING:
    from jaxtyping import Float

CORRECTIONS = {"bh": "Benjamini-Hochberg", "by": "Benjamini-Yekutieli"}
NO_P = "p-values are NaN"
"""How a note begins that says why there are no p-values."""


def score(
    joint: np.ndarray, label: np.ndarray | float, expert: np.ndarray | float, total: np.ndarray | float
) -> np.ndarray:
    """nPMI from counts, broadcasting: log(p(x,y) / (p(x) p(y))) / -log p(x,y), without base.

    Args:
        joint: tokens of the label at which the expert is active.
        label: tokens of the label.
        expert: tokens at which the expert is active.
        total: all tokens.

    Returns:
        In [-1, 1]: -1 where the two never meet, 1 where every token is both; NaN where `label` or `expert` is 0.
    """
    with np.errstate(divide="ignore", invalid="ignore"):
        value = np.log(joint * total / (label * expert)) / -np.log(joint / total)
    value = np.where(joint == 0, -1.0, np.where(joint == total, 1.0, value))
    return np.where((label == 0) | (expert == 0), np.nan, np.clip(value, -1.0, 1.0))


def q_values(p: np.ndarray, correction: str = "bh") -> np.ndarray:
    """False discovery rates over all p-values that are numbers; NaN where p is.

    Args:
        p: any shape.
        correction: "bh" Benjamini-Hochberg, "by" Benjamini-Yekutieli (any dependence, stricter).

    Raises:
        MoescopeError: another correction.
    """
    if correction not in CORRECTIONS:
        raise MoescopeError('`correction` is "bh" or "by".')
    return adjusted(p, "by" if correction == "by" else "bh")


def association(
    axis: LayerAxis,
    counts: Sequence[Float[np.ndarray, "expert label"]],
    size: Float[np.ndarray, " label"],
    labels: Sequence[str],
    documents: np.ndarray,
    statistics: dict[str, Any],
    attrs: dict[str, Any],
    notes: Sequence[str],
    selections: Sequence[Float[np.ndarray, " expert"]] | None = None,
    total: float | None = None,
) -> xr.Dataset:
    """The Dataset of nPMI and its kin.

    Args:
        axis: of the layers.
        counts: per layer, tokens of each label at which each expert was active.
        size: tokens of each label.
        labels: their names.
        documents: documents that hold each label.
        statistics: any of p, q, p_max, null_mean, null_p99, npmi_low, npmi_high of shape (layer, expert, label), and
            null_max_p99 (); NaN for those left out.
        attrs: provenance.
        notes: sentences about the test; those that begin with `NO_P` go to `attrs["undefined"]`.
        selections: per layer, tokens at which each expert was active, where the labels do not divide all tokens among
            them.
        total: all tokens, in that case.
    """
    joint = axis.pad(list(counts))
    expert = joint.sum(axis=2) if selections is None else axis.pad(list(selections))
    expert = expert[..., None]
    everything = float(size.sum() if total is None else total)
    with np.errstate(divide="ignore", invalid="ignore"):
        pmi = np.log(joint * everything / (size * expert))
        active = joint / size
        elsewhere = (expert - joint) / (everything - size)
        lift = active / (expert / everything)
    cell = ("layer", "expert", "label")
    blank = np.full(joint.shape, np.nan)
    value = np.where(axis.exists[..., None], score(joint, size, expert, everything), np.nan)
    variables: dict[str, Any] = {
        "npmi": (cell, value),
        "count": (cell, joint),
        "pmi": (cell, np.where((expert == 0) | (size == 0), np.nan, pmi)),
        "p_active": (cell, active),
        "lift": (cell, lift),
        "risk_difference": (cell, active - elsewhere),
    }
    for name in ("p", "q", "p_max", "null_mean", "null_p99", "npmi_low", "npmi_high"):
        variables[name] = (cell, statistics.get(name, blank))
    variables["null_max_p99"] = ((), statistics.get("null_max_p99", np.nan))
    variables["tokens"] = ("label", size)
    variables["documents"] = ("label", documents)
    variables["uniform"] = ("layer", axis.top_k / axis.n_experts)
    variables["exists"] = (("layer", "expert"), axis.exists)
    attrs = attrs | noted(notes) | {"padding": PADDING, "table": "layer, expert, label", "table_order": "npmi"}
    return xr.Dataset(variables, coords=axis.coordinates() | {"label": list(labels)}, attrs=attrs)


UNDEFINED = "NaN where an expert is never selected or a label has no token: 0/0, no association is defined"


def noted(notes: Sequence[str]) -> dict[str, str]:
    """The attributes `undefined` (why values or p-values are NaN) and `notes` (everything else)."""
    return {
        "undefined": "; ".join([UNDEFINED, *[note for note in notes if note.startswith(NO_P)]]),
        "notes": "; ".join(note for note in notes if not note.startswith(NO_P)) or "none",
    }
