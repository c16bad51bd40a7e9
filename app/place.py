"""Where a person is in the app and what they have chosen: one value, one URL, one codec.

    /                                   every store of the folder
    /store/<name>                       the overview of one
    /store/<name>/L12/E57               one expert
    /store/<name>/<page>?by=domain&label=code&layer=12&expert=57

Everything that a page shows follows from its `Place`; everything that a click does is another `Place`. A URL with
nonsense in it still leads somewhere: what cannot be read is left out, and said.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass, fields, replace
from typing import Any
from urllib.parse import parse_qsl, quote, unquote, urlencode, urlsplit

PAGES = ("overview", "expert", "text", "specialisation", "flow", "map", "outliers", "compare", "lab", "analyses")
"""Pages of a store, in the order of the menu; `shelf` is the page without one."""

_LONGEST = 8_000  # characters of one field: a recipe of a few hundred edits still fits, a browser still sends it


@dataclass(frozen=True)
class Place:
    """One state of the app.

    Attributes:
        page: one of `PAGES`, or "shelf".
        store: the store's name, its path below the folder.
        layer: the layer as figures name it: "12", or a site key where a layer has two routers.
        expert: expert id in that layer.
        pin: an expert by its name, "L3E7", beside which the selected one is shown.
        by, label: the label column, and one of its values.
        phase: "prefill" or "decode"; None for both.
        slices: named sets of documents, `name~column:value,value` or `name~documents:3-9,12`, joined by "|".
        slice: the name of the slice that counts now.
        value: what the grid of layers and experts shows.
        measure: what the map of experts and labels shows.
        kinds: which kinds of tokens experts are held against.
        definition: of super experts, "paper" or "code".
        colour: what the tokens of a text are coloured by.
        doc, token: a document's number, and a token's place in it (from 0).
        step: where a replay stands; None when nothing is replayed.
        start: the first token of a long document that is shown.
        held: a token of the document that others are compared with.
        listed: the first document of the list that is shown.
        word: a token id whose occurrences are listed; hit: the first of them that is shown.
        other: the second store of a comparison (`with=` in the URL).
        against: a value of the label, or `slice:` and a slice's name, to hold texts against; None: all others.
        recipe: edits, as `moescope.app.recipes` writes them.
        question: one analysis by name, where a page offers several; options: its parameters, `name:value;name:value`.
        alike: by what experts stand near each other on a map; paint: what points are coloured by, ink: those of tokens.
        only: the one group of a map that is not faint, "layer 3" or a label's value.
        neighbour: the other layer of a pair.
        markers: texts whose experts are looked for, with " | " between them.
        length: layers of a window, from the chosen one on.
        bands: what a Sankey diagram shows: "paths" or "transitions".
        devices, group: devices and (of replication) redundant slots of a placement.
        method: of the placement.
        nodes: devices that share a node; None: all.
        bandwidth, node_bandwidth: GB/s of a device inside its node, and to other nodes.
        patience: seconds that each solver of a placement may take.
        find: what is searched for.
        prompt: the lab's prompt.
        model: the model that the lab runs; None: the store's own.
        chat: the prompt goes through the tokenizer's chat template.
        new: how many tokens the lab writes at most.
        temperature, seed: of the lab's sampling; without a temperature it takes the likeliest token.
        contrast: the lab also decodes by self-contrast; beta, alpha: its strength, and what it finds plausible.
        run: what the lab has generated, while the app remembers it.
        texts: documents of each label on which the effect of an expert is measured.
        full: the panel that fills the window.
        embed: without header and menu, for a frame in another page.
        hide: names of panels left out.
        without: columns left out of tables, each "table.column".
    """

    page: str = "shelf"
    store: str | None = None
    layer: str | None = None
    expert: int | None = None
    pin: str | None = None
    by: str | None = None
    label: str | None = None
    phase: str | None = None
    slices: str | None = None
    slice: str | None = None
    value: str | None = None
    measure: str | None = None
    kinds: str | None = None
    definition: str | None = None
    colour: str | None = None
    doc: int | None = None
    token: int | None = None
    step: int | None = None
    start: int | None = None
    held: int | None = None
    listed: int | None = None
    word: int | None = None
    hit: int | None = None
    other: str | None = None
    against: str | None = None
    recipe: str | None = None
    question: str | None = None
    options: str | None = None
    alike: str | None = None
    paint: str | None = None
    ink: str | None = None
    only: str | None = None
    neighbour: str | None = None
    markers: str | None = None
    length: int | None = None
    bands: str | None = None
    devices: int | None = None
    group: int | None = None
    method: str | None = None
    nodes: int | None = None
    bandwidth: int | None = None
    node_bandwidth: int | None = None
    patience: int | None = None
    find: str | None = None
    prompt: str | None = None
    model: str | None = None
    chat: bool = False
    new: int | None = None
    temperature: float | None = None
    seed: int | None = None
    contrast: bool = False
    beta: float | None = None
    alpha: float | None = None
    run: str | None = None
    texts: int | None = None
    full: str | None = None
    embed: bool = False
    hide: tuple[str, ...] = ()
    without: tuple[str, ...] = ()

    def go(self, **changes: Any) -> Place:
        """The same place but for some fields; a new store forgets what belonged to the old one."""
        if "store" in changes and changes["store"] != self.store:
            kept = Place(embed=self.embed, hide=self.hide, without=self.without, recipe=self.recipe, page=self.page)
            return replace(kept, **({"page": "overview"} | changes if self.page == "shelf" else changes))
        if "by" in changes and changes["by"] != self.by:
            changes = {"label": None, "against": None} | changes
        if "question" in changes and changes["question"] != self.question:
            changes = {"options": None} | changes
        if "devices" in changes and changes["devices"] != self.devices:
            changes = {"nodes": None} | changes
        if "doc" in changes and changes["doc"] != self.doc:
            changes = {"token": None, "step": None, "start": None, "held": None} | changes
        if any(name in changes and changes[name] != getattr(self, name) for name in ("find", "by", "label", "slice")):
            changes = {"listed": None, "word": None, "hit": None} | changes
        return replace(self, **changes)

    def moved(self, start: Place, end: Place) -> Place:
        """This place with what changes from `start` to `end`: a link drawn at `start`, followed from here.

        What names one thing comes from the link as a whole: an expert with its layer, a token with its document. A
        link to the page of L3E7 that was drawn while L3E7 was selected must not lead to what is selected now.
        """
        changed = {f.name for f in fields(self) if getattr(end, f.name) != getattr(start, f.name)}
        # A link to what was selected where it was drawn selects it again.
        changed = changed or {"expert", "doc"}
        if end.page != start.page:
            changed |= {"expert": {"expert"}, "text": {"doc"}}.get(end.page, set())
        changed |= {name for one in changed for name in _TOGETHER.get(one, ())}
        return replace(self, **{name: getattr(end, name) for name in changed})

    def left_out(self, table: str) -> list[str]:
        """The columns left out of a table."""
        return [one.partition(".")[2] for one in self.without if one.partition(".")[0] == table]

    def leaving_out(self, table: str, columns: Iterable[str]) -> Place:
        """The same place with these columns left out of a table, and no others of it."""
        others = [one for one in self.without if one.partition(".")[0] != table]
        return replace(self, without=(*others, *(f"{table}.{column}" for column in columns)))

    @property
    def href(self) -> str:
        """The URL, without scheme and host; `parse` reads it back."""
        path = "/"
        in_path = {"page", "store"}
        if self.store is not None and self.page != "shelf":
            path = f"/store/{quote(self.store, safe='')}"
            if self.page == "expert" and self.layer is not None and self.expert is not None:
                path += f"/{_layer_in_path(self.layer)}/E{self.expert}"
                in_path |= {"layer", "expert"}
            elif self.page != "overview":
                path += f"/{self.page}"
        pairs = []
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name in in_path or value is None or value is False or value == ():
                continue
            shown = ",".join(value) if isinstance(value, tuple) else "1" if value is True else str(value)
            pairs.append((_QUERY.get(field.name, field.name), shown))
        return path + (f"?{urlencode(pairs, quote_via=quote, safe=':,~|*!@')}" if pairs else "")

    @property
    def expert_name(self) -> str | None:
        """The selected expert as people write it, "L12E57"."""
        if self.layer is None or self.expert is None:
            return None
        return f"{_layer_in_path(self.layer)}E{self.expert}"

    @property
    def pinned(self) -> Place | None:
        """The same place with the pinned expert selected; None if none is pinned."""
        if self.pin is None:
            return None
        layer, _, expert = self.pin.rpartition("E")
        return self.go(layer=_layer(layer), expert=int(expert))


def parse(href: str) -> tuple[Place, tuple[str, ...]]:
    """A URL as a place, and what of it could not be read, in words."""
    try:
        parts = urlsplit(href)
    except ValueError:
        return Place(), ("The address could not be read.",)
    found, notes = _path(parts.path)
    names = {query: name for name, query in _QUERY.items()}
    kinds = {field.name: str(field.type) for field in fields(Place)}
    seen: set[str] = set()
    for key, text in parse_qsl(parts.query, keep_blank_values=False):
        name = names.get(key, key)
        if name not in kinds or name in ("page", "store") or (key in _QUERY and key not in names):
            notes.append(f"The address names {short(key)!r}, which means nothing here.")
        elif name in seen or name in found:
            notes.append(f"The address gives {short(key)!r} twice; the first counts.")
        else:
            seen.add(name)
            value = _value(name, kinds[name], text)
            if value is None:
                notes.append(f"The address gives {short(key)!r} as {short(text)!r}, which it cannot be.")
            else:
                found[name] = value
    return Place(**found), tuple(notes)


def longest() -> int:
    """Characters that one field of an address may have."""
    return _LONGEST


def coerced(name: str, text: str) -> Any:
    """A field's value from what a control gives; None if it cannot be that."""
    kinds = {field.name: str(field.type) for field in fields(Place)}
    return _value(name, kinds[name], text)


