"""Balance by layer: how evenly each layer's work is shared, and what its busiest expert does, against chance."""

from __future__ import annotations

import numpy as np
import plotly.graph_objects as go
import xarray as xr

from moescope.errors import MoescopeError
from moescope.figures.axes import layer_axis, layer_names
from moescope.figures.marks import chance_ticks
from moescope.figures.sheets import Sheet
from moescope.figures.theme import BLUE, row_height

READ = (
    "Left: how many equally busy experts would be as mixed as this layer, as a share of those it has; 100 % is perfect "
    "balance. Right: how many fair shares the busiest expert does. The orange ticks are what uniform random choice "
    "passes once in 100: to their left on the left, to their right on the right."
)
"""How to read the figure."""


def balance(result: xr.Dataset) -> go.Figure:
    """Draws the balance of every layer.

    How to read it: see `READ`.

    Args:
        result: from `analysis.load` or `load_from_counts` without labels, or with one chosen (`result.sel(label=…)`).

    Raises:
        MoescopeError: the result has several labels.
    """
    if "label" in result["max_vio"].dims:
        raise MoescopeError("Choose one label whose balance to draw: `result.sel(label=…)`.")
    names, width = layer_names(result), result["n_experts"].values
    sheet = Sheet(
        ["effective experts, of those it has", "busiest expert, × fair share"],
        cols=2,
        shared_yaxes=True,
        horizontal_spacing=0.04,
    )
    details = np.stack(
        [result[name].values for name in ("effective_experts", "entropy", "gini", "cv", "dead")], axis=-1
    )
    bars = (
        (result["effective_experts"].values / width, "%{x:.0%} of its experts"),
        (result["max_vio"].values + 1, "busiest expert: %{x:.2f} × its fair share"),
    )
    ticks = (
        (result["null_effective_experts_p01"].values / width, "uniform random choice: above %{x:.1%} in 99 of 100"),
        (result["null_max_vio_p99"].values + 1, "uniform random choice: below %{x:.2f} × in 99 of 100"),
    )
    for column, ((value, said), (chance, told)) in enumerate(zip(bars, ticks, strict=True), start=1):
        bar = go.Bar(
            x=value,
            y=names,
            orientation="h",
            marker={"color": BLUE, "opacity": 0.6, "line": {"width": 0}},
            customdata=np.column_stack([details, width]),
            hovertemplate=f"layer %{{y}}<br><b>{said}</b><br>effective experts %{{customdata[0]:.1f}} of "
            "%{customdata[5]:.0f} (entropy %{customdata[1]:.2f} nats)<br>Gini %{customdata[2]:.2f}, coefficient of "
            "variation %{customdata[3]:.2f}<br>never selected: %{customdata[4]:.0f}<extra></extra>",
        )
        sheet.add_trace(bar, row=1, col=column)
        sheet.add_trace(chance_ticks(chance, names, f"layer %{{y}}<br>{told}"), row=1, col=column)
        sheet.update_yaxes(layer_axis(result, **({} if column == 1 else {"title": {"text": ""}})), row=1, col=column)
    sheet.update_xaxes(rangemode="tozero", nticks=6)
    sheet.update_xaxes(tickformat=".0%", range=[0, 1.02], row=1, col=1)
    sheet.update_layout(
        height=110 + row_height(result.sizes["layer"]) * result.sizes["layer"],
        showlegend=False,
        bargap=0.35,
    )
    return sheet.figure()
