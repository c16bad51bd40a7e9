"""What each section of the report says: plain values for the template, from results and a store."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import xarray as xr

from moescope.analysis.contexts import Example, TopToken, examples, top_tokens
from moescope.analysis.counts import labelling
from moescope.analysis.labelled import expert_name, layer_names
from moescope.analysis.summary import specialisation_finding
from moescope.errors import MoescopeError

if TYPE_CHECKING:
    from moescope.store import Store

LEVEL = 0.05
"""False discovery rate at which an expert is shown as a specialist."""
LABELS = 12
"""Labels shown in full; the report says how many more there are."""
EXPERTS = 3
"""Experts shown for each label."""
EXAMPLES = 2
"""Stretches of text shown for each expert."""
ROWS = 10
"""Rows of the table of outliers."""


@dataclass(frozen=True)
class Specialist:
    """One expert shown under a label: its layer and numbers by name, its preferred tokens, and text it is busy in."""

    layer: str
    expert: int
    values: dict[str, float]
    tokens: list[TopToken]
    examples: list[Example]


@dataclass(frozen=True)
class LabelCard:
    """One label: its size and its specialists; `preferred` counts all that stand, shown or not; `told` says it."""

    name: str
    documents: int
    tokens: int
    preferred: int
    told: str
    specialists: list[Specialist]


def number(value: Any, digits: int = 3) -> str:
    """A number as people write it: thousands apart, small ones to `digits` significant digits, a dash for none."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return "–"
    if isinstance(value, (int, np.integer)) or (abs(value) >= 1000 and math.isfinite(value)):
        return f"{value:,.0f}"
    return f"{value:.{digits}g}"


def balance_rows(result: xr.Dataset | MoescopeError) -> list[dict[str, Any]]:
    """One row per layer: busiest expert, balance, null, experts never selected."""
    if isinstance(result, MoescopeError):
        return []
    rows = []
    for index, layer in enumerate(layer_names(result)):
        part = result.isel(layer=index)
        if not np.isfinite(part["max_vio"].item()):
            continue
        rows.append(
            {
                "layer": layer,
                "busiest": int(np.nanargmax(part["count"].values)),
                "times": part["max_vio"].item() + 1,
                "chance": part["null_max_vio_p99"].item() + 1,
                "effective": part["effective_experts"].item(),
                "of": int(part["n_experts"].item()),
                "gini": part["gini"].item(),
                "dead": int(part["dead"].item()),
            }
        )
    return rows


def label_cards(store: Store, result: xr.Dataset | MoescopeError) -> list[LabelCard]:
    """Labels with their specialists, each with tokens and text; those with the most specialists if there are many."""
    if isinstance(result, MoescopeError) or np.isnan(result["q"].values).all():
        return []
    stands = (result["q"].values <= LEVEL) & (result["npmi"].values > 0)
    preferred = stands.sum(axis=(0, 1))
    shown = sorted(int(index) for index in np.argsort(-preferred, kind="stable")[:LABELS])
    chosen = labelling(store, str(result.attrs["by"]))
    picked = {index: _picked(result, stands, index) for index in shown}
    preferences = _preferences(store, result, picked)
    layers = layer_names(result)
    cards = []
    for index in shown:
        documents = set(chosen.documents[chosen.code == index].tolist())
        specialists = [
            Specialist(
                layer=layers[row],
                expert=expert,
                values={
                    name: result[name].values[row, expert, index].item()
                    for name in ("npmi", "null_p99", "q", "lift", "p_active")
                },
                tokens=preferences[row][expert],
                examples=examples(store, result["site"].values[row], expert, documents, n=EXAMPLES),
            )
            for row, expert in picked[index]
        ]
        cards.append(
            LabelCard(
                name=str(result["label"].values[index]),
                documents=int(result["documents"].values[index]),
                tokens=int(result["tokens"].values[index]),
                preferred=int(preferred[index]),
                told=specialisation_finding(result, label=str(result["label"].values[index])).headline,
                specialists=specialists,
            )
        )
    return cards


