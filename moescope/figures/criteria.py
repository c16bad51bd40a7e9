"""What masking by each criterion does to the loss, and what silencing super experts does, beside random experts."""

from __future__ import annotations

from typing import Any

import numpy as np
import plotly.graph_objects as go
import xarray as xr

from moescope.figures.importance_table import said
from moescope.figures.sheets import Sheet
from moescope.figures.theme import BLUE, GREY, ORANGE, plain

READ = (
    "Each row is a criterion: blue, its lowest experts of every layer silenced; orange, its highest; with 95 % "
    "intervals over documents. The band holds 95 % of random experts of the same layers, ticks at the bottom. A "
    "criterion that knows what matters has its blue dot left of the band and its orange dot right of it; filled dots "
    "are beyond chance (p at most 0.05). Rows are in the order of the distance between the two."
)
READ_SILENCED = (
    "Left: what silencing the super experts adds to the loss of each label (orange), beside random experts of the same "
    "layers (blue). Middle: how far the attention sink of each layer decays, 1 where it is gone. Right: the largest "
    "value of the residual stream after each layer, with the super experts (grey) and without (orange). Where orange "
    "stands among the blue ticks, these experts do no more than others would."
)
LEVEL = 0.05
TICK = {"symbol": "line-ns", "size": 11, "line": {"width": 1.5, "color": BLUE}}


