"""How alike the experts of a layer are: one square map per layer, similar experts side by side, what chance cannot
give marked; and how output norms stand to router scores."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import plotly.graph_objects as go
import xarray as xr
from scipy.cluster.hierarchy import leaves_list, linkage
from scipy.spatial.distance import squareform

from moescope.errors import MoescopeError
from moescope.figures.axes import layer_names
from moescope.figures.sheets import Sheet
from moescope.figures.theme import BLUE, ORANGE, colour_bar

READ = (
    "One square per layer: how alike each two of its experts are ({metric}). Experts are ordered so that similar ones "
    "stand together, so their numbers do not run. A ring marks a pair that is closer than any pair of any layer in any "
    "draw of the null. The diagonal and pairs without a value are left empty."
)
"""How to read the figure; filled in by `read`."""
READ_NORMS = (
    "Left: of the experts a token ranked i-th by routing weight, how many gave the j-th largest output; orange more "
    "than an even share, blue less. Right: the mean rank correlation of weight and norm within tokens in each layer, "
    "with its interval over documents; the second one after each expert's own mean norm is divided out."
)
"""How to read the figure of norms against scores."""
PANEL = 300
"""Pixels of one square."""
TITLE = 46


def read(result: xr.Dataset) -> str:
    """How to read the figure of this result."""
    return READ.format(metric=result.attrs.get("metric", "similarity"))


def similarity(
    result: xr.Dataset, layers: Sequence[int] | None = None, most: int = 12, columns: int | None = None
) -> go.Figure:
    """Draws the similarity of every two experts, one panel per layer, in clustered order.

    How to read it: see `READ`.

    Args:
        result: from any analysis of pairs of experts.
        layers: model layer indices to draw; the `most` layers with the closest pairs if None, which the figure says.
        most: how many.
        columns: panels per row.

    Raises:
        MoescopeError: a layer that the result does not have, or a result without pairs.
    """
    if "similarity" not in result or "other" not in result.dims:
        raise MoescopeError("This is not a result about pairs of experts.")
    numbers = [int(layer) for layer in result["layer"].values]
    missing = sorted(set(layers or []) - set(numbers))
    if missing:
        raise MoescopeError(f"The result has no layer {missing[0]}; it has {', '.join(map(str, numbers))}.")
    chosen = [row for row, layer in enumerate(numbers) if layers is None or layer in set(layers)]
    if layers is None and len(chosen) > most:
        values = result["similarity"].values
        closest = [np.nanmax(values[row], initial=-np.inf) for row in chosen]
        chosen = sorted(np.argsort(closest)[::-1][:most].tolist())
    wide = columns or min(len(chosen), 3)
    rows = -(-len(chosen) // wide)
    names = layer_names(result)
    sheet = Sheet(
        [_title(result, row, names[row]) for row in chosen],
        rows=rows,
        cols=wide,
        horizontal_spacing=0.3 / max(wide, 2) * 0.5,
        vertical_spacing=min(0.9 / max(rows - 1, 1), TITLE / (rows * (PANEL + TITLE)) * 1.6),
    )
    for place, row in enumerate(chosen):
        line, column = divmod(place, wide)
        order, traces = _panel(result, row)
        for trace in traces:
            sheet.add_trace(trace, row=line + 1, col=column + 1)
        axis = _expert_ticks(order)
        sheet.update_xaxes(axis, row=line + 1, col=column + 1)
        sheet.update_yaxes(axis | {"range": axis["range"][::-1]}, row=line + 1, col=column + 1)
    sheet.update_xaxes(title={"text": "expert"}, row=rows, col=1)
    sheet.update_yaxes(title={"text": "expert"}, col=1)
    low, high = _range(result)
    sheet.update_layout(
        height=int(rows * (PANEL + TITLE) + 90),
        showlegend=False,
        coloraxis={
            "cmin": low,
            "cmax": high,
            "colorbar": {"title": {"text": "similarity", "side": "right"}, "nticks": 6} | colour_bar(rows * PANEL),
        },
    )
    if layers is None and len(chosen) < len(numbers):
        sheet.add_annotation(
            text=f"the {len(chosen)} of {len(numbers)} layers with the closest pairs; name others with layers=",
            xref="paper", yref="paper", x=1, y=1, xanchor="right", yanchor="bottom", yshift=24, showarrow=False,
        )  # fmt: skip
    return sheet.figure()


# One figure for every way to compare experts; each result names its own measure.
weight_similarity = gate_similarity = logit_similarity = output_similarity = similarity


def clustered(matrix: np.ndarray) -> np.ndarray:
    """An order of experts in which similar ones stand together: average linkage, leaves in optimal order.

    Args:
        matrix: [E, E] symmetric similarity; NaN pairs count as least similar.
    """
    n = len(matrix)
    if n < 3 or np.isnan(matrix).all():
        return np.arange(n)
    lowest = np.nanmin(matrix)
    distance = np.nanmax(matrix) - np.where(np.isnan(matrix), lowest, matrix)
    np.fill_diagonal(distance, 0.0)
    condensed = squareform((distance + distance.T) / 2, checks=False)
    return leaves_list(linkage(condensed, "average", optimal_ordering=n <= 256))


def norm_against_score(result: xr.Dataset) -> go.Figure:
    """Draws the rank-rank table over all layers and the rank correlation of each.

    How to read it: see `READ_NORMS`.

    Args:
        result: from `analysis.norm_against_score`.
    """
    names = layer_names(result)
    with np.errstate(invalid="ignore"):
        count = np.nansum(result["count"].values, axis=0)
        share = count / count.sum(axis=1, keepdims=True)
    even = 1 / max(len(share), 1)
    beyond = share - even
    reach = float(np.nanmax(np.abs(beyond), initial=0.01))
    sheet = Sheet(["all layers together", "each layer"], cols=2, column_widths=[0.42, 0.58], horizontal_spacing=0.17)
    ranks = np.arange(1, len(share) + 1)
    sheet.add_trace(
        go.Heatmap(
            z=beyond,
            x=ranks,
            y=ranks,
            coloraxis="coloraxis",
            xgap=1,
            ygap=1,
            customdata=np.stack([share, count], axis=-1),
            text=[[f"{value:.0%}" for value in row] for row in share],
            texttemplate="%{text}" if len(share) <= 10 else "",
            textfont={"size": 11},
            hovertemplate=(
                "%{y}. by routing weight, %{x}. by output norm<br><b>%{customdata[0]:.1%}</b> of such experts "
                f"(an even share: {even:.1%})<br>%{{customdata[1]:,.0f}} of them<extra></extra>"
            ),
        ),
        row=1,
        col=1,
    )
    for name, colour, words in (
        ("spearman", ORANGE, "weight and norm"),
        ("spearman_within", BLUE, "norm over its expert's mean"),
    ):
        value = result[name].values
        high, low = result[f"{name}_high"].values - value, value - result[f"{name}_low"].values
        sheet.add_trace(
            go.Scatter(
                x=names,
                y=value,
                error_y={"type": "data", "array": high, "arrayminus": low, "width": 0, "thickness": 1.2},
                customdata=np.stack([result[f"{name}_p"].values, result["tokens"].values], axis=-1),
                mode="lines+markers",
                marker={"color": colour, "size": 6},
                line={"color": colour, "width": 1.5},
                name=words,
                hovertemplate=(
                    f"layer %{{x}}: {words}<br><b>ρ = %{{y:.3f}}</b>, p = %{{customdata[0]:.2g}}<br>"
                    "%{customdata[1]:,.0f} tokens<extra></extra>"
                ),
            ),
            row=1,
            col=2,
        )
    sheet.add_shape(type="line", x0=0, x1=1, y0=0, y1=0, xref="x2 domain", yref="y2", line={"width": 1})
    sheet.update_xaxes(title={"text": "rank by output norm"}, dtick=1, showgrid=False, row=1, col=1)
    sheet.update_yaxes(
        title={"text": "rank by routing weight"}, dtick=1, autorange="reversed", showgrid=False, row=1, col=1
    )
    sheet.update_xaxes(title={"text": "layer"}, type="category", row=1, col=2)
    sheet.update_yaxes(title={"text": "rank correlation within tokens"}, row=1, col=2)
    sheet.update_layout(
        height=380,
        legend={"orientation": "h", "y": 1.0, "x": 1, "xanchor": "right", "yanchor": "bottom"},
        coloraxis={"cmin": -reach, "cmax": reach, "showscale": False},
    )
    return sheet.figure()


def _title(result: xr.Dataset, row: int, name: str) -> str:
    part = result.isel(layer=row)
    pairs = int(np.triu(part["redundant"].values, 1).sum())
    if np.isnan(float(part["null_extreme"])):
        about = "no null"
    else:
        about = f"{pairs or 'no'} pair{'' if pairs == 1 else 's'} beyond the null's {float(part['null_extreme']):.2f}"
    return f"<b>layer {name}</b><br><span style='font-size:11px'>{about}</span>"


def _panel(result: xr.Dataset, row: int) -> tuple[list[str], list[go.Heatmap | go.Scatter]]:
    width = int(result["n_experts"].values[row])
    part = result.isel(layer=row, expert=slice(width), other=slice(width))
    values = part["similarity"].values
    order = clustered(values)
    names = [str(expert) for expert in order]
    square = np.ix_(order, order)
    # Single precision: it is for reading, and the bulk of a large model's figure.
    details = np.stack([part[name].values[square] for name in ("p_max", "z")], axis=-1).astype(np.float32)
    traces: list[go.Heatmap | go.Scatter] = [
        go.Heatmap(
            z=values[square],
            x=names,
            y=names,
            coloraxis="coloraxis",
            customdata=details,
            hoverongaps=False,
            name="similarity",
            hovertemplate=(
                "experts %{x} and %{y}<br><b>similarity %{z:.3f}</b> (null's largest "
                f"{float(part['null_extreme']):.3f})<br>p = %{{customdata[0]:.2g}} over the layer's pairs, "
                "z = %{customdata[1]:.1f} among them<extra></extra>"
            ),
        )
    ]
    first, second = np.nonzero(part["redundant"].values)
    # Where nearly every pair is beyond the null, rings would only hide the map.
    if 0 < first.size <= 0.2 * width * width or width <= 8:
        traces.append(
            go.Scatter(
                x=[str(e) for e in second],
                y=[str(e) for e in first],
                mode="markers",
                marker={
                    "symbol": "circle-open",
                    "size": max(4, min(14, 200 // max(width, 1))),
                    "color": ORANGE,
                    "line": {"width": 1.6},
                },
                hoverinfo="skip",
                name="beyond the null",
            )
        )
    return names, traces


def _expert_ticks(names: list[str]) -> dict[str, Any]:
    """An axis of experts in the given order: every number for few of them, some for many."""
    return {
        "type": "category",
        "categoryorder": "array",
        "categoryarray": names,
        # Given, because plotly widens the range it finds for itself where markers stand on the map.
        "range": [-0.5, len(names) - 0.5],
        "tickmode": "array",
        "tickvals": names[:: -(-len(names) // 16)],
        "tickfont": {"size": 10},
        "tickangle": 0,
        "showgrid": False,
        "title": {"text": ""},
    }


def _range(result: xr.Dataset) -> tuple[float, float]:
    values = result["similarity"].values
    if np.isnan(values).all():
        return 0.0, 1.0
    low, high = float(np.nanmin(values)), float(np.nanmax(values))
    if low < 0:
        reach = max(abs(low), abs(high), 0.05)
        return -reach, reach
    return low, high if high > low else low + 0.05
