"""Caches of experts: hit rates by size, and what is moved for a token, beside the same tokens in another order."""

from __future__ import annotations

from typing import Any

import numpy as np
import plotly.graph_objects as go
import xarray as xr

from moescope.errors import MoescopeError
from moescope.figures.axes import layer_axis, layer_names
from moescope.figures.sheets import Sheet
from moescope.figures.theme import BLUE, GREY, ORANGE, plain, row_height

READ_CACHES = (
    "Left: the share of selected experts that a cache in every layer already holds; LRU and LFU can be built, SCH "
    "foresees m tokens, Belady all, and nothing beats it. Dotted: the same with each sequence's tokens shuffled; grey "
    "dashes: experts cached at random. Right: the same for each layer."
)
READ_OFFLOAD = (
    "Left: what a token moves over the slow link, against the memory that the caches take; the grey line is without a "
    "cache, dotted lines are with each sequence's tokens shuffled. Hover for the time. Right: which layers load."
)
COLOURS = {"lru": BLUE, "lfu": "#2a9d78", "belady": ORANGE}
FORESIGHT = ("#d9b3cc", "#c88ab3", "#b65a92", "#8e3f70", "#652c4f")
"""SCH, from little foresight to much."""
NAMES = {"lru": "LRU", "lfu": "LFU", "belady": "Belady"}
WIDE = [0.56, 0.44]


def caches(result: xr.Dataset, policy: str | None = None) -> go.Figure:
    """Draws the hit rates of every policy by cache size, and of one policy in each layer.

    How to read it: see `READ_CACHES`.

    Args:
        result: from `analysis.caches`; a menu chooses the label, or else the policy, of what is drawn by layer.
        policy: shown first by layer, or for all labels; LRU if None.

    Raises:
        MoescopeError: the result does not have this policy.
    """
    by_label = "label" in result.dims
    policies = [str(name) for name in result["policy"].values]
    first = _place(policies, policy)
    sheet = _pair(result, ["the whole model", "each layer"])
    drawn: list[list[Any]] = []
    parts = [result.isel(label=i) for i in range(result.sizes["label"])] if by_label else [result] * len(policies)
    for place, part in enumerate(parts):
        at = first if by_label else place
        traces = [(trace, 1) for trace in (_hit_rates(part) if by_label or not place else [])]
        traces += [(_by_layer(part["hit_rate"].isel(policy=at), part, ".1%", "hits"), 2)]
        for trace, column in traces:
            # Without labels the left panel shows all policies, whichever is chosen.
            trace.visible = place == (0 if by_label else first) or (not by_label and column == 1)
            sheet.add_trace(trace, row=1, col=column)
        drawn.append([trace for trace, _ in traces])
    sheet.update_yaxes(title={"text": "hit rate"}, tickformat=".0%", row=1, col=1)
    sheet.update_layout(coloraxis={"colorbar": {"tickformat": ".0%", "title": {"text": "hit rate", "side": "right"}}})
    names = [plain(name) for name in result["label"].values] if by_label else [_name(policy) for policy in policies]
    keep = 0 if by_label else len(drawn[0]) - 1
    sheet.update_layout(updatemenus=[switch(names, drawn, 0 if by_label else first, keep=keep)])
    return sheet.figure()


