"""Reading what was routed: a stretch of a document through one layer, one token through all layers.

Both read only the row groups that hold their tokens, so a page costs milliseconds whatever the size of the store.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import xarray as xr

from moescope.analysis.contents import Contents, Stretch, contents_of
from moescope.analysis.contexts import token_pieces
from moescope.analysis.labelled import NONE_IS_MINUS_ONE, provenance
from moescope.errors import MoescopeError

if TYPE_CHECKING:
    import pyarrow as pa

    from moescope.store import Routing, Store

MISSING = "expert is -1 and weight NaN where a slot is missing or a layer has no such rank; entropy and margin are NaN "
MISSING += "where the router defines none, loss where it was not captured"
FIELDS = ("expert", "weight", "valid", "entropy", "margin")
COLUMNS = ("sequence", "position", "token_id", "start", "end", "phase", "loss")
BEFORE = 8
"""Tokens read before a stretch to know where in the text it begins: special tokens without a span may come between."""


def passage(store: Store, document: int, layer: int | str, start: int = 0, stop: int | None = None) -> xr.Dataset:
    """A stretch of one document, token by token, with the routing of one layer.

    How to read it: the texts joined are the document's own text (what a tokenizer skips goes to the token that
    follows); a character that several tokens share stands at its first. `margin` is how far the last chosen expert's
    selection score was above the first one left out: near 0, the choice hung by a thread.

    Args:
        store: an open store with the routing tier.
        document: its number.
        layer: a model layer index, or a site key where a layer has two routers.
        start, stop: tokens of the document, counted from its first stored one; to its end if `stop` is None.

    Returns:
        Dataset with dims (token, rank), ranks by descending selection score: expert (ids, -1 where a slot is missing),
        weight (as multiplied into the output, NaN where missing); with dim (token): row (of the store, what
        `token_routing` takes), sequence, position (in its sequence), token_id, text, phase ("prefill" or "decode"),
        loss (nats, of predicting this token), entropy (nats, of the router's scores), margin. Coordinate `token` counts
        from the document's start; `attrs["n_tokens"]` is the whole document's stored tokens.

    Raises:
        MoescopeError: no such document or layer, no routing tier, or a range outside the document.
    """
    site = store.site(layer)
    contents = contents_of(store)
    total = contents.n_tokens(document)
    stop = total if stop is None else min(stop, total)
    if not 0 <= start <= stop:
        raise MoescopeError(f"document {document} has {total} tokens: there are none from {start} to {stop}.")
    parts = list(contents.stretches(document, start, stop))
    tokens = [part.shard.tokens(list(COLUMNS), part.rows) for part in parts]
    routings = [part.shard.routing(site.key, _fields(site), part.rows) for part in parts]
    texts = _texts(store, contents, document, start, tokens)
    variables: dict[str, Any] = {"row": ("token", _joined([_rows(part) for part in parts], np.int64))}
    variables |= {name: ("token", values) for name, values in _columns(tokens).items()}
    variables["text"] = ("token", np.array(texts, dtype=object))
    slots = [_slots(routing) for routing in routings]
    variables["expert"] = (
        ("token", "rank"),
        _joined([ids for ids, _ in slots], np.int32, site.top_k),
        NONE_IS_MINUS_ONE,
    )
    variables["weight"] = (("token", "rank"), _joined([weight for _, weight in slots], np.float32, site.top_k))
    for name in ("entropy", "margin"):
        variables[name] = ("token", _joined([getattr(routing, name) for routing in routings], np.float32))
    attrs = provenance(store, analysis="passage", document=document, layer=site.layer, site=site.key)
    attrs |= {
        "n_experts": site.n_experts,
        "start": start,
        "stop": stop,
        "n_tokens": total,
        "missing": MISSING,
        "null": "none: it shows what was captured",
        "table": "token",
    }
    coords = {"token": np.arange(start, stop), "rank": np.arange(site.top_k)}
    return xr.Dataset(variables, coords=coords, attrs=attrs)


def passage_routes(store: Store, document: int, start: int = 0, stop: int | None = None) -> xr.Dataset:
    """Which experts each token of a stretch of a document went to, in every layer: what a replay steps through.

    How to read it: token by token the selections add up; under equal load each expert of a layer would have
    tokens x top-k / experts of them, and a stretch of one document need not be near that.

    Args:
        store: an open store with the routing tier.
        document: its number.
        start, stop: tokens of the document, counted from its first stored one; to its end if `stop` is None.

    Returns:
        Dataset with dims (token, layer, rank): expert (ids, -1 where there is none); coordinates token, site, n_experts
        and top_k.

    Raises:
        MoescopeError: no such document, no routing tier, or a range outside the document.
    """
    contents = contents_of(store)
    total = contents.n_tokens(document)
    stop = total if stop is None else min(stop, total)
    if not 0 <= start <= stop:
        raise MoescopeError(f"document {document} has {total} tokens: there are none from {start} to {stop}.")
    sites = list(store.sites)
    expert = np.full((stop - start, len(sites), max(site.top_k for site in sites)), -1, dtype=np.int32)
    at = 0
    for part in contents.stretches(document, start, stop):
        found = part.shard.routings(("expert", "valid"), part.rows)
        n = part.rows.stop - part.rows.start
        for place, site in enumerate(sites):
            ids, valid = found[site.key].expert.astype(np.int32), found[site.key].valid
            expert[at : at + n, place, : site.top_k] = ids if valid is None else np.where(valid, ids, -1)
        at += n
    attrs = provenance(store, analysis="passage_routes", document=document, start=start, stop=stop)
    attrs |= {"null": "none: it shows what was captured", "table": "token, layer, rank"}
    return xr.Dataset(
        {"expert": (("token", "layer", "rank"), expert, NONE_IS_MINUS_ONE)},
        coords=_layers(sites) | {"token": np.arange(start, stop), "rank": np.arange(expert.shape[2])},
        attrs=attrs,
    )


def _layers(sites: Sequence[Any]) -> dict[str, Any]:
    return {
        "layer": ("layer", np.array([site.layer for site in sites]), {"long_name": "model layer index"}),
        "site": ("layer", np.array([site.key for site in sites], dtype=object)),
        "n_experts": ("layer", np.array([site.n_experts for site in sites])),
        "top_k": ("layer", np.array([site.top_k for site in sites])),
    }


def token_routing(store: Store, row: int) -> xr.Dataset:
    """Where one token went: its experts, weights, entropy and margin in every layer.

    How to read it: one line is one layer, its experts from the one the router wanted most. The share of a weight is of
    the token's whole weight in that layer, and so comparable between layers whose weights do not sum to 1.

    Args:
        store: an open store with the routing tier.
        row: a token row of the store, as `passage` and `token_occurrences` name them.

    Returns:
        Dataset with dims (layer, rank): expert (-1 where there is none), weight, share (of the absolute weights of its
        layer; sums to 1), NaN where there is none; with dim (layer): entropy (nats), margin, and the coordinates site,
        n_experts, top_k. attrs: the token's row, document, sequence, position, token_id, text, phase, loss.

    Raises:
        MoescopeError: there is no such row, or no routing tier.
    """
    contents = contents_of(store)
    shard = contents.shard_of(row)
    at = row - shard.offset
    found = shard.routings(FIELDS, slice(at, at + 1))
    sites = list(store.sites)
    widest = max(site.top_k for site in sites)
    shape = (len(sites), widest)
    expert, weight = np.full(shape, -1, dtype=np.int32), np.full(shape, np.nan, dtype=np.float32)
    level = {name: np.full(len(sites), np.nan, dtype=np.float32) for name in ("entropy", "margin")}
    for place, site in enumerate(sites):
        ids, weights = _slots(found[site.key])
        expert[place, : site.top_k], weight[place, : site.top_k] = ids[0], weights[0]
        for name, values in level.items():
            values[place] = getattr(found[site.key], name)[0]
    magnitude = np.abs(weight.astype(np.float64))
    total = np.nansum(magnitude, axis=1, keepdims=True)
    share = np.divide(magnitude, total, out=np.full(shape, np.nan), where=total > 0)
    cell = ("layer", "rank")
    variables: dict[str, Any] = {
        "expert": (cell, expert, NONE_IS_MINUS_ONE),
        "weight": (cell, weight),
        "share": (cell, share),
    }
    variables |= {name: ("layer", values) for name, values in level.items()}
    coords = _layers(sites) | {"rank": np.arange(widest)}
    attrs = provenance(store, analysis="token_routing", **_about(store, contents, shard, at))
    attrs |= {"missing": MISSING, "null": "none: it shows what was captured", "table": "layer, rank"}
    return xr.Dataset(variables, coords=coords, attrs=attrs)


def _about(store: Store, contents: Contents, shard: Any, at: int) -> dict[str, Any]:
    table = shard.tokens(["document", *COLUMNS], slice(at, at + 1))
    about = table.to_pylist()[0]
    piece = token_pieces([about], contents.text_of(about["document"]), store.vocabulary())[0]
    kept = ("document", "sequence", "position", "token_id", "phase", "loss")
    return {"row": shard.offset + at, "text": piece} | {name: about[name] for name in kept}


def _fields(site: Any) -> list[str]:
    return [name for name in FIELDS if name != "valid" or site.slots_can_miss]


def _rows(part: Stretch) -> np.ndarray:
    return np.arange(part.first, part.first + part.rows.stop - part.rows.start)


def _columns(tokens: Sequence[pa.Table]) -> dict[str, np.ndarray]:
    out: dict[str, np.ndarray] = {}
    for name in ("sequence", "position", "token_id"):
        out[name] = _joined([table[name].to_numpy() for table in tokens], np.int64)
    out["phase"] = np.array([phase for table in tokens for phase in table["phase"].to_pylist()], dtype=object)
    loss = [None if value is None else value for table in tokens for value in table["loss"].to_pylist()]
    out["loss"] = np.array(loss, dtype=np.float32)  # None becomes NaN
    return out


def _slots(routing: Routing) -> tuple[np.ndarray, np.ndarray]:
    """(ids, -1 where a slot is missing; weights, NaN there) of some rows of one layer."""
    ids, weight = routing.expert.astype(np.int32), routing.weight
    if routing.valid is None:
        return ids, weight
    return np.where(routing.valid, ids, -1), np.where(routing.valid, weight, np.nan)


def _joined(parts: Sequence[np.ndarray], dtype: Any, width: int | None = None) -> np.ndarray:
    empty = np.empty(0 if width is None else (0, width), dtype=dtype)
    return np.concatenate([empty, *parts]).astype(dtype, copy=False)


def _texts(store: Store, contents: Contents, document: int, start: int, tokens: Sequence[pa.Table]) -> list[str]:
    rows = [row for table in tokens for row in table.select(["token_id", "start", "end"]).to_pylist()]
    text = contents.text_of(document)
    return token_pieces(rows, text, store.vocabulary(), _reached(contents, document, start))


def _reached(contents: Contents, document: int, start: int) -> int | None:
    """Where in the text the token before token `start` of a document ends: 0 at its beginning."""
    if start == 0:
        return 0
    before = max(start - BEFORE, 0)
    ends = [
        end
        for part in contents.stretches(document, before, start)
        for end in part.shard.tokens(["end"], part.rows)["end"].to_pylist()
        if end is not None
    ]
    if ends:
        return max(ends)
    return 0 if before == 0 else None
