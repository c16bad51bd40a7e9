"""Selection scores from stored logits: what a router compared when it chose, by the rule its site's record holds."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from scipy.special import expit, softmax

from moescope.errors import StoreError

if TYPE_CHECKING:
    from jaxtyping import Float

    from moescope.store.manifest import SiteRecord

SCORES = {
    "softmax": lambda logits: softmax(logits, axis=-1),
    "sigmoid": expit,
    "sqrtsoftplus": lambda logits: np.sqrt(np.logaddexp(logits, 0)),
}


def selection_scores(site: SiteRecord, logits: Float[np.ndarray, "token expert"]) -> Float[np.ndarray, "token expert"]:
    """Scores whose largest k were selected, [T, E]: score or logit, plus bias, with the members of lost groups filled.

    They differ from the router's own by rounding alone (it may have worked in a lower precision).

    Raises:
        StoreError: the rule of this router was not proven when it was captured, or rests on logits that are not stored.
    """
    if site.skip_classes:
        raise StoreError(f"{site.key}: its router also scores skipping an expert, and those logits are not stored.")
    base = site.rank_by.removeprefix("selection ")
    if base not in ("score", "logit") or (base == "score" and site.score_function not in SCORES):
        raise StoreError(f"{site.key}: how this router selects was not proven, so it has no selection scores.")
    scores = logits if base == "logit" else SCORES[site.score_function](logits)
    if site.selection.bias_values is not None:
        scores = scores + np.asarray(site.selection.bias_values, scores.dtype)
    return scores if site.selection.group_rule is None else _within_groups(site, scores)


def _within_groups(site: SiteRecord, scores: np.ndarray) -> np.ndarray:
    assert site.selection.group_rule is not None
    n_groups, kept, how = site.selection.group_rule
    grouped = scores.reshape(len(scores), n_groups, -1)
    ordered = np.sort(grouped, axis=-1)
    worth = ordered[..., -1] if how == "max" else ordered[..., -2:].sum(-1)
    lost = np.argsort(-worth, axis=-1, kind="stable")[:, kept:]
    fill = -np.inf if site.selection.group_fill is None else site.selection.group_fill
    filled = grouped.copy()
    np.put_along_axis(filled, lost[..., None], fill, axis=1)
    return filled.reshape(scores.shape)