def offload(result: xr.Dataset, policy: str | None = None) -> go.Figure:
    """Draws what each policy moves per token against the memory it takes, and which layers load.

    How to read it: see `READ_OFFLOAD`.

    Args:
        result: from `analysis.offload`; a menu chooses the policy of what is drawn by layer.
        policy: shown first by layer; LRU if None.

    Raises:
        MoescopeError: the result does not have this policy.
    """
    policies = [str(name) for name in result["policy"].values]
    first = _place(policies, policy)
    sheet = _pair(result, ["moved for each token", "loads of each layer"])
    fixed = _moved(result)
    drawn: list[list[Any]] = []
    for place in range(len(policies)):
        trace = _by_layer(result["layer_loads"].isel(policy=place), result, ".2f", "loads for each token")
        trace.visible = place == first
        drawn.append([*(fixed if not place else []), trace])
    for trace in fixed:
        sheet.add_trace(trace, row=1, col=1)
    for traces in drawn:
        sheet.add_trace(traces[-1], row=1, col=2)
    known = np.isfinite(float(result["bytes_all"]))
    if known:
        unit, memory = (_unit(float(result[name]))[1] for name in ("bytes_uncached", "bytes_all"))
        sheet.update_yaxes(title={"text": f"{unit} for each token"}, rangemode="tozero", row=1, col=1)
        sheet.update_xaxes(title={"text": f"{memory} of cached experts"}, tickmode="auto", tickvals=None, row=1, col=1)
    else:
        sheet.update_yaxes(title={"text": "experts loaded for each token"}, rangemode="tozero", row=1, col=1)
    sheet.update_layout(coloraxis={"colorbar": {"title": {"text": "loads for each token", "side": "right"}}})
    sheet.update_layout(updatemenus=[switch([_name(p) for p in policies], drawn, first, keep=len(fixed))])
    return sheet.figure()


def _pair(result: xr.Dataset, titles: list[str]) -> Sheet:
    """Two panels: curves over cache sizes, and a map of layers by sizes."""
    rows = row_height(result.sizes["layer"]) * result.sizes["layer"]
    sheet = Sheet(titles, cols=2, column_widths=WIDE, horizontal_spacing=0.08)
    sizes = [int(size) for size in result["size"].values]
    sheet.update_xaxes(title={"text": "experts that a layer's cache holds"}, tickvals=sizes, row=1, col=1)
    sheet.update_xaxes(
        title={"text": "experts that the cache holds"}, type="category", showgrid=False, row=1, col=2, tickangle=0
    )
    sheet.update_yaxes(layer_axis(result), row=1, col=2)
    sheet.update_layout(
        height=max(rows, 300) + 170,
        legend={"orientation": "h", "x": 0, "xanchor": "left", "y": 0, "yanchor": "bottom", "yref": "container"},
        margin={"t": 80, "b": 96},
    )
    return sheet


def _hit_rates(part: xr.Dataset) -> list[Any]:
    x = part["size"].values
    traces: list[Any] = []
    colours = _colours(part)
    for place, name in enumerate(part["policy"].values):
        here = part.isel(policy=place)
        names = ("low", "high", "empty")
        details = [here[f"model_hit_rate_{end}"].values for end in names] + [here["model_shuffled"].values]
        traces += _curve(
            x,
            here["model_hit_rate"].values,
            here["model_shuffled"].values,
            str(name),
            colours[str(name)],
            np.stack(details, axis=-1),
            "%{x} experts cached<br><b>%{y:.1%} hits</b> (%{customdata[0]:.1%} to %{customdata[1]:.1%})<br>"
            "%{customdata[2]:.1%} if first loads are misses, %{customdata[3]:.1%} with tokens shuffled",
        )
    traces.append(
        go.Scatter(
            x=x,
            y=part["model_chance"].values,
            mode="lines",
            line={"color": GREY, "width": 1.6, "dash": "dash"},
            name="at random",
            hovertemplate="%{x} experts drawn at random: %{y:.1%}<extra></extra>",
        )
    )
    return traces


def _moved(result: xr.Dataset) -> list[Any]:
    """Bytes (or experts) per token of every policy, and without a cache."""
    known = bool(np.isfinite(float(result["bytes_all"])))
    each = float(result.attrs["bytes_per_expert"]) if known else 1.0
    down, unit = _unit(float(result["bytes_uncached"])) if known else (1.0, "experts")
    x = result["memory"].values / _unit(float(result["bytes_all"]))[0] if known else result["size"].values
    colours = _colours(result)
    traces: list[Any] = []
    for place, name in enumerate(result["policy"].values):
        here = result.isel(policy=place)
        columns = ("hit_rate", "loads", "loads_empty", "ms_per_token", "ms_per_token_empty", "tokens_per_second")
        details = [here[column].values for column in columns] + [result["size"].values, result["share_held"].values]
        time = (
            "<br>%{customdata[3]:.3g} ms a token, %{customdata[5]:,.3g} tokens a second "
            "(%{customdata[4]:.3g} ms from an empty cache)"
        )
        traces += _curve(
            x,
            here["loads"].values * each / down,
            here["loads_shuffled"].values * each / down,
            str(name),
            colours[str(name)],
            np.stack(details, axis=-1),
            "%{customdata[6]:.0f} experts a layer, %{customdata[7]:.0%} of all<br>"
            f"<b>%{{y:.3g}} {unit} a token</b>, "
            "%{customdata[1]:.2f} experts (%{customdata[2]:.2f} from an empty cache)<br>%{customdata[0]:.1%} hits"
            + (time if known else ""),
        )
    traces.append(
        go.Scatter(
            x=x,
            y=np.full(x.size, float(result["selections"]) * each / down),
            mode="lines",
            line={"color": GREY, "width": 1.6, "dash": "dash"},
            name="no cache",
            hovertemplate=f"without a cache: %{{y:.3g}} {unit} a token<extra></extra>",
        )
    )
    return traces


