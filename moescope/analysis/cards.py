"""One expert's card: its row of the atlas, the tokens it answers to, the text it is busy in; readable by itself."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from moescope.analysis.atlas_table import atlas
from moescope.analysis.contexts import Example, TopToken, examples_of_experts, top_tokens, visible
from moescope.analysis.labelled import expert_name, layer_names
from moescope.errors import MoescopeError
from moescope.store.html import plain

if TYPE_CHECKING:
    import xarray as xr

    from moescope.store import Store


@dataclass(frozen=True)
class Card:
    """One expert, for a person to read.

    Attributes:
        layer, expert: which one; name: as people write it, "L3E7", or "L003-attentionE7" where a layer has two routers.
        values: its row of the atlas, by name; missing parts are absent.
        predecessors, successors, similar: (name, lift or similarity), strongest first.
        tokens: the tokens it prefers.
        examples: its busiest stretches of text.
        absent: part -> why this store does not tell it.
    """

    layer: int
    expert: int
    name: str
    values: Mapping[str, Any]
    predecessors: tuple[tuple[str, float], ...]
    successors: tuple[tuple[str, float], ...]
    similar: tuple[tuple[str, float], ...]
    tokens: tuple[TopToken, ...]
    examples: tuple[Example, ...]
    absent: Mapping[str, str]

    def _repr_html_(self) -> str:
        return _html(self)


def card(
    store: Store,
    name: str | tuple[int | str, int],
    found: xr.Dataset | None = None,
    tokens: int = 12,
    contexts: int = 3,
    by: str | None = None,
    seed: int = 0,
) -> Card:
    """One expert's card.

    Args:
        store: an open store.
        name: "L3E7", or (layer, expert); the site's key for the layer where that has two routers.
        found: the store's atlas, if it is at hand.
        tokens, contexts: how many preferred tokens and stretches of text.
        by, seed: of the atlas, where it is not given.

    Raises:
        MoescopeError: no such layer or expert.
    """
    layer, expert = parsed(name)
    table = atlas(store, by=by, seed=seed) if found is None else found
    return cards_of_layer(store, table, layer, [expert], tokens, contexts)[0]


def cards_of_layer(
    store: Store,
    found: xr.Dataset,
    layer: int | str,
    experts: list[int] | None = None,
    tokens: int = 12,
    contexts: int = 3,
) -> list[Card]:
    """Cards of some experts of one layer (by number or site key), all of them if None; the text is read once."""
    rows = np.flatnonzero(found["site" if isinstance(layer, str) else "layer"].values == layer)
    if not rows.size:
        known = ", ".join(layer_names(found))
        raise MoescopeError(f"There is no MoE layer {layer} in this store; it has {known}.")
    if rows.size > 1:
        keys = " or ".join(str(found["site"].values[row]) for row in rows)
        raise MoescopeError(f"Layer {layer} has several routers; name one: {keys}.")
    row = int(rows[0])
    width = int(found["n_experts"].values[row])
    chosen = list(range(width)) if experts is None else experts
    for expert in chosen:
        if not 0 <= expert < width:
            raise MoescopeError(f"Layer {layer} has experts 0 to {width - 1}; there is no expert {expert}.")
    site = str(found["site"].values[row])
    words = top_tokens(store, site, chosen, tokens)
    stretches = examples_of_experts(store, site, chosen, n=contexts)
    return [_card(found, row, expert, words[expert], stretches[expert]) for expert in chosen]


def _card(found: xr.Dataset, row: int, expert: int, tokens: list[TopToken], stretches: list[Example]) -> Card:
    part = found.isel(layer=row, expert=expert)
    values = {str(name): part[name].item() for name in part.data_vars if not part[name].dims and name != "exists"}
    return Card(
        layer=int(found["layer"].values[row]),
        expert=expert,
        name=expert_name(layer_names(found)[row], expert),
        values=values,
        **neighbours(found, str(found["site"].values[row]), expert),
        tokens=tuple(tokens),
        examples=tuple(stretches),
        absent=absent(found),
    )


def neighbours(found: xr.Dataset, site: str, expert: int) -> dict[str, tuple[tuple[str, float], ...]]:
    """Predecessors, successors (name, lift) and similar experts (name, similarity) of one expert, strongest first.

    Args:
        found: an atlas, which names only those that stand against their null.
        site: key of the expert's site; expert: its number.
    """
    row, names = [str(key) for key in found["site"].values].index(site), layer_names(found)
    part = found.isel(layer=row, expert=expert)

    def near(name: str, worth: str, step: int) -> tuple[tuple[str, float], ...]:
        if name not in part or not 0 <= row + step < len(names):
            return ()
        pairs = zip(part[name].values, part[worth].values, strict=True)
        return tuple((expert_name(names[row + step], int(e)), float(value)) for e, value in pairs if np.isfinite(e))

    return {
        "predecessors": near("predecessor", "predecessor_lift", -1),
        "successors": near("successor", "successor_lift", 1),
        "similar": near("similar", "similarity", 0),
    }


def absent(found: xr.Dataset) -> dict[str, str]:
    """Parts that an atlas lacks -> why its store does not tell them."""
    words = str(found.attrs["absent"])
    return {} if words == "none" else dict(part.split(": ", 1) for part in words.split("; "))


def parsed(name: str | tuple[int | str, int]) -> tuple[int | str, int]:
    """(layer, expert) of "L3E7", and (site key, expert) of "L003-attentionE7".

    Raises:
        MoescopeError: it is no such name.
    """
    if not isinstance(name, str):
        return name[0], int(name[1])
    match = re.fullmatch(r"\s*[Ll](\d{1,15})\s*[Ee](\d{1,15})\s*", name)
    if match is not None:
        return int(match[1]), int(match[2])
    match = re.fullmatch(r"\s*(L\d{3,}[A-Za-z_-][A-Za-z0-9_-]*?)E(\d{1,15})\s*", name)
    if match is None:
        raise MoescopeError(f"{name!r} names no expert: write it as L3E7, layer 3 and expert 7.")
    return match[1], int(match[2])


_NAMES = {
    "relative_load": ("\u00d7 its fair share of the layer's work", "{:.2f}"),
    "npmi": ("nPMI with that label", "{:.2f}"),
    "npmi_null": ("what chance reaches once in a hundred", "{:.2f}"),
    "reap": ("mean weight \u00d7 output norm (REAP)", "{:.3g}"),
    "ean": ("mean output norm (EAN)", "{:.3g}"),
    "absmax": ("largest magnitude in its output", "{:.3g}"),
    "effect": ("rise of the loss without it, nats per token", "{:+.4f}"),
}


def _html(card: Card) -> str:
    """A card as HTML that stands alone; text from a corpus is escaped."""
    label = card.values.get("prefers")
    tested = label is not None and "prefers" not in card.absent
    head = f"prefers {plain(label)}" if label else "no label it prefers beyond chance" if tested else ""
    if card.values.get("super"):
        head += "; a super expert by the published rule"
    rows = [
        f"<tr><td>{words}</td><td style='text-align:right'>{form.format(card.values[name])}</td></tr>"
        for name, (words, form) in _NAMES.items()
        if isinstance(card.values.get(name), (int, float)) and np.isfinite(card.values[name])
    ]
    near = [
        f"<div><b>{title}</b> " + ", ".join(f"{name} ({value:{form}})" for name, value in pairs) + "</div>"
        for title, pairs, form in (
            ("Comes after", card.predecessors, ".1f"),
            ("Goes on to", card.successors, ".1f"),
            ("Scored like", card.similar, ".2f"),
        )
        if pairs
    ]
    words = " ".join(
        f"<code title='fires on {token.active} of {token.occurrences}; chance would give {token.expected:.1f}'>"
        f"{_visible(token)}</code>"
        for token in card.tokens
    )
    stretches = "".join(f"<blockquote style='white-space:pre-wrap'>{_stretch(e)}</blockquote>" for e in card.examples)
    missing = "".join(f"<div><small>{plain(part)}: {plain(why)}</small></div>" for part, why in card.absent.items())
    return (
        f"<section class='expert-card' id='{card.name}'><h4>{card.name} <small>{head}</small></h4>"
        f"<table>{''.join(rows)}</table>{''.join(near)}<div>{words}</div>{stretches}{missing}</section>"
    )


def _visible(token: TopToken) -> str:
    shown = visible(token.text)
    return f"<bdi>{plain(shown)}</bdi>" if shown.strip("\ufffd") else f"#{token.token_id}"


def _stretch(example: Example) -> str:
    largest = max((token.weight for token in example.tokens if token.weight is not None), default=0) or 1
    parts = []
    for token in example.tokens:
        text = "\n".join(plain(line) for line in token.text.split("\n"))
        if token.weight is None:
            parts.append(text)
        else:
            strength = 0.16 + 0.56 * min(max(token.weight / largest, 0), 1)
            style = f"background:rgba(221,122,44,{strength:.2f});color:inherit"
            parts.append(f"<mark style='{style}' title='routing weight {token.weight:.3f}'>{text}</mark>")
    before, after = "\u2026 " if example.cut_before else "", " \u2026" if example.cut_after else ""
    return f"<bdi>{before}{''.join(parts)}{after}</bdi>"