def criteria_effects(result: xr.Dataset) -> go.Figure:
    """Draws what masking the lowest and highest experts of each criterion costs, one label at a time.

    How to read it: see `READ`.

    Args:
        result: from `effects.criteria_effects`; with several labels, a menu chooses among them.
    """
    labels = [str(name) for name in result["label"].values]
    order = np.argsort(result["gap"].isel(label=0).values, kind="stable")[::-1]
    names = [said(str(name)) for name in result["criterion"].values[order]]
    sheet = Sheet()
    each = 0
    for place in range(len(labels)):
        traces = _rows(result.isel(label=place, criterion=order), names, visible=place == 0)
        each = len(traces)
        for trace in traces:
            sheet.add_trace(trace)
    controls = result.sizes["control"] > 0
    shown = [*names, "random experts"] if controls else names
    what = "masked" if result.attrs["kind"] == "mask" else "zeroed"
    title = f"{result.attrs['n']} of each layer's experts {what}: change of the loss, nats per token"
    sheet.update_xaxes(title={"text": title}, zeroline=True, zerolinecolor="#c9cdd3")
    sheet.update_yaxes(
        tickmode="array", tickvals=list(range(len(shown))), ticktext=shown, range=[len(shown) - 0.5, -0.5],
        showgrid=False, ticks="",
    )  # fmt: skip
    sheet.update_layout(
        height=130 + 30 * len(shown),
        legend={"orientation": "h", "x": 1, "xanchor": "right", "y": 1, "yanchor": "bottom"},
    )
    if len(labels) > 1:
        buttons = [
            {"label": plain(label), "method": "restyle",
             "args": [{"visible": [which // each == place for which in range(each * len(labels))]}]}
            for place, label in enumerate(labels)
        ]  # fmt: skip
        menu = {"buttons": buttons, "x": 0, "xanchor": "left", "y": 1, "yanchor": "bottom", "pad": {"b": 10}}
        sheet.update_layout(updatemenus=[menu], margin={"t": 66}, height=152 + 30 * len(shown))
    return sheet.figure()


def _rows(part: xr.Dataset, names: list[str], *, visible: bool) -> list[go.Scatter]:
    rows = np.arange(len(names))
    traces = []
    if part.sizes["control"]:
        low, high = float(part["control_low"]), float(part["control_high"])
        bottom = len(names) + 0.5
        traces.append(
            go.Scatter(
                x=[low, high, high, low], y=[-0.5, -0.5, bottom, bottom], fill="toself", mode="lines", visible=visible,
                line={"width": 0}, fillcolor="rgba(139,145,154,0.16)", hoverinfo="skip", name="95 % of random experts",
            )
        )  # fmt: skip
        changes = part["control_change"].values
        traces.append(
            go.Scatter(
                x=changes, y=np.full(changes.size, len(names)), mode="markers", visible=visible, showlegend=False,
                marker={**TICK, "line": {"width": 1.5, "color": GREY}},
                hovertemplate="random experts: %{x:+.4f}<extra></extra>",
            )
        )  # fmt: skip
    change = part["change"].values
    traces.append(
        go.Scatter(
            x=np.column_stack([change, np.full(len(names), np.nan)]).ravel(), y=np.repeat(rows, 3), mode="lines",
            line={"color": "#c9cdd3", "width": 2}, hoverinfo="skip", showlegend=False, visible=visible,
        )
    )  # fmt: skip
    for place, (end, colour) in enumerate((("lowest", BLUE), ("highest", ORANGE))):
        own = part.sel(end=end)
        middle, sure = change[:, place], own["p"].values <= LEVEL
        traces.append(
            go.Scatter(
                x=middle, y=rows, mode="markers", name=f"{end} silenced", visible=visible,
                marker={"size": 11, "color": np.where(sure, colour, "#ffffff"), "line": {"width": 2, "color": colour}},
                error_x={"type": "data", "symmetric": False, "array": np.nan_to_num(own["high"].values - middle),
                         "arrayminus": np.nan_to_num(middle - own["low"].values), "color": colour, "thickness": 1.2,
                         "width": 0},
                customdata=np.stack([own[key].values for key in ("p", "q", "best")] + [part["gap"].values], axis=-1),
                text=names,
                hovertemplate=(
                    f"<b>%{{text}}</b>, its {end}: %{{x:+.4f}} nats per token<br>p %{{customdata[0]:.3g}}, q "
                    "%{customdata[1]:.3g}; the best of all in %{customdata[2]:.0%} of the draws<br>between its ends "
                    "%{customdata[3]:+.4f}<extra></extra>"
                ),
            )
        )  # fmt: skip
    return traces


def super_expert_effects(result: xr.Dataset) -> go.Figure:
    """Draws what silencing the super experts does to the loss, the attention sinks and the massive activations.

    How to read it: see `READ_SILENCED`.

    Args:
        result: from `effects.super_expert_effects`.
    """
    labels = [plain(str(name)) for name in result["label"].values]
    sheet = Sheet(
        ["loss", "decay of the attention sink", "largest value of the residual stream"],
        cols=3,
        column_widths=[0.36, 0.3, 0.34],
        horizontal_spacing=0.09,
    )
    for trace in _losses(result, labels):
        sheet.add_trace(trace, row=1, col=1)
    for trace in _by_layer(result, "decay_control", [("decay", ORANGE, "without the super experts")]):
        sheet.add_trace(trace, row=1, col=2)
    lines = [("massive_before", GREY, "as the model is"), ("massive_after", ORANGE, "without the super experts")]
    for trace in _by_layer(result, "massive_control", lines):
        sheet.add_trace(trace, row=1, col=3)
    sheet.update_xaxes(title={"text": "nats per token"}, zeroline=True, zerolinecolor="#c9cdd3", row=1, col=1)
    sheet.update_yaxes(type="category", autorange="reversed", row=1, col=1)
    sheet.update_xaxes(title={"text": "layer"}, showgrid=False, dtick=max(1, result.sizes["model_layer"] // 8), row=1)
    sheet.update_xaxes(dtick=None, showgrid=True, title={"text": "nats per token"}, row=1, col=1)
    sheet.update_yaxes(zeroline=True, zerolinecolor="#c9cdd3", row=1, col=2)
    sheet.update_yaxes(_logarithmic(result["massive_before"].values, result["massive_after"].values), row=1, col=3)
    sheet.update_layout(
        height=max(330, 170 + 30 * len(labels)),
        legend={"orientation": "h", "x": 0, "xanchor": "left", "y": -0.22, "yanchor": "top"},
        margin={"b": 96},
    )
    return sheet.figure()


def _logarithmic(*values: np.ndarray) -> dict[str, Any]:
    """A logarithmic axis with round numbers at 1, 2 and 5, or at 1 alone where there are many decades."""
    positive = np.concatenate(values)
    positive = positive[positive > 0]
    if not positive.size:
        return {}
    first, last = np.floor(np.log10(positive.min())), np.ceil(np.log10(positive.max()))
    steps = (1, 2, 5) if last - first <= 3 else (1,)
    ticks = [step * 10.0**power for power in np.arange(first, last + 1) for step in steps]
    return {"type": "log", "tickmode": "array", "tickvals": ticks, "ticktext": [f"{tick:g}" for tick in ticks]}


def _losses(result: xr.Dataset, labels: list[str]) -> list[Any]:
    change = result["change"].values
    bars = go.Bar(
        x=change, y=labels, orientation="h", marker={"color": ORANGE, "opacity": 0.75}, showlegend=False,
        error_x={"type": "data", "symmetric": False, "array": np.nan_to_num(result["high"].values - change),
                 "arrayminus": np.nan_to_num(change - result["low"].values), "color": GREY},
        customdata=result["p"].values,
        hovertemplate="%{y}<br><b>%{x:+.4f} nats per token</b>; p %{customdata:.3g}<extra></extra>",
    )  # fmt: skip
    controls = result["control_change"].values
    ticks = go.Scatter(
        x=controls.T.ravel(), y=np.repeat(labels, controls.shape[0]), mode="markers", marker=TICK,
        name="random experts of the same layers", legendgroup="random",
        hovertemplate="random experts: %{x:+.4f}<extra></extra>",
    )  # fmt: skip
    return [bars, ticks]


def _by_layer(result: xr.Dataset, control: str, lines: list[tuple[str, str, str]]) -> list[go.Scatter]:
    layers = result["model_layer"].values
    values = result[control].values
    traces = [
        go.Scatter(
            x=np.tile(layers, values.shape[0]), y=values.ravel(), mode="markers", legendgroup="random",
            marker={"symbol": "line-ew", "size": 11, "line": {"width": 1.5, "color": BLUE}}, showlegend=False,
            hovertemplate="layer %{x}, random experts: %{y:.3g}<extra></extra>",
        )
    ]  # fmt: skip
    for name, colour, words in lines:
        traces.append(
            go.Scatter(
                x=layers, y=result[name].values, mode="lines+markers", line={"color": colour, "width": 2},
                marker={"size": 7, "color": colour}, name=words, legendgroup=words, showlegend=control.startswith("m"),
                hovertemplate=f"layer %{{x}}, {words}: %{{y:.3g}}<extra></extra>",
            )
        )  # fmt: skip
    return traces