def _curve(
    x: np.ndarray,
    y: np.ndarray,
    shuffled: np.ndarray,
    policy: str,
    colour: str,
    details: np.ndarray,
    hover: str,
) -> list[Any]:
    """A policy's curve, and dotted the same with tokens shuffled."""
    control = go.Scatter(
        x=x,
        y=shuffled,
        mode="lines",
        line={"color": colour, "width": 1.3, "dash": "dot"},
        opacity=0.5,
        name=f"{_name(policy)}, shuffled",
        legendgroup=policy,
        showlegend=False,
        hoverinfo="skip",
    )
    own = go.Scatter(
        x=x,
        y=y,
        mode="lines+markers",
        line={"color": colour, "width": 2.2},
        marker={"size": 6},
        customdata=details,
        name=_name(policy),
        legendgroup=policy,
        hovertemplate=f"{_name(policy)}, {hover}<extra></extra>",
    )
    return [control, own]


def _by_layer(values: xr.DataArray, part: xr.Dataset, form: str, what: str) -> go.Heatmap:
    table = values.transpose("layer", "size").values
    return go.Heatmap(
        z=table,
        x=[str(int(size)) for size in part["size"].values],
        y=layer_names(part),
        coloraxis="coloraxis",
        hoverongaps=False,
        xgap=1,
        ygap=1,
        name="layers",
        hovertemplate=f"layer %{{y}}, %{{x}} experts cached<br><b>%{{z:{form}}} {what}</b><extra></extra>",
    )


def switch(names: list[str], drawn: list[list[Any]], first: int, keep: int) -> dict[str, Any]:
    """A menu that shows one option's traces, and always the first `keep` of all."""
    sizes = [len(traces) for traces in drawn]
    buttons = []
    for option, name in enumerate(names):
        shown = [which == option for which, size in enumerate(sizes) for _ in range(size)]
        buttons.append({"label": name, "method": "restyle", "args": [{"visible": [True] * keep + shown[keep:]}]})
    return {
        "buttons": buttons,
        "active": first,
        "x": 1,
        "xanchor": "right",
        "y": 1,
        "yanchor": "bottom",
        "pad": {"b": 6},
    }


def _place(policies: list[str], policy: str | None) -> int:
    if policy is not None and policy not in policies:
        raise MoescopeError(f"The result has no policy {policy!r}; it has {', '.join(policies)}.")
    return policies.index(policy or "lru")


def _name(policy: str) -> str:
    return NAMES.get(policy) or f"SCH, m = {policy.removeprefix('sch-')}"


def _colours(result: xr.Dataset) -> dict[str, str]:
    policies = [str(name) for name in result["policy"].values]
    seeing = sorted((name for name in policies if name not in COLOURS), key=lambda name: int(name.removeprefix("sch-")))
    step = (len(FORESIGHT) - 1) / max(len(seeing) - 1, 1)
    middle = len(FORESIGHT) // 2
    shades = {name: FORESIGHT[round(place * step) if len(seeing) > 1 else middle] for place, name in enumerate(seeing)}
    return COLOURS | shades


def _unit(size: float) -> tuple[float, str]:
    """A decimal unit that the size is a few or a few hundred of."""
    for scale, name in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if size >= scale:
            return scale, name
    return 1.0, "bytes"