_QUERY = {"other": "with"}
_PAGE = ("listed", "word", "hit")
_TOGETHER = {
    "layer": ("expert",),
    "expert": ("layer",),
    "doc": ("token", "step", "start", "held"),
    "question": ("options",),
    "devices": ("nodes",),
    "by": ("label", "against", *_PAGE),
} | dict.fromkeys(("find", "label", "slice"), _PAGE)
"""Fields that mean nothing without another, or that another takes along."""
ALLOWED = {
    "phase": ("prefill", "decode"),
    "value": ("relative_load", "npmi", "reap", "ean", "absmax", "margin"),
    "measure": ("npmi", "share"),
    "kinds": ("classes", "markers", "tokens"),
    "definition": ("paper", "code"),
    "bands": ("paths", "transitions"),
    "method": ("all", "exflow", "moetuner", "eplb"),
}
"""Fields that are one of a few words."""


def _path(path: str) -> tuple[dict[str, Any], list[str]]:
    steps = [unquote(step) for step in path.strip("/").split("/") if step]
    if not steps:
        return {}, []
    if steps[0] != "store" or len(steps) < 2:
        return {}, [f"There is no page {short('/' + '/'.join(steps))!r}; here is every store instead."]
    found: dict[str, Any] = {"page": "overview", "store": steps[1]}
    rest = steps[2:]
    if not rest:
        return found, []
    if len(rest) == 1 and rest[0] in PAGES:
        return found | {"page": rest[0]}, []
    if len(rest) == 2 and (layer := _layer(rest[0])) and re.fullmatch(r"E\d{1,15}", rest[1]):
        return found | {"page": "expert", "layer": layer, "expert": int(rest[1][1:])}, []
    return found, [f"There is no page {short('/'.join(rest))!r} of a store; here is its overview instead."]


