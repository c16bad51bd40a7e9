"""The atlas as one HTML file: the map of all experts, and below it a card for each, found by its name."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import xarray as xr
from markupsafe import Markup

from moescope import figures
from moescope.analysis.atlas_table import atlas
from moescope.analysis.cards import cards_of_layer
from moescope.analysis.facts import model_facts
from moescope.analysis.summary import findings
from moescope.errors import MoescopeError
from moescope.figures import atlases as atlas_figure
from moescope.figures.axes import layer_names
from moescope.report import sections, shell

if TYPE_CHECKING:
    from moescope.store import Store


def write_atlas(
    store: Store,
    path: str | Path,
    by: str | None = None,
    effects: xr.DataArray | None = None,
    tokens: int = 10,
    contexts: int = 2,
    seed: int = 0,
) -> Path:
    """Writes the atlas of a store as one HTML file that needs no network and no other file.

    Args:
        store: an open store.
        path: the file, replaced if it is there. It appears whole or not at all.
        by: the document label; the store's first if None.
        effects: (layer, expert) causal effects, as `analysis.atlas` takes them.
        tokens, contexts: preferred tokens and stretches of text on each card.
        seed: of all nulls.

    Raises:
        MoescopeError: the folder does not exist, is full or cannot be written, or the store has no tokens yet.
    """
    if not store.n_tokens:
        raise MoescopeError(f"{store.path} has no committed tokens yet: there is nothing to show.")
    target = shell.target(path)
    found = atlas(store, by=by, effects=effects, seed=seed)
    drawn = figures.draw(found)
    cards = {
        name: [Markup(card._repr_html_()) for card in cards_of_layer(store, found, str(site), None, tokens, contexts)]
        for name, site in zip(layer_names(found), found["site"].values, strict=True)
    }
    return shell.put(
        target,
        shell.fill(
            "atlas.html.j2",
            {"atlas": drawn},
            model=model_facts(store),
            findings=findings(store, by=by, seed=seed),
            read=atlas_figure.READ,
            absent=found.attrs["absent"],
            null=found.attrs["null"],
            cards=cards,
            provenance=sections.provenance_rows(store, {"atlas": found}),
        ),
    )
