"""How far each expert's router row moved between two checkpoints (METHODS 6): weights alone, no text.

Source: "A Provably Effective Method for Pruning Experts in Fine-tuned Sparse Mixture-of-Experts" (arXiv 2405.16646):
experts whose router row's norm changed least in fine-tuning are pruned first.
"""

from __future__ import annotations

import numpy as np
import xarray as xr

from moescope.analysis.labelled import PADDING
from moescope.effects.atoms import axis_of
from moescope.errors import MoescopeError, RefusedError
from moescope.hooks import Model
from moescope.hooks.weights import expert_weights


def router_change(before: Model, after: Model) -> xr.Dataset:
    """The change of each router row from one checkpoint to another of the same model.

    How to read it: `router_change` is by how much the row's norm grew; experts at the low end learned least from the
    second training. `distance` also counts a row that turned and kept its norm, `cosine` says how far it turned.

    Args:
        before: the pretrained model.
        after: the fine-tuned one.

    Returns:
        Dataset with dims (layer, expert): router_change = |w_after| - |w_before|, distance = |w_after - w_before|,
        cosine, norm_before, norm_after. NaN in layers whose router has no row for each expert.

    Raises:
        MoescopeError: the two have other layers or shapes.
        RefusedError: no layer's router rows can be read.
    """
    keys = [[site.key for site in model.sites] for model in (before, after)]
    if keys[0] != keys[1]:
        raise MoescopeError(f"{before.name} and {after.name} do not have the same MoE layers.")
    axis = axis_of(after, after.sites)
    names = ("router_change", "distance", "cosine", "norm_before", "norm_after")
    parts: dict[str, list[np.ndarray]] = {name: [] for name in names}
    for site in after.sites:
        old, new = (expert_weights(model, site.key).router for model in (before, after))
        if old is None or new is None:
            for name in names:
                parts[name].append(np.full(site.n_experts, np.nan))
            continue
        if old.shape != new.shape:
            raise MoescopeError(f"The routers at {site.key} have the shapes {old.shape} and {new.shape}.")
        a, b = old.astype(np.float64), new.astype(np.float64)
        norm_a, norm_b = np.linalg.norm(a, axis=1), np.linalg.norm(b, axis=1)
        with np.errstate(invalid="ignore", divide="ignore"):
            cosine = (a * b).sum(axis=1) / (norm_a * norm_b)
        found = (norm_b - norm_a, np.linalg.norm(b - a, axis=1), cosine, norm_a, norm_b)
        for name, values in zip(names, found, strict=True):
            parts[name].append(values)
    tables = {name: axis.pad(values) for name, values in parts.items()}
    if np.isnan(tables["distance"]).all():
        raise RefusedError("No router of this model has a row for each expert.")
    return xr.Dataset(
        {name: (("layer", "expert"), values) for name, values in tables.items()}
        | {"exists": (("layer", "expert"), axis.exists)},
        coords=axis.coordinates(),
        attrs={
            "analysis": "router_change", "model": after.name, "before": before.name,
            "config_hash": after.config_hash, "padding": PADDING, "table": "layer, expert",
            "table_order": "router_change",
        },
    )  # fmt: skip