def _layer_in_path(layer: str) -> str:
    return f"L{layer}" if layer.isdigit() else layer


def _layer(text: str) -> str | None:
    """ "12" of "12", "L12" and "L012"; a site key that is more than a number as it is."""
    if match := re.fullmatch(r"L?(\d{1,5})", text):
        return str(int(match[1]))
    return text if re.fullmatch(r"L\d{3,}+[A-Za-z0-9_-]+", text) else None


def _value(name: str, kind: str, text: str) -> Any:
    if len(text) > _LONGEST:
        return None
    if name in ("layer", "neighbour"):
        return _layer(text)
    if name == "pin":
        match = re.fullmatch(r"(L[A-Za-z0-9_-]+)E(\d{1,15})", text, re.ASCII)
        layer = None if match is None else _layer(match[1])
        return None if match is None or layer is None else f"{_layer_in_path(layer)}E{int(match[2])}"
    if kind.startswith("int"):
        return int(text) if re.fullmatch(r"\d{1,15}", text) else None
    if kind.startswith("float"):
        written = re.fullmatch(r"\d{1,15}(\.\d{1,17})?(e-?\d{1,3})?", text, re.ASCII)
        return float(text) if written and math.isfinite(float(text)) else None
    if kind == "bool":
        return {"1": True, "true": True}.get(text)
    if kind.startswith("tuple"):
        return tuple(part for part in text.split(",") if part)
    return text if name not in ALLOWED or text in ALLOWED[name] else None


def short(text: str) -> str:
    """A text out of an address, cut to what a sentence can hold."""
    return text if len(text) <= 60 else text[:60] + "…"
