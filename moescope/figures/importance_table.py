"""Importance: which experts each criterion puts first, and how alike the criteria rank them."""

from __future__ import annotations

from typing import Any

import numpy as np
import plotly.graph_objects as go
import xarray as xr

from moescope.figures.axes import expert_axis, layer_axis, layer_names
from moescope.figures.sheets import Sheet
from moescope.figures.theme import colour_bar, plain, row_height, template

READ = (
    "Left: the experts of each layer in the order of one criterion, chosen above; dark is first. Right: how alike two "
    "criteria rank the experts of a layer (Spearman, mean over layers); a faint number is one that independent "
    "rankings reach too. The diagonal is how well a criterion agrees with itself on the other half of the documents: "
    "no other criterion can be asked to agree better than that."
)
NAMES = {
    "frequency": "frequency", "mean_weight": "mean weight", "mc_moe": "MC-MoE", "esft_token": "ESFT tokens",
    "esft_gate": "ESFT gates", "reap": "REAP", "reap_total": "REAP, total", "ean": "EAN", "ean_total": "EAN, total",
    "msan": "MSAN", "heapr": "HEAPr", "heapr_total": "HEAPr, total", "naee": "NAEE",
    "router_change": "router row change", "effect": "masked alone",
}  # fmt: skip
"""How criteria are written; others as they are called."""


def said(criterion: str) -> str:
    """A criterion's name as people write it."""
    return NAMES.get(criterion, plain(criterion))


def importance(result: xr.Dataset) -> go.Figure:
    """Draws each criterion's order of the experts, and the rank correlations between criteria.

    How to read it: see `READ`.

    Args:
        result: from `analysis.importance`.
    """
    names = [str(name) for name in result["criterion"].values]
    layers = result.sizes["layer"]
    sheet = Sheet(
        ["experts of each layer, first to last", "do the criteria agree?"],
        cols=2,
        column_widths=[0.46, 0.54],
        horizontal_spacing=0.19,
    )
    start = names.index("reap") if "reap" in names else 0
    for place, name in enumerate(names):
        sheet.add_trace(_order(result, name, visible=place == start), row=1, col=1)
    sheet.add_trace(_agreement(result, names), row=1, col=2)
    for text in _numbers(result, names):
        sheet.add_trace(text, row=1, col=2)
    height = max(row_height(layers) * layers, 30 * len(names))
    axis = {"categoryorder": "array", "categoryarray": [said(name) for name in names], "showgrid": False}
    sheet.update_xaxes(expert_axis(result, most=8), row=1, col=1)
    sheet.update_yaxes(layer_axis(result), row=1, col=1)
    sheet.update_xaxes(axis | {"tickangle": -45, "ticks": ""}, row=1, col=2)
    sheet.update_yaxes(axis | {"autorange": "reversed", "ticks": ""}, row=1, col=2)
    colours: Any = template("light").layout
    sheet.update_layout(
        height=height + 190,
        margin={"t": 92},
        showlegend=False,
        coloraxis={"colorscale": colours.colorscale.sequential, "reversescale": True, "cmin": 1,
                   "cmax": float(result.sizes["expert"]), "showscale": False},
        coloraxis2={"colorscale": colours.colorscale.diverging, "cmin": -1, "cmax": 1,
                    "colorbar": {"title": {"text": "Spearman", "side": "right"}} | colour_bar(height)},
        updatemenus=[_menu(names, start, len(names) + 4)],
    )  # fmt: skip
    return sheet.figure()


def _menu(names: list[str], start: int, traces: int) -> dict[str, object]:
    buttons = [
        {
            "label": said(name),
            "method": "restyle",
            "args": [{"visible": [which == place or which >= len(names) for which in range(traces)]}],
        }
        for place, name in enumerate(names)
    ]
    return {
        "buttons": buttons, "active": start, "x": 0, "xanchor": "left", "y": 1, "yanchor": "bottom",
        "pad": {"b": 34}, "font": {"size": 12},
    }  # fmt: skip


def _order(result: xr.Dataset, name: str, *, visible: bool) -> go.Heatmap:
    rank = result["rank"].sel(criterion=name).transpose("layer", "expert").values
    values = result[name]
    known = "label" not in values.dims
    details = values.transpose("layer", "expert").values if known else np.full(rank.shape, np.nan)
    return go.Heatmap(
        z=rank,
        x=result["expert"].values,
        y=layer_names(result),
        customdata=details,
        coloraxis="coloraxis",
        hoverongaps=False,
        xgap=1,
        ygap=1,
        visible=visible,
        hovertemplate=f"layer %{{y}}, expert %{{x}}<br><b>place %{{z}} by {said(name)}</b>"
        + ("<br>%{customdata:.4g}" if known else "")
        + "<extra></extra>",
    )


def _shown(result: xr.Dataset) -> np.ndarray:
    """Correlations between criteria, and across halves of the documents on the diagonal."""
    values = result["spearman_within"].values.copy()
    np.fill_diagonal(values, np.diag(result["split_half_within"].values))
    return values


def _agreement(result: xr.Dataset, names: list[str]) -> go.Heatmap:
    shown = [said(name) for name in names]
    details = np.stack(
        [result[name].values for name in ("kendall_within", "split_half_within", "null_p99", "q")], axis=-1
    )
    return go.Heatmap(
        z=_shown(result),
        x=shown,
        y=shown,
        customdata=details,
        coloraxis="coloraxis2",
        hoverongaps=False,
        xgap=1,
        ygap=1,
        hovertemplate=(
            "%{y} and %{x}<br><b>Spearman %{z:.2f}</b>, Kendall %{customdata[0]:.2f}<br>across halves of the "
            "documents %{customdata[1]:.2f}<br>independent rankings: up to %{customdata[2]:.2f}, q %{customdata[3]:.2g}"
            "<extra></extra>"
        ),
    )


def _numbers(result: xr.Dataset, names: list[str]) -> list[go.Scatter]:
    """The numbers in the cells: dark on pale cells and white on dark ones, faint where chance reaches them."""
    values, limit = _shown(result), result["null_p99"].values
    known = ~np.isnan(values)
    chance = known & (np.abs(values) <= np.nan_to_num(limit, nan=-1))
    deep = known & ~chance & (np.abs(values) > 0.7)
    traces = []
    for cells, colour in ((chance, "#a3a9b3"), (deep, "#ffffff"), (known & ~chance & ~deep, "#23272e")):
        row, column = np.nonzero(cells)
        traces.append(
            go.Scatter(
                x=[said(names[place]) for place in column],
                y=[said(names[place]) for place in row],
                text=[f"{values[cell]:.2f}" for cell in zip(row, column, strict=True)],
                mode="text",
                textfont={"size": 11, "color": colour},
                hoverinfo="skip",
            )
        )
    return traces
