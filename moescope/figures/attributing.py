"""Which (layer, expert) carries a set of texts: a map of attribution beside the same of the other texts."""

from __future__ import annotations

import numpy as np
import plotly.graph_objects as go
import xarray as xr

from moescope.figures.axes import expert_axis, layer_axis, layer_names
from moescope.figures.pale import PALE, beyond
from moescope.figures.sheets import Sheet
from moescope.figures.theme import GREY, ORANGE, colour_bar, plain, row_height, template

READ = (
    "Left: how much of the router's score each expert gets on the set's texts (mean over texts of the mean over "
    "tokens). The ring is the largest, the target of single-expert unlearning; dots are experts that came first in "
    "some resample of the texts, larger the oftener. Right: what the set gives an expert beyond the other texts; pale "
    "is what as many texts taken at random give too (q above 0.05): both sets use that expert alike, so that changing "
    "it reaches both."
)
LEVEL = 0.05


def attribution(result: xr.Dataset) -> go.Figure:
    """Draws the attribution of a set to (layer, expert), and its contrast with the other texts.

    How to read it: see `READ`.

    Args:
        result: from `analysis.attribution`.
    """
    both = bool(np.isfinite(result["contrast"].values).any())
    titles = [plain(f"attribution of {result.attrs.get('label', 'the set')}"), "beyond the other texts"][: 1 + both]
    sheet = Sheet(titles, cols=1 + both, shared_yaxes=True, horizontal_spacing=0.16)
    sheet.add_trace(_map(result, "attribution", "coloraxis"), 1, 1)
    for trace in _firsts(result):
        sheet.add_trace(trace, 1, 1)
    if both:
        stands = beyond(result["q"].values, LEVEL)
        for shown, opacity in ((~stands, PALE), (stands, 1.0)):
            sheet.add_trace(_map(result, "contrast", "coloraxis2", shown, opacity), 1, 2)
        sheet.add_trace(_firsts(result)[1], 1, 2)
        sheet.add_annotation(
            text=_said(result), xref="paper", yref="paper", x=1, y=0, xanchor="right", yanchor="top", yshift=-48,
            showarrow=False,
        )  # fmt: skip
    height = row_height(result.sizes["layer"]) * result.sizes["layer"]
    reach = float(np.nanmax(np.abs(result["contrast"].values))) if both else 1.0
    bar = colour_bar(height)
    sequential = template("light").to_plotly_json()["layout"]["colorscale"]["sequential"]
    sheet.update_xaxes(expert_axis(result))
    sheet.update_yaxes(layer_axis(result))
    if both:
        sheet.update_yaxes(title={"text": ""}, row=1, col=2)
    sheet.update_layout(
        height=height + 140 + 30 * both,
        margin={"b": 60 + 30 * both},
        showlegend=False,
        coloraxis={"cmin": 0, "colorscale": sequential, "colorbar": bar | {"x": 0.425 if both else 1.02}},
        coloraxis2={"cmin": -(reach or 1.0), "cmax": reach or 1.0, "colorbar": bar | {"x": 1.01}},
    )
    return sheet.figure()


def _said(result: xr.Dataset) -> str:
    """What chance makes of the target's contrast, in a line."""
    best = result.stack(cell=("layer", "expert"))
    best = best.isel(cell=int(np.nanargmin(best["rank"].values)))
    values = [float(best[name]) for name in ("attribution", "rest", "null_low", "null_high")]
    text = "the largest: {:.3f}, {:.3f} on the other texts".format(*values[:2])
    if np.isfinite(values[2]):
        text += f"; texts at random {values[2]:.3f} to {values[3]:.3f}, p = {float(result['target_p']):.3g}"
    return text


def _map(result: xr.Dataset, name: str, axis: str, here: np.ndarray | None = None, opacity: float = 1.0) -> go.Heatmap:
    columns = ("attribution", "low", "high", "rest", "rank", "first", "null_low", "null_high", "q")
    shown = [result[column].values for column in columns]
    beyond_others = "<b>%{z:+.4f} beyond the other texts</b><br>" if name == "contrast" else ""
    return go.Heatmap(
        z=result[name].values if here is None else np.where(here, result[name].values, np.nan),
        opacity=opacity,
        x=result["expert"].values,
        y=layer_names(result),
        coloraxis=axis,
        customdata=np.stack(shown, axis=-1),
        hoverongaps=False,
        xgap=1,
        ygap=1,
        hovertemplate=(
            f"layer %{{y}}, expert %{{x}}<br>{beyond_others}"
            "<b>%{customdata[0]:.4f} on the set</b> (95 %: %{customdata[1]:.4f} to %{customdata[2]:.4f}); other "
            "texts %{customdata[3]:.4f}<br>texts at random %{customdata[6]:.4f} to %{customdata[7]:.4f}, q "
            "%{customdata[8]:.3g}<br>rank %{customdata[4]}, first in %{customdata[5]:.0%} of resamples"
            "<extra></extra>"
        ),
    )


def _firsts(result: xr.Dataset) -> list[go.Scatter]:
    names, first = layer_names(result), np.nan_to_num(result["first"].values)
    rows, experts = np.nonzero(first > 0)
    best = np.argwhere(result["rank"].values == 1)
    return [
        go.Scatter(
            x=result["expert"].values[experts],
            y=[names[row] for row in rows],
            mode="markers",
            marker={"size": 3 + 6 * first[rows, experts], "color": GREY},
            hoverinfo="skip",
        ),
        go.Scatter(
            x=[result["expert"].values[expert] for _, expert in best],
            y=[names[row] for row, _ in best],
            mode="markers",
            marker={"size": 20, "symbol": "circle-open", "color": ORANGE, "line": {"width": 3}},
            hoverinfo="skip",
        ),
    ]
