"""What unlearning did: variants side by side with intervals, the terms over the steps, and the relearning attack."""

from __future__ import annotations

from typing import Any

import numpy as np
import plotly.graph_objects as go
import xarray as xr

from moescope.figures.sheets import Sheet
from moescope.figures.theme import BLUE, GREY, ORANGE, plain

READ = (
    "Each dot is one way of unlearning, the bar its 95 % interval (items drawn anew), the thin line the range of its "
    "runs where there are several; the dotted line is the model before. Orange panels should fall, blue ones stay at "
    "the line. What falls in both was not unlearned but broken."
)
READ_PROGRESS = (
    "Left: the loss of the forget set should rise and level off while the held-out retain loss (blue) stays "
    "where it was. Right: the terms that training sees; the anchor falls as the router settles on the target."
)
READ_RELEARNING = (
    "The share of forgotten answers that come back as the whole model is trained on half of them. Facts that return "
    "without being shown again (blue) were hidden, not erased."
)
HOVER = "step %{x}: %{y:.3f}<extra>%{fullData.name}</extra>"


def unlearning(result: xr.Dataset) -> go.Figure:
    """Draws every variant of unlearning beside the model before, a panel for each measure.

    How to read it: see `READ`.

    Args:
        result: from `unlearning.compared`.
    """
    shown = _shown([str(name) for name in result["measure"].values])
    variants = [str(name) for name in result["variant"].values if str(name) != "before"]
    columns = min(3, len(shown))
    rows = -(-len(shown) // columns)
    height = rows * (84 + 30 * len(variants)) + 50
    titles = {
        str(name): str(title) for name, title in zip(result["measure"].values, result["title"].values, strict=True)
    }
    sheet = Sheet(
        [plain(titles[name]) for name in shown],
        rows=rows,
        cols=columns,
        shared_yaxes=True,
        horizontal_spacing=0.05,
        vertical_spacing=62 / height,
    )
    for place, name in enumerate(shown):
        row, column = place // columns + 1, place % columns + 1
        part = result.sel(measure=name)
        for trace in _dots(part.sel(variant=variants), ORANGE if name.startswith(("forget", "relearnt")) else BLUE):
            sheet.add_trace(trace, row, column)
        if "before" in result["variant"].values:
            where: dict[str, Any] = {"row": row, "col": column}
            line = {"color": GREY, "dash": "dot", "width": 1.5}
            if np.isfinite(was := float(part["value"].sel(variant="before"))):
                sheet.add_vline(x=was, line=line, **where)
        loss = name.endswith("loss")
        sheet.update_xaxes(row=row, col=column, rangemode="tozero", tickformat=None if loss else ".0%")
    sheet.update_yaxes(type="category", autorange="reversed")
    sheet.update_layout(
        height=height,
        showlegend=False,
        margin={"t": 44, "b": 30},
    )
    return sheet.figure()


def _shown(measures: list[str]) -> list[str]:
    sets = list(dict.fromkeys(name.partition(": ")[0] for name in measures if ": " in name))
    wanted = [f"forget: {measure}" for measure in ("exact", "paraphrase", "extraction")]
    for name in sets:
        if name != "forget":
            kinds = [f"{name}: exact", f"{name}: loss"]
            wanted.append(next((kind for kind in kinds if kind in measures), kinds[1]))
    wanted += ["kept", "relearnt_hidden"]
    if "forget: exact" not in measures:
        wanted.insert(0, "forget: loss")
    return [name for name in wanted if name in measures]


def _dots(part: xr.Dataset, colour: str) -> list[go.Scatter]:
    value, names = part["value"].values, [plain(str(name)) for name in part["variant"].values]
    ranges = go.Scatter(
        x=[x for low, high in zip(part["least"].values, part["most"].values, strict=True) for x in (low, high, None)],
        y=[y for name in names for y in (name, name, None)],
        mode="lines",
        line={"color": GREY, "width": 1},
        hoverinfo="skip",
    )
    dots = go.Scatter(
        x=value,
        y=names,
        mode="markers",
        marker={"size": 10, "color": colour},
        error_x={
            "type": "data", "symmetric": False, "array": np.nan_to_num(part["high"].values - value),
            "arrayminus": np.nan_to_num(value - part["low"].values), "color": colour, "thickness": 2.5, "width": 0,
        },
        customdata=np.stack([part[name].values for name in ("low", "high", "least", "most")], axis=-1),
        hovertemplate=(
            "%{y}<br><b>%{x:.3f}</b><br>95 %: %{customdata[0]:.3f} to %{customdata[1]:.3f}<br>"
            "runs: %{customdata[2]:.3f} to %{customdata[3]:.3f}<extra></extra>"
        ),
    )  # fmt: skip
    return [ranges, dots]


def unlearning_progress(result: xr.Dataset) -> go.Figure:
    """Draws a run's terms and what was seen of it at its looks.

    How to read it: see `READ_PROGRESS`.

    Args:
        result: from `Unlearned.progress`.
    """
    sheet = Sheet(["losses, nats per token", "terms of the objective"], cols=2, horizontal_spacing=0.1)
    names = {"forgotten": ("forget set", ORANGE), "utility": ("held-out retain set", BLUE)}
    for name, (label, colour) in names.items():
        if name in result:
            there = np.isfinite(result[name].values)
            sheet.add_trace(
                go.Scatter(
                    x=result["step"].values[there], y=result[name].values[there], name=label,
                    mode="lines+markers", line={"color": colour}, hovertemplate=HOVER,
                ), 1, 1,
            )  # fmt: skip
    for name, colour in (("forget", ORANGE), ("retain", BLUE), ("anchor", GREY)):
        if name in result:
            sheet.add_trace(
                go.Scatter(
                    x=result["step"].values, y=result[name].values, name=f"{name} term", mode="lines",
                    line={"color": colour, "width": 1.5}, hovertemplate=HOVER,
                ), 1, 2,
            )  # fmt: skip
    sheet.update_xaxes(title={"text": "step"})
    sheet.update_layout(height=340, legend={"orientation": "h", "y": -0.22}, margin={"t": 44, "b": 30})
    return sheet.figure()


def relearning(result: xr.Dataset) -> go.Figure:
    """Draws how soon forgotten answers come back.

    How to read it: see `READ_RELEARNING`.

    Args:
        result: from `unlearning.relearn`.
    """
    sheet = Sheet()
    for name, label, colour in (("shown", "shown again", ORANGE), ("hidden", "not shown", BLUE)):
        sheet.add_trace(
            go.Scatter(
                x=result["step"].values, y=result[name].values, name=label, mode="lines+markers",
                line={"color": colour},
                hovertemplate="%{x} steps: %{y:.0%}<extra>%{fullData.name}</extra>",
            )
        )  # fmt: skip
    sheet.update_xaxes(title={"text": "steps of relearning"})
    sheet.update_yaxes(title={"text": "answered exactly"}, tickformat=".0%", range=[-0.03, 1.03])
    sheet.update_layout(height=320, legend={"orientation": "h", "y": 1.14})
    return sheet.figure()
