"""What masking one expert does to the loss, in words, held to its controls (from `effects.causal_effect`)."""

from __future__ import annotations

import numpy as np
import xarray as xr

from moescope.analysis.summary import LEVEL, Finding

NAMED = 3
"""Labels named in a headline; the rest are counted."""


def effect_finding(result: xr.Dataset) -> Finding:
    """Whether the model loses more without this expert than without others of its layer, and on which label.

    It stands where `p_any` (corrected over the labels) is at most 0.05. Where the layer has too few other experts for
    that, an expert beyond all of them is told as such, and does not stand.

    Args:
        result: from `effects.causal_effect`.
    """
    labels = [str(name) for name in result["label"].values]
    change, p = result["change"].values, result["p_any"].values
    controls = result["control_change"].values
    kind = {"mask": "Masking", "zero": "Zeroing"}[str(result.attrs["kind"])]
    if not len(controls):
        top = int(np.abs(change).argmax())
        words = f"{kind} it moves the loss of {_of(labels[top])}by {change[top]:+.4f} nats per token."
        return Finding(
            "causal_effect", words, "Nothing was masked beside it, so nothing says whether that is much.", None
        )
    middle = np.median(np.vstack([change, controls]), axis=0)
    order = np.lexsort((-np.abs(change - middle), p))
    top, n = int(order[0]), len(controls)
    values = {"label": labels[top], "change": float(change[top]), "p": float(p[top]), "controls": n}
    least = 1 / (1 + n)
    detail = _detail(result, top)
    stands = [place for place in order.tolist() if p[place] <= LEVEL]
    if stands:
        named = ", ".join(f"{_of(labels[place])}by {change[place]:+.4f}" for place in stands[:NAMED])
        more = f" and of {len(stands) - NAMED} more labels" if len(stands) > NAMED else ""
        above = [change[place] > middle[place] for place in stands]
        side = "more" if all(above) else "less" if not any(above) else "otherwise"
        words = (
            f"{kind} it moves the loss of {named}{more} nats per token, {side} than masking others of its layer does."
        )
        return Finding("causal_effect", words, detail, True, values)
    if least > LEVEL and p[top] <= least * (1 + 1e-9):
        side = "more" if change[top] > middle[top] else "less"
        words = (
            f"{kind} it moves the loss of {_of(labels[top])}by {change[top]:+.4f} nats per token, {side} than masking "
            f"any of the {n} others does; with so few that is no proof."
        )
        return Finding("causal_effect", words, f"{detail} p cannot fall below {least:.3f} here.", False, values)
    sure = (result["low"].values > 0) | (result["high"].values < 0)
    if not sure.any():
        words = f"{kind} it moves the loss of no label beyond what the choice of texts does."
        return Finding(
            "causal_effect",
            words.replace("no label", "the texts") if len(labels) == 1 else words,
            detail,
            False,
            values,
        )
    top = int(np.where(sure, np.abs(change), -1).argmax())
    words = (
        f"{kind} it moves the loss of {_of(labels[top])}by {change[top]:+.4f} nats per token; masking others of its "
        "layer moves it as far."
    )
    values |= {"label": labels[top], "change": float(change[top]), "p": float(p[top])}
    return Finding("causal_effect", words, _detail(result, top), False, values)


def _detail(result: xr.Dataset, place: int) -> str:
    part = result.isel(label=place)
    labels, n = result.sizes["label"], result.sizes["control"]
    low, high, documents = float(part["low"]), float(part["high"]), int(part["documents"])
    spread = f" (95 % over {documents} documents: {low:+.4f} to {high:+.4f})" if low == low else ""
    over = f", corrected over {labels} labels" if labels > 1 else ""
    where = f"{part['label'].item()}: " if labels > 1 else ""
    others = f"all {n} others" if n == int(result.attrs["experts_of_layer"]) - 1 else f"{n} random others"
    lowest, highest = float(part["control_change"].min()), float(part["control_change"].max())
    return (
        f"{where}{float(part['plain']):.3f} → {float(part['edited']):.3f} nats per token{spread}; {others} of its "
        f"layer move it by {lowest:+.4f} to {highest:+.4f}; p = {float(part['p_any']):.2g}{over}."
    )


def _of(label: str) -> str:
    return "" if label == "all" else f"{label} "
