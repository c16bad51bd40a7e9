"""What an answer owes to experts, layers, tokens and paths: maps and bars beside their random controls."""

from __future__ import annotations

from typing import Any

import numpy as np
import plotly.graph_objects as go
import xarray as xr

from moescope.figures.axes import expert_axis, layer_axis, layer_names
from moescope.figures.sheets import Sheet
from moescope.figures.theme import BLUE, GREY, ORANGE, colour_bar, plain, row_height

READ = (
    "Each cell is one expert silenced (or patched) alone. Orange: the metric rises; blue: it falls. With the loss as "
    "metric, orange is what the answer needs. A dot marks a 95 % interval over cases that does not hold 0. Colour "
    "saturates at the largest effect."
)
READ_POSITIONS = (
    "Each cell is one token whose routing in one layer is that of the other prompt (or whose routed experts give "
    "nothing). Orange: the metric rises; blue: it falls. Empty columns are tokens that are aligned with nothing. A "
    "dot marks a cell whose effect is larger than that of each of its controls."
)
READ_BARS = (
    "Orange: the change of the metric, with its 95 % interval over cases. Blue ticks: random controls. Where the bar "
    "lies beyond the ticks, it is this layer, or these experts, that matter. A grey diamond is the sum of what the "
    "experts of a path do alone."
)
WIDTH_OF_CHARACTER, LONGEST_WORD = 7, 14


def trace_experts(result: xr.Dataset) -> go.Figure:
    """Draws the effect of every (layer, expert).

    How to read it: see `READ`.

    Args:
        result: from `effects.trace_experts`.
    """
    hover = (
        "layer %{y}, expert %{x}<br><b>%{z:+.4f}</b><br>p %{customdata[0]:.2f} among its layer<br>"
        "%{customdata[1]:.1f} tokens<extra></extra>"
    )
    values = np.stack([result["p"].values, result["tokens"].values], axis=-1)
    sheet = Sheet()
    sheet.add_trace(_map(result, result["expert"].values, values, hover))
    sure = (result["low"].values > 0) | (result["high"].values < 0)
    sheet.add_trace(_dots(result, result["expert"].values, sure))
    sheet.update_xaxes(expert_axis(result))
    _lay_out(sheet, result)
    return sheet.figure()


def trace_positions(result: xr.Dataset) -> go.Figure:
    """Draws the effect of every (layer, token).

    How to read it: see `READ_POSITIONS`.

    Args:
        result: from `effects.trace_positions`.
    """
    positions, words = result["position"].values, [str(word) for word in result["word"].values]
    shown = [_word(word) for word in words]
    customdata = np.stack(
        [np.broadcast_to(np.array(shown, dtype=object), result["effect"].shape), result["recovered"].values], axis=-1
    )
    hover = (
        "layer %{y}, token %{x}: %{customdata[0]}<br><b>%{z:+.4f}</b><br>recovered %{customdata[1]:.1%}<extra></extra>"
    )
    sheet = Sheet()
    sheet.add_trace(_map(result, positions, customdata, hover))
    largest = result["p"].values <= 1 / (1 + result.attrs["controls"])
    sheet.add_trace(_dots(result, positions, largest & (result["effect"].values != 0)))
    sheet.update_xaxes(
        tickmode="array", tickvals=positions, ticktext=shown, tickangle=-60, showgrid=False, zeroline=False,
        range=[-0.5, len(positions) - 0.5],
    )  # fmt: skip
    _lay_out(sheet, result, below=WIDTH_OF_CHARACTER * max(map(len, shown)))
    if len(positions) > 24:
        sheet.update_layout(width=max(520, 190 + 30 * len(positions)))
    return sheet.figure()


def trace_layers(result: xr.Dataset) -> go.Figure:
    """Draws the effect of each layer's routing beside its controls.

    How to read it: see `READ_BARS`.

    Args:
        result: from `effects.trace_layers`.
    """
    sheet = _bars(result, layer_names(result))
    sheet.update_yaxes(layer_axis(result))
    return sheet.figure()


def trace_paths(result: xr.Dataset) -> go.Figure:
    """Draws the effect of each path beside random paths, and beside the sum of its experts alone.

    How to read it: see `READ_BARS`.

    Args:
        result: from `effects.trace_paths`.
    """
    ordered = result.isel(path=np.argsort(-result["effect"].values, kind="stable"))
    names = [str(name) for name in ordered["path"].values]
    sheet = _bars(ordered, names)
    sheet.add_trace(
        go.Scatter(
            x=ordered["parts"].values,
            y=names,
            mode="markers",
            marker={"symbol": "diamond-open", "size": 8, "color": GREY, "line": {"width": 1.5}},
            hovertemplate="its experts alone, summed: %{x:+.4f}<extra></extra>",
        )
    )
    sheet.update_yaxes(type="category", autorange="reversed", categoryorder="array", categoryarray=names)
    return sheet.figure()


