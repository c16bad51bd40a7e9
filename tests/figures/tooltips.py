"""What a tooltip says: a trace's hover template filled in as plotly fills it."""

from __future__ import annotations

import re
from typing import Any

import numpy as np

_FIELD = re.compile(r"%\{(\w+)((?:\[\d+\])*)(?::([^}]*))?\}")


def told(trace: Any, *at: int) -> str:
    """The tooltip of a point, or of a map's cell by row and column."""

    def filled(field: re.Match[str]) -> str:
        name, places, form = field[1], [int(place) for place in re.findall(r"\d+", field[2])], field[3]
        value: Any = getattr(trace, name)
        if name != "meta":
            own = at if trace.type != "heatmap" or name not in ("x", "y") else (at[1] if name == "x" else at[0],)
            for place in own:
                value = value[place]
        if name == "x" and trace.type == "bar" and trace.base is not None:
            value = value + np.broadcast_to(trace.base, np.shape(trace.x))[at]
        for place in places:
            value = value[place]
        return str(value) if form is None else format(float(value), form.replace("~", ""))

    return re.sub(r"<[^>]*>", " ", _FIELD.sub(filled, trace.hovertemplate.replace("<extra></extra>", "")))
