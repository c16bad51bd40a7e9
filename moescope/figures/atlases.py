"""The atlas as a map: every expert of every layer, coloured by whichever measure is chosen above it."""

from __future__ import annotations

from typing import Any

import numpy as np
import plotly.graph_objects as go
import xarray as xr

from moescope.analysis.labelled import expert_name
from moescope.figures.axes import expert_axis, layer_axis, layer_names
from moescope.figures.sheets import Sheet
from moescope.figures.theme import colour_bar, plain, row_height, template

READ = (
    "Each cell is one expert; choose above the map what colours it. Load is in fair shares of its layer's work. "
    "nPMI is of the label that the expert prefers most, and the cell is empty where no preference stands against "
    "dealing the labels anew over documents. The tooltip names links and look-alikes that stand against their null. "
    "Norms and magnitudes grow with depth: compare experts inside a layer."
)
"""How to read the figure."""

_MEASURES = {
    "relative_load": "load, × fair share",
    "npmi": "nPMI of its best label",
    "reap": "REAP: mean weight × norm",
    "ean": "mean output norm",
    "absmax": "largest output magnitude",
    "effect": "rise of the loss without it",
}


def atlas(result: xr.Dataset) -> go.Figure:
    """Draws the atlas as a layer x expert map with a menu of measures.

    How to read it: see `READ`.

    Args:
        result: from `analysis.atlas`.
    """
    measures = [name for name in _MEASURES if name in result]
    height = row_height(result.sizes["layer"]) * result.sizes["layer"]
    layout: Any = template().layout
    scale = layout.colorscale.sequential
    sheet = Sheet()
    words = _words(result)
    for index, name in enumerate(measures):
        sheet.add_trace(
            go.Heatmap(
                z=result[name].values,
                x=result["expert"].values,
                y=layer_names(result),
                customdata=words,
                colorscale=scale,
                colorbar={
                    "title": {"text": _MEASURES[name], "side": "right", "font": {"size": 12}},
                    "tickfont": {"size": 11},
                    "outlinewidth": 0,
                    "thickness": 10,
                }
                | colour_bar(height),
                hoverongaps=False,
                xgap=1,
                ygap=1,
                visible=index == 0,
                name=name,
                hovertemplate=f"layer %{{y}}, expert %{{x}}<br><b>{_MEASURES[name]}: %{{z:.3g}}</b>"
                "%{customdata}<extra></extra>",
            )
        )
    sheet.update_xaxes(expert_axis(result))
    sheet.update_yaxes(layer_axis(result))
    sheet.update_layout(height=150 + height, margin={"t": 84})
    if len(measures) > 1:
        buttons = [
            {
                "label": _MEASURES[name],
                "method": "restyle",
                "args": [{"visible": [which == name for which in measures]}],
            }
            for name in measures
        ]
        menu = {"buttons": buttons, "x": 0, "xanchor": "left", "y": 1, "yanchor": "bottom", "pad": {"b": 12}}
        sheet.update_layout(updatemenus=[menu])
    return sheet.figure()


def _words(result: xr.Dataset) -> np.ndarray:
    """What the tooltip says of each expert beside the measure."""
    layers, widest = result.sizes["layer"], result.sizes["expert"]
    names = layer_names(result)
    out = np.full((layers, widest), "", dtype=object)
    for row in range(layers):
        for expert in range(int(result["n_experts"].values[row])):
            lines = []
            if "prefers" in result and result["prefers"].values[row, expert]:
                lines.append(f"prefers {plain(result['prefers'].values[row, expert])}")
            for title, name, step in (
                ("after", "predecessor", -1),
                ("goes on to", "successor", 1),
                ("scored like", "similar", 0),
            ):
                lines += _near(result, names, row, expert, title, name, step)
            if "super" in result and bool(result["super"].values[row, expert]):
                lines.append("super expert by the published rule")
            out[row, expert] = "".join(f"<br>{line}" for line in lines)
    return out


def _near(result: xr.Dataset, names: list[str], row: int, expert: int, title: str, name: str, step: int) -> list[Any]:
    if name not in result or not 0 <= row + step < len(names):
        return []
    found = result[name].values[row, expert]
    shown = [expert_name(names[row + step], int(e)) for e in found[np.isfinite(found)]]
    return [f"{title} {', '.join(shown)}"] if shown else []