def _map(result: xr.Dataset, x: np.ndarray, customdata: np.ndarray, hover: str) -> go.Heatmap:
    return go.Heatmap(
        z=result["effect"].values,
        x=x,
        y=layer_names(result),
        coloraxis="coloraxis",
        customdata=customdata,
        hoverongaps=False,
        xgap=1,
        ygap=1,
        hovertemplate=hover,
    )


def _dots(result: xr.Dataset, x: np.ndarray, where: np.ndarray) -> go.Scatter:
    names = layer_names(result)
    rows, columns = np.nonzero(where)
    return go.Scatter(
        x=x[columns],
        y=[names[row] for row in rows],
        mode="markers",
        marker={"size": 4, "color": GREY},
        hoverinfo="skip",
    )


def _lay_out(sheet: Sheet, result: xr.Dataset, below: int = 0) -> None:
    effect = result["effect"].values
    reach = float(np.nanmax(np.abs(effect), initial=0)) or 1.0
    height = row_height(result.sizes["layer"]) * result.sizes["layer"]
    sheet.update_yaxes(layer_axis(result))
    sheet.update_layout(
        height=height + 150 + below,
        margin={"t": 64},
        showlegend=False,
        title=_title(result),
        coloraxis={
            "cmin": -reach,
            "cmax": reach,
            "colorbar": {"tickformat": "~g", "title": {"text": _unit(result), "side": "right"}} | colour_bar(height),
        },
    )


def _bars(result: xr.Dataset, names: list[str]) -> Sheet:
    effect = result["effect"].values
    sheet = Sheet()
    sheet.add_trace(
        go.Bar(
            x=effect,
            y=names,
            orientation="h",
            marker={"color": ORANGE, "opacity": 0.75},
            error_x={
                "type": "data",
                "symmetric": False,
                "array": np.nan_to_num(result["high"].values - effect),
                "arrayminus": np.nan_to_num(effect - result["low"].values),
                "color": GREY,
            },
            customdata=result["p"].values,
            hovertemplate="%{y}<br><b>%{x:+.4f}</b><br>p %{customdata:.3g}<extra></extra>",
        )
    )
    for place, name in enumerate(names):
        controls = result["control_effect"].values[:, place]
        if not len(controls):
            continue
        sheet.add_trace(
            go.Scatter(
                x=controls,
                y=[name] * len(controls),
                mode="markers",
                marker={"symbol": "line-ns", "size": 10, "line": {"width": 1.5, "color": BLUE}},
                hovertemplate="random control: %{x:+.4f}<extra></extra>",
            )
        )
    sheet.update_xaxes(title={"text": f"change, {_unit(result)}"}, zeroline=True, tickformat="~g")
    sheet.update_layout(
        height=170 + 30 * len(names),
        margin={"t": 64},
        showlegend=False,
        title=_title(result),
    )
    return sheet


def _unit(result: xr.Dataset) -> str:
    return "nats per answer token" if result.attrs["metric"] == "loss" else "logit difference"


def _title(result: xr.Dataset) -> dict[str, Any]:
    """Prompt and answer of a single case, or how many cases there were."""
    attrs = result.attrs
    doing = {"mask": "masked", "zero": "zeroed", "patch": "patched from the source"}[attrs["kind"]]
    what = attrs["analysis"].removeprefix("trace_")
    if attrs["cases"] > 1:
        below = f"{attrs['cases']} cases"
    else:
        below = f"{_short(attrs['prompt'], 60)} ⟶ {_short(attrs['answer'], 30)}"
        below += f"   (source: {_short(attrs['source_prompt'], 40)})" if attrs["kind"] == "patch" else ""
    return {
        "text": f"{what} {doing}<br><span style='font-size:12px;color:{GREY}'>{below}</span>",
        "yref": "container",
        "y": 1,
        "yanchor": "top",
        "pad": {"t": 14},
    }


def _short(text: str, most: int) -> str:
    text = text.replace("\n", "↵").strip()
    return plain(text if len(text) <= most else text[: most - 1] + "…")


def _word(word: str) -> str:
    return _short(word.replace(" ", "·") if word.isspace() else word, LONGEST_WORD) or "·"
