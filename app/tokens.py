"""Tokens as a page shows them: real text in which nothing acts, coloured by one value, with what a tooltip tells.

What would be invisible, or turn the text around it, is replaced by a mark that names it. Each token carries its facts
in data attributes; `assets/text.js` makes the tooltip, the keys and the replay of them.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import xarray as xr
from dash import html
from plotly.colors import sample_colorscale, unlabel_rgb

from moescope.app.aria import SILENT, named
from moescope.figures.theme import template

COLOURS = {
    "weight": "weight of the selected expert",
    "fires": "whether the selected expert fires",
    "entropy": "router entropy, nats",
    "margin": "margin of the choice",
    "loss": "loss, nats",
    "top": "first expert",
}
"""What tokens can be coloured by."""
OF_EXPERT = ("weight", "fires")
_UNSELECTED: dict[str, Any] = {"aria-selected": "false"}
_ODD = ("Cc", "Cf", "Zl", "Zp", "Cs", "Co", "Cn")
# Okabe and Ito's colours, which differ for all common kinds of colour blindness.
_KINDS = ("#e69f00", "#56b4e9", "#009e73", "#f0e442", "#0072b2", "#d55e00", "#cc79a7")
_FIRES = {False: "#eea15f", True: "#b0662a"}


@dataclass(frozen=True)
class Paint:
    """Colours of some tokens, and their legend.

    Attributes:
        values: [token], NaN where there is none.
        backgrounds: CSS colours, None where the token is left plain.
        words: each token's value in words.
        legend: components.
    """

    values: np.ndarray
    backgrounds: list[str | None]
    words: list[str]
    legend: Any


def marked(text: str, blanks: bool = True) -> list[Any]:
    """A text as components: what is invisible or turns text around is a mark; blanks and breaks stay themselves.

    Args:
        text: any.
        blanks: breaks and tabs have a sign beside them.
    """
    parts: list[Any] = []
    held = ""
    for character in text:
        if character in "\n\t" and not blanks:
            held += character
        elif character in "\n\t":
            parts += [held, html.Span("↵" if character == "\n" else "⇥", className="blank-mark", **SILENT), character]
            held = ""
        elif unicodedata.category(character) in _ODD:
            parts += [held, html.Span(_named(character), className="odd-mark")]
            held = ""
        else:
            held += character
    return [part for part in [*parts, held] if part != ""]


def spelled(text: str, most: int = 200) -> str:
    """The same in one line of plain text, blanks seen, for names and tooltips."""
    blanks = {" ": "␣", "\n": "↵", "\t": "⇥"}
    shown = "".join(
        blanks.get(c) or (f"⟨{_named(c)}⟩" if unicodedata.category(c) in _ODD else c) for c in text[: most + 1]
    )
    return shown if len(text) <= most else shown[:most] + "…"


def spoken(text: str, most: int = 200) -> str:
    """A stretch of text in one line, blanks as blanks: nothing in it acts on what stands around it."""
    line = " ".join(text.split())
    shown = "".join(f"⟨{_named(c)}⟩" if unicodedata.category(c) in _ODD else c for c in line[:most])
    return shown if len(line) <= most else shown + "…"


def painted(found: xr.Dataset, colour: str, expert: int | None, dark: bool) -> Paint:
    """The colours of a passage's tokens.

    Args:
        found: from `analysis.passage`.
        colour: one of `COLOURS`.
        expert: the selected one, which `OF_EXPERT` speak of.
        dark: the page is dark.
    """
    ids = found["expert"].values
    tokens = ids.shape[0]
    if colour == "top":
        first = ids[:, 0] if ids.shape[1] else np.full(tokens, -1)
        colours = [_KINDS[int(one) % len(_KINDS)] if one >= 0 else None for one in first]
        words = [f"first expert {one}" if one >= 0 else "no expert" for one in first]
        legend = [html.Span("the small number is the expert; seven colours, so experts seven apart share one")]
        return Paint(np.where(first >= 0, first, np.nan), colours, words, legend)
    if colour in OF_EXPERT:
        hit = ids == expert
        fires = hit.any(axis=1)
        if colour == "fires":
            colours = [_FIRES[dark] if one else None for one in fires]
            words = [f"expert {expert} {'fires' if one else 'does not fire'}" for one in fires]
            legend = [_swatch(_FIRES[dark]), html.Span(f"expert {expert} fires: {int(fires.sum())} of {tokens} tokens")]
            return Paint(fires.astype(float), colours, words, legend)
        values = np.where(hit, np.nan_to_num(found["weight"].values), 0).sum(axis=1).astype(float)
        words = [f"weight {v:.3g}" if f else f"not sent to expert {expert}" for v, f in zip(values, fires, strict=True)]
        return _scaled(values, words, (0.0, _top(np.abs(values))), dark, f"weight of expert {expert}")
    values = found[colour].values.astype(float)
    unit = "" if colour == "margin" else " nats"
    words = [f"{colour} {value:.3g}{unit}" if np.isfinite(value) else f"no {colour}" for value in values]
    # Entropies lie close together: their scale begins at the least of those shown, and the legend tells where it could.
    low = float(np.nanmin(values, initial=np.inf)) if colour == "entropy" and np.isfinite(values).any() else 0.0
    paint = _scaled(values, words, (low, _top(values)), dark, COLOURS[colour])
    if colour == "entropy":
        paint.legend.append(html.Span(f"of at most {np.log(found.attrs['n_experts']):.3g}"))
    return paint


def token(
    text: str, number: int, place: int, current: bool, phase: str, paint: tuple[str | None, str, bool], routes: str
) -> Any:
    """One token.

    Args:
        text: its own.
        number: in the document, from 0.
        place: its position in its sequence.
        current: it takes the focus when the text is entered.
        phase: "prefill" or "decode".
        paint: its colour, its value in words, whether the value is missing.
        routes: its experts and weights, "3:0.412 7:0.2", the first first.
    """
    background, words, missing = paint
    style = {"background": background, "color": ink_on(background)} if background else {}
    return html.Span(
        marked(text),
        className=f"token {phase}{' missing' if missing else ''}",
        style=style,
        role="option",
        tabIndex=0 if current else -1,
        **data(token=number, text=spelled(text), words=words, routes=routes, place=place, phase=phase),
        **_UNSELECTED,
        **named(f"token {number}, {spelled(text, 60)}, {words}, {phase}"),
    )


def data(**facts: Any) -> dict[str, Any]:
    """Data attributes, which the page's script reads."""
    return {f"data-{name}": str(value) for name, value in facts.items()}


