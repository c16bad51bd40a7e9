"""What silencing each expert, one of them, or a recipe does to the loss: a map, and bars beside their controls."""

from __future__ import annotations

import numpy as np
import plotly.graph_objects as go
import xarray as xr

from moescope.figures.axes import expert_axis, layer_axis, layer_names
from moescope.figures.sheets import Sheet
from moescope.figures.theme import BLUE, GREY, ORANGE, colour_bar, plain, row_height

READ = (
    "Each cell is one expert silenced alone: orange, the loss of the chosen label rises without it; blue, it falls. A "
    "dot marks a 95 % interval (documents drawn anew) that does not hold 0. Colour saturates at the largest effect."
)
READ_RECIPE = (
    "Orange: what the recipe adds to the loss of each label, with its 95 % interval. Blue ticks: the same edits on "
    "random experts of the same layers. Where the bar lies beyond the ticks, it is these experts that matter."
)

READ_ONE = (
    "Orange: what masking the expert adds to the loss of each label, with its 95 % interval over documents. Blue "
    "ticks: another expert of the same layer masked instead. Where the bar ends beyond all ticks, the model loses more "
    "without this expert than without those. Bars are scaled to the largest: read the numbers before calling one long."
)


def expert_effects(result: xr.Dataset) -> go.Figure:
    """Draws the effect of every (layer, expert), one label at a time.

    How to read it: see `READ`.

    Args:
        result: from `effects.expert_effects`; with several labels, a menu chooses among them.
    """
    labels = [str(name) for name in result["label"].values]
    reach = float(np.nanmax(np.abs(result["effect"].values))) or 1.0
    sheet = Sheet()
    for place in range(len(labels)):
        part = result.isel(label=place)
        sheet.add_trace(_map(part, visible=place == 0))
        sheet.add_trace(_sure(part, visible=place == 0))
    height = row_height(result.sizes["layer"]) * result.sizes["layer"]
    sheet.update_xaxes(expert_axis(result))
    sheet.update_yaxes(layer_axis(result))
    sheet.update_layout(
        height=height + 130,
        showlegend=False,
        coloraxis={
            "cmin": -reach,
            "cmax": reach,
            "colorbar": {"title": {"text": "nats per token", "side": "right"}} | colour_bar(height),
        },
    )
    if len(labels) > 1:
        buttons = [
            {"label": plain(label), "method": "restyle",
             "args": [{"visible": [which // 2 == place for which in range(2 * len(labels))]}]}
            for place, label in enumerate(labels)
        ]  # fmt: skip
        menu = {"buttons": buttons, "x": 0, "xanchor": "left", "y": 1, "yanchor": "bottom", "pad": {"b": 12}}
        sheet.update_layout(updatemenus=[menu], margin={"t": 70})
    return sheet.figure()


def _map(part: xr.Dataset, *, visible: bool) -> go.Heatmap:
    return go.Heatmap(
        z=part["effect"].values,
        x=part["expert"].values,
        y=layer_names(part),
        coloraxis="coloraxis",
        customdata=np.stack([part["low"].values, part["high"].values], axis=-1),
        hoverongaps=False,
        xgap=1,
        ygap=1,
        visible=visible,
        hovertemplate=(
            "layer %{y}, expert %{x}<br><b>%{z:+.4f} nats per token</b><br>95 %: %{customdata[0]:+.4f} to "
            "%{customdata[1]:+.4f}<extra></extra>"
        ),
    )


def _sure(part: xr.Dataset, *, visible: bool) -> go.Scatter:
    names = layer_names(part)
    rows, experts = np.nonzero((part["low"].values > 0) | (part["high"].values < 0))
    return go.Scatter(
        x=part["expert"].values[experts],
        y=[names[row] for row in rows],
        mode="markers",
        marker={"size": 4, "color": GREY},
        visible=visible,
        hoverinfo="skip",
    )


def effect(result: xr.Dataset) -> go.Figure:
    """Draws what a recipe does to the loss of each label, beside its random controls.

    How to read it: see `READ_RECIPE`.

    Args:
        result: from `effects.effect`.
    """
    return _bars(result, ["random experts"] * result.sizes["control"])


def causal_effect(result: xr.Dataset) -> go.Figure:
    """Draws what masking one expert does to the loss of each label, beside masking others of its layer.

    How to read it: see `READ_ONE`.

    Args:
        result: from `effects.causal_effect`.
    """
    return _bars(result, [f"expert {other}" for other in result["control"].values])


def _bars(result: xr.Dataset, others: list[str]) -> go.Figure:
    labels = [plain(str(name)) for name in result["label"].values]
    change = result["change"].values
    sheet = Sheet()
    sheet.add_trace(
        go.Bar(
            x=change,
            y=labels,
            orientation="h",
            marker={"color": ORANGE, "opacity": 0.75},
            error_x={
                "type": "data",
                "symmetric": False,
                "array": result["high"].values - change,
                "arrayminus": change - result["low"].values,
                "color": GREY,
            },
            customdata=np.stack([result["plain"].values, result["edited"].values, result["p_any"].values], axis=-1),
            hovertemplate=(
                "%{y}<br><b>%{x:+.4f} nats per token</b><br>%{customdata[0]:.3f} → %{customdata[1]:.3f}; p over all "
                "labels %{customdata[2]:.3g}<extra></extra>"
            ),
        )
    )
    for place, label in enumerate(labels):
        controls = result["control_change"].isel(label=place).values
        sheet.add_trace(
            go.Scatter(
                x=controls,
                y=[label] * len(controls),
                text=others,
                mode="markers",
                marker={"symbol": "line-ns", "size": 10, "line": {"width": 1.5, "color": BLUE}},
                hovertemplate="%{text}: %{x:+.4f}<extra></extra>",
            )
        )
    sheet.update_xaxes(title={"text": "change of the loss, nats per token"}, zeroline=True)
    sheet.update_yaxes(type="category", autorange="reversed")
    sheet.update_layout(height=104 + 34 * len(labels), showlegend=False, margin={"t": 16})
    return sheet.figure()
