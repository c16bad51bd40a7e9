"""How every figure looks: one template, light and dark, with colours that a colour-blind person can tell apart."""

from __future__ import annotations

import html
from typing import Any, Literal

import numpy as np
import plotly.graph_objects as go

Mode = Literal["light", "dark"]

FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, 'Helvetica Neue', Arial, sans-serif"
# Blue and orange differ for all common kinds of colour blindness (Okabe & Ito); both stand on white and on near-black.
BLUE, ORANGE, GREY = "#3f84c9", "#dd7a2c", "#8b919a"

_INK = {"light": "#23272e", "dark": "#e4e6ea"}
_FAINT = {"light": "#e4e6ea", "dark": "#343941"}
_MUTED = {"light": "#5c636d", "dark": "#a3a9b3"}
_PANEL = {"light": "#ffffff", "dark": "#22262c"}
# The neutral middle of a diverging scale is the page's own, so that "nothing special" recedes in either mode.
_DIVERGING = {
    "light": [[0, "#12507f"], [0.25, "#6ba6d6"], [0.5, "#f1f1ef"], [0.75, "#eea15f"], [1, "#a84a05"]],
    "dark": [[0, "#8cc4f2"], [0.25, "#3d76a6"], [0.5, "#2b2f36"], [0.75, "#b0662a"], [1, "#ffb46b"]],
}
_SEQUENTIAL = {
    "light": [[0, "#f1f1ef"], [0.5, "#6ba6d6"], [1, "#0b3a60"]],
    "dark": [[0, "#2b2f36"], [0.5, "#3d76a6"], [1, "#b5dbfb"]],
}


def template(mode: Mode = "light") -> go.layout.Template:
    """The shared plotly template; paper and plot are transparent, so that a figure sits on its page.

    Args:
        mode: "light" or "dark".
    """
    ink, faint, muted = _INK[mode], _FAINT[mode], _MUTED[mode]
    axis: dict[str, Any] = {
        "gridcolor": faint,
        "linecolor": faint,
        "zeroline": False,
        "tickcolor": faint,
        "tickfont": {"color": muted, "size": 12},
        "title": {"font": {"color": muted, "size": 12}, "standoff": 8},
        "automargin": True,
    }
    return go.layout.Template(
        layout={
            "font": {"family": FONT, "size": 13, "color": ink},
            "title": {"font": {"size": 15, "color": ink}, "x": 0, "xanchor": "left"},
            "paper_bgcolor": "rgba(0,0,0,0)",
            "plot_bgcolor": "rgba(0,0,0,0)",
            "colorway": [BLUE, ORANGE, "#2a9d78", "#b65a92", "#c9a227", GREY],
            "colorscale": {"diverging": _DIVERGING[mode], "sequential": _SEQUENTIAL[mode]},
            "xaxis": axis,
            "yaxis": axis,
            "coloraxis": {"colorbar": {"outlinewidth": 0, "tickfont": {"color": muted, "size": 11}, "thickness": 10}},
            "legend": {"font": {"color": muted, "size": 12}, "bgcolor": "rgba(0,0,0,0)"},
            "hoverlabel": {
                "bgcolor": _PANEL[mode],
                "bordercolor": faint,
                "font": {"family": FONT, "size": 13, "color": ink},
                "align": "left",
            },
            "annotationdefaults": {"font": {"color": muted, "size": 12}, "showarrow": False},
            "shapedefaults": {"line": {"color": GREY}},
            "hovermode": "closest",
            "margin": {"l": 56, "r": 24, "t": 44, "b": 48},
        }
    )


def dark(figure: go.Figure) -> go.Figure:
    """A copy of a figure for a dark page."""
    copy = go.Figure(figure)
    return copy.update_layout(template=template("dark"))


def plain(text: Any) -> str:
    """Text from a corpus or a model, safe inside plotly's pseudo-HTML: markup shows as written and does nothing."""
    shown = "".join(character if character.isprintable() else "\N{REPLACEMENT CHARACTER}" for character in str(text))
    return html.escape(shown, quote=True)


def shortened(text: Any, most: int) -> str:
    """At most so many characters of a name, the middle left out: names that begin alike often differ at their end."""
    shown = str(text)
    return shown if len(shown) <= most else f"{shown[: most - most // 3 - 1]}…{shown[len(shown) - most // 3 :]}"


def row_height(rows: int) -> int:
    """Pixels per layer of a map: generous for a few layers, still readable for many."""
    return 34 if rows <= 8 else 24 if rows <= 16 else 16 if rows <= 40 else 13


def signed_shares(reach: float, digits: int = 1) -> dict[str, Any]:
    """Ticks of a colour bar from -reach to reach, in signed per cent; nought has no sign."""
    ticks = np.linspace(-reach, reach, 5)
    return {"tickvals": ticks, "ticktext": [f"{tick:+.{digits}%}" if tick else "0" for tick in ticks]}


def colour_bar(available: float) -> dict[str, Any]:
    """Place and length of a colour bar: beside the top of the plot, no longer than can be compared at a glance.

    Args:
        available: height of the plot in pixels.
    """
    return {"lenmode": "pixels", "len": int(min(max(available, 150), 340)), "y": 1, "yanchor": "top"}