def _picked(result: xr.Dataset, stands: np.ndarray, label: int) -> list[tuple[int, int]]:
    value = np.where(stands[..., label], result["npmi"].values[..., label], -np.inf)
    best = np.argsort(-value, axis=None, kind="stable")[:EXPERTS]
    cells = [np.unravel_index(flat, value.shape) for flat in best]
    return [(int(row), int(expert)) for row, expert in cells if np.isfinite(value[row, expert])]


def _preferences(
    store: Store, result: xr.Dataset, picked: dict[int, list[tuple[int, int]]]
) -> dict[int, dict[int, list[TopToken]]]:
    """Preferred tokens of every picked expert, each layer counted once."""
    wanted: dict[int, set[int]] = {}
    for cells in picked.values():
        for row, expert in cells:
            wanted.setdefault(row, set()).add(expert)
    return {row: top_tokens(store, result["site"].values[row], sorted(experts)) for row, experts in wanted.items()}


def outlier_rows(store: Store, result: xr.Dataset | MoescopeError) -> list[dict[str, Any]]:
    """The largest maxima, each with its verdicts and the token at which it occurred."""
    if isinstance(result, MoescopeError):
        return []
    words = store.vocabulary()
    rank = result["rank"].values
    rows = []
    for row, expert in np.argwhere(rank <= ROWS):
        cell = result.isel(layer=row, expert=expert)
        token = int(cell["token_id"].item())
        rows.append(
            {
                "rank": int(rank[row, expert]),
                "name": expert_name(layer_names(result)[row], int(expert)),
                "token": words.get(token) if token >= 0 else None,
                "token_id": token,
                "document": int(cell["document"].item()),
                "position": int(cell["position"].item()),
                "null": float(result["z_null_p99"].values[row]),
            }
            | {name: cell[name].item() for name in ("absmax", "ratio_to_median", "robust_z", "super", "by_ratio")}
            | {"pooled": bool(cell["pooled"].item())}
        )
    return sorted(rows, key=lambda found: found["rank"])


def notes(results: dict[str, xr.Dataset | MoescopeError]) -> dict[str, list[str]]:
    """What a reader must know about a result: undefined cells, weak labels, filters."""
    said: dict[str, list[str]] = {}
    for name, found in results.items():
        if isinstance(found, MoescopeError):
            continue
        lines = [
            str(found.attrs[key]) for key in ("null", "undefined", "notes") if found.attrs.get(key, "none") != "none"
        ]
        unlabelled = int(found.attrs.get("documents_unlabelled", 0))
        if unlabelled:
            lines.append(f"{unlabelled:,} documents carry no {found.attrs['by']} and are left out")
        said[name] = [line[0].upper() + line[1:] + "." for whole in lines for line in whole.split("; ")]
    return said


def provenance_rows(store: Store, results: dict[str, xr.Dataset | MoescopeError]) -> list[tuple[str, str]]:
    """Everything needed to make the report again."""
    manifest = store.manifest
    model, corpus = manifest.model, manifest.corpus
    rows = [
        ("store", f"{manifest.store_id} ({store.status}, {len(store.shards)} shards, created {manifest.created})"),
        ("model", f"{model.name}{f' @ {model.revision}' if model.revision else ''}"),
        ("architecture", f"{model.architecture}, {model.dtype} on {model.device}, config {model.config_hash}"),
        ("experts ran as", model.experts_implementation or "the model's own code"),
        ("tokenizer", f"{manifest.tokenizer.name}, {manifest.tokenizer.vocab_size:,} tokens"),
        ("corpus", f"{corpus.source}{f', hash {corpus.hash}' if corpus.hash else ''}, contexts of {corpus.max_length}"),
        ("labels", ", ".join(corpus.labels) or "none"),
        ("captured", ", ".join(manifest.tiers)),
        ("edits", "none" if manifest.edits is None else str(manifest.edits)),
        ("versions", ", ".join(f"{name} {version}" for name, version in manifest.versions.items()) or "not recorded"),
    ]
    hidden = {"analysis", "null", "undefined", "notes", "floor", "padding", "table", "table_order"}
    for name, found in results.items():
        if isinstance(found, MoescopeError):
            continue
        own = [
            f"{key} {value}"
            for key, value in found.attrs.items()
            if key not in hidden and not key.startswith(("store", "model", "corpus")) and value != "none"
        ]
        rows.append((f"analysis {name}", ", ".join(own)))
    return rows