def routes_of(ids: np.ndarray, weight: np.ndarray) -> str:
    """The experts of one token and layer as a data attribute."""
    return " ".join(f"{e}:{w:.4g}" for e, w in zip(ids.tolist(), weight.tolist(), strict=True) if e >= 0)


def ink_on(colour: str) -> str:
    """Black or white, whichever is read more easily on a colour: one of them always has a contrast above 4.5."""
    return "#000000" if (luminance(colour) + 0.05) / 0.05 >= 1.05 / (luminance(colour) + 0.05) else "#ffffff"


def luminance(colour: str) -> float:
    """Relative luminance of "#rrggbb" or "rgb(r, g, b)", as WCAG defines it."""
    if colour.startswith("#"):
        parts: Sequence[float] = [int(colour[at : at + 2], 16) for at in (1, 3, 5)]
    else:
        parts = unlabel_rgb(colour)
    linear = [part / 255 / 12.92 if part / 255 <= 0.04045 else ((part / 255 + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def _scaled(values: np.ndarray, words: list[str], ends: tuple[float, float], dark: bool, title: str) -> Paint:
    scale: Any = template("dark" if dark else "light").layout.colorscale.sequential  # pyright: ignore
    scale = [list(stop) for stop in scale]
    low, high = ends
    there = np.isfinite(values)
    share = np.clip((np.where(there, values, low) - low) / ((high - low) or 1), 0, 1)
    colours: list[str | None] = [
        str(sample_colorscale(scale, [float(part)])[0]) if full and part > 0.01 else None
        for part, full in zip(share, there, strict=True)
    ]
    bar = html.Span(
        className="legend-bar", style={"background": f"linear-gradient(to right, {', '.join(s[1] for s in scale)})"}
    )
    legend = [html.Span(title), html.Span(f"{low:.3g}"), bar, html.Span(f"{high:.3g}")]
    if not there.all():
        missing = int((~there).sum())
        legend.append(html.Span([html.Span(className="swatch missing"), f" not defined: {missing} tokens"]))
    return Paint(values, colours, words, legend)


def _top(values: np.ndarray) -> float:
    return float(np.nanmax(values, initial=0)) or 1.0


def _swatch(colour: str) -> Any:
    return html.Span(className="swatch", style={"background": colour})


def _named(character: str) -> str:
    return f"U+{ord(character):04X}"
