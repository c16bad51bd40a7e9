"""Bits of each expert, what they save against uniform bits, and what the same widths save when dealt at random."""

from __future__ import annotations

import numpy as np
import plotly.graph_objects as go
import xarray as xr
from plotly.colors import sample_colorscale

from moescope.figures.axes import expert_axis, layer_axis, layer_names
from moescope.figures.marks import chance_ticks
from moescope.figures.sheets import Sheet
from moescope.figures.theme import BLUE, GREY, row_height

READ = (
    "Above: the share of the cost of {uniform}-bit experts that this choice avoids, that a choice made on one half of "
    "the documents avoids on the other, and that the same widths dealt to experts at random avoid: the orange tick is "
    "what they reach once in 100. Below: the bits of each expert, darker is more; beside it what each layer still "
    "costs, 100 % being uniform bits. Cost is the program's own, {errors}."
)
"""How to read the figure; filled in by `read`."""


def read(result: xr.Dataset) -> str:
    """How to read the figure of this result."""
    stand_in = str(result.attrs["errors"]).startswith("stand-in")
    errors = "with a stand-in for each expert's error" if stand_in else "from the errors that were given"
    return READ.format(uniform=int(result["uniform_bits"]), errors=errors)


def bits(result: xr.Dataset) -> go.Figure:
    """Draws the widths of all experts, and what they save beside chance.

    How to read it: see `READ`.

    Args:
        result: from `analysis.bits` or `bits_from_importance`.

    Returns:
        A plotly Figure whose height fits the number of layers.
    """
    layers = result.sizes["layer"]
    rows, above = row_height(layers) * layers, 110
    sheet = Sheet(
        ["cost avoided, of uniform bits", "bits of each expert", "cost left"],
        rows=2,
        cols=2,
        specs=[[{"colspan": 2}, None], [{}, {}]],
        row_heights=[above / (above + rows), rows / (above + rows)],
        column_widths=[0.8, 0.2],
        vertical_spacing=80 / (above + rows + 80),
        horizontal_spacing=0.02,
    )
    for trace in _savings(result):
        sheet.add_trace(trace, row=1, col=1)
    sheet.add_trace(_map(result), row=2, col=1)
    sheet.add_trace(_left(result), row=2, col=2)
    sheet.update_xaxes(tickformat=".0%", zeroline=True, row=1, col=1)
    sheet.update_yaxes(type="category", autorange="reversed", showgrid=False, row=1, col=1)
    sheet.update_xaxes(expert_axis(result), row=2, col=1)
    sheet.update_yaxes(layer_axis(result), row=2, col=1)
    sheet.update_xaxes(tickformat=".0%", rangemode="tozero", nticks=4, title={"text": "of uniform bits"}, row=2, col=2)
    sheet.update_yaxes(layer_axis(result, title={"text": ""}, showticklabels=False), row=2, col=2)
    widths = sorted({int(width) for width in np.unique(result["bits"].values[result["exists"].values])})
    sheet.update_layout(
        height=above + rows + 230,
        showlegend=False,
        bargap=0.35,
        coloraxis=_width_colours(widths)
        | {
            "colorbar": {
                "title": {"text": "bits", "side": "right"},
                "tickmode": "array",
                "tickvals": list(range(len(widths))),
                "ticktext": [str(width) for width in widths],
                "lenmode": "pixels",
                "len": int(min(max(rows, 110), 34 * len(widths) + 40)),
                "y": 0,
                "yanchor": "bottom",
            }
        },
    )
    return sheet.figure()


def _savings(result: xr.Dataset) -> list[go.Bar | go.Scatter]:
    names = ["this choice", "on held-out documents", "the same widths at random"]
    values = [float(result[name]) for name in ("saving", "heldout_saving", "random_saving")]
    kept = [index for index, value in enumerate(values) if not np.isnan(value)]
    gap = float(result["gap"])
    said = [
        f"proven: no choice costs less by more than {gap:.1%}",
        "chosen on one half, judged on the other",
        "mean of draws",
    ]
    bar = go.Bar(
        x=[values[index] for index in kept],
        y=[names[index] for index in kept],
        orientation="h",
        marker={"color": [GREY if index == 2 else BLUE for index in kept], "opacity": 0.6, "line": {"width": 0}},
        customdata=[said[index] for index in kept],
        name="saving",
        hovertemplate="<b>%{y}: %{x:.1%}</b><br>%{customdata}<extra></extra>",
    )
    tick = chance_ticks([float(result["random_saving_p99"])], names[2:], "at random: below %{x:.1%} in 99 of 100")
    return [bar, tick]


def _map(result: xr.Dataset) -> go.Heatmap:
    held = result["bits"].values
    widths = np.unique(held[result["exists"].values])
    place = np.where(np.isnan(held), np.nan, np.searchsorted(widths, np.nan_to_num(held)))
    details = [held, result["importance"].values, result["cost"].values]
    return go.Heatmap(
        z=place,
        x=result["expert"].values,
        y=layer_names(result),
        coloraxis="coloraxis",
        customdata=np.stack(details, axis=-1),
        hoverongaps=False,
        xgap=1,
        ygap=1,
        name="bits",
        hovertemplate=(
            "layer %{y}, expert %{x}<br><b>%{customdata[0]:.0f} bits</b><br>importance %{customdata[1]:.3g}, cost "
            "%{customdata[2]:.3g}<extra></extra>"
        ),
    )


def _left(result: xr.Dataset) -> go.Bar:
    cost, uniform = result["layer_cost"].values, result["layer_uniform_cost"].values
    with np.errstate(invalid="ignore", divide="ignore"):
        share = np.where(uniform > 0, cost / uniform, np.nan)
    return go.Bar(
        x=share,
        y=layer_names(result),
        orientation="h",
        marker={"color": BLUE, "opacity": 0.6, "line": {"width": 0}},
        customdata=result["mean_bits"].values,
        name="cost left",
        hovertemplate=(
            "layer %{y}<br><b>%{x:.1%}</b> of the cost of uniform bits<br>%{customdata:.2f} bits on average"
            "<extra></extra>"
        ),
    )


def _width_colours(widths: list[int]) -> dict:
    """One step of colour for each width, the widest the darkest; both ends stand on white and on near-black."""
    n = len(widths)
    shades = sample_colorscale([[0, "#c9dcee"], [0.5, "#3f84c9"], [1, "#17446f"]], [(i + 0.5) / n for i in range(n)])
    steps = [[(index + side) / n, shades[index]] for index in range(n) for side in (0, 1)]
    return {"colorscale": steps, "cmin": -0.5, "cmax": n - 0.5}
