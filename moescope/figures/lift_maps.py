"""Square maps of lift, with what chance explains drawn pale: affinity between layers, co-activation inside one."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import plotly.graph_objects as go
import xarray as xr

from moescope.errors import MoescopeError
from moescope.figures.pale import beyond, details, pale_and_full
from moescope.figures.sheets import Sheet
from moescope.figures.theme import colour_bar, plain

CELLS = 400_000
"""Cells that one figure holds: beyond them the page would be too heavy for a browser."""

SIDE = 430
"""Pixels of a square map."""


def chosen_maps(known: list[str], wanted: Sequence[str] | None, worth: np.ndarray, cells: int, what: str) -> list[int]:
    """Which maps to draw: the ones asked for, or the most worthy that fit, in the result's order."""
    unknown = [name for name in wanted or [] if name not in known]
    if unknown:
        raise MoescopeError(f"The result has no {what} {plain(unknown[0])}; it has {', '.join(known)}.")
    if wanted is not None:
        return [known.index(name) for name in wanted]
    fits = max(1, CELLS // max(cells, 1))
    best = np.argsort(-np.nan_to_num(worth.astype(float), nan=-np.inf), kind="stable")[:fits]
    return sorted(best.tolist())


def lift_maps(
    part: xr.Dataset, names: Sequence[str], title: str, hover: str, level: float, reach: int
) -> list[go.Heatmap]:
    """Two maps, what chance explains below and what stands above it, which nothing does where nothing was tested."""
    lift = part["lift"].values
    with np.errstate(divide="ignore", invalid="ignore"):
        shown = np.where(np.isnan(lift), np.nan, np.maximum(np.log2(lift), -reach))
    gap = 1 if lift.shape[1] <= 64 else 0
    return pale_and_full(
        shown,
        beyond(part["q"].values, level),
        x=np.arange(lift.shape[1]),
        y=np.arange(lift.shape[0]),
        coloraxis="coloraxis",
        customdata=details(part, names),
        meta=plain(title),
        xgap=gap,
        ygap=gap,
        hovertemplate=hover,
    )


def lift_reach(lift: np.ndarray) -> int:
    """Colour saturates at 2 ** reach times the usual share, either way: enough for the largest lift, 32 at most."""
    largest = float(np.nanmax(lift, initial=1.0))
    return int(min(5, max(1, math.ceil(math.log2(max(largest, 2.0))))))


def square(sheet: Sheet, width: int, height: int, across: str, down: str, reach: int) -> None:
    """Axes of experts by experts, and the colour bar of lift."""
    ticks = list(range(-reach, reach + 1))
    axis = {"showgrid": False, "zeroline": False, "tick0": 0}
    step = {"dtick": _step(width)}
    sheet.update_xaxes(axis | step | {"title": {"text": across}, "range": [-0.5, width - 0.5]}, row=1, col=1)
    step = {"dtick": _step(height)}
    sheet.update_yaxes(axis | step | {"title": {"text": down}, "range": [height - 0.5, -0.5]}, row=1, col=1)
    sheet.update_layout(
        height=SIDE + 130,
        showlegend=False,
        coloraxis={
            "cmin": -reach,
            "cmax": reach,
            "colorbar": {
                "title": {"text": "lift", "side": "right"},
                "tickvals": ticks,
                "ticktext": [f"{2**tick}×" if tick >= 0 else f"1/{2**-tick}×" for tick in ticks],
                "x": 1.0 if across.startswith("other") else 0.535,
            }
            | colour_bar(SIDE),
        },
    )


def _step(experts: int) -> int:
    """From tick to tick: whole experts, at most ten of them."""
    return next(step for step in (1, 2, 5, 10, 20, 50, 100, 200, 500, experts) if experts <= 10 * step)


def say(sheet: Sheet, text: str) -> None:
    """A remark above the plot, at its right."""
    sheet.add_annotation(
        text=text, xref="paper", yref="paper", x=1, y=1, xanchor="right", yanchor="bottom", yshift=22, showarrow=False
    )
