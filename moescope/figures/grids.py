"""The bird's-eye view: every expert of every layer as one cell, coloured by whichever measure of it is asked for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import plotly.graph_objects as go
import xarray as xr

from moescope.errors import MoescopeError
from moescope.figures.axes import expert_axis, layer_axis, layer_names
from moescope.figures.pale import untested
from moescope.figures.sheets import Sheet
from moescope.figures.specialisation import standing
from moescope.figures.theme import GREY, colour_bar, plain, row_height, shortened, signed_shares

LEVEL = 0.05
"""False discovery rate at which a preference is drawn as one, as in the atlas."""


@dataclass(frozen=True)
class Measure:
    """How one measure of an expert is drawn.

    Attributes:
        title: of the colour bar, with the unit.
        said: what the tooltip says of a value.
        scale: "ratio" (1 is neutral, both ways), "layer" (so much above or below the layer's own mean), "signed" (0 is
            neutral), "plain" (from 0) or "powers" (of 10).
        empty: what a cell without a value means.
        read: how to read it.
    """

    title: str
    said: str
    scale: str
    empty: str
    read: str


MEASURES = {
    "relative_load": Measure(
        "× fair share",
        "{:.2f} × its fair share",
        "ratio",
        "never selected",
        "Orange does more than a fair share of its layer's work, blue less; a cross does none at all.",
    ),
    "npmi": Measure(
        "nPMI of its best label",
        "nPMI {:.3f}",
        "plain",
        "no preference stands against dealing the labels anew over documents",
        "The darker, the more an expert's work is tied to one label, by the label it prefers most; empty where no "
        "preference stands against dealing the labels anew over documents.",
    ),
    "reap": Measure(
        "REAP",
        "REAP {:.3g}",
        "powers",
        "no measured output",
        "Mean of routing weight × output norm over the expert's tokens. Norms grow with depth: compare inside a layer.",
    ),
    "ean": Measure(
        "mean output norm",
        "mean output norm {:.3g}",
        "powers",
        "no measured output",
        "Mean L2 norm of the expert's output, before its weight. Norms grow with depth: compare inside a layer.",
    ),
    "absmax": Measure(
        "largest output",
        "largest output magnitude {:.3g}",
        "powers",
        "never selected",
        "The largest magnitude that ever left an expert. A cell far darker than its whole layer may be a super expert.",
    ),
    "margin": Measure(
        "mean margin",
        "mean margin {:.3g}",
        "layer",
        "never selected, or its router defines no margin",
        "Mean, over the tokens that select an expert, of how far the last expert chosen was above the first left out, "
        "against the mean of its layer: blue experts are chosen more narrowly than the others, orange more clearly.",
    ),
    "mean_weight": Measure(
        "mean weight",
        "mean weight {:.3g}",
        "layer",
        "never selected",
        "Mean routing weight over the tokens that select an expert, against the mean of its layer.",
    ),
    "token_entropy": Measure(
        "mean entropy",
        "mean entropy {:.3g} nats",
        "layer",
        "never selected, or its router defines no entropy",
        "Mean, over the tokens that select an expert, of the entropy of the router's scores, against the mean of its "
        "layer: orange experts serve tokens at which the router was undecided.",
    ),
    "effect": Measure(
        "rise of the loss",
        "loss {:+.3g} without it",
        "signed",
        "not measured",
        "How much the loss rises when the expert alone is masked: orange is needed, blue would not be missed.",
    ),
}
"""What a cell can show, by the name of the variable in a result."""


def layer_expert_grid(
    result: xr.Dataset, value: str | None = None, chosen: tuple[str | int, int] | None = None
) -> go.Figure:
    """Draws one measure of every (layer, expert), with one of them marked.

    How to read it: `MEASURES[value].read`. Hatched cells are experts that a layer does not have. Each cell's customdata
    is (site key, layer, expert): ids, whatever is shown or left out.

    Args:
        result: with dims (layer, expert), or (layer, expert, label) for the nPMI: from `analysis.load`, `npmi`,
            `importance`, `super_experts`, `margins` or `atlas`.
        value: a name of `MEASURES` that the result has; its first if None.
        chosen: (site key or layer, expert) to mark.

    Raises:
        MoescopeError: the result has no such measure, layer or expert.
    """
    offered = [name for name in MEASURES if name in result]
    if value is None and offered:
        value = offered[0]
    if value not in offered:
        raise MoescopeError(f"This result has no {value!r} by expert to draw; it has {', '.join(offered) or 'none'}.")
    cells, words = _cells(result, value)
    measure, exists = MEASURES[value], result["exists"].values.astype(bool)
    not_tested = "label" in result[value].dims and untested(result["q"].values)
    if not_tested:
        measure = replace(measure, empty="not tested")
    if "label" in result[value].dims and result.sizes["label"] == 1:
        measure = replace(measure, title=f"nPMI with {plain(shortened(result['label'].values[0], 24))}")
    if measure.scale == "layer" and f"layer_{value}" not in result:
        measure = replace(measure, scale="plain")
    height = row_height(result.sizes["layer"]) * result.sizes["layer"]
    shown, axis = _coloured(cells, measure, _neutral(result, value, measure))
    names, ids = layer_names(result), _ids(result)
    sheet = Sheet()
    said = np.full(cells.shape, "", dtype=object)
    for row, expert in zip(*np.nonzero(np.isfinite(cells)), strict=True):
        said[row, expert] = f"<b>{measure.said.format(cells[row, expert])}</b>{words[row, expert]}"
        if measure.scale == "layer":
            said[row, expert] += f"<br>{_against(result, value, row, expert)}"
    place = {"x": result["expert"].values, "y": names, "xgap": 1, "ygap": 1}
    sheet.add_trace(
        go.Heatmap(
            z=shown,
            coloraxis="coloraxis",
            customdata=ids,
            text=said,
            hoverongaps=False,
            name=value,
            hovertemplate="layer %{y}, expert %{x}<br>%{text}<extra></extra>",
            **place,
        )
    )
    sheet.add_trace(absent(exists, names))
    sheet.add_trace(_flat(exists & ~np.isfinite(shown), ids, measure.empty, "rgba(139,145,154,0.04)", place))
    sheet.add_trace(_crosses(result, exists & ~np.isfinite(shown), names, ids, measure.empty))
    sheet.update_xaxes(expert_axis(result))
    sheet.update_yaxes(layer_axis(result))
    axis["colorbar"] |= colour_bar(height)
    sheet.update_layout(height=110 + height, coloraxis=axis, showlegend=False, margin={"t": 24})
    if not exists.all():
        place = {"xref": "paper", "yref": "paper", "x": 1, "y": 1, "xanchor": "right", "yanchor": "bottom"}
        sheet.add_annotation(text="hatched: no such expert", font={"size": 11}, **place)
    if not_tested:
        place = {"xref": "paper", "yref": "paper", "x": 0, "y": 1, "xanchor": "left", "yanchor": "bottom"}
        sheet.add_annotation(text="not tested, so no label is named", font={"size": 11}, **place)
    if chosen is not None:
        _mark(sheet, result, chosen)
    return sheet.figure()


def _cells(result: xr.Dataset, value: str) -> tuple[np.ndarray, np.ndarray]:
    """[layer, expert] values, and what else the tooltip says of each."""
    found = result[value]
    words = np.full((result.sizes["layer"], result.sizes["expert"]), "", dtype=object)
    if "label" in found.dims:
        if "q" not in result or "label" not in result["q"].dims:
            raise MoescopeError(f"Choose one label to draw {value!r} of: `result.sel(label=…)`.")
        order = ("layer", "expert", "label")
        ordered = result.transpose(*order, ...)
        values = ordered[value].values
        stands = standing(ordered, LEVEL) & (values > 0)
        best = np.where(stands, values, -np.inf).argmax(axis=2)
        cells = np.where(stands.any(axis=2), np.take_along_axis(values, best[..., None], 2)[..., 0], np.nan)
        labels = [plain(name) for name in result["label"].values]
        for row, expert in zip(*np.nonzero(np.isfinite(cells)), strict=True):
            words[row, expert] = f"<br>prefers {labels[best[row, expert]]}"
        return cells, words
    if set(found.dims) != {"layer", "expert"}:
        raise MoescopeError(f"{value!r} is by {', '.join(map(str, found.dims))}, not by layer and expert.")
    if value == "npmi" and "prefers" in result:
        for row, expert in np.ndindex(*words.shape):
            if result["prefers"].values[row, expert]:
                words[row, expert] = f"<br>prefers {plain(result['prefers'].values[row, expert])}"
    return found.transpose("layer", "expert").values.astype(np.float64), words


def _neutral(result: xr.Dataset, value: str, measure: Measure) -> np.ndarray:
    """[layer, 1] what a "layer" scale holds the cells of a layer against."""
    return result[f"layer_{value}"].values[:, None] if measure.scale == "layer" else np.empty((0, 1))


def _against(result: xr.Dataset, value: str, row: int, expert: int) -> str:
    low, high = (float(result[f"{value}_{end}"].values[row, expert]) for end in ("low", "high"))
    interval = f"95 % interval {low:.3g} to {high:.3g}; " if np.isfinite(low) else ""
    return f"{interval}its layer's mean {float(result[f'layer_{value}'].values[row]):.3g}"


def _coloured(cells: np.ndarray, measure: Measure, neutral: np.ndarray) -> tuple[np.ndarray, dict[str, Any]]:
    """(what the colours stand for, NaN where there is nothing; their axis)."""
    bar: dict[str, Any] = {"title": {"text": measure.title, "side": "right", "font": {"size": 12}}}
    shown = np.where(np.isfinite(cells), cells, np.nan)
    if not np.isfinite(shown).any():
        return shown, {"cmin": 0, "cmax": 1, "showscale": False, "colorbar": bar}
    if measure.scale == "ratio":
        shown = _logged(shown, np.log2)
        reach = int(min(4, max(1, np.ceil(np.nanmax(shown, initial=1)))))
        ticks = sorted({-reach, -(reach // 2), 0, reach // 2, reach})
        bar |= {"tickvals": ticks, "ticktext": [f"{2**t}×" if t >= 0 else f"1/{2**-t}×" for t in ticks]}
        return shown, {"cmin": -reach, "cmax": reach, "colorbar": bar}
    if measure.scale == "layer":
        bar["title"]["text"] += " against its layer's"
        apart = shown - neutral
        shown = np.divide(apart, np.abs(neutral), out=np.sign(apart), where=neutral != 0)
        # A quarter more or less at least, so that next to no difference looks like none.
        reach = min(max(float(np.nanmax(np.abs(shown))), 0.25), 1.0)
        bar |= signed_shares(reach, digits=0)
        return shown, {"cmin": -reach, "cmax": reach, "colorbar": bar}
    if measure.scale == "signed":
        reach = float(np.nanmax(np.abs(shown))) or 1.0
        return shown, {"cmin": -reach, "cmax": reach, "colorbar": bar}
    if measure.scale == "powers":
        logged = _logged(shown, np.log10)
        if not np.isfinite(logged).any():
            return shown * 0, {"cmin": 0, "cmax": 1, "showscale": False, "colorbar": bar}
        low, high = float(np.nanmin(logged)), float(np.nanmax(logged))
        # From 0, so that plotly takes the sequential colours whatever the powers' signs.
        ticks = np.linspace(0, max(high - low, np.log10(2)), 5)
        bar |= {"tickvals": ticks, "ticktext": [f"{10 ** (low + tick):.3g}" for tick in ticks]}
        return np.where(shown <= 0, 0.0, logged - low), {"cmin": 0, "cmax": float(ticks[-1]), "colorbar": bar}
    return shown, {"cmin": 0, "cmax": float(np.nanmax(shown)) or 1.0, "colorbar": bar}


def _logged(values: np.ndarray, log: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(values > 0, log(values), np.nan)


def _ids(result: xr.Dataset) -> np.ndarray:
    ids = np.empty((result.sizes["layer"], result.sizes["expert"], 3), dtype=object)
    ids[..., 0] = np.array([str(site) for site in result["site"].values], dtype=object)[:, None]
    ids[..., 1] = np.array([int(layer) for layer in result["layer"].values], dtype=object)[:, None]
    ids[..., 2] = np.array([int(expert) for expert in result["expert"].values], dtype=object)[None, :]
    return ids


def _flat(where: np.ndarray, ids: np.ndarray, said: str, colour: str, place: dict[str, Any]) -> go.Heatmap:
    return go.Heatmap(
        z=np.where(where, 0.0, np.nan),
        colorscale=[[0, colour], [1, colour]],
        showscale=False,
        customdata=ids,
        hoverongaps=False,
        name=said,
        hovertemplate=f"layer %{{y}}, expert %{{x}}<br><b>{said}</b><extra></extra>",
        **place,
    )


_PALE = "rgba(139,145,154,0.12)"  # over either mode's page


def absent(exists: np.ndarray, names: list[str]) -> go.Bar:
    """Hatched where a layer is narrower than the widest."""
    width = exists.sum(axis=1)
    rows = np.flatnonzero(width < exists.shape[1])
    return go.Bar(
        x=exists.shape[1] - width[rows],
        base=width[rows] - 0.5,
        y=[names[row] for row in rows],
        orientation="h",
        width=0.94,
        marker={
            "color": _PALE,
            "line": {"width": 0},
            "pattern": {
                "shape": "/",
                "size": 6,
                "solidity": 0.25,
                "fgcolor": GREY,
                "bgcolor": "rgba(139,145,154,0.12)",
            },
        },
        customdata=width[rows],
        name="no such expert",
        hovertemplate="layer %{y} has %{customdata} experts<br><b>no such expert</b><extra></extra>",
    )


def _crosses(result: xr.Dataset, where: np.ndarray, names: list[str], ids: np.ndarray, said: str) -> go.Scatter:
    rows, experts = np.nonzero(where if said.startswith("never selected") else np.zeros_like(where))
    return go.Scatter(
        x=result["expert"].values[experts],
        y=[names[row] for row in rows],
        mode="markers",
        marker={"symbol": "x-thin", "size": 6, "line": {"width": 1.2, "color": GREY}},
        customdata=ids[rows, experts],
        name=said,
        hovertemplate=f"layer %{{y}}, expert %{{x}}<br><b>{said}</b><extra></extra>",
    )


def _mark(sheet: Sheet, result: xr.Dataset, chosen: tuple[str | int, int]) -> None:
    where, expert = chosen
    sites, layers = [str(site) for site in result["site"].values], result["layer"].values.tolist()
    rows = [row for row in range(len(sites)) if where in (sites[row], layers[row])]
    if not rows or expert not in result["expert"].values or not bool(result["exists"].values[rows[0], expert]):
        raise MoescopeError(f"This result has no expert {expert} in layer {where}.")
    for row in rows:
        edge = {"x0": expert - 0.5, "x1": expert + 0.5, "y0": row - 0.5, "y1": row + 0.5}
        # Light under dark: seen on every colour of either mode.
        for width, colour in ((5, "#ffffff"), (2, "#14171b")):
            sheet.add_shape(type="rect", line={"color": colour, "width": width}, name="chosen", **edge)


def margins(result: xr.Dataset) -> go.Figure:
    """Draws the mean margin of every expert's tokens; see `layer_expert_grid`, which draws its weights and entropies.

    Args:
        result: from `analysis.margins`.
    """
    return layer_expert_grid(result, "margin")
