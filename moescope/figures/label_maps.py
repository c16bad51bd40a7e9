"""One map of layers and experts per label, what chance explains in pale: how every specialisation is drawn."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import plotly.graph_objects as go
import xarray as xr

from moescope.errors import MoescopeError
from moescope.figures.axes import expert_axis, layer_axis, layer_names
from moescope.figures.pale import details, pale_and_full
from moescope.figures.sheets import Sheet
from moescope.figures.theme import colour_bar, plain, row_height, shortened

TITLE = 62
"""Pixels between rows of panels: two lines of title and the axis."""
ROOM = 124
"""Characters of bold type across a window 1280 wide, over all panels of a row."""
_TALL = 300
"""Pixels of a panel above which each has numbers of its own at its axis: the lowest one's are out of sight."""


@dataclass(frozen=True)
class Maps:
    """What the maps of one result show.

    Attributes:
        value: [layer, expert, label] the colour.
        stands: [layer, expert, label] cells beyond what chance explains.
        about: one per label, a few words under its name.
        details: variables of the result that a cell's hover text names as customdata[0], [1], ...
        hover: its lines, after the label and the place; the colour's value is z.
        bar: settings of the colour bar.
        reach: the colours end at -reach and reach.
    """

    value: np.ndarray
    stands: np.ndarray
    about: Sequence[str]
    details: Sequence[str]
    hover: str
    bar: dict
    reach: float


def label_maps(
    result: xr.Dataset, maps: Maps, labels: Sequence[str] | None, most: int, columns: int | None
) -> go.Figure:
    """Draws them.

    Args:
        result: with dims layer, expert and label.
        maps: what to show.
        labels: which labels, in this order; all by default.
        most: with more labels than this, only those with the most standing cells are drawn, and the figure says so.
        columns: panels per row; by default as many as the number of experts allows.

    Raises:
        MoescopeError: a label that the result does not have.
    """
    chosen, known = _chosen(result, maps, labels, most), result.sizes["label"]
    wide = columns or min(len(chosen), 4 if result.sizes["expert"] <= 32 else 2 if result.sizes["expert"] <= 128 else 1)
    rows = -(-len(chosen) // wide)
    layers = result.sizes["layer"]
    panel = row_height(layers) * 0.62 * layers + 18
    sheet = Sheet(
        [_title(result["label"].values[index], maps.about[index], ROOM // wide) for index in chosen],
        rows=rows,
        cols=wide,
        shared_xaxes=True,
        shared_yaxes=True,
        horizontal_spacing=0.03 if wide > 2 else 0.05,
        vertical_spacing=min(0.9 / max(rows - 1, 1), TITLE / (rows * (panel + TITLE))),
    )
    for place, index in enumerate(chosen):
        row, column = divmod(place, wide)
        for trace in _panel(result, maps, index):
            sheet.add_trace(trace, row=row + 1, col=column + 1)
    sheet.update_xaxes(expert_axis(result, most=8, title={"text": ""}, tickangle=0))
    sheet.update_yaxes(layer_axis(result, title={"text": ""}))
    if panel > _TALL:
        sheet.update_xaxes(showticklabels=True)
    for column in range(1, wide + 1):
        lowest = rows if (rows - 1) * wide + column <= len(chosen) else rows - 1
        sheet.update_xaxes(title={"text": "expert"}, showticklabels=True, row=lowest, col=column)
    for row in range(1, rows + 1):
        sheet.update_yaxes(title={"text": "layer"}, row=row, col=1)
    sheet.update_layout(
        height=int(rows * (panel + TITLE) + 90),
        showlegend=False,
        coloraxis={
            "cmin": -maps.reach,
            "cmax": maps.reach,
            "colorbar": colour_bar(rows * (panel + TITLE)) | maps.bar,
        },
    )
    if labels is None and len(chosen) < known:
        sheet.add_annotation(
            text=f"{len(chosen)} of {known} labels are drawn, those with the most experts; name others with labels=",
            xref="paper",
            yref="paper",
            x=1,
            y=1,
            xanchor="right",
            yanchor="bottom",
            yshift=40,
            showarrow=False,
        )
        sheet.update_layout(margin={"t": 66})
    return sheet.figure()


def counted(number: float, more: str = "", of: str = "expert") -> str:
    """ "1 expert", "12 experts above chance"."""
    return f"{number:,.0f} {of}{'' if number == 1 else 's'} {more}".strip()


def _title(name: object, about: str, room: int) -> str:
    """The two lines over a panel: the label, which is data, as far as there is room, and a few words about it."""
    shown = (
        plain(shortened(name, room)).replace("&quot;", '"').replace("&#x27;", "'")
    )  # plotly prints these two as they are
    return f"<b>{shown}</b><br><span style='font-size:11px'>{about}</span>"


def _chosen(result: xr.Dataset, maps: Maps, labels: Sequence[str] | None, most: int) -> list[int]:
    known = [str(name) for name in result["label"].values]
    unknown = [name for name in labels or [] if name not in known]
    if unknown:
        raise MoescopeError(f"The result has no label {unknown[0]!r}; it has {', '.join(known)}.")
    if labels is not None:
        return [known.index(name) for name in labels]
    if len(known) <= most:
        return list(range(len(known)))
    ranked = np.argsort(-maps.stands.sum(axis=(0, 1)), kind="stable")[:most]
    return sorted(int(index) for index in ranked)


def _panel(result: xr.Dataset, maps: Maps, index: int) -> list[go.Heatmap]:
    part, value, stands = result.isel(label=index), maps.value[..., index], maps.stands[..., index]
    # The last says which label it is, for what answers to clicks.
    which = np.full((*value.shape, 1), index, dtype=np.float32)
    return pale_and_full(
        value,
        stands,
        x=part["expert"].values,
        y=layer_names(result),
        coloraxis="coloraxis",
        customdata=np.concatenate([details(part, maps.details), which], axis=-1),
        # A label's name is data: in meta it is printed, in the template it would be parsed.
        meta=plain(result["label"].values[index]),
        xgap=1,
        ygap=1,
        hovertemplate=f"%{{meta}}<br>layer %{{y}}, expert %{{x}}<br>{maps.hover}<extra></extra>",
    )
